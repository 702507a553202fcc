"""A model and an AdamW of the course's modules under training: the library's losses, exact resuming, refusals."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from llamita.backend.adamw import AdamWSettings
from llamita.backend.group import ParallelSettings
from llamita.backend.muon import MuonSettings
from llamita.backend.objectives import Classification, Preference
from llamita.backend.torch.own.backend import OwnBackend
from llamita.backend.torch.train.step import build_train_step
from llamita.data.batches import IGNORE_INDEX, Batch
from llamita.model.lora import LoraSettings
from llamita.model.parameters import CLASSIFIER
from tests.backend.steps import CONFIG, batch, largest_difference, same, split
from tests.backend.torch.own.programs import solved

OWN = OwnBackend(solved())
FP32: dict[str, Any] = {"precision": "fp32", "device": "cpu"}
UNTIED = dataclasses.replace(CONFIG, tie_word_embeddings=False, rope_theta=500.0)
LABELS = dataclasses.replace(CONFIG, num_labels=3, label_names=("a", "b", "c"), pad_token_id=0)


def labelled(seed: int = 0) -> Batch:
    """Texts of 1 to 12 tokens, 0 among them, a label at the last token of each."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 5, (8, 12), dtype=np.int32)
    labels = np.full((8, 12), IGNORE_INDEX, dtype=np.int32)
    for row, length in enumerate(generator.integers(1, 13, 8)):
        labels[row, length - 1] = generator.integers(0, 3)
        tokens[row, length:] = 0
    return Batch(tokens, labels, None, np.arange(8, dtype=np.int64))


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied, another theta"])
@pytest.mark.parametrize("form", ["textbook", "efficient"])
def test_without_weight_decay_updates_are_the_librarys(config, form) -> None:
    settings = AdamWSettings(weight_decay=0.0, bias_correction=form, epsilon=1e-4)
    options = {"seed": 3, "optimizer": settings, "max_grad_norm": 0.5, **FP32}
    own, library = (build(config, **options) for build in (OWN.build_train_step, build_train_step))
    assert same(own.weights(), library.weights())
    for number in range(4):
        parts = split(batch(seed=number), 3)  # of unequal numbers of targets
        mine, theirs = own.step(parts, 3e-3), library.step(parts, 3e-3)
        assert mine.targets == theirs.targets
        assert mine.loss == pytest.approx(theirs.loss, rel=2e-6)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=2e-5)
    assert largest_difference(own.weights(), library.weights()) < 2e-6
    held_out = batch(seed=9)
    assert own.evaluate(held_out).nats == pytest.approx(library.evaluate(held_out).nats, rel=2e-6)
    np.testing.assert_allclose(own.log_probs(held_out), library.log_probs(held_out), atol=2e-5)


def test_with_weight_decay_they_part_by_rate_times_decay_of_an_update() -> None:
    """With an update u of p, theirs is (p - u) (1 - c) and the library's p (1 - c) - u, c being rate times decay."""
    rate, decay = 0.05, 0.5

    def after(build: Any, weight_decay: float) -> dict[str, np.ndarray]:
        step = build(CONFIG, seed=3, optimizer=AdamWSettings(weight_decay=weight_decay, epsilon=1e-4), **FP32)
        step.step([batch()], rate)
        return {name: array.to_numpy() for name, array in step.weights().items()}

    before = build_train_step(CONFIG, seed=3, **FP32).weights()
    own, library, plain = after(OWN.build_train_step, decay), after(build_train_step, decay), after(build_train_step, 0)
    for name, array in before.items():
        update = array.to_numpy() - plain[name]
        apart = rate * decay * update if array.to_numpy().ndim == 2 else 0  # norms do not decay
        np.testing.assert_allclose(own[name], library[name] + apart, atol=2e-5, err_msg=name)
    assert max(np.abs(own[name] - library[name]).max() for name in own) > 1e-3


@pytest.mark.parametrize("tuned", [None, CLASSIFIER.__eq__], ids=["all", "the head alone"])
def test_a_classification_is_the_librarys(tuned) -> None:
    arrays = build_train_step(LABELS, seed=5, **FP32).weights()
    objective = Classification(class_weights=(1.0, 2.0, 0.5))
    settings = AdamWSettings(weight_decay=0.0, epsilon=1e-4)
    options = {"objective": objective, "optimizer": settings, "trainable": tuned, **FP32}
    own, library = (build(LABELS, arrays, **options) for build in (OWN.build_train_step, build_train_step))
    for number in range(4):
        parts = split(labelled(number), 5)
        mine, theirs = own.step(parts, 3e-3), library.step(parts, 3e-3)
        assert mine.loss == pytest.approx(theirs.loss, rel=2e-6)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=2e-5)
        assert mine.measures == theirs.measures
    assert largest_difference(own.weights(), library.weights()) < 2e-6
    moved = {name for name, value in own.weights().items() if bytes(value.data) != bytes(arrays[name].data)}
    assert moved == ({CLASSIFIER} if tuned else set(arrays))
    mine, theirs = own.evaluate(labelled(9)), library.evaluate(labelled(9))
    assert mine.nats == pytest.approx(theirs.nats, rel=2e-6)
    assert mine.measures == theirs.measures


