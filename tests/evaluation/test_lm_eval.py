"""lm_eval's tasks over a Llamita model give the figures of its own adapter for transformers on the same checkpoint."""

import json
import shutil
import subprocess
import sys
from functools import partial

import pytest

import llamita
from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.backend import BACKEND
from llamita.cli.main import main
from llamita.data import meadow
from llamita.evaluation import records
from llamita.text.tokenizer import Tokenizer
from llamita.workflows.options import resolve
from llamita.workflows.pretrain import PretrainConfig, pretrain
from tests.evaluation.lm_eval_peer import compare, peer
from tests.training.helpers import Silence, prepare_stories

STORIES = 12
POSITIONS = 96
BOS_FIRST = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}
COMMON = "dataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {{test: {file}}}}}\n"
TASKS = {
    "choices": "output_type: multiple_choice\ndoc_to_text: '{{prompt}}'\ndoc_to_choice: '{{choices}}'\n"
    "doc_to_target: answer\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "writing": "output_type: generate_until\ndoc_to_text: '{{prompt}}'\ndoc_to_target: ' {{first}}'\n"
    "generation_kwargs: {until: ['.'], max_gen_toks: 24, do_sample: false}\nmetric_list: [{metric: exact_match}]\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{long}}'\n"
    "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]\n",
}
REASON = "needs the package lm_eval (pip install 'llamita[evaluation]')"
pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run that has learned a few stories by heart, so that its likeliest tokens are beyond doubt; tasks on them."""
    pytest.importorskip("lm_eval", reason=REASON)
    root = tmp_path_factory.mktemp("harness")
    data = prepare_stories(root, count=STORIES)
    settings = resolve(PretrainConfig,
        data=data, output=root / "run", mode="pad", sequence_length=POSITIONS, steps=160, batch_size=12,
        set=("hidden_size=64", "num_hidden_layers=2", "intermediate_size=128", "num_attention_heads=2",
             "num_key_value_heads=2", "head_dim=32", f"max_position_embeddings={POSITIONS}"),
        learning_rate=1e-2, weight_decay=0.0, evaluate_every=0, sample_tokens=0, precision="fp32", device="cpu",
    )  # fmt: skip
    pretrain(settings, BACKEND, display=Silence())
    stories = list(meadow.corpus(0, STORIES, "train"))
    lines = []
    for index, story in enumerate(stories[:10]):
        words = story.split(" ")
        rest = [" ".join(other.split(" ")[8 : 10 + index % 4]) for other in stories[index : index + 3]]
        answer = index % 3
        rest[0], rest[answer] = rest[answer], rest[0]
        lines.append(
            {
                "prompt": " ".join(words[:8]) + (" " if index % 2 else ""),  # a blank at the end goes to the answer
                "choices": rest if index else ["", *rest][1:],
                "answer": answer,
                "first": " ".join(words[8:]).split(".")[0],
                "long": "\n".join(stories[index : index + 4]),
            }
        )
    file = root / "lines.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    (root / "tasks").mkdir()
    for name, text in TASKS.items():
        text = f"task: llamita_{name}\n" + COMMON.format(file=file) + text
        (root / "tasks" / f"{name}.yaml").write_text(text)
    return root


def results(model, root, tasks=tuple(TASKS)):
    from llamita.evaluation import lm_eval_adapter

    return lm_eval_adapter.run(
        model, [f"llamita_{name}" for name in tasks], root / "tasks", bootstrap_iters=0, log_samples=True
    )


@pytest.fixture(scope="module")
def ours(made):
    from llamita.evaluation.lm_eval_adapter import LlamitaLM

    return LlamitaLM(llamita.load(made / "run"))


def test_the_figures_are_those_of_the_adapter_for_transformers(made, ours):
    found = compare(results(ours, made), results(peer(made / "run/last"), made))
    assert found["llamita_choices"]["acc"] > 0.5  # it knows the stories; a third is chance
    assert found["llamita_writing"]["exact_match"] > 0.2
    prompts = [json.loads(line)["prompt"].rstrip() for line in (made / "lines.jsonl").read_text().splitlines()]
    params = SamplingParams(temperature=0, max_tokens=24, top_logprobs=2)
    ids = [ours.tok_encode(prompt) for prompt in prompts]
    gaps = [row[0][1] - row[1][1] for g in ours.llm.generate(ids, params) for row in g.top_logprobs]
    assert min(gaps) > 1e-3  # so equal texts are no accident


def test_a_tokenizer_that_puts_bos_first_is_followed(made, tmp_path):
    from llamita.evaluation.lm_eval_adapter import LlamitaLM

    model = shutil.copytree(made / "run/last", tmp_path / "model")
    spec = json.loads((model / "tokenizer.json").read_text())
    spec["post_processor"] = BOS_FIRST
    (model / "tokenizer.json").write_text(json.dumps(spec))
    theirs = peer(model)
    mine = LlamitaLM(llamita.load(model))
    for text in ("One day", "<s>One day", "", "a </s> b"):
        assert mine.tok_encode(text) == theirs.tok_encode(text)
        assert mine.tok_encode(text, add_special_tokens=False) == theirs.tok_encode(text, add_special_tokens=False)
    assert mine.tok_encode("One day")[0] == mine.prefix_token_id == theirs.prefix_token_id
    compare(results(mine, made), results(theirs, made))
    assert not Tokenizer.load(made / "run/last").adds_bos


def test_an_empty_context_begins_with_the_prefix_token(made, ours):
    from lm_eval.api.instance import Instance

    ask = partial(Instance, "loglikelihood", {})
    requests = [ask(arguments=("", "One day"), idx=0), ask(arguments=("One", " day"), idx=1)]
    for mine, other in zip(ours.loglikelihood(requests), peer(made / "run/last").loglikelihood(requests), strict=True):
        assert mine == (pytest.approx(other[0], abs=1e-4), other[1])


def test_the_command(made, capfd):
    command = ["evaluate", str(made / "run"), "--data", str(made / "tasks"), "--limit", "4"]
    assert main([*command, "--task", "lm-eval:llamita_choices,llamita_writing"]) == 0
    assert "acc norm" in capfd.readouterr().out
    found = {record.name: record.metrics for record in records.read(made / "run")[0]}
    assert found.keys() == {"lm-eval:llamita_choices", "lm-eval:llamita_writing"}
    assert 0 <= found["lm-eval:llamita_choices"]["acc"] <= 1
    for arguments, message in (
        (["--task", "lm-eval:llamita_writing", "--max-tokens", "96"], "leaves no room for a prompt"),
        (["--task", "lm-eval:llamita_writing", "--data", "nowhere"], "there is no directory nowhere"),
    ):
        assert main([*command, *arguments]) == 2
        assert message in capfd.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_task_that_is_nowhere_is_named(made, ours):
    """Slow, since all of lm_eval's own tasks are looked through."""
    from llamita.evaluation import lm_eval_adapter

    with pytest.raises(ValueError, match="lm_eval has no task 'no_such_task'"):
        lm_eval_adapter.run(ours, ["llamita_choices", "no_such_task"], made / "tasks")


def test_an_option_that_is_unknown_is_not_passed_over():
    pytest.importorskip("lm_eval", reason=REASON)
    from llamita.evaluation.lm_eval_adapter import _sampling

    with pytest.raises(ValueError, match="num_beams"):
        _sampling({"num_beams": 4}, 3, ())
    drawn = _sampling({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, 3, ("x",))
    assert drawn == SamplingParams(temperature=0.7, top_p=0.9, max_tokens=3, stop=("x",))
    assert _sampling({"do_sample": False, "temperature": 0.0}, 3, ()).temperature == 0


def test_without_the_package_one_line_says_so(made):
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from llamita.cli.main import main\n"
        "sys.exit(main(['evaluate', sys.argv[1], '--task', 'lm-eval:anything']))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(made / "run")], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: the package 'lm_eval' is not installed; install it with: pip install lm_eval"
