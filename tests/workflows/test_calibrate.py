"""Calibration as typed: stored with the model, applied by every verb and by Python, and kept by what copies a model."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

import llamita
from llamita.backend.torch.backend import BACKEND
from llamita.backend.torch.model import weights
from llamita.cli.main import main
from llamita.data import meadow
from llamita.data.labelled import read_labelled
from llamita.evaluation.classification import log_softmax
from llamita.evaluation.zero_shot import zero_shot
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.lora import LoraSettings, adapter_shapes
from llamita.storage import calibration, model_directory
from llamita.storage.calibration import Calibration, HeadTemperature, QuestionTemperature
from llamita.storage.peft_directory import AdapterFiles, BaseModel, weights_digest
from llamita.text.bpe import train_bpe_from_iterator
from llamita.text.tokenizer import Tokenizer
from llamita.workflows.classify import Classifier
from llamita.workflows.decisions import decide
from llamita.workflows.questions import Choice, Option

NAMES = ("bad", "average", "good")
SUFFIX = "It is a day that is"
HEAD = Calibration(HeadTemperature(2.0, NAMES, 9))
QUESTION = Calibration(None, (QuestionTemperature(3.0, SUFFIX, ("sad", "there", "happy"), 9),))


@pytest.fixture
def world(tmp_path):
    """A classifier with random weights, a language model, and labelled texts that neither knows anything of."""
    tokenizer = train_bpe_from_iterator(meadow.corpus(0, 100, "train"), 300)
    generator = np.random.default_rng(0)
    for name, labels in (("classifier", NAMES), ("base", ())):
        config = ModelConfig(300, 16, 24, 1, 2, 1, 64, num_labels=len(labels), label_names=labels)
        (tmp_path / name).mkdir()
        tokenizer.save(tmp_path / name)
        arrays = weights.to_host_arrays(weights.build_model(config, seed=1))
        model_directory.save_config(tmp_path / name, config)
        model_directory.save_tensors(tmp_path / name, arrays)
    texts = [f"{generator.integers(3)} ||| {meadow.story(0, i)[:60]}" for i in range(60)]
    (tmp_path / "dev.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "map.json").write_text(json.dumps(NAMES))
    return tmp_path


TEXTS = [meadow.story(0, i)[:60].strip() for i in range(400)]


def write_drawn(file, log_p, scale):
    """Writes TEXTS with labels drawn from what a model would say were it `scale` times as sure."""
    true = (log_p * scale + np.random.default_rng(0).gumbel(size=log_p.shape)).argmax(axis=1)
    file.write_text("".join(f"{label} ||| {text}\n" for label, text in zip(true, TEXTS, strict=True)))


def test_a_head_is_calibrated_and_every_use_of_it_follows(world, capsys):
    directory, data = world / "classifier", str(world / "drawn.txt")
    plain = Classifier.load(directory, BACKEND)
    write_drawn(world / "drawn.txt", plain.log_probabilities(plain.encode(TEXTS)), 20)
    encoded = plain.encode(["A fox was sad."])
    before = plain.log_probabilities(encoded)
    assert main(["classify", "evaluate", str(directory), "--data", data]) == 0
    assert "temperature  " not in capsys.readouterr().out
    assert main(["classify", "calibrate", str(directory), data]) == 0
    printed = capsys.readouterr().out
    stored = json.loads((directory / "calibration.json").read_text())["head"]
    assert stored["texts"] == 400
    assert stored["temperature"] == pytest.approx(1 / 20, rel=0.3)
    assert f"temperature {stored['temperature']:.4f}, the least loss on these texts" in printed
    model = Classifier.load(directory, BACKEND)
    expected = log_softmax(before / stored["temperature"])
    np.testing.assert_allclose(model.log_probabilities(encoded), expected)
    answer = decide(model, "A fox was sad.", [Choice("?", tuple(map(Option, NAMES)))]).answers[0]
    np.testing.assert_allclose(answer.probabilities, np.exp(expected[0]))
    assert main(["classify", "predict", str(directory), "--text", "A fox was sad."]) == 0
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines())
    for name, log_p in zip(NAMES, expected[0], strict=True):
        assert float(shown[name]) == pytest.approx(math.exp(log_p), abs=6e-5)
    assert main(["classify", "evaluate", str(directory), "--data", data, "--output", str(world / "scores")]) == 0
    evaluated = capsys.readouterr().out
    assert f"temperature       {stored['temperature']:.4f}" in evaluated
    scores = json.loads((world / "scores" / "evaluation.json").read_text())
    for name, key in (("loss", "loss"), ("Brier score", "brier_score"), ("calibration error", "calibration_error")):
        after = next(line for line in printed.splitlines() if line.startswith(name)).split("before, ")[1]
        assert after == f"{scores[key]:.4f} after"
    assert f"Brier score       {scores['brier_score']:.4f}\n" in evaluated
    # Calibrating again gives the same: what is stored is left out of the fit.
    assert main(["classify", "calibrate", str(directory), data]) == 0
    assert json.loads((directory / "calibration.json").read_text())["head"] == stored


def test_transformers_still_opens_it(world):
    transformers = pytest.importorskip("transformers")
    directory = world / "classifier"
    calibration.save(directory, HEAD)
    _, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert transformers.AutoTokenizer.from_pretrained(directory).vocab_size == 300


@pytest.mark.parametrize(("more", "scale"), [([], 0.2), (["--score", "mean"], 4), (["--calibrate"], 4)])
def test_a_question_to_a_language_model(world, capsys, more, scale):
    """Fitted and applied by zero-shot for the same question alone; by decisions where it is asked in that way."""
    directory, data = world / "base", str(world / "drawn.txt")
    words, runner, tokenizer = ("sad", "there", "happy"), BACKEND.load_runner(directory), Tokenizer.load(directory)
    options = {"reduction": "mean" if "mean" in more else "sum", "calibrate": "--calibrate" in more}
    found = zero_shot(runner, tokenizer, TEXTS, words, suffix=SUFFIX, length=64, vocab_size=300, **options)
    write_drawn(world / "drawn.txt", found.log_probabilities, scale)
    question = ["--label-mapping", str(world / "map.json"), "--labels", *words, "--suffix", SUFFIX]

    def evaluate(*options):
        assert main(["classify", "zero-shot", str(directory), "--data", data, *question, *options]) == 0
        return capsys.readouterr().out

    before = evaluate(*more)
    assert main(["classify", "calibrate", str(directory), data, *question, *more]) == 0
    printed = capsys.readouterr().out
    (stored,) = json.loads((directory / "calibration.json").read_text())["questions"]
    assert stored["temperature"] == pytest.approx(1 / scale, rel=0.3)
    after = evaluate(*more)
    assert f"temperature       {stored['temperature']:.4f}, fitted by llamita classify calibrate" in after
    assert after.split("accuracy")[0] == before.split("accuracy")[0], "predictions stay as they were"
    (brier,) = (line.split()[-2] for line in printed.splitlines() if line.startswith("Brier"))
    assert f"Brier score       {brier}" in after
    assert "fitted by" not in evaluate(*(["--score", "sum"] if "mean" in more else ["--score", "mean"]))
    assert "fitted by" not in evaluate(*more, "--suffix", "It was")
    model = llamita.load(directory)
    answer = decide(model, TEXTS[0], [Choice(SUFFIX, tuple(map(Option, words)))]).answers[0]
    plain = zero_shot(runner, tokenizer, TEXTS[:1], words, suffix=SUFFIX, length=64, vocab_size=300).log_probabilities
    expected = log_softmax(plain[0] / (1 if more else stored["temperature"]))
    np.testing.assert_allclose(np.log(answer.probabilities), expected, atol=1e-4)


def test_what_copies_a_model_keeps_its_temperatures(world):
    classifier, base = world / "classifier", world / "base"
    calibration.save(classifier, HEAD)
    calibration.save(base, QUESTION)
    assert main(["quantize", str(classifier), str(world / "int8"), "--to", "int8"]) == 0
    assert calibration.load(world / "int8") == HEAD
    assert Classifier.load(world / "int8", BACKEND).temperature == 2.0
    assert main(["convert", str(classifier), str(world / "copy")]) == 0
    assert calibration.load(world / "copy") == HEAD
    assert main(["convert", str(base), str(world / "model.gguf"), "--to", "gguf-f32"]) == 0
    assert llamita.load(world / "model.gguf").calibration == QUESTION
    assert main(["convert", str(world / "model.gguf"), str(world / "back")]) == 0
    model = llamita.load(world / "back")
    assert model.calibration == QUESTION
    model.save(world / "saved")
    assert calibration.load(world / "saved") == QUESTION


def test_a_merged_adapter_has_its_own_temperatures_and_not_its_bases(world):
    base = world / "base"
    calibration.save(base, QUESTION)
    config = model_directory.load_config(base)
    settings = LoraSettings(2, 4.0)
    shapes = adapter_shapes(config, settings.factors(config))
    arrays = {name: HostArray.from_numpy(np.ones(shape, np.float32)) for name, shape in shapes.items()}
    adapter = world / "adapter"
    adapter.mkdir()
    AdapterFiles(settings, BaseModel(str(base), weights_digest(base))).save(adapter, config, arrays)
    shutil.copy(base / "tokenizer.json", adapter)
    assert main(["merge", str(adapter), "--output", str(world / "merged")]) == 0
    assert calibration.load(world / "merged") == Calibration()
    own = Calibration(None, (QuestionTemperature(5.0, "x", ("a", "b"), 2),))
    calibration.save(adapter, own)
    assert main(["merge", str(adapter), "--output", str(world / "merged-too")]) == 0
    assert calibration.load(world / "merged-too") == own
    assert llamita.load(adapter).calibration == own


def test_a_head_that_was_tuned_further_begins_without(world):
    calibration.save(world / "classifier", HEAD)
    flags = ["--steps", "2", "--batch-size", "4", "--precision", "fp32", "--device", "cpu"]
    data = ["--data", str(world / "dev.txt"), "--label-mapping", str(world / "map.json")]
    command = ["classify", "train", "--model", str(world / "classifier"), *data, "--output", str(world / "run"), *flags]
    assert main(command) == 0
    assert Classifier.load(world / "run", BACKEND).temperature == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{world}/classifier"], "DATA is missing"),
        (["{world}/classifier", "{world}/dev.txt", "--suffix", "It is"], "is asked no question; leave its flags out"),
        (["{world}/classifier", "{world}/none.txt"], "there is no file"),
        (["{world}/classifier", "{world}/one.txt"], "labels that are all alike are placeholders"),
        (["{world}/classifier", "{world}/empty.txt"], "there is no text"),
        (["{world}/none", "{world}/dev.txt"], "does not exist"),
        (["{world}/base", "{world}/dev.txt", "--labels", "a", "b"], "is none of a, b"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(world, capsys, arguments, message):
    (world / "one.txt").write_text("0 ||| a\n0 ||| b\n")
    (world / "empty.txt").write_text("\n")
    assert main(["classify", "calibrate", *(argument.format(world=world) for argument in arguments)]) == 2
    printed = capsys.readouterr().err.strip()
    assert message in printed
    assert "\n" not in printed
    assert not (world / "classifier" / "calibration.json").exists()


def test_a_calibration_for_other_labels_is_refused(world):
    calibration.save(world / "classifier", Calibration(HeadTemperature(2.0, ("a", "b", "c"), 9)))
    with pytest.raises(ValueError, match="is for the labels a, b, c, and the model's are bad, average, good"):
        Classifier.load(world / "classifier", BACKEND)
    texts = read_labelled([str(world / "dev.txt")], "validation", NAMES)
    assert len(texts) == 60
