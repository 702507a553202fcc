"""Each kind of tuning through the command line on either backend: the same figures, and a run that changes over."""

import json
import shutil

import pytest

from llamita.cli.main import main
from llamita.data import meadow_tasks
from llamita.training import metrics
from tests.workflows.test_sft import save_model

pytest.importorskip("mlx.core", reason="mlx is not installed")

# In float32 the backends round differently, and full tuning goes on from there; measured: 1e-6 after four updates.
TOLERANCE = 1e-4
SHARED = ("--precision", "fp32", "--device", "cpu", "--evaluate-every", "2", "--checkpoint-every", "2")
UPDATES = 4


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    directory = tmp_path_factory.mktemp("given")
    save_model(directory / "model")
    for kind in ("sft", "preferences"):
        lines = [json.dumps(record) for record in meadow_tasks.records(kind, 0, 8, "train")]
        (directory / f"{kind}.jsonl").write_text("\n".join(lines) + "\n")
    labelled = ["1 ||| A lovely film .", "0 ||| Dull and long .", "1 ||| Short and lovely .", "0 ||| A dull film ."]
    (directory / "films.txt").write_text("\n".join(labelled * 2) + "\n")
    (directory / "prompts.jsonl").write_text('{"prompt": "Hello"}\n{"prompt": "One day"}\n')
    (directory / "rewards.py").write_text("def vowels(sample):\n    return sum(c in 'aeiou' for c in sample.answer)\n")
    return directory


def command(given, verb):
    sft, pairs, films = (str(given / name) for name in ("sft.jsonl", "preferences.jsonl", "films.txt"))
    reward = f"{given / 'rewards.py'}:vowels"
    return {
        "sft": ["sft", "--data", sft, "--validation-data", sft, "--answers", "2", "--batch-size", "4"],
        "sft-lora": ["sft", "--data", sft, "--validation-data", sft, "--tuning", "lora", "--batch-size", "4"],
        "sft-muon": ["sft", "--data", sft, "--validation-data", sft, "--optimizer", "muon", "--batch-size", "4"],
        "dpo": ["dpo", "--data", pairs, "--validation-data", pairs, "--batch-size", "4"],
        "rl": [
            *("rl", "--data", str(given / "prompts.jsonl"), "--reward", reward, "--validation-share", "0"),
            *("--batch-size", "8", "--group", "4", "--max-tokens", "8"),
        ],
        "classify": [
            *("classify", "train", "--data", films, "--validation", films, "--labels", "bad", "good"),
            *("--head-dropout", "0", "--batch-size", "4"),
        ],
        "classify-head": [
            *("classify", "train", "--data", films, "--validation", films, "--labels", "bad", "good"),
            *("--tuning", "head", "--head-dropout", "0", "--batch-size", "4"),
        ],
    }[verb]


def curve(run):
    """Loss, norm and reward of each update."""
    records = [record for record in metrics.read_records(run / "metrics.jsonl") if record["kind"] == "train"]
    return [[record.get(name, 0.0) for name in ("loss", "grad_norm", "reward")] for record in records]


def cut_back(run, step):
    """A run as it was when it had been killed after this update: its later checkpoints and figures are not there."""
    kept = run / "checkpoints" / f"step-{step:08d}"
    for directory in (run / "checkpoints").iterdir():
        if directory.name > kept.name:
            shutil.rmtree(directory)
    for link in (run / "last", run / "best"):
        if link.is_symlink():  # a run without validation has no best
            link.unlink()
            link.symlink_to(kept.relative_to(run))
    metrics.rewind(run / "metrics.jsonl", step)


@pytest.mark.medium
@pytest.mark.parametrize("verb", ["sft", "sft-lora", "sft-muon", "dpo", "rl", "classify", "classify-head"])
def test_a_tuning_is_the_same_on_either_backend_and_goes_on_with_the_other(verb, given, tmp_path, capsys):
    words = command(given, verb)
    runs = {backend: tmp_path / backend for backend in ("torch", "mlx")}
    for backend, run in runs.items():
        options = ["--model", str(given / "model"), "--output", str(run), "--backend", backend]
        assert main([*words, *options, "--steps", str(UPDATES), *SHARED]) == 0, capsys.readouterr().err
    expected = curve(runs["torch"])
    assert len({norm for _, norm, _ in expected}) == UPDATES  # every update moved something
    for run in runs.values():
        assert curve(run) == [pytest.approx(values, rel=TOLERANCE, abs=1e-6) for values in expected]
    for other, run in zip(("mlx", "torch"), runs.values(), strict=True):
        cut_back(run, UPDATES // 2)
        assert len(curve(run)) == UPDATES // 2
        verbs = [word for word in words[:2] if not word.startswith("--")]
        assert main([*verbs, "--output", str(run), "--resume", "--backend", other]) == 0, capsys.readouterr().err
        assert curve(run) == [pytest.approx(values, rel=TOLERANCE, abs=1e-6) for values in expected]


@pytest.mark.parametrize("verb", ["sft-lora", "classify-head"])
def test_muon_is_refused_where_no_matrix_of_a_block_is_trained(verb, given, tmp_path, capsys):
    options = ["--model", str(given / "model"), "--output", str(tmp_path / "run"), "--optimizer", "muon"]
    assert main([*command(given, verb), *options, *SHARED]) != 0
    message = capsys.readouterr().err
    assert message.startswith("error: --optimizer muon updates the matrices of the blocks, and none of them is trained")
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()
