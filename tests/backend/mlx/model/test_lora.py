"""Adapters in MLX held to PyTorch's (whose reference is peft): logits, loss, gradients, updates, files handed over both
ways, merging, quantised bases."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed")
import mlx.core as mx

from llamita.backend.adamw import AdamWSettings
from llamita.backend.mlx.model import lora
from llamita.backend.mlx.model.weights import build_model, copy_host_arrays, quantize_arrays, to_host_arrays
from llamita.backend.mlx.train.step import build_train_step
from llamita.backend.objectives import Classification
from llamita.backend.torch.model import lora as torch_lora
from llamita.backend.torch.train.step import build_train_step as build_torch
from llamita.model.lora import LoraSettings
from llamita.storage import model_directory
from llamita.storage.peft_directory import AdapterFiles, BaseModel, open_adapter, weights_digest
from tests.backend.steps import same
from tests.backend.torch.model.test_lora import CONFIG, TARGETS, batch, labelled, save_base, shake

TOKENS = np.random.Generator(np.random.Philox(key=5)).integers(0, 61, (3, 12))
BUILDERS = {"torch": build_torch, "mlx": build_train_step}
EVERYTHING = LoraSettings(4, 8, targets=("all", "lm_head"))
SMALL = dataclasses.replace(
    CONFIG, hidden_size=32, intermediate_size=64
)  # whole groups: MLX's kernel of packed weights


def make(backend="mlx", config=CONFIG, arrays=None, **options):
    return BUILDERS[backend](config, arrays, **{"precision": "fp32", "device": "cpu", "seed": 3, **options})


def both(config=CONFIG, arrays=None, **options):
    """A step of each backend with the same values, B not zero."""
    theirs, ours = (make(one, config, arrays, **options) for one in ("torch", "mlx"))
    shake(theirs)
    ours.load_state(theirs.weights(), theirs.state())
    return ours, theirs


def difference(a, b):
    """The largest difference of two sets of arrays, as a share of each array's largest number."""
    assert a.keys() == b.keys()
    return max(np.abs(a[name] - b[name]).max() / np.abs(b[name]).max() for name in a)


def numpys(arrays):
    return {name: array.to_numpy() for name, array in arrays.items()}


def gradients_of(step, data):
    """The loss of a step, and the gradients that its optimiser was given."""
    found, fused = {}, step.optimizer.parameters

    def keep(gradients, *_):
        values = [each.parameter.grad.numpy() for each in fused] if isinstance(gradients, float) else gradients
        found.update((each.name, np.array(value)) for each, value in zip(fused, values, strict=True))

    step.optimizer.step = keep
    return step.step([data], 0.0).loss, found


@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("targets", TARGETS)
def test_logits_loss_and_gradients_are_pytorch_s(targets, stabilized):
    settings = LoraSettings(4, 12, targets=targets, rank_stabilized=stabilized)
    ours, theirs = both(adapter=settings)
    logits = theirs.runner().forward(TOKENS)
    assert difference(ours.runner().forward(TOKENS), logits) < 1e-5
    assert np.abs(make(adapter=settings).runner().forward(TOKENS)["logits"] - logits["logits"]).max() > 0.01
    scores = [{"": step.log_probs(batch())} for step in (ours, theirs)]
    assert difference(*scores) < 1e-5
    (loss, gradients), (their_loss, their_gradients) = (gradients_of(step, batch()) for step in (ours, theirs))
    assert loss == pytest.approx(their_loss, rel=1e-5)
    assert difference(gradients, their_gradients) < 1e-5


def test_ten_updates_of_a_fresh_adapter_follow_pytorch_s_and_leave_the_base_alone():
    """Micro-batches, clipping and decay included."""
    options = {"adapter": EVERYTHING, "max_grad_norm": 1.0, "optimizer": AdamWSettings(weight_decay=0.1)}
    ours, theirs = (make(one, **options) for one in ("mlx", "torch"))
    assert same(ours.weights(), theirs.weights()), "the same beginning, bit for bit"
    base = to_host_arrays(ours.model)
    for i in range(10):
        data = [batch(2 * i), batch(2 * i + 1, rows=2)]
        a, b = ours.step(data, 3e-3), theirs.step(data, 3e-3)
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
    assert difference(numpys(ours.weights()), numpys(theirs.weights())) < 1e-5
    assert same(to_host_arrays(ours.model), base)
    moments = {name.partition(".")[2] for name in ours.state()} - {""}
    assert moments == ours.weights().keys() == ours.adapter.parameters().keys()


