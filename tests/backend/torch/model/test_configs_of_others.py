"""A config.json as people have it, old keys beside new ones, or weights beside it that say otherwise: read as
transformers reads it."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llamita.backend import opening
from llamita.backend.torch.backend import BACKEND
from llamita.backend.torch.model import weights
from llamita.model.config import ModelConfig
from llamita.storage import model_directory
from llamita.workflows.classify import Classifier

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": None,
}  # fmt: skip
LINEAR = {"type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
DEFAULT = {"rope_type": "default", "rope_theta": 500000.0}
NESTED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 300000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
}
ABSENT = object()

# model type, and the keys of its config.json that are changed; ABSENT: the key is taken out
EDITS: dict[str, tuple[str, dict[str, Any]]] = {
    "theta alone": ("llama", {"rope_parameters": ABSENT, "rope_theta": 700.0}),
    "no theta at all": ("llama", {"rope_parameters": ABSENT}),
    "theta inside before theta beside": ("llama", {"rope_parameters": DEFAULT, "rope_theta": 700.0}),
    "theta beside where there is none inside": (
        "llama", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 700.0},
    ),
    "theta null inside is none": ("llama", {"rope_parameters": ABSENT, "rope_scaling": None, "rope_theta": 700.0}),
    "scaling before parameters": ("llama", {"rope_parameters": DEFAULT, "rope_scaling": LINEAR}),
    "scaling before parameters, theta beside": (
        "llama", {"rope_parameters": DEFAULT, "rope_scaling": LINEAR, "rope_theta": 700.0},
    ),
    "scaling with a theta of its own": (
        "llama", {"rope_parameters": ABSENT, "rope_scaling": {**LINEAR, "rope_theta": 99.0}, "rope_theta": 700.0},
    ),
    "scaling that says default": (
        "llama", {"rope_parameters": {**LINEAR, "rope_theta": 700.0}, "rope_scaling": {"rope_type": "default"}},
    ),
    "empty scaling": ("llama", {"rope_parameters": {**LINEAR, "rope_theta": 700.0}, "rope_scaling": {}}),
    "two scalings": ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 700.0}, "rope_scaling": YARN}),
    "rope_type before type": ("llama", {"rope_parameters": ABSENT, "rope_scaling": {**LLAMA3, "type": "linear"}}),
    "the first length beside": (
        "llama", {"rope_parameters": ABSENT, "rope_scaling": LLAMA3, "original_max_position_embeddings": 128},
    ),
    "a first length that is written as 32.0": (
        "llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32.0, "rope_theta": 10000.0}},
    ),
    "no first length": (
        "llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "yarn, factor from the lengths": ("llama", {"rope_parameters": {**YARN, "factor": None, "rope_theta": 10000.0}}),
    "yarn, betas of nought": (
        "llama", {"rope_parameters": {**YARN, "beta_fast": 0, "beta_slow": None, "rope_theta": 10000.0}},
    ),
    "yarn, truncate null is false": ("llama", {"rope_parameters": {**YARN, "truncate": None, "rope_theta": 10000.0}}),
    "yarn, truncate false": ("qwen3", {"rope_parameters": ABSENT, "rope_scaling": {**YARN, "truncate": False}}),
    "no rms_norm_eps": ("llama", {"rms_norm_eps": ABSENT}),
    "no head_dim": ("llama", {"head_dim": ABSENT}),
    "no key/value heads": ("llama", {"num_key_value_heads": ABSENT}),
    "a window in mistral's way": ("mistral", {"sliding_window": 8}),
    "mistral whose layers all slide": ("mistral", {"sliding_window": 8, "layer_types": ["sliding_attention"] * 4}),
    "mistral whose layers all see far": ("mistral", {"sliding_window": 8, "layer_types": ["full_attention"] * 4}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "qwen 2, layers that slide by default": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": ABSENT, "layer_types": ABSENT},
    ),
    "qwen 2, layers that slide": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "layer_types": ABSENT},
    ),
    "qwen 2, layer_types before max_window_layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4,
         "layer_types": ["full_attention"] + ["sliding_attention"] * 3},
    ),
    "qwen 3, scaling beside parameters": ("qwen3", {"rope_parameters": DEFAULT, "rope_scaling": LINEAR}),
    "smollm 3, no theta": ("smollm3", {"rope_parameters": ABSENT}),
    "granite, old keys": ("granite", {"rope_parameters": ABSENT, "rope_theta": 700.0, "rope_scaling": None}),
    "olmo 2, no theta": ("olmo2", {"rope_parameters": ABSENT, "rms_norm_eps": ABSENT}),
    "gemma 2, activation under the older name": ("gemma2", {"hidden_activation": ABSENT, "hidden_act": "gelu"}),
    "gemma 2, a pattern that it does not read": (
        "gemma2", {"layer_types": ABSENT, "sliding_window_pattern": 3, "sliding_window": 8},
    ),
    "gemma 3, old keys": (
        "gemma3_text",
        {"rope_parameters": ABSENT, "rope_theta": 300000.0, "rope_local_base_freq": 700.0, "rope_scaling": LINEAR},
    ),
    "gemma 3, no keys": ("gemma3_text", {"rope_parameters": ABSENT}),
    "gemma 3, scaling over parameters": (
        "gemma3_text", {"rope_parameters": NESTED, "rope_scaling": {"factor": 2.0}, "rope_theta": 5.0},
    ),
    "gemma 3, thetas inside before thetas beside": (
        "gemma3_text", {"rope_parameters": NESTED, "rope_theta": 700.0, "rope_local_base_freq": 5.0},
    ),
    "gemma 3, parameters for all layers": ("gemma3_text", {"rope_parameters": DEFAULT}),
    "gemma 3, a pattern": (
        "gemma3_text", {"layer_types": ABSENT, "sliding_window_pattern": 2, "_sliding_window_pattern": 3},
    ),
    "gemma 3, a pattern under another name": ("gemma3_text", {"layer_types": ABSENT, "_sliding_window_pattern": 2}),
}  # fmt: skip


def made(directory: Path, model_type: str, head: str = "CausalLM", **more: Any) -> Path:
    """A small model of transformers with random weights, saved."""
    config = transformers.AutoConfig.for_model(model_type, **SIZES | {"tie_word_embeddings": False} | more)
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter) if parameter.ndim == 1 else parameter * 3
    model.save_pretrained(directory)
    return directory


def edit(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ABSENT}))


def edit_weights(directory: Path, change: Any) -> None:
    arrays = load_file(directory / "model.safetensors")
    change(arrays)
    save_file({name: array.contiguous() for name, array in arrays.items()}, directory / "model.safetensors")


@torch.inference_mode()
def logits(directory: Path, head: str = "CausalLM") -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and those of transformers."""
    tokens_BT = torch.randint(3, 96, (1, 120), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(False):
        theirs = getattr(transformers, f"AutoModelFor{head}").from_pretrained(directory, dtype=torch.float32).eval()
        config, arrays = model_directory.load_config(directory), model_directory.load_tensors(directory)
        ours = weights.build_model(config, arrays).eval()
    found = ours(tokens_BT).logits_BTV
    return (found if head == "CausalLM" else found[:, -1]), theirs(tokens_BT).logits


def check_logits(directory: Path, head: str = "CausalLM") -> None:
    ours, theirs = logits(directory, head)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("name", EDITS)
def test_the_same_key_counts(name, tmp_path):
    model_type, changes = EDITS[name]
    directory = made(tmp_path, model_type)
    edit(directory, **changes)
    check_logits(directory)
    config = model_directory.load_config(directory)
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "bfloat16"),
        ({"dtype": None, "torch_dtype": "float16"}, "float16"),
        ({"dtype": ABSENT, "torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float32", "torch_dtype": "float16"}, "float32"),
        ({"dtype": ABSENT}, "float32"),
    ],
)
def test_the_type_of_numbers(changes, expected, tmp_path):
    directory = made(tmp_path, "llama")
    edit(directory, **changes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert str(theirs.dtype) == f"torch.{expected}"
    assert opening.open_model(directory).dtype == expected
    assert opening.open_model(directory, "float32").dtype == "float32"


# --- weights that contradict the config ------------------------------------------------------------------------------


def test_tied_with_another_head(tmp_path):
    directory = made(tmp_path, "llama")
    edit(directory, tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="lm_head.weight in the weights is another: that one is used"):
        config = model_directory.load_config(directory)
    assert not config.tie_word_embeddings
    with pytest.warns(UserWarning, match="that one is used"):
        check_logits(directory)


@pytest.mark.parametrize("family", ["gemma2", "smollm3"])
def test_tied_by_default_with_another_head(family, tmp_path):
    directory = made(tmp_path, family)
    edit(directory, tie_word_embeddings=ABSENT)
    with pytest.warns(UserWarning, match="lm_head.weight in the weights is another"):
        check_logits(directory)


def test_tied_with_the_same_head_again(tmp_path):
    directory = made(tmp_path, "llama", tie_word_embeddings=True)
    edit_weights(directory, lambda arrays: arrays.update({"lm_head.weight": arrays["model.embed_tokens.weight"] * 1}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model_directory.load_config(directory).tie_word_embeddings
    check_logits(directory)


def test_tied_with_the_embedding_under_the_heads_name_alone(tmp_path):
    directory = made(tmp_path, "llama", tie_word_embeddings=True)
    edit_weights(directory, lambda arrays: arrays.update({"lm_head.weight": arrays.pop("model.embed_tokens.weight")}))
    assert model_directory.load_config(directory).tie_word_embeddings
    check_logits(directory)


def test_untied_without_a_head_is_refused(tmp_path):
    directory = made(tmp_path, "llama", tie_word_embeddings=True)
    edit(directory, tie_word_embeddings=False)  # transformers draws one at random
    with pytest.raises(ValueError, match=r"lm_head\.weight is missing"):
        logits(directory)


@pytest.mark.parametrize("switch", ["attention_bias", "mlp_bias"])
def test_biases_that_the_file_has_not(switch, tmp_path):
    directory = made(tmp_path, "llama")
    edit(directory, **{switch: True})
    with pytest.warns(UserWarning, match=f"has {switch} true, but the weights hold no such biases"):
        check_logits(directory)


def test_both_kinds_of_biases_that_the_file_has_not(tmp_path):
    directory = made(tmp_path, "smollm3")
    edit(directory, attention_bias=True, mlp_bias=True)
    with pytest.warns(UserWarning, match="the weights hold no such biases"):
        check_logits(directory)


@pytest.mark.parametrize(
    ("family", "key"), [("qwen2", "attention_bias"), ("qwen3", "mlp_bias"), ("gemma2", "mlp_bias")]
)
def test_biases_that_the_family_has_not_are_named(family, key, tmp_path):
    directory = made(tmp_path, family)
    edit(directory, **{key: True})
    with pytest.warns(UserWarning, match=f"does not know, and ignores: {key}"):
        check_logits(directory)


@pytest.mark.parametrize("switch", ["attention_bias", "mlp_bias"])
def test_biases_that_the_config_has_not(switch, tmp_path):
    directory = made(tmp_path, "llama", **{switch: True})
    edit(directory, **{switch: False})
    with pytest.warns(UserWarning, match="says that linear maps have no biases"):
        check_logits(directory)


def test_heads_of_another_kind_are_left_aside(tmp_path):
    directory = made(tmp_path / "classifier", "llama", "SequenceClassification", num_labels=3)
    edit_weights(directory, lambda arrays: arrays.update({"lm_head.weight": torch.ones(96, 64)}))
    with pytest.warns(UserWarning, match=r"does not use lm_head\.weight"):
        check_logits(directory, "SequenceClassification")
    directory = made(tmp_path / "lm", "llama")
    edit_weights(directory, lambda arrays: arrays.update({"score.weight": torch.ones(3, 64)}))
    with pytest.warns(UserWarning, match=r"does not use score\.weight"):
        check_logits(directory)


# --- names of the weights --------------------------------------------------------------------------------------------

NAMES: dict[str, Any] = {  # of a file's weights, by those that transformers writes
    "the model without its head": lambda name: name.removeprefix("model."),
    "a second prefix": lambda name: f"model.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled in data parallelism": lambda name: f"module._orig_mod.{name}",
    "data parallelism, compiled": lambda name: f"_orig_mod.module.{name}",
    "blocks compiled one by one": lambda name: re.sub(r"(layers\.\d+\.)", r"\1_orig_mod.", name),
    "blocks wrapped by FSDP": lambda name: re.sub(r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module.", name),
    "blocks that are recomputed": lambda name: re.sub(r"(layers\.\d+\.)", r"\1_checkpoint_wrapped_module.", name),
    "inside of PEFT's model": lambda name: f"base_model.model.{name}",
}


def renamed(directory: Path, rename: Any, without: str = "") -> None:
    arrays = {rename(name): array for name, array in load_file(directory / "model.safetensors").items()}
    arrays.pop(without, None)
    save_file(arrays, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "head"),
    [
        *((name, "CausalLM") for name in NAMES),
        *((name, "SequenceClassification") for name in ("the model without its head", "compiled")),
    ],
)
def test_names_with_what_wrapped_the_model(name, head, tmp_path):
    directory = made(tmp_path, "llama", head, num_hidden_layers=2)
    before, expected = logits(directory, head)
    renamed(directory, NAMES[name])
    ours, theirs = logits(directory, head)
    assert torch.equal(ours, before)
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()
    if name in ("the model without its head", "a second prefix"):  # transformers reads these two, no other
        assert torch.equal(theirs, expected)


def test_a_tied_model_saved_without_its_head_is_whole(tmp_path):
    """As embedding models are published; untied ones lack their head."""
    directory = made(tmp_path, "qwen3", tie_word_embeddings=True)
    edit(directory, architectures=["Qwen3Model"])
    renamed(directory, NAMES["the model without its head"], "lm_head.weight")
    check_logits(directory)
    edit(directory, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"do not fit config.json: lm_head.weight is missing$"):
        logits(directory)


def test_two_names_of_one_parameter_are_refused(tmp_path):
    directory = made(tmp_path, "llama")
    edit_weights(directory, lambda arrays: arrays.update({"_orig_mod.model.norm.weight": torch.ones(64)}))
    with pytest.raises(ValueError, match=r"_orig_mod\.model\.norm\.weight is not part of this model"):
        logits(directory)


def test_rotary_tables_in_the_weights_are_left_out(tmp_path):
    directory = made(tmp_path, "llama")
    names = [f"model.layers.{i}.self_attn.rotary_emb.{name}" for i in range(4) for name in ("inv_freq", "cos_cached")]
    edit_weights(directory, lambda arrays: arrays.update({name: torch.ones(8) for name in names}))
    check_logits(directory)


# --- what a head means -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "count", "names"),
    [
        ({}, 3, ("LABEL_0", "LABEL_1", "LABEL_2")),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}, 3, ("a", "b", "c")),
        ({"id2label": ABSENT, "label2id": ABSENT, "num_labels": 3}, 3, ("LABEL_0", "LABEL_1", "LABEL_2")),
        ({"id2label": {"0": "a", "1": "b"}, "num_labels": 3}, 3, ("LABEL_0", "LABEL_1", "LABEL_2")),
        ({"problem_type": "single_label_classification"}, 3, ("LABEL_0", "LABEL_1", "LABEL_2")),
        ({"problem_type": "multi_label_classification"}, 3, ("LABEL_0", "LABEL_1", "LABEL_2")),
        ({"problem_type": "regression"}, 3, ("LABEL_0", "LABEL_1", "LABEL_2")),
    ],
)
def test_labels(changes, count, names, tmp_path):
    directory = made(tmp_path, "llama", "SequenceClassification", num_labels=3)
    edit(directory, **changes)
    check_logits(directory, "SequenceClassification")
    config = model_directory.load_config(directory)
    theirs = transformers.AutoConfig.from_pretrained(directory)
    assert (config.num_labels, config.labels) == (count, names)
    assert (theirs.num_labels, tuple(theirs.id2label.values())) == (count, names)
    assert (config.problem_type or None) == theirs.problem_type
    assert config.scores_labels == (changes.get("problem_type", "single_label_classification")[0] == "s")
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_a_head_of_one_number(tmp_path):
    directory = made(tmp_path, "llama", "SequenceClassification", num_labels=1)
    check_logits(directory, "SequenceClassification")
    config = model_directory.load_config(directory)
    assert (config.num_labels, config.scores_labels) == (1, False)
    edit(directory, problem_type="single_label_classification")
    with pytest.raises(ValueError, match="requires `num_labels > 1`"):
        transformers.AutoConfig.from_pretrained(directory)
    with pytest.raises(ValueError, match="needs num_labels of 2 or more"):
        model_directory.load_config(directory)
    edit(directory, problem_type="ranking")
    with pytest.raises(ValueError, match="problem_type='ranking' must be one of single_label_classification"):
        model_directory.load_config(directory)


