"""lm_eval's client of completion servers gives the figures of the adapter that asks the same model in this process.

It sends token ids, as it does by default: a text begins with BOS here, which it would not count.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamita.backend.sampling_params import SamplingParams
from llamita.inference.llm import LLM
from tests.evaluation.lm_eval_peer import compare, flat
from tests.server.clients import POSITIONS, random_model, serve

pytest.importorskip("lm_eval", reason="needs the package lm_eval (pip install 'llamita[evaluation]')")
pytest.importorskip("tenacity", reason="needs what lm_eval's clients do (pip install 'lm_eval[api]')")
COMMON = (
    "dataset_path: json\ntarget_delimiter: ''\ntest_split: test\ndataset_kwargs: {{data_files: {{test: {file}}}}}\n"
)
TASKS = {
    "choices": "output_type: multiple_choice\ndoc_to_text: '{{prompt}}'\ndoc_to_choice: '{{choices}}'\n"
    "doc_to_target: 0\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "writing": "output_type: generate_until\ndoc_to_text: '{{prompt}}'\ndoc_to_target: '{{greedy}}'\n"
    "generation_kwargs: {until: ['#'], max_gen_toks: 12, do_sample: false}\nmetric_list: [{metric: exact_match}]\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{long}}'\n"
    "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
}
PROMPTS = ("The fox gave", "Où est l'", "They sat by the river. User:", "naïve, and")
pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def llm() -> LLM:
    return random_model().require_llm()


@pytest.fixture(scope="module")
def made(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a directory, and tasks: each first choice is what the model itself would write."""
    root = tmp_path_factory.mktemp("lm_eval")
    llm.save(root / "model")
    (root / "tasks").mkdir()
    for name, text in TASKS.items():
        text = f"task: served_{name}\n" + COMMON.format(file=root / "lines.jsonl") + text
        (root / "tasks" / f"{name}.yaml").write_text(text)
    lines = []
    for prompt in PROMPTS:
        greedy = written(llm, prompt)
        long = "The fox and the owl sat by the river. " * 50
        lines.append({"prompt": prompt, "choices": [greedy, " the owl", " 12{}"], "greedy": greedy, "long": long})
    (root / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serve(random_model()) as place:
        yield place


def written(llm: LLM, prompt: str) -> str:
    """What the model writes after a prompt, up to where its text would not become the same tokens again."""
    assert llm.tokenizer is not None
    tokens = llm.generate(llm.tokenizer.encode(prompt), SamplingParams(temperature=0, max_tokens=3)).token_ids
    for count in (3, 2, 1):
        text = llm.tokenizer.decode(tokens[:count])
        if llm.tokenizer.encode(prompt + text) == [*llm.tokenizer.encode(prompt), *tokens[:count]]:
            return text
    return " the"


def results(model: Any, root: Path) -> dict[str, Any]:
    from llamita.evaluation import lm_eval_adapter

    tasks = [f"served_{name}" for name in TASKS]
    return lm_eval_adapter.run(model, tasks, root / "tasks", bootstrap_iters=0, log_samples=True)


@pytest.mark.parametrize("options", [{"batch_size": 8}, {"num_concurrent": 4}], ids=["batch", "at once"])
def test_the_figures_are_those_of_the_model_in_this_process(
    llm: LLM, made: Path, address: str, options: dict[str, Any]
) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from llamita.evaluation.lm_eval_adapter import LlamitaLM

    theirs = LocalCompletionsAPI(
        base_url=f"{address}/v1/completions", model="tiny", tokenizer=str(made / "model"), max_retries=1,
        tokenizer_backend="huggingface", max_length=POSITIONS, **options,
    )  # fmt: skip
    ours = results(LlamitaLM(llm), made)
    found = compare(ours, results(theirs, made))
    assert found.keys() == {f"served_{name}" for name in TASKS}
    verdicts = [value for sample in ours["samples"]["served_choices"] for value in flat(sample["resps"])]
    assert {"True", "False"} <= {str(value) for value in verdicts}  # some choices are what the model would write
