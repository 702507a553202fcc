"""Instruction tuning with a teacher, as a run: its loss is transformers', it resumes to the same bytes, the teacher
stays as it was, and what cannot teach is refused in one line."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llamita.backend.torch.backend import BACKEND
from llamita.cli.main import main
from llamita.data import meadow
from llamita.data.batches import IGNORE_INDEX, Batch
from llamita.storage import files, model_directory
from llamita.text.bpe import train_bpe_from_iterator
from llamita.text.chat import Chat
from llamita.text.tokenizer import Tokenizer
from llamita.training import metrics
from llamita.workflows.options import resolve
from llamita.workflows.sft import SftConfig, Teacher, sft
from tests.training.helpers import Silence, cut_short, timeless, weights_of
from tests.workflows.test_sft import WORDS, config, save_model, tune


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A student, a wider teacher of the same tokenizer, and a file of conversations."""
    directory = tmp_path_factory.mktemp("given")
    data = directory / "data.jsonl"
    lines = [json.dumps({"prompt": f"Say {i}", "response": " ".join(WORDS[i:])}) for i in range(len(WORDS))]
    data.write_text("\n".join(lines) + "\n")
    student = save_model(directory / "student")
    teacher = save_model(directory / "teacher", hidden_size=48, num_hidden_layers=3)
    return SimpleNamespace(bare=student, teacher=teacher, data=data)


@pytest.fixture(scope="module")
def made(given, tmp_path_factory):
    """A run that tuned the teacher to answer."""
    run = tmp_path_factory.mktemp("made") / "run"
    tune(config(given, run, model=given.teacher, mode="pad", steps=40, batch_size=8, evaluate_every=0, answers=0))
    return run


def taught(given, output, **changes):
    return config(given, output, **{"teacher": given.teacher, "mode": "pad", "answers": 0} | changes)


def bytes_of(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def records_of(run, kind):
    return [record for record in metrics.read_records(run / "metrics.jsonl") if record["kind"] == kind]


# Float32 against float64; micro-batches, so that the teacher is asked about a few rows at a time.
def test_the_first_update_s_loss_is_that_of_transformers(given, tmp_path):
    transformers = pytest.importorskip("transformers")
    before = bytes_of(given.teacher)
    run = tmp_path / "run"
    tune(
        taught(
            given, run, steps=1, batch_size=8, micro_batch_size=3, teacher_weight=0.3, teacher_temperature=2.0,
        )
    )  # fmt: skip
    assert bytes_of(given.teacher) == before
    student, teacher = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        for path in (given.bare, given.teacher)
    )
    chat = Chat(Tokenizer.load(run / "last"))
    cross_entropy, divergence, targets = 0.0, 0.0, 0
    for line in given.data.read_text().splitlines():
        record = json.loads(line)
        said = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["response"]}]
        encoded = chat.encode(said, add_generation_prompt=False)
        tokens, scored = torch.tensor(encoded.tokens), torch.tensor(encoded.assistant_mask)[1:]
        with torch.no_grad():
            ours, theirs = (model(tokens[None, :-1]).logits[0][scored] for model in (student, teacher))
        cross_entropy += F.cross_entropy(ours, tokens[1:][scored], reduction="sum").item()
        log_probs, known = ((logits / 2).log_softmax(-1) for logits in (ours, theirs))
        divergence += F.kl_div(log_probs, known, log_target=True, reduction="sum").item()
        targets += int(scored.sum())
    (record,) = records_of(run, "train")
    assert record["targets"] == targets
    assert record["cross_entropy"] == pytest.approx(cross_entropy / targets, rel=1e-5)
    assert record["teacher_kl"] == pytest.approx(divergence / targets, rel=1e-4)
    assert record["loss"] == pytest.approx((0.7 * cross_entropy + 0.3 * 4 * divergence) / targets, rel=1e-5)
    (evaluation,) = records_of(run, "evaluation")
    assert evaluation["loss"] == pytest.approx(evaluation["measures"]["cross_entropy"], rel=1e-12)
    assert evaluation["perplexity"] == pytest.approx(np.exp(evaluation["loss"]))
    assert evaluation["measures"]["teacher_kl"] > 0


