"""Adapters held to peft: logits, gradients, files in both directions; merging; training, also over quantised bases."""

import warnings
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
import transformers

from llamita.backend.objectives import Classification
from llamita.backend.torch.model import lora, quantize
from llamita.backend.torch.model.weights import (
    build_model,
    host_from_tensor,
    quantize_arrays,
    tensor_from_host,
    to_host_arrays,
)
from llamita.backend.torch.train.step import build_train_step
from llamita.data.batches import Batch
from llamita.model.config import ModelConfig
from llamita.model.lora import UP, LoraSettings
from llamita.storage import model_directory
from llamita.storage.peft_directory import AdapterFiles, BaseModel, open_adapter, weights_digest

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    tie_word_embeddings=False,
)
TOKENS = torch.randint(0, 61, (3, 12), generator=torch.Generator().manual_seed(5))
TARGETS = [("all",), ("q_proj", "v_proj"), ("gate_proj",), ("k_proj", "down_proj", "lm_head"), ("o_proj", "up_proj")]


def save_base(directory, config=CONFIG, seed=1):
    model = build_model(config, seed=seed)
    directory.mkdir(parents=True)
    model_directory.save_config(directory, config)
    model_directory.save_tensors(directory, to_host_arrays(model))
    return directory


def make(config=CONFIG, arrays=None, **options):
    return build_train_step(config, arrays, **{"precision": "fp32", "device": "cpu", "seed": 3, **options})