@pytest.mark.parametrize("begun_on", BUILDERS)
def test_a_run_s_adapter_goes_on_in_the_other_backend(tmp_path, begun_on):
    """Through files; five further updates differ by rounding alone."""
    base = save_base(tmp_path / "base")
    arrays = model_directory.load_tensors(base)
    first, second = (
        make(one, arrays=arrays, adapter=EVERYTHING, optimizer=AdamWSettings(epsilon=1e-4), seed=seed)
        for one, seed in ((begun_on, 3), (({*BUILDERS} - {begun_on}).pop(), 4))
    )
    for i in range(5):
        first.step([batch(i)], 3e-3)
    files = AdapterFiles(EVERYTHING, BaseModel(str(base), weights_digest(base)))
    files.save(tmp_path, CONFIG, first.weights())
    model_directory.save_tensors(tmp_path, first.state(), "optimizer")
    second.load_state(files.load(tmp_path), model_directory.load_tensors(tmp_path, "optimizer"))
    assert same(second.weights(), first.weights())
    assert same(second.state(), first.state())
    for i in range(5, 10):
        assert second.step([batch(i)], 3e-3).loss == pytest.approx(first.step([batch(i)], 3e-3).loss, rel=1e-5)
    assert difference(numpys(second.weights()), numpys(first.weights())) < 1e-5


def test_a_classifier_trains_its_head_beside_the_adapter():
    config = dataclasses.replace(CONFIG, num_labels=3)
    ours, theirs = both(config, adapter=LoraSettings(4, 8), objective=Classification())
    for _ in range(3):
        a, b = (step.step([labelled()], 1e-2) for step in (ours, theirs))
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.measures == b.measures
    assert "score.weight" in ours.weights()
    assert difference(numpys(ours.weights()), numpys(theirs.weights())) < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dropout_is_drawn_in_training_alone_and_a_resumed_run_draws_it_again(precision):
    settings = dataclasses.replace(EVERYTHING, dropout=0.5)
    step, plain = (make(adapter=one, precision=precision) for one in (settings, EVERYTHING))
    for _ in range(2):
        step.step([batch(), batch(1)], 1e-2)
    plain.load_state(step.weights(), step.state())
    assert step.evaluate(batch()) == step.evaluate(batch()) == plain.evaluate(batch())
    assert step.step([batch()], 0.0).loss != plain.step([batch()], 0.0).loss
    resumed = make(adapter=settings, precision=precision)
    resumed.load_state(step.weights(), step.state())
    assert resumed.step([batch()], 1e-2) == step.step([batch()], 1e-2)
    assert same(resumed.weights(), step.weights())


def test_dropout_differs_between_steps_micro_batches_and_matrices(monkeypatch):
    step, row = make(adapter=dataclasses.replace(EVERYTHING, dropout=0.5)), batch(rows=1)
    step.step([row], 1e-2)  # B is no longer zero
    assert len({step.step([row], 0.0).loss for _ in range(3)}) == 3
    seen = []

    def watched(adapter, matrix, x_D):
        seen.append(adapter.draws[matrix](mx.ones(x_D.shape)))
        return x_D

    monkeypatch.setattr(lora.ModelAdapter, "dropped", watched)
    step.step([row, row], 0.0)
    drawn = [np.array(mask).tobytes() for mask in seen]
    assert len(drawn) == len(set(drawn)) == 2 * (2 * 4 + 1)


def test_what_dropout_leaves_has_the_mean_of_the_whole():
    """One matrix, no depth: over many draws B A (dropped x) averages to B A x, which grows with 1 / sqrt(draws)."""
    model = build_model(CONFIG, seed=1)
    adapter = lora.fresh_adapter(model, EVERYTHING, seed=3)
    adapter.changes["lm_head"].parts[0].up_CR = mx.random.normal((61, 4), key=mx.random.key(1))
    x_RD, y_RC = mx.ones((4000, 32)), mx.zeros((4000, 61))
    whole_C = adapter.changed("lm_head", x_RD, y_RC)[0]
    dropping = adapter.dropping(0.5, mx.random.key(2))
    mean_C, deviation_C = (f(dropping.changed("lm_head", x_RD, y_RC), axis=0) for f in (mx.mean, mx.std))
    assert mx.all(mx.abs(mean_C - whole_C) < 5 * deviation_C / 4000**0.5).item()
    assert mx.all(deviation_C > 0).item()


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("config", [CONFIG, SMALL], ids=["some dequantised", "all packed"])
def test_an_adapter_over_quantised_weights_trains_as_pytorch_s(config, scheme):
    quantised = dataclasses.replace(config, quantization=scheme)
    arrays = dict(quantize_arrays(quantised, to_host_arrays(build_model(config, seed=1)).items()))
    ours, theirs = both(quantised, arrays, adapter=EVERYTHING, optimizer=AdamWSettings(epsilon=1e-4))
    assert difference(ours.runner().forward(TOKENS), theirs.runner().forward(TOKENS)) < 1e-5
    for i in range(3):
        a, b = ours.step([batch(i)], 3e-3), theirs.step([batch(i)], 3e-3)
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
    assert difference(numpys(ours.weights()), numpys(theirs.weights())) < 1e-5
    with pytest.raises(ValueError, match="train an adapter over it"):
        make(config=quantised, arrays=arrays)