@pytest.mark.parametrize("labels", [False, True], ids=["next token", "classification"])
def test_a_run_goes_on_to_the_same_bits(labels: bool) -> None:
    config, make = (LABELS, labelled) if labels else (dataclasses.replace(CONFIG, dropout=0.2), lambda n: batch(seed=n))
    objective = {"objective": Classification(dropout=0.3)} if labels else {}
    arrays = build_train_step(config, seed=5, **FP32).weights()
    whole = OWN.build_train_step(config, arrays, seed=1, **objective, **FP32)
    for number in range(3):
        whole.step([make(number)], 1e-2)
    first = OWN.build_train_step(config, arrays, seed=1, **objective, **FP32)
    first.step([make(0)], 1e-2)
    second = OWN.build_train_step(config, arrays, seed=1, **objective, **FP32)
    second.load_state(first.weights(), first.state())
    for number in (1, 2):
        second.step([make(number)], 1e-2)
    assert same(second.weights(), whole.weights())
    assert same(second.state(), whole.state())


def test_dropout_is_drawn_while_training_alone() -> None:
    config = dataclasses.replace(CONFIG, dropout=0.5)
    arrays = build_train_step(config, seed=5, **FP32).weights()
    step = OWN.build_train_step(config, arrays, seed=1, **FP32)
    plain = OWN.build_train_step(CONFIG, arrays, seed=1, **FP32)
    assert step.evaluate(batch()).nats == plain.evaluate(batch()).nats
    assert step.step([batch()], 1e-3, loss_limit=0.0).loss != pytest.approx(plain.step([batch()], 1e-3).loss, rel=1e-3)
    assert same(step.weights(), {name: arrays[name] for name in step.weights()})  # above the limit: no update


def test_a_look_at_an_update_has_its_loss_its_gradients_and_its_layers() -> None:
    own, library = (build(CONFIG, seed=3, **FP32) for build in (OWN.build_train_step, build_train_step))
    mine, theirs = own.diagnose([batch()]), library.diagnose([batch()])
    assert mine.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert mine.grad_norms == pytest.approx(dict(theirs.grad_norms), rel=1e-4)
    assert mine.activations == pytest.approx(dict(theirs.activations), rel=1e-5)
    assert [row.loss for row in mine.rows] == pytest.approx([row.loss for row in theirs.rows], rel=1e-5)
    labels = OWN.build_train_step(LABELS, seed=3, objective=Classification(dropout=0.5), **FP32)
    found = labels.diagnose([labelled()])
    again = labels.diagnose([labelled()])
    assert found.loss == again.loss
    assert [row.loss for row in found.rows] == [row.loss for row in again.rows]
    assert np.mean([row.loss for row in found.rows]) != pytest.approx(found.loss, rel=1e-3)  # which has dropout


def test_the_state_of_another_optimiser_is_refused() -> None:
    library = build_train_step(CONFIG, seed=3, **FP32)
    library.step([batch()], 1e-3)
    own = OWN.build_train_step(CONFIG, seed=3, **FP32)
    with pytest.raises(ValueError, match="the run was begun without --with"):
        own.load_state(library.weights(), library.state())
    changed = OwnBackend(solved(("optimizer", 'state["step"] = 0', 'state["step"] = 0; state["seen"] = [1]')))
    own = changed.build_train_step(CONFIG, seed=3, **FP32)
    own.step([batch()], 1e-3)
    with pytest.raises(ValueError, match="your AdamW keeps 'seen' of a parameter as list"):
        own.state()


def test_an_error_of_their_optimiser_is_one_line() -> None:
    broken = OwnBackend(solved(("optimizer", "alpha = lr\n", "alpha = lr / missing\n")))
    step = broken.build_train_step(CONFIG, seed=3, **FP32)
    with pytest.raises(ValueError, match=r"failed: NameError: .*missing.* \(optimizer.py, line \d+: alpha = lr\)"):
        step.step([batch()], 1e-3)


def test_what_the_course_has_no_part_for_is_refused() -> None:
    refused = {
        "--tuning lora": {"adapter": LoraSettings()},
        "--optimizer muon": {"muon": MuonSettings()},
        "--compile": {"compile": True},
        "--recompute": {"recompute": "all"},
        "--precision fp8": {"precision": "fp8"},
        "--attention flex": {"attention": "flex"},
        "several processes": {"parallel": ParallelSettings()},
    }
    for name, options in refused.items():
        with pytest.raises(ValueError, match=f"{name} does not go with --with"):
            OWN.build_train_step(CONFIG, **options)
    with pytest.raises(ValueError, match="not this objective"):
        OWN.build_train_step(CONFIG, objective=Preference())
    with pytest.raises(ValueError, match="cannot keep attention inside each of several documents"):
        OWN.build_train_step(CONFIG, **FP32).step([batch(segments=True)], 1e-3)
