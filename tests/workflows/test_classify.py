"""Tuning a classifier: the same logits in transformers, padding, class weights, heads, resuming, seeds, refusals."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from llamita.backend.objectives import Classification
from llamita.backend.torch.backend import BACKEND
from llamita.backend.torch.model import weights
from llamita.backend.torch.train.step import build_train_step
from llamita.cli.main import main
from llamita.data import meadow
from llamita.data.batches import IGNORE_INDEX, Batch
from llamita.data.labelled import read_labelled
from llamita.model.config import ModelConfig
from llamita.model.parameters import initialize_parameters
from llamita.storage import model_directory
from llamita.text.bpe import train_bpe_from_iterator
from llamita.training.config import with_options
from llamita.workflows import classify, classify_seeds
from llamita.workflows.classify import Classifier, ClassifyConfig, train_classifier
from llamita.workflows.options import resolve
from tests.training.helpers import Altered, timeless, weights_of

CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    train_bpe_from_iterator(meadow.corpus(0, 100, "train"), 300).save(directory)
    model_directory.save_config(directory, CONFIG)
    model_directory.save_tensors(directory, weights.to_host_arrays(weights.build_model(CONFIG, seed=1)))
    return directory


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Sentences of three labels, told by a word; lengths from short to longer than the context."""
    directory = tmp_path_factory.mktemp("texts")
    generator = np.random.default_rng(0)
    story = meadow.story(0, 0)
    for name, count in (("train.txt", 48), ("dev.txt", 20)):
        lines = []
        for i in range(count):
            word = ("sad", "here", "happy")[i % 3]
            lines.append(f"{i % 3} ||| {story[: int(generator.integers(1, 260))]} {i} so he was {word}.")
        (directory / name).write_text("\n".join(lines) + "\n")
    (directory / "map.json").write_text('["bad", "average", "good"]')
    return directory


backend = Altered()


def settings(output, base, files, **changes):
    values = {
        "output": Path(output),
        "model": base,
        "data": (str(files / "train.txt"),),
        "validation": (str(files / "dev.txt"),),
        "label_mapping": files / "map.json",
        "steps": 12,
        "batch_size": 6,
        "learning_rate": 1e-2,
        "evaluate_every": 6,
        "checkpoint_every": 3,
        "precision": "fp32",
        "device": "cpu",
        **changes,
    }
    return resolve(ClassifyConfig, **values)


def run(config, build=backend):
    told = []
    return train_classifier(config, build, told.append), told


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base, files):
    output = tmp_path_factory.mktemp("trained") / "run"
    result, told = run(settings(output, base, files))
    return output, result, told


@pytest.mark.medium
def test_a_checkpoint_gives_the_same_logits_in_transformers(trained, files):
    transformers = pytest.importorskip("transformers")
    directory = trained[0] / "best"
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert theirs.config.id2label == {0: "bad", 1: "average", 2: "good"}
    assert theirs.config.label2id == {"bad": 0, "average": 1, "good": 2}
    model = Classifier.load(directory, BACKEND)
    texts = read_labelled([str(files / "dev.txt")], "validation", model.config.labels)
    ids = model.encode(texts.texts).tokens
    length = max(map(len, ids))
    padded = {}
    for side in ("right", "left"):  # transformers looks for the last token that is not pad_token_id
        tokens, mask = (torch.full((len(ids), length), fill) for fill in (model.config.pad_token_id, 0))
        for row, one in enumerate(ids):
            place = slice(0, len(one)) if side == "right" else slice(length - len(one), length)
            tokens[row, place], mask[row, place] = torch.from_numpy(one).long(), 1
        with torch.inference_mode():
            padded[side] = theirs(tokens, attention_mask=mask).logits.log_softmax(-1).numpy()
    ours = model.log_probabilities(model.encode(texts.texts))
    np.testing.assert_allclose(ours, padded["right"], atol=1e-5)
    np.testing.assert_allclose(ours, padded["left"], atol=1e-5)
    # Their tokenizer cuts on the same side, to the same length.
    cut = transformers.AutoTokenizer.from_pretrained(directory)
    long = texts.texts[int(np.argmax([len(text) for text in texts.texts]))]
    encoded = cut(long, truncation=True).input_ids
    assert len(encoded) == 64
    assert encoded[-63:] == model.encode([long]).tokens[0][-63:].tolist()
    assert cut.pad_token_id == model.config.pad_token_id


