"""The quickstart at a small scale, end to end: everything is written, and it goes on where it was."""

import contextlib
import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.backend import BACKEND
from llamita.backend.torch.infer.runner import load_runner
from llamita.data import meadow
from llamita.inference.llm import LLM
from llamita.text.bpe import train_bpe_from_iterator
from llamita.workflows import quickstart
from llamita.workflows.after_pretraining import SMALL, Amounts, tune_and_report
from llamita.workflows.quickstart import QuickstartConfig


class Knowing:
    """A runner that knows the stories: it gives their next token, moved on by `error`, a logit of 10 and others 0."""

    def __init__(self, rows, vocab_size, error=0):
        self.rows, self.vocab_size, self.error = rows, vocab_size, error

    def forward(self, tokens_BT):
        logits_BTV = np.zeros((*tokens_BT.shape, self.vocab_size), dtype=np.float32)
        for tokens_T, logits_TV in zip(tokens_BT.tolist(), logits_BTV, strict=True):
            row = next(row for row in self.rows if row[:-1] == tokens_T[: len(row) - 1])
            targets = (np.array(row[1:]) + self.error) % self.vocab_size
            logits_TV[np.arange(len(targets)), targets] = 10.0
        return {"logits": logits_BTV}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A small quickstart that has been run: its options, and what it printed."""
    output = tmp_path_factory.mktemp("quickstart") / "quick"
    config = QuickstartConfig(output=output, steps=2, stories=400, vocab_size=500, scored_stories=4)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert quickstart.quickstart(config, BACKEND) == 0
    return config, printed.getvalue()


def test_prediction_adds_up_whole_stories_and_finds_the_determined_words():
    stories = list(meadow.corpus(0, 20, "validation"))
    tokenizer = train_bpe_from_iterator(meadow.corpus(0, 500, "train"), 400)
    rows = [tokenizer.encode(text, bos=True, eos=True) for text in stories]
    nats, hits, determined = quickstart.predict(Knowing(rows, tokenizer.vocab_size), tokenizer, stories)
    per_token = math.log(math.exp(10) + tokenizer.vocab_size - 1) - 10
    assert nats == pytest.approx(per_token * sum(len(row) - 1 for row in rows), rel=1e-3)
    assert hits == determined > 0

    nats, hits, _ = quickstart.predict(Knowing(rows, tokenizer.vocab_size, error=1), tokenizer, stories)
    assert nats == pytest.approx((per_token + 10) * sum(len(row) - 1 for row in rows), rel=1e-3)
    assert hits == 0


@pytest.mark.medium
def test_a_small_quickstart_writes_everything_and_goes_on(quick, capsys):
    config, output = quick
    assert "times the floor" in output
    assert output.count("; seed 100000") == quickstart.STORIES_SHOWN
    report = json.loads((config.output / "report.json").read_text())
    assert report["sampled_stories"] == report["validation_stories"] == 4
    assert report["times_floor"] > 1
    assert report["floor_per_story"] == pytest.approx(meadow.floor(meadow.corpus(0, 4, "validation")).nats_per_story)
    assert (config.output / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    before = (config.output / "run" / "last" / "model.safetensors").read_bytes()

    assert quickstart.quickstart(config, BACKEND) == 0
    assert "3. A model" not in capsys.readouterr().out
    assert json.loads((config.output / "report.json").read_text()) == report
    assert (config.output / "run" / "last" / "model.safetensors").read_bytes() == before


def test_stories_sampled_together_are_those_of_each_seed_alone(quick, monkeypatch):
    config, _ = quick
    monkeypatch.setattr(quickstart, "SAMPLED_AT_ONCE", 3)
    model = LLM.load(config.output / "run" / "last", backend="torch", exact=True)
    together = list(quickstart.sample_stories(model, range(10, 14), Console(quiet=True)))
    alone = [model.generate("", SamplingParams(max_tokens=10_000, seed=seed)).text for seed in range(10, 14)]
    assert together == alone
    assert len(set(alone)) == 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quickstart_reaches_its_scores(tmp_path):
    """At most 1.05 times the floor and 3 nats above it; 98% grammatical, 85% consistent."""
    config = QuickstartConfig(output=tmp_path / "quick")
    assert quickstart.quickstart(config, BACKEND) == 0
    report = json.loads((config.output / "report.json").read_text())
    assert report["times_floor"] <= 1.05
    assert report["nats_per_story"] <= report["floor_per_story"] + 3
    assert report["grammatical"] >= 0.98
    assert report["consistent"] >= 0.85


def test_a_quick_look_bounds_the_runs_after_it():
    assert SMALL.at_most(0, 0) == SMALL
    assert SMALL.at_most(1000, 1000) == SMALL
    assert SMALL.at_most(30, 8) == Amounts(30, 1000, 20, 200, 30, 800, 8, 8)


@pytest.mark.medium
def test_after_pretraining_everything_is_tuned_reported_and_not_done_twice(quick, capsys):
    config, _ = quick
    amounts = Amounts(
        answer_steps=3, conversations=30, pair_steps=2, pairs=40, label_steps=4, texts=40, asked=2, labelled=10
    )

    def tune():
        return tune_and_report(config, BACKEND, Console(highlight=False), amounts)

    assert tune() == 0
    output = capsys.readouterr().out
    for text in ("answers right to the letter", "right answers preferred", "happy or sad", "llamita chat"):
        assert text in output
    times = {}
    for name in ("answers", "preferences", "happy-or-sad"):
        run = config.output / name
        assert (run / "report.html").is_file()
        times[name] = (run / "metrics.jsonl").stat().st_mtime_ns
    found = json.loads((config.output / "happy-or-sad/evaluations/happy-or-sad.json").read_text())
    assert found["metrics"]["texts"] == 10
    assert all((config.output / "happy-or-sad/evaluations" / name).is_file() for name in found["pictures"])
    assert load_runner(config.output / "happy-or-sad").config.num_labels == 2
    assert tune() == 0
    assert times == {name: (config.output / name / "metrics.jsonl").stat().st_mtime_ns for name in times}
