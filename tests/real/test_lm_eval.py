"""A task of lm_eval over a published model: the figures of lm_eval's own adapter for transformers."""

import json

import pytest

import llamita
from llamita.cli.main import main
from tests.evaluation.lm_eval_peer import compare, peer
from tests.real import smollm2

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Russia": "Moscow",
    "Spain": "Madrid",
}
TASK = """task: capitals
dataset_path: json
test_split: test
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
doc_to_text: 'The capital of {{{{country}}}} is'
doc_to_choice: '{{{{choices}}}}'
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
pytestmark = pytest.mark.slow


def test_a_task_has_the_figures_of_the_adapter_for_transformers(tmp_path):
    pytest.importorskip("lm_eval", reason="needs the package lm_eval (pip install 'llamita[evaluation]')")
    pytest.importorskip("transformers", reason="needs transformers (pip install 'llamita[compare]')")
    from llamita.evaluation import lm_eval_adapter

    model = smollm2.needed()
    choices = list(CAPITALS.values())
    lines = [
        {"country": country, "choices": choices, "answer": choices.index(city)} for country, city in CAPITALS.items()
    ]
    (tmp_path / "capitals.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "capitals.yaml").write_text(TASK.format(file=tmp_path / "capitals.jsonl"))
    assert main(["convert", str(model), str(tmp_path / "directory")]) == 0

    def results(harness_model):
        return lm_eval_adapter.run(harness_model, ["capitals"], tmp_path / "tasks", bootstrap_iters=0, log_samples=True)

    ours = lm_eval_adapter.LlamitaLM(llamita.load(model, backend="torch", dtype="float32"))
    found = compare(results(ours), results(peer(tmp_path / "directory")))
    assert found["capitals"]["acc"] == 1.0