def test_what_is_told_and_recorded(trained):
    output, result, told = trained
    assert "48 texts (bad 16, average 16, good 16)" in told[0]
    assert "context of 64: " in told[0]
    assert "of them cut, their end kept" in told[0]
    assert "12 updates of 6 texts are 1.5 epochs" in told
    records = timeless(output)
    best = max((r["measures"]["accuracy"], -r["loss"]) for r in records if r["kind"] == "evaluation")
    assert (result.best.measures["accuracy"], -result.best.loss) == best
    assert json.loads((output / "run.json").read_text())["identity"]["kind"] == "classification"
    assert model_directory.load_config(output / "best").labels == ("bad", "average", "good")


def test_evaluating_the_best_checkpoint_gives_the_accuracy_of_its_run(trained, files):
    output, result, _ = trained
    model = Classifier.load(output, BACKEND)
    texts = read_labelled([str(files / "dev.txt")], "validation", model.config.labels)
    log_p = model.log_probabilities(model.encode(texts.texts))
    assert (log_p.argmax(1) == texts.labels).mean() == pytest.approx(result.best.measures["accuracy"])
    assert -log_p[range(20), texts.labels].mean() == pytest.approx(result.best.loss, rel=1e-5)


@pytest.mark.parametrize("class_weights", [(), (0.5, 2.0, 1.0)])
def test_the_loss_is_that_of_torch_on_either_side_of_padding(class_weights):
    config = dataclasses.replace(CONFIG, num_labels=3)
    step = build_train_step(
        config, precision="fp32", device="cpu", objective=Classification(class_weights=class_weights)
    )
    generator = np.random.default_rng(0)
    texts = [generator.integers(3, 300, length) for length in (5, 12, 1, 9)]
    labels = np.array([2, 0, 1, 2])
    with torch.inference_mode():
        logits = torch.cat([step.model(torch.from_numpy(one)[None]).logits_BTV[:, -1] for one in texts])
    target, weight = torch.from_numpy(labels), torch.tensor(class_weights) if class_weights else None
    expected = torch.nn.functional.cross_entropy(logits, target, weight, reduction="sum")
    mean = torch.nn.functional.cross_entropy(logits, target, weight)  # divided by the weights of the texts
    weights_sum = weight[target].sum() if class_weights else torch.tensor(4.0)
    accuracy = (logits.argmax(-1) == target).sum().item()
    for side in ("right", "left"):
        tokens, labels_BT = np.zeros((4, 12), dtype=np.int32), np.full((4, 12), IGNORE_INDEX, dtype=np.int32)
        segments = np.zeros((4, 12), dtype=np.int32)
        for row, one in enumerate(texts):
            start = 0 if side == "right" else 12 - len(one)
            tokens[row, start : start + len(one)], segments[row, start : start + len(one)] = one, 1
            labels_BT[row, start + len(one) - 1] = labels[row]
        found = step.evaluate(Batch(tokens, labels_BT, segments, np.arange(4)))
        assert found.targets == 4
        assert found.nats == pytest.approx(expected.item(), rel=1e-5)
        assert found.nats == pytest.approx((mean * weights_sum).item(), rel=1e-5)
        assert found.measures["accuracy"] == accuracy


def test_balanced_weights_are_those_of_scikit_learn(tmp_path):
    sklearn = pytest.importorskip("sklearn.utils.class_weight")
    counts = {"a": 7, "b": 2, "c": 11}
    (tmp_path / "t.txt").write_text("".join(f"{name} ||| text\n" * count for name, count in counts.items()))
    train = read_labelled([str(tmp_path / "t.txt")], "train")
    found = classify.class_weights(("balanced",), train)
    expected = sklearn.compute_class_weight("balanced", classes=np.arange(3), y=train.labels)
    np.testing.assert_allclose(found, expected)
    assert np.array(found)[train.labels].mean() == pytest.approx(1.0)
    absent = read_labelled([str(tmp_path / "t.txt")], "train", ("a", "b", "c", "d"))
    np.testing.assert_allclose(classify.class_weights(("balanced",), absent), [*expected, 1.0])
    assert classify.class_weights(("1", "0.5", "2"), train) == (1.0, 0.5, 2.0)
    for wrong in (("1", "2"), ("heavy",), ("1", "-1", "2"), ("0", "0", "0"), ("nan", "1", "1")):
        with pytest.raises(ValueError, match="'balanced', or a number for each of a, b, c"):
            classify.class_weights(wrong, train)


