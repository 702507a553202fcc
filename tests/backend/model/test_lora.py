"""Adapters of both backends held to peft: logits, loss, gradients, files in both directions; merging; training, also
over quantised bases; and handed over from one backend to the other."""

import dataclasses
import warnings

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers

from llamita.backend.adamw import AdamWSettings
from llamita.backend.objectives import Classification
from llamita.model.host_array import HostArray
from llamita.model.lora import DOWN, UP, LoraSettings
from llamita.storage import model_directory
from llamita.storage.peft_directory import AdapterFiles, BaseModel, open_adapter, weights_digest
from tests.backend.adapters import (
    CONFIG,
    EVERYTHING,
    TOKENS,
    WHOLE_GROUPS,
    batch,
    difference,
    fresh,
    labelled,
    save_adapter,
    save_base,
    shake,
)
from tests.backend.frameworks import NAMES, host, make, to_numpy
from tests.backend.models import dequantized
from tests.backend.steps import same
from tests.backend.tolerances import DEQUANTIZED_TRAINING

TARGETS = [("all",), ("q_proj", "v_proj"), ("gate_proj",), ("k_proj", "down_proj", "lm_head"), ("o_proj", "up_proj")]


def peft_model(base, adapter=None, kind=transformers.AutoModelForCausalLM, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind.from_pretrained(base, dtype=torch.float32, **options)
        return peft.PeftModel.from_pretrained(model, adapter) if adapter else model


def logits_of(runner):
    return runner.forward(TOKENS)["logits"]


def adapted(framework, directory):
    """Logits of our model of an adapter directory, through the adapter."""
    return logits_of(framework.backend.load_runner(directory, "float32", "cpu"))


def close(found, expected, atol=1e-5):
    np.testing.assert_allclose(found, np.asarray(expected), atol=atol, rtol=1e-5)


@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("targets", TARGETS)
def test_peft_opens_ours_with_equal_logits_and_gradients(framework, tmp_path, targets, stabilized):
    base = save_base(tmp_path / "base")
    settings = LoraSettings(4, 12, targets=targets, rank_stabilized=stabilized)
    step = shake(framework.train_step(CONFIG, model_directory.load_tensors(base), adapter=settings))
    directory = save_adapter(tmp_path / "adapter", CONFIG, step.weights(), settings, base)
    theirs, data = peft_model(base, directory), batch()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(TOKENS)).logits.numpy()
    found = logits_of(step.runner())
    assert np.abs(found - logits_of(framework.runner_over(CONFIG, fresh(CONFIG)))).max() > 0.01
    close(found, expected)
    close(adapted(framework, directory), expected)

    result, gradients = framework.update_gradients(step, [data])
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in name)
    logits_BTV = theirs(torch.from_numpy(data.tokens_BT).long()).logits
    labels_BT = torch.from_numpy(data.labels_BT).long()
    log_probs_BT = logits_BTV.log_softmax(-1).gather(-1, labels_BT[..., None])[..., 0]
    close(step.log_probs(data), log_probs_BT.detach())
    loss = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), abs=1e-5)
    expected = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad.numpy()
        for name, parameter in theirs.named_parameters()
        if "lora_" in name
    }
    assert gradients.keys() == expected.keys() == step.weights().keys(), "of the adapter alone"
    for name, gradient in expected.items():
        np.testing.assert_allclose(gradients[name], gradient, atol=1e-6, rtol=1e-4)


PEFT_FORMS = [
    {"target_modules": r".*layers\.1\..*\.(q|up)_proj"},
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"layers.0.mlp.down_proj": 2}, "use_rslora": True},
    {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 3}, "rank_pattern": {"q_proj": 5}},
    {"target_modules": ["k_proj", "o_proj"], "layers_to_transform": [1]},
    {"target_modules": ["gate_proj", "lm_head"], "exclude_modules": ["layers.0.mlp.gate_proj"]},
]


@pytest.mark.parametrize("form", PEFT_FORMS, ids=str)
def test_ours_opens_what_peft_wrote(framework, tmp_path, form):
    base = save_base(tmp_path / "base")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            peft_model(base), peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **form)
        )
        theirs.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        close(adapted(framework, tmp_path / "adapter"), theirs.eval()(torch.from_numpy(TOKENS)).logits)


def classifier(base):
    """Its config and arrays: the base's, and a head of its own."""
    config = dataclasses.replace(CONFIG, num_labels=3)
    arrays = {k: v for k, v in model_directory.load_tensors(base).items() if k != "lm_head.weight"}
    return config, arrays | {"score.weight": fresh(config, seed=2)["score.weight"]}