def shake(step, seed=9):
    """Values for B, which begins as zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in step.adapter.parameters().items():
        if name.endswith(UP):
            value.data.normal_(std=0.1, generator=generator)
    return step


def batch(seed=0, rows=4, T=12):
    generator = np.random.Generator(np.random.Philox(key=seed))
    block = generator.integers(0, 61, (rows, T + 1), dtype=np.int32)
    return Batch(block[:, :-1], block[:, 1:].copy(), None, np.arange(rows, dtype=np.int64))


def labelled(rows=4, T=12):
    labels = np.full((rows, T), -100, dtype=np.int32)
    labels[:, -1] = np.arange(rows) % 3
    return replace(batch(), labels_BT=labels)


def save_adapter(directory, step, settings, base):
    directory.mkdir()
    named = BaseModel(str(base), weights_digest(base))
    AdapterFiles(settings, named).save(directory, step.model.config, step.weights())
    return directory


def peft_model(base, adapter=None, kind=transformers.AutoModelForCausalLM, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind.from_pretrained(base, dtype=torch.float32, **options)
        return peft.PeftModel.from_pretrained(model, adapter) if adapter else model


def adapted(directory):
    """Logits of our model of an adapter directory, through the adapter."""
    opened = open_adapter(directory)
    arrays = opened.adapter.over(model_directory.load_tensors(opened.base))
    model = build_model(opened.adapter.config, arrays)
    return model(TOKENS, adapters=lora.loaded_adapter(model, opened.adapter)).logits_BTV


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("targets", TARGETS)
def test_peft_opens_ours_with_equal_logits_and_gradients(tmp_path, targets, stabilized):
    base = save_base(tmp_path / "base")
    settings = LoraSettings(4, 12, targets=targets, rank_stabilized=stabilized)
    step = shake(make(arrays=model_directory.load_tensors(base), adapter=settings))
    directory = save_adapter(tmp_path / "adapter", step, settings, base)
    theirs = peft_model(base, directory)
    with torch.no_grad():
        logits = step.model(TOKENS, adapters=step.adapter).logits_BTV
        assert (logits - build_model(CONFIG, model_directory.load_tensors(base))(TOKENS).logits_BTV).abs().max() > 0.01
        close(logits, theirs(TOKENS).logits)
        close(adapted(directory), theirs(TOKENS).logits)

    gradients = {}
    step.optimizer.step = lambda *_: gradients.update(
        (each.name, each.parameter.grad.clone()) for each in step.optimizer.parameters
    )
    data = batch()
    result = step.step([data], 0.0)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in name)
    logits = theirs(torch.from_numpy(data.tokens_BT).long()).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(data.labels_BT).long().flatten())
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), abs=1e-5)
    expected = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if "lora_" in name
    }
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-4)
    assert all(p.grad is None for p in step.model.parameters())


PEFT_FORMS = [
    {"target_modules": r".*layers\.1\..*\.(q|up)_proj"},
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"layers.0.mlp.down_proj": 2}, "use_rslora": True},
    {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 3}, "rank_pattern": {"q_proj": 5}},
    {"target_modules": ["k_proj", "o_proj"], "layers_to_transform": [1]},
    {"target_modules": ["gate_proj", "lm_head"], "exclude_modules": ["layers.0.mlp.gate_proj"]},
]


@pytest.mark.parametrize("form", PEFT_FORMS, ids=str)
def test_ours_opens_what_peft_wrote(tmp_path, form):
    base = save_base(tmp_path / "base")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            peft_model(base), peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **form)
        )
        theirs.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        close(adapted(tmp_path / "adapter"), theirs.eval()(TOKENS).logits)


@pytest.mark.parametrize("tuning", ["lora", "head"])
def test_a_classifier_trains_its_head_beside_the_adapter_or_alone(tmp_path, tuning):
    base = save_base(tmp_path / "base")
    config = replace(CONFIG, num_labels=3)
    arrays = {k: v for k, v in model_directory.load_tensors(base).items() if k != "lm_head.weight"}
    arrays["score.weight"] = to_host_arrays(build_model(config, seed=2))["score.weight"]
    settings = LoraSettings(4, 8) if tuning == "lora" else None
    options = {"adapter": settings} if settings else {"trainable": "score.weight".__eq__}
    step = make(config, arrays, objective=Classification(), **options)
    before = {name: value.detach().clone() for name, value in step.model.canonical_state().items()}
    for _ in range(2):  # A learns once B is no longer zero
        step.step([labelled()], 1e-2)
    after = step.model.canonical_state()
    assert [name for name in after if not torch.equal(after[name], before[name])] == ["score.weight"]
    moments = {name.partition(".")[2] for name in step.state()} - {""}
    assert "score.weight" in moments
    assert all("lora" in name or name == "score.weight" for name in moments)
    if tuning == "head":
        assert step.weights().keys() == before.keys()
        return
    directory = save_adapter(tmp_path / "adapter", step, settings, base)
    theirs = peft_model(base, directory, transformers.AutoModelForSequenceClassification, num_labels=3, pad_token_id=0)
    with torch.no_grad():
        states = adapted(directory)
        close(states, step.model(TOKENS, adapters=step.adapter).logits_BTV)
        opened = open_adapter(directory)
        merged = dict(lora.merged_arrays(model_directory.load_tensors(base), opened.adapter))
        close(build_model(config, merged).eval()(TOKENS).logits_BTV, states)
        close(states[:, -1], theirs(TOKENS, attention_mask=torch.ones_like(TOKENS)).logits)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("targets", [("all",), ("q_proj", "lm_head")])
def test_an_adapter_over_quantised_weights_trains_as_over_the_same_weights_dequantised(scheme, targets):
    config = replace(CONFIG, quantization=scheme)
    plain = to_host_arrays(build_model(CONFIG, seed=1))
    quantised = dict(quantize_arrays(config, plain.items()))
    wide = {}
    for name, array in plain.items():  # float32, so that nothing is rounded a second time
        values = tensor_from_host(quantised[name])
        if f"{name}_scale" in quantised:
            scale = tensor_from_host(quantised[f"{name}_scale"])
            values = quantize.dequantize(values, scale, array.shape[1], torch.float32)
        wide[name] = host_from_tensor(values.float())
    settings = LoraSettings(4, 8, targets=targets)
    ours, reference = (
        shake(make(config, quantised, adapter=settings)), shake(make(CONFIG, wide, adapter=settings))
    )  # fmt: skip
    for i in range(3):
        a, b = ours.step([batch(i)], 1e-3), reference.step([batch(i)], 1e-3)
        assert a.loss == pytest.approx(b.loss, rel=1e-6)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
    expected = reference.weights()
    for name, array in ours.weights().items():
        np.testing.assert_allclose(array.to_numpy(), expected[name].to_numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="train an adapter over it"):
        make(config, quantised)
    with pytest.raises(ValueError, match="are not compiled"):
        make(config, quantised, adapter=settings, compile=True)


def test_what_a_quantised_product_keeps_for_its_backward_pass_is_not_the_dequantised_weight():
    config = replace(CONFIG, quantization="int4")
    model = build_model(config, seed=1).train()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        hidden = torch.randn(1, 3, 32, requires_grad=True)
        model.model.layers[0].mlp.gate_up_proj(hidden).sum().backward()
    assert all(t.numel() <= hidden.numel() for t in kept)
    assert hidden.grad.abs().sum() > 0


def test_merged_equals_unmerged_and_taking_it_away_restores_the_base(tmp_path):
    base = save_base(tmp_path / "base")
    settings = LoraSettings(4, 8, targets=("all", "lm_head"), rank_stabilized=True)
    step = shake(make(arrays=model_directory.load_tensors(base), adapter=settings))
    opened = open_adapter(save_adapter(tmp_path / "adapter", step, settings, base))
    arrays = model_directory.load_tensors(base)
    model = build_model(CONFIG, arrays).eval()
    before = {name: value.clone() for name, value in model.canonical_state().items()}
    with torch.no_grad():
        unmerged = adapted(opened.directory)
        lora.merge(model, opened.adapter)
        close(model(TOKENS).logits_BTV, unmerged)
        written = build_model(CONFIG, dict(lora.merged_arrays(arrays, opened.adapter))).eval()
        close(written(TOKENS).logits_BTV, unmerged)
        lora.unmerge(model, opened.adapter)
    for name, value in model.canonical_state().items():
        close(value, before[name], atol=1e-6)


def test_dropout_is_drawn_in_training_alone():
    step = shake(make(adapter=LoraSettings(4, 8, 0.5, ("all", "lm_head"))))
    plain = shake(make(adapter=LoraSettings(4, 8, 0.0, ("all", "lm_head"))))
    assert step.evaluate(batch()) == step.evaluate(batch()) == plain.evaluate(batch())
    assert step.step([batch()], 0.0).loss != plain.step([batch()], 0.0).loss


@pytest.mark.parametrize("scheme", ["", "int4"])
def test_products_in_bfloat16_train_an_adapter_about_as_float32_does(scheme):
    config = replace(CONFIG, quantization=scheme)
    plain = to_host_arrays(build_model(CONFIG, seed=1))
    arrays = dict(quantize_arrays(config, plain.items())) if scheme else plain
    settings = LoraSettings(4, 8, 0.1, ("all", "lm_head"))
    low, high = (shake(make(config, arrays, adapter=settings, precision=one)) for one in ("bf16", "fp32"))
    for i in range(3):
        a, b = low.step([batch(i)], 1e-3), high.step([batch(i)], 1e-3)
        assert a.loss == pytest.approx(b.loss, rel=0.02)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=0.05)
    assert all(each.parameter.dtype == torch.float32 for each in low.optimizer.parameters)


def test_an_output_head_that_is_the_embedding_is_not_adapted_alone():
    with pytest.raises(ValueError, match="no lm_head of its own"):
        make(replace(CONFIG, tie_word_embeddings=True), adapter=LoraSettings(targets=("lm_head",)))


@pytest.mark.medium
def test_a_compiled_step_trains_an_adapter_as_an_uncompiled_one():
    settings = LoraSettings(4, 8, targets=("all", "lm_head"))
    a, b = (shake(make(adapter=settings, compile=compiled)) for compiled in (True, False))
    for i in range(2):
        assert a.step([batch(i)], 1e-3).loss == pytest.approx(b.step([batch(i)], 1e-3).loss, rel=1e-5)