@pytest.mark.parametrize(
    ("count", "changes", "words"),
    [
        (1, {}, "num_labels=1 numbers are for regression"),
        (3, {"problem_type": "regression"}, "num_labels=3 numbers are for regression"),
        (3, {"problem_type": "multi_label_classification"}, "are for multi_label_classification"),
    ],
)
def test_numbers_that_are_no_probabilities_are_not_given_as_such(count, changes, words, tmp_path):
    directory = made(tmp_path, "llama", "SequenceClassification", num_labels=count)
    edit(directory, **changes)
    with pytest.raises(ValueError, match=words):
        Classifier.load(directory, BACKEND)


@pytest.mark.parametrize("head", ["TokenClassification", "QuestionAnswering"])
def test_other_heads_are_refused(head, tmp_path):
    directory = made(tmp_path, "llama", head)
    with pytest.raises(ValueError, match=rf"architectures=\['LlamaFor{head}'\] in config.json is not supported"):
        model_directory.load_config(directory)


# --- what is not mentioned -------------------------------------------------------------------------------------------

BOOKKEEPING: dict[str, Any] = {
    "_name_or_path": "somewhere", "_model_name_or_path": "elsewhere", "_commit_hash": "0a1b",
    "_attn_implementation": "sdpa",
    "model_name": "x", "unsloth_fixed": True, "unsloth_version": "2025.1", "transformers_version": "4.31.0",
    "use_cache": False, "pretraining_tp": 2, "auto_map": {"AutoModel": "m.M"}, "is_llama_config": True,
    "rope_interleaved": False, "max_length": 20, "temperature": 0.7, "do_sample": True, "top_p": 0.9,
    "torchscript": False, "pruned_heads": {}, "task_specific_params": None, "tokenizer_class": "LlamaTokenizer",
    "max_sequence_length": 2048, "finetuning_task": None, "problem_type": None,
}  # fmt: skip


def test_bookkeeping_is_not_mentioned(tmp_path):
    directory = made(tmp_path, "llama")
    edit(directory, **BOOKKEEPING)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model_directory.load_config(directory)
    edit(directory, mystery=3)
    with pytest.warns(UserWarning, match="does not know, and ignores: mystery"):
        model_directory.load_config(directory)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "granite", "gemma2"])
def test_special_tokens_that_are_not_named(model_type, tmp_path):
    directory = made(tmp_path, model_type)
    edit(directory, bos_token_id=ABSENT, eos_token_id=ABSENT, pad_token_id=ABSENT)
    ours, theirs = model_directory.load_config(directory), transformers.AutoConfig.from_pretrained(directory)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_the_weights_stay_whole(tmp_path):
    """What is settled is settled in the config: the arrays are those of the file."""
    directory = made(tmp_path, "llama")
    edit(directory, tie_word_embeddings=True)
    arrays = model_directory.load_tensors(directory)
    theirs = load_file(directory / "model.safetensors")
    assert arrays.keys() == theirs.keys()
    assert all(np.array_equal(arrays[name].to_numpy(), theirs[name].numpy()) for name in theirs)