def test_a_new_head_is_the_tables_and_follows_the_seed(base, files, tmp_path):
    config = settings(tmp_path / "x", base, files)
    heads = []
    for seed in (0, 1):
        task = classify.read_task(with_options(config, seed=seed), lambda text: None)
        fresh = dict(initialize_parameters(task.model, seed))["score.weight"]
        heads.append(task.base.arrays["score.weight"].to_numpy())
        np.testing.assert_array_equal(heads[-1], fresh)
    assert not np.array_equal(*heads)
    assert not (tmp_path / "x").exists()


@pytest.mark.medium
def test_head_only_leaves_the_rest_and_resumes(base, files, tmp_path):
    run(settings(tmp_path / "run", base, files, tuning="head"))
    before, after = (model_directory.load_tensors(path) for path in (base, tmp_path / "run" / "last"))
    same = [name for name in after if name in before and bytes(after[name].data) == bytes(before[name].data)]
    assert set(after) - set(same) == {"score.weight"}
    optimizer = model_directory.load_tensors(tmp_path / "run" / "last", name="optimizer")
    assert not [name for name in optimizer if "layers" in name]
    run(settings(tmp_path / "half", base, files, tuning="head", steps=6, schedule="constant"))
    run(settings(tmp_path / "half", base, files, tuning="head", steps=12, schedule="constant", resume=True))
    run(settings(tmp_path / "whole", base, files, tuning="head", steps=12, schedule="constant"))
    assert weights_of(tmp_path / "half" / "last") == weights_of(tmp_path / "whole" / "last")


@pytest.mark.medium
def test_an_adapter_with_its_head_opens_as_a_model_and_in_transformers(base, files, tmp_path):
    run(settings(tmp_path / "run", base, files, tuning="lora", lora_rank=4))
    assert not list((tmp_path / "run").rglob("model.safetensors"))
    model = Classifier.load(tmp_path / "run", BACKEND)
    assert model.config.labels == ("bad", "average", "good")
    assert (model.context, model.keep) == (64, "end")
    texts = [meadow.story(0, 3), "A fox."]
    ours = model.log_probabilities(model.encode(texts))
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(whole, tmp_path / "run" / "best").eval()
    for row, ids in zip(ours, model.encode(texts).tokens, strict=True):
        with torch.inference_mode():
            logits = theirs(torch.from_numpy(ids).long()[None]).logits[0]
        np.testing.assert_allclose(row, logits.log_softmax(-1).numpy(), atol=1e-5)


def test_a_tuned_model_goes_on_with_its_head_for_the_same_labels_alone(trained, files, tmp_path):
    config = settings(tmp_path / "x", trained[0], files)
    task = classify.read_task(config, lambda text: None)
    theirs = model_directory.load_tensors(trained[0] / "best")["score.weight"]
    assert bytes(task.base.arrays["score.weight"].data) == bytes(theirs.data)
    told = []
    other = dataclasses.replace(config, label_mapping=None, labels=("0", "1", "2"))
    task = classify.read_task(other, told.append)
    assert bytes(task.base.arrays["score.weight"].data) != bytes(theirs.data)
    assert any("for bad, average, good is left out" in text for text in told)


class StopError(Exception):
    pass


def stopping_at(update):
    """A backend whose runs break off before that update."""

    def break_off(step):
        go_on = step.step

        def step_until(*arguments):
            if step.optimizer.t == update:
                raise StopError
            return go_on(*arguments)

        step.step = step_until

    return Altered(break_off)


def test_a_run_that_is_stopped_resumes_to_the_same_bytes(trained, base, files, tmp_path):
    with pytest.raises(StopError):
        run(settings(tmp_path / "run", base, files), stopping_at(8))
    train_classifier(resolve(ClassifyConfig, output=tmp_path / "run", resume=True), backend, lambda text: None)
    assert weights_of(tmp_path / "run" / "last") == weights_of(trained[0] / "last")
    assert timeless(tmp_path / "run") == timeless(trained[0])
    with pytest.raises(ValueError, match=r"tuning\.what was None and is now 'head'"):
        run(settings(tmp_path / "run", base, files, tuning="head", resume=True))