@pytest.mark.parametrize("scheme", ["", "int4"])
def test_products_in_bfloat16_train_an_adapter_about_as_float32_does(scheme):
    config = dataclasses.replace(SMALL, quantization=scheme)
    low, high = (make(config=config, adapter=EVERYTHING, precision=one) for one in ("bf16", "fp32"))
    for i in range(5):
        a, b = low.step([batch(i)], 1e-2), high.step([batch(i)], 1e-2)
        assert a.loss == pytest.approx(b.loss, rel=0.02)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=0.05)
    assert all(array.dtype == "F32" for array in low.weights().values())


@pytest.mark.medium
@pytest.mark.parametrize("scheme", ["", "int4"])
def test_a_compiled_step_trains_an_adapter_as_an_uncompiled_one(scheme):
    config = dataclasses.replace(SMALL, quantization=scheme)
    settings = dataclasses.replace(EVERYTHING, dropout=0.3)
    eager, compiled = (make(config=config, adapter=settings, compile=flag) for flag in (False, True))
    for i in range(4):
        data = [batch(i), batch(i + 9)]
        assert compiled.step(data, 1e-3).loss == pytest.approx(eager.step(data, 1e-3).loss, rel=1e-5)
    assert compiled.evaluate(batch()).nats == pytest.approx(eager.evaluate(batch()).nats, rel=1e-5)


@pytest.fixture
def saved(tmp_path):
    """A base and an adapter over it, trained a little."""
    base = save_base(tmp_path / "base")
    _, step = both(arrays=model_directory.load_tensors(base), adapter=EVERYTHING)
    (tmp_path / "adapter").mkdir()
    named = BaseModel(str(base), weights_digest(base))
    AdapterFiles(EVERYTHING, named).save(tmp_path / "adapter", CONFIG, step.weights())
    return tmp_path / "adapter"


def logits(model, adapters=None):
    return np.array(model(mx.array(TOKENS), adapters=adapters).logits_BTV)


def test_merged_equals_unmerged_and_taking_it_away_restores_the_base(saved):
    opened = open_adapter(saved)
    arrays = model_directory.load_tensors(opened.base)
    model = build_model(CONFIG, arrays)
    unmerged = logits(model, lora.loaded_adapter(model, opened.adapter))
    before = numpys(to_host_arrays(model))
    lora.merge(model, opened.adapter)
    np.testing.assert_allclose(logits(model), unmerged, atol=1e-5)
    merged = dict(lora.merged_arrays(arrays, opened.adapter))
    np.testing.assert_allclose(logits(build_model(CONFIG, merged)), unmerged, atol=1e-5)
    theirs = dict(torch_lora.merged_arrays(model_directory.load_tensors(opened.base), opened.adapter))
    assert difference(numpys(merged), numpys(theirs)) < 1e-6
    lora.unmerge(model, opened.adapter)
    assert difference(numpys(to_host_arrays(model)), before) < 1e-6


def test_a_quantised_base_merges_to_what_pytorch_writes(saved):
    config = dataclasses.replace(CONFIG, quantization="int4")
    opened = open_adapter(saved)
    adapter = dataclasses.replace(opened.adapter, config=config)
    arrays = dict(quantize_arrays(config, model_directory.load_tensors(opened.base).items()))
    ours, theirs = dict(lora.merged_arrays(arrays, adapter)), dict(torch_lora.merged_arrays(arrays, adapter))
    assert {array.dtype for array in ours.values()} == {"BF16"}
    assert difference(numpys(ours), numpys(theirs)) < 2**-7, "a unit in the last place of bfloat16"
    with pytest.raises(ValueError, match="take no sums"):
        lora.merge(build_model(config, arrays), adapter)


def test_weights_that_do_not_fit_are_refused():
    step = make(adapter=EVERYTHING)
    weights = step.weights()
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    with pytest.raises(ValueError, match=f"the weights lack {name}"):
        copy_host_arrays(step.optimizer.parameters, {key: value for key, value in weights.items() if key != name})
    damaged = weights | {name: dataclasses.replace(weights[name], data=memoryview(b"\xff" * len(weights[name].data)))}
    with pytest.raises(ValueError, match="NaN or infinite"):
        step.load_state(damaged, step.state())
    with pytest.raises(ValueError, match=r"no lm_head of its own"):
        make(config=dataclasses.replace(CONFIG, tie_word_embeddings=True), adapter=LoraSettings(targets=("lm_head",)))
