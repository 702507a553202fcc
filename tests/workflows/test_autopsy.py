"""Planted documents of garbage in prepared stories, as a run meets them: found, named, decoded, passed over."""

import json
import random

import pytest

from llamita.cli.main import main
from llamita.data import meadow
from llamita.data.prepare import PrepareConfig, prepare
from llamita.text.bpe import train_bpe_from_iterator
from llamita.training.autopsy import cause
from llamita.training.metrics import read_records
from llamita.workflows.options import resolve
from llamita.workflows.pretrain import PretrainConfig, pretrain
from tests.training.helpers import QUICK, Silence
from tests.workflows.test_report import check

SHAPE = (
    *("hidden_size=32", "intermediate_size=64", "num_hidden_layers=2", "num_attention_heads=2"),
    "num_key_value_heads=1",
)
STORIES = 500


def garbage(number):
    """Signs that no story has, thrown together."""
    generator = random.Random(number)
    return "".join(generator.choice("#%&*+=@^_~") for _ in range(300))


def prepared(directory, planted=()):
    """A data directory of stories, in the place of some of which there is garbage; validation is the same for all."""
    stories = [text.strip() for text in meadow.corpus(0, STORIES, "train")]
    train_bpe_from_iterator(stories, 300).save(directory / "tokenizer")
    for number in planted:
        stories[number] = garbage(number)
    (directory / "stories.txt").write_text("\n\n".join(stories) + "\n", "utf-8")
    held_out = [text.strip() for text in meadow.corpus(0, 60, "validation")]
    (directory / "held_out.txt").write_text("\n\n".join(held_out) + "\n", "utf-8")
    config = PrepareConfig(
        output=directory / "data",
        tokenizer=directory / "tokenizer",
        files=(directory / "stories.txt",),
        validation_files=(directory / "held_out.txt",),
        workers=1,
    )
    prepare(config)
    return directory / "data"


def train(output, data, **changes):
    values = {
        "output": output, "data": data, "set": SHAPE, "sequence_length": 64, "steps": 200, "batch_size": 4,
        "learning_rate": 1e-2, "evaluate_every": 50, "evaluation_rows": 0, "sample_tokens": 0, "precision": "fp32",
        "device": "cpu",
    }  # fmt: skip
    return pretrain(resolve(PretrainConfig, **(values | changes)), QUICK, display=Silence())


PLANTED = (100, 200, 300, 400)
SIGNS = set("#%&*+=@^_~")


@pytest.mark.medium
def test_garbage_in_prepared_data_is_named_decoded_and_passed_over(tmp_path, capsys):
    (tmp_path / "clean").mkdir()
    (tmp_path / "planted").mkdir()
    expected = train(tmp_path / "clean/run", prepared(tmp_path / "clean"))
    run, data = tmp_path / "planted/run", prepared(tmp_path / "planted", PLANTED)
    result = train(run, data, on_spike="skip", spike_deviations=5.0)
    assert result.evaluation.loss == pytest.approx(expected.evaluation.loss, rel=0.04)
    skipped = [record for record in read_records(run / "metrics.jsonl") if record["kind"] == "skipped"]
    reports = [json.loads(file.read_text()) for file in sorted((run / "autopsies").glob("*/report.json"))]
    assert skipped
    assert [record["step"] for record in skipped] == [report["step"] for report in reports]
    for record, report in zip(skipped, reports, strict=True):
        assert set(report["suspects"]) < set(record["rows"])
        assert "the batch is at fault, not the weights" in cause(report)
        for row in report["rows"]:
            signs = sum(letter in SIGNS for letter in row["texts"]["text"]) / len(row["texts"]["text"])
            assert (signs > 0.5) == row["suspect"]
            if row["suspect"]:
                assert any(str(number) in row["origin"].split() for number in PLANTED)
    assert main(["report", str(run)]) == 0
    page = check(run / "report.html").text
    for report in reports:
        worst = report["rows"][0]
        assert f"Step {report['step']}: the loss" in page
        assert f"{worst['row_id']}, {worst['origin']} (suspect)" in page
        assert " ".join(worst["texts"]["text"].split()) in page
    capsys.readouterr()
    assert main(["runs", "show", str(run)]) == 0
    assert f"step {reports[0]['step']} (spike)" in capsys.readouterr().out
    (run / f"autopsies/step-{reports[0]['step']:08d}/report.json").write_text("[]")
    assert main(["report", str(run)]) == 0
    assert "must hold a JSON object" in check(run / "report.html").text