@pytest.mark.parametrize("tuning", ["lora", "head"])
def test_a_classifier_trains_its_head_beside_the_adapter_or_alone(framework, tmp_path, tuning):
    base = save_base(tmp_path / "base")
    config, arrays = classifier(base)
    settings = LoraSettings(4, 8) if tuning == "lora" else None
    options = {"adapter": settings} if settings else {"trainable": "score.weight".__eq__}
    step = framework.train_step(config, arrays, objective=Classification(), **options)
    for _ in range(2):  # A learns once B is no longer zero
        step.step([labelled()], 1e-2)
    after = framework.weights.to_host_arrays(step.model)
    changed = [name for name, array in after.items() if bytes(array.data) != bytes(arrays[name].data)]
    assert changed == ["score.weight"]
    moments = {name.partition(".")[2] for name in step.state()} - {""}
    assert "score.weight" in moments
    assert all("lora" in name or name == "score.weight" for name in moments)
    if tuning == "head":
        assert step.weights().keys() == arrays.keys()
        return
    assert step.weights().keys() == moments
    directory = save_adapter(tmp_path / "adapter", config, step.weights(), settings, base)
    theirs = peft_model(base, directory, transformers.AutoModelForSequenceClassification, num_labels=3, pad_token_id=0)
    tokens, found = torch.from_numpy(TOKENS), adapted(framework, directory)
    close(found, logits_of(step.runner()))
    merged = framework.backend.merged_arrays(model_directory.load_tensors(base), open_adapter(directory).adapter)
    close(logits_of(framework.runner_over(config, dict(merged))), found)
    with torch.no_grad():
        close(found[:, -1], theirs(tokens, attention_mask=torch.ones_like(tokens)).logits)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("targets", [("all",), ("q_proj", "lm_head"), ("all", "lm_head")])
@pytest.mark.parametrize("config", [CONFIG, WHOLE_GROUPS], ids=["some dequantised", "all in the kernel's form"])
def test_an_adapter_over_quantised_weights_trains_as_over_the_same_weights_dequantised(
    framework, config, scheme, targets
):
    quantized = dataclasses.replace(config, quantization=scheme)
    stored = dict(framework.backend.quantize_arrays(quantized, fresh(config).items()))
    wide = {name: dequantized(stored)[name][..., : array.shape[-1]] for name, array in fresh(config).items()}
    options = {"adapter": LoraSettings(4, 8, targets=targets), "optimizer": AdamWSettings(epsilon=1e-4)}
    ours = shake(framework.train_step(quantized, stored, **options))
    plain = shake(framework.train_step(config, host(wide), **options))
    assert difference({"": logits_of(ours.runner())}, {"": logits_of(plain.runner())}) < 1e-5
    loss, norm = DEQUANTIZED_TRAINING[framework.name]
    for i in range(3):
        a, b = ours.step([batch(i)], 1e-3), plain.step([batch(i)], 1e-3)
        assert a.loss == pytest.approx(b.loss, rel=loss)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=norm)
    expected = plain.weights()
    for name, array in ours.weights().items():
        np.testing.assert_allclose(array.to_numpy(), expected[name].to_numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="train an adapter over it"):
        framework.train_step(quantized, stored)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dropout_is_drawn_in_training_alone_and_a_resumed_run_draws_it_again(framework, precision):
    settings = dataclasses.replace(EVERYTHING, dropout=0.5)
    step, plain = (framework.train_step(CONFIG, adapter=each, precision=precision) for each in (settings, EVERYTHING))
    for _ in range(2):
        step.step([batch(), batch(1)], 1e-2)
    plain.load_state(step.weights(), step.state())
    assert step.evaluate(batch()) == step.evaluate(batch()) == plain.evaluate(batch())
    assert step.step([batch()], 0.0).loss != plain.step([batch()], 0.0).loss
    resumed = framework.train_step(CONFIG, adapter=settings, precision=precision)
    resumed.load_state(step.weights(), step.state())
    assert resumed.step([batch()], 1e-2) == step.step([batch()], 1e-2)
    assert same(resumed.weights(), step.weights())


@pytest.mark.parametrize("scheme", ["", "int4"])
def test_products_in_bfloat16_train_an_adapter_about_as_float32_does(framework, scheme):
    config, arrays = dataclasses.replace(WHOLE_GROUPS, quantization=scheme), fresh(WHOLE_GROUPS)
    if scheme:
        arrays = dict(framework.backend.quantize_arrays(config, arrays.items()))
    settings = dataclasses.replace(EVERYTHING, dropout=0.1)
    low, high = (
        shake(framework.train_step(config, arrays, adapter=settings, precision=each)) for each in ("bf16", "fp32")
    )
    for i in range(5):
        a, b = low.step([batch(i)], 1e-3), high.step([batch(i)], 1e-3)
        assert a.loss == pytest.approx(b.loss, rel=0.02)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=0.05)
    assert all(array.dtype == "F32" for array in low.weights().values())


def test_an_output_head_that_is_the_embedding_is_not_adapted_alone(framework):
    with pytest.raises(ValueError, match="no lm_head of its own"):
        framework.train_step(
            dataclasses.replace(CONFIG, tie_word_embeddings=True), adapter=LoraSettings(targets=("lm_head",))
        )


def test_weights_that_do_not_fit_are_refused(framework):
    step = framework.train_step(CONFIG, adapter=EVERYTHING)
    weights, name = step.weights(), "model.layers.0.self_attn.q_proj.lora_A.weight"
    with pytest.raises(ValueError, match=f"the weights lack {name}"):
        step.load_state({key: value for key, value in weights.items() if key != name}, step.state())
    damaged = weights | {name: HostArray.from_numpy(np.full(weights[name].shape, np.nan, np.float32))}
    with pytest.raises(ValueError, match="NaN or infinite"):
        step.load_state(damaged, step.state())