def test_a_teacher_speaks_where_labels_are_scored(given):
    """What it says of a batch is its runner's distribution there, whichever rows are asked about at once."""
    model, arrays = model_directory.load_config(given.teacher), model_directory.load_tensors(given.teacher)
    scorer = BACKEND.build_scorer(model, arrays, precision="fp32", device="cpu")
    random = np.random.default_rng(0)
    tokens_BT, labels_BT = random.integers(0, 300, (2, 5, 12), dtype=np.int32)
    for row, count in enumerate((5, 1, 12, 3, 2)):
        labels_BT[row, random.permutation(12)[count:]] = IGNORE_INDEX
    batch = Batch(tokens_BT, labels_BT, None, np.arange(5), metrics={"kept": 1.0})
    logits_BTV = torch.from_numpy(BACKEND.load_runner(given.teacher, "float32", "cpu").forward(tokens_BT)["logits"])
    expected_BTV = (logits_BTV.double() / 0.5).log_softmax(-1).numpy()
    for rows_at_once in (1, 2, 5):
        teacher = Teacher(scorer, "", temperature=0.5, rows_at_once=rows_at_once, vocab_size=300)
        found = teacher.teach(batch)
        assert found.metrics == batch.metrics
        found_BSV = found.extras["teacher_log_probs_BSV"]
        assert found_BSV.shape == (5, 12, 300)
        assert found_BSV.dtype == np.float32
        for row in range(5):
            expected_SV = expected_BTV[row][labels_BT[row] != IGNORE_INDEX]
            np.testing.assert_allclose(found_BSV[row, : len(expected_SV)], expected_SV, atol=1e-4)
            assert not found_BSV[row, len(expected_SV) :].any()
    assert teacher.teach(batch.rows(slice(3, 5))).extras["teacher_log_probs_BSV"].shape == (2, 4, 300)