@pytest.mark.medium
def test_seeds_run_one_after_another_and_go_on(base, files, tmp_path):
    config = settings(tmp_path / "all", base, files, seeds=(3, 1), steps=6)
    with pytest.raises(StopError):
        classify_seeds.train_seeds(config, stopping_at(4), lambda text: None)
    begun = resolve(ClassifyConfig, output=tmp_path / "all", resume=True)
    found = classify_seeds.train_seeds(begun, backend, lambda text: None)
    record = json.loads((tmp_path / "all" / "seeds.json").read_text())
    assert record["accuracy"] == list(found.accuracies)
    assert record["mean"] == pytest.approx(np.mean(found.accuracies))
    assert record["deviation"] == pytest.approx(np.std(found.accuracies, ddof=1))
    alone, _ = run(settings(tmp_path / "one", base, files, seed=1, steps=6))
    assert weights_of(tmp_path / "all" / "seed-1" / "last") == weights_of(tmp_path / "one" / "last")
    assert found.accuracies[1] == alone.best.measures["accuracy"]
    changed = (tmp_path / "all" / "seed-1" / "last" / "model.safetensors").stat().st_mtime_ns
    more = resolve(ClassifyConfig, output=tmp_path / "all", resume=True, seeds=(2,))
    assert more.seeds == (2,)
    assert begun.seeds == (3, 1)
    again = classify_seeds.train_seeds(more, backend, lambda text: None)
    assert again.accuracies[:2] == found.accuracies
    assert (again.seeds, len(again.accuracies)) == ((3, 1, 2), 3)
    assert (tmp_path / "all" / "seed-1" / "last" / "model.safetensors").stat().st_mtime_ns == changed


@pytest.mark.parametrize(("changes", "message"), [
    ({"data": ()}, "--data is missing"),
    ({"model": None}, "--model is missing"),
    ({"sequence_length": 65}, "sequence_length=65 is more than the model's 64 positions"),
    ({"sequence_length": -1}, "sequence_length=-1 must not be negative"),
    ({"labels": ("a", "b", "c")}, "--label-mapping and --labels both"),
    ({"head_dropout": 1.0}, r"head_dropout=1.0 must lie in \[0, 1\)"),
    ({"class_weights": ("1",)}, "class_weights='1' must be 'balanced'"),
    ({"seeds": (1, 1)}, "must be different"),
    ({"label_mapping": None, "labels": ("x", "y")}, "line 3: the label '2' is none of x, y"),
])  # fmt: skip
def test_refusals_leave_nothing(base, files, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(settings(tmp_path / "run", base, files, **changes))
    assert not (tmp_path / "run").exists()


def test_seeds_need_something_to_compare(base, files, tmp_path):
    config = settings(tmp_path / "run", base, files, seeds=(0, 1), validation=())
    with pytest.raises(ValueError, match="--validation is missing"):
        classify_seeds.train_seeds(config, backend, lambda text: None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_an_adapter_and_a_head_over_a_quantised_base(base, files, tmp_path, scheme):
    whole = dataclasses.replace(CONFIG, tie_word_embeddings=False)  # its own output head is left out, scales and all
    directory = shutil.copytree(base, tmp_path / "whole")
    model_directory.save_config(directory, whole)
    model_directory.save_tensors(directory, weights.to_host_arrays(weights.build_model(whole, seed=1)))
    assert main(["quantize", str(directory), str(tmp_path / "base"), "--to", scheme]) == 0
    result, _ = run(settings(tmp_path / "run", tmp_path / "base", files, tuning="lora"))
    tuned = Classifier.load(tmp_path / "run", BACKEND)
    texts = read_labelled([str(files / "dev.txt")], "validation", tuned.config.labels)
    found = tuned.log_probabilities(tuned.encode(texts.texts)).argmax(axis=1)
    assert (found == texts.labels).mean() == pytest.approx(result.best.measures["accuracy"], abs=0.051)


def test_a_tokenizer_of_another_model_is_refused(base, files, tmp_path):
    directory = shutil.copytree(base, tmp_path / "base")
    train_bpe_from_iterator(meadow.corpus(0, 100, "train"), 320).save(directory)
    with pytest.raises(ValueError, match="has 320 tokens and the model embeddings for 300; one of them is another"):
        run(settings(tmp_path / "run", directory, files))
    assert not (tmp_path / "run").exists()


def test_a_language_model_is_no_classifier(base):
    with pytest.raises(ValueError, match="without a classification head; tune it with"):
        Classifier.load(base, BACKEND)