# --- merging ---


@pytest.fixture
def saved(tmp_path):
    """A base and an adapter over it that changes much."""
    base = save_base(tmp_path / "base")
    settings = dataclasses.replace(EVERYTHING, rank_stabilized=True)
    step = shake(make("torch").train_step(CONFIG, model_directory.load_tensors(base), adapter=settings))
    return save_adapter(tmp_path / "adapter", CONFIG, step.weights(), settings, base)


def summed(plain, adapter):
    """W + scale B A in float64, by name."""
    found = {name: array.astype(np.float64) for name, array in plain.items()}
    for module, factors in adapter.factors.items():
        down_RD, up_CR = (adapter.arrays[module + kind].to_numpy().astype(np.float64) for kind in (DOWN, UP))
        found[f"{module}.weight"] += factors.scale * (up_CR @ down_RD)
    return found


def test_merged_equals_unmerged_and_taking_it_away_restores_the_base(framework, saved):
    opened = open_adapter(saved)
    arrays = model_directory.load_tensors(opened.base)
    unmerged = adapted(framework, saved)
    model = framework.build_model(CONFIG, arrays)
    framework.lora.merge(model, opened.adapter)
    close(framework.logits(model, TOKENS), unmerged)
    merged = dict(framework.backend.merged_arrays(arrays, opened.adapter))
    close(logits_of(framework.runner_over(CONFIG, merged)), unmerged)
    assert difference(merged, summed(to_numpy(arrays), opened.adapter)) < 1e-6
    framework.lora.unmerge(model, opened.adapter)
    assert difference(framework.weights.to_host_arrays(model), arrays) < 1e-6


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_quantised_base_merges_to_sums_of_what_it_stands_for(framework, saved, scheme):
    config, opened = dataclasses.replace(CONFIG, quantization=scheme), open_adapter(saved)
    adapter = dataclasses.replace(opened.adapter, config=config)
    plain = model_directory.load_tensors(opened.base)
    stored = dict(framework.backend.quantize_arrays(config, plain.items()))
    merged = dict(framework.backend.merged_arrays(stored, adapter))
    assert {array.dtype for array in merged.values()} == {"BF16"}
    values = {name: dequantized(stored)[name][..., : array.shape[-1]] for name, array in plain.items()}
    assert difference(dequantized(merged), summed(values, adapter)) < 2**-8, "rounded once to bfloat16"
    with pytest.raises(ValueError, match="take no sums"):
        framework.lora.merge(framework.build_model(config, stored), adapter)


# --- both backends beside each other ---


def test_ten_updates_of_a_fresh_adapter_are_the_same_and_leave_the_base_alone():
    """Micro-batches, clipping and decay included."""
    options = {"adapter": EVERYTHING, "max_grad_norm": 1.0, "optimizer": AdamWSettings(weight_decay=0.1)}
    frameworks = [make(name) for name in NAMES]
    theirs, ours = (each.train_step(CONFIG, fresh(CONFIG), **options) for each in frameworks)
    assert same(ours.weights(), theirs.weights()), "the same beginning, bit for bit"
    for i in range(10):
        data = [batch(2 * i), batch(2 * i + 1, rows=2)]
        a, b = ours.step(data, 3e-3), theirs.step(data, 3e-3)
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
    assert difference(ours.weights(), theirs.weights()) < 1e-5
    for framework, step in zip(frameworks, (theirs, ours), strict=True):
        assert same(framework.weights.to_host_arrays(step.model), fresh(CONFIG))
        moments = {name.partition(".")[2] for name in step.state()} - {""}
        assert moments == step.weights().keys() == step.adapter.parameters().keys()


def test_a_classifier_s_updates_are_the_same(tmp_path):
    config, arrays = classifier(save_base(tmp_path / "base"))
    options = {"adapter": LoraSettings(4, 8), "objective": Classification()}
    ours, theirs = (shake(make(name).train_step(config, arrays, **options)) for name in NAMES)
    for _ in range(3):
        a, b = (step.step([labelled()], 1e-2) for step in (ours, theirs))
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.measures == b.measures
    assert "score.weight" in ours.weights()
    assert difference(ours.weights(), theirs.weights()) < 1e-4


@pytest.mark.parametrize(("begun_on", "other"), [NAMES, NAMES[::-1]])
def test_a_run_s_adapter_goes_on_in_the_other_backend(tmp_path, begun_on, other):
    """Through files; five further updates differ by rounding alone."""
    base = save_base(tmp_path / "base")
    options = {"adapter": EVERYTHING, "optimizer": AdamWSettings(epsilon=1e-4)}
    first, second = (
        make(name).train_step(CONFIG, model_directory.load_tensors(base), seed=seed, **options)
        for name, seed in ((begun_on, 3), (other, 4))
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
    assert difference(second.weights(), first.weights()) < 1e-5