@pytest.mark.medium
@pytest.mark.parametrize("mode", ["pad", "pack"])
def test_a_run_cut_short_resumes_to_the_same_bytes(given, tmp_path, mode, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    monkeypatch.chdir(given.teacher.parent)
    options = {"dropout": 0.1, "micro_batch_size": 2, "teacher_temperature": 2.0, "sequence_length": 120}
    tune(taught(given, whole, teacher=Path("teacher"), mode=mode, **options))
    cut_short(whole, cut, lost_steps=(8, 12))
    monkeypatch.chdir(tmp_path)
    result, _ = tune(resolve(SftConfig, output=cut, resume=True))
    assert result.step == 12
    assert weights_of(whole / "last") == weights_of(cut / "last")
    assert timeless(whole) == timeless(cut)
    with pytest.raises(ValueError, match=r"teacher\.teacher_weight was 0\.5 and is now 0\.9"):
        tune(resolve(SftConfig, output=cut, resume=True, teacher_weight=0.9))
    with pytest.raises(ValueError, match=r"teacher\.model was '\w+' and is now '\w+'"):
        tune(resolve(SftConfig, output=cut, resume=True, teacher=given.bare))
    without = tmp_path / "without"
    tune(config(given, without, mode=mode, steps=1, answers=0))
    with pytest.raises(ValueError, match=r"teacher\.model was None and is now"):
        tune(resolve(SftConfig, output=without, resume=True, teacher=given.teacher))


@pytest.mark.medium
@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_student_learns_what_its_teacher_knows(given, made, tmp_path, backend, capsys):
    """Through the command line, from a teacher that a run made."""
    if backend == "mlx":
        pytest.importorskip("mlx.core", reason="mlx is not installed")
    before = bytes_of(made / "best")
    words = [
        *("sft", "--model", given.bare, "--data", given.data, "--validation-data", given.data, "--mode", "pad"),
        *("--output", tmp_path / "run", "--steps", 60, "--batch-size", 8, "--evaluate-every", 30, "--answers", 0),
        *("--teacher", made, "--teacher-weight", 1, "--learning-rate", "1e-2", "--device", "cpu"),
        *("--backend", backend, "--precision", "fp32"),
    ]
    assert main([str(word) for word in words]) == 0, capsys.readouterr().err
    assert "validation loss" in capsys.readouterr().out
    assert bytes_of(made / "best") == before
    first, last = (records_of(tmp_path / "run", "train")[i] for i in (0, -1))
    assert last["teacher_kl"] < first["teacher_kl"] / 5
    assert last["cross_entropy"] < first["cross_entropy"]  # of what the teacher was tuned to say
    manifest = json.loads((tmp_path / "run/run.json").read_text())
    assert manifest["arguments"]["teacher"] == str(made)
    assert manifest["identity"]["teacher"].keys() == {"model", "teacher_weight", "teacher_temperature"}


@pytest.mark.medium
@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_teacher_and_student_may_be_quantised(given, tmp_path, backend, precision, capsys):
    """The student under an adapter, over its head too."""
    if backend == "mlx":
        pytest.importorskip("mlx.core", reason="mlx is not installed")
    for name, source in (("student", given.bare), ("teacher", given.teacher)):
        assert main(["quantize", str(source), str(tmp_path / name), "--to", "int8"]) == 0
    words = [
        *("sft", "--model", tmp_path / "student", "--teacher", tmp_path / "teacher", "--data", given.data),
        *("--tuning", "lora", "--lora-targets", "q_proj", "lm_head", "--output", tmp_path / "run", "--mode", "pad"),
        *("--validation-data", given.data, "--steps", 12, "--batch-size", 8, "--learning-rate", "1e-2"),
        *("--answers", 0, "--device", "cpu", "--backend", backend, "--precision", precision),
    ]
    assert main([str(word) for word in words]) == 0, capsys.readouterr().err
    first, last = (records_of(tmp_path / "run", "train")[i] for i in (0, -1))
    assert last["loss"] < first["loss"]
    plain = tmp_path / "plain"
    tune(taught(given, plain, steps=1, batch_size=8))
    (expected,) = records_of(plain, "train")
    assert first["loss"] == pytest.approx(expected["loss"], rel=1e-2)


def test_what_cannot_teach_is_refused_in_one_line(given, tmp_path, capsys):
    classifier = save_model(tmp_path / "classifier", num_labels=2)
    wider = save_model(tmp_path / "wider", vocab_size=320)
    short = save_model(tmp_path / "short", max_position_embeddings=16)
    other = tmp_path / "other"
    with files.atomic_directory(other) as directory:
        model_directory.save_tensors(directory, model_directory.load_tensors(given.teacher))
        model_directory.save_config(directory, model_directory.load_config(given.teacher))
        train_bpe_from_iterator(meadow.corpus(1, 50, "train"), 290).save(directory)
    cases = [
        (["--teacher", classifier], "is a classifier, which predicts no tokens"),
        (["--teacher", other], "has another tokenizer than"),
        (["--teacher", wider], "has embeddings for 320 tokens and"),
        (["--teacher", short], "has 16 positions; give a shorter --sequence-length"),
        (["--teacher", tmp_path / "none"], "none"),
        (["--teacher", given.teacher, "--teacher-weight", "1.5"], "teacher_weight=1.5 must be above 0 and at most 1"),
        (["--teacher", given.teacher, "--teacher-weight", "0"], "teacher_weight=0.0 must be above 0"),
        (["--teacher", given.teacher, "--teacher-temperature", "-1"], "teacher_temperature=-1.0 must be a number"),
        (["--teacher-weight", "0.3"], "say how to learn from a --teacher; give one"),
    ]
    shared = ["sft", "--model", given.bare, "--data", given.data, "--output", tmp_path / "run", "--device", "cpu"]
    for words, message in cases:
        assert main([str(word) for word in (*shared, *words)]) == 2, words
        error = capsys.readouterr().err
        assert message in error, error
        assert error.startswith("error: ")
        assert error.count("\n") == 1, error
        assert not (tmp_path / "run").exists()


def test_a_teacher_s_weights_stay_as_they_are(given, tmp_path):
    """What it says after a run is to the bit what it said before."""
    scorers = []

    class Watched:
        def __getattr__(self, name):
            return getattr(BACKEND, name)

        def build_scorer(self, *arguments, **options):
            scorers.append(BACKEND.build_scorer(*arguments, **options))
            return scorers[-1]

    sft(taught(given, tmp_path / "run", steps=3), Watched(), report=lambda text: None, display=Silence())
    (scorer,) = scorers
    fresh = BACKEND.build_scorer(
        model_directory.load_config(given.teacher), model_directory.load_tensors(given.teacher),
        precision="fp32", device="cpu",
    )  # fmt: skip
    tokens_BT = np.arange(24, dtype=np.int32).reshape(2, 12)
    batch = Batch(tokens_BT, tokens_BT, None, np.arange(2))
    assert np.array_equal(scorer.distributions(batch), fresh.distributions(batch))
