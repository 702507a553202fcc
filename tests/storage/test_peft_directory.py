"""Adapters that PEFT writes with whole parameters in them, held to PEFT's own logits, and merged; the others are
refused by name."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llamita.backend.torch.infer.runner import load_runner
from llamita.cli.main import main
from llamita.inference.llm import LLM
from llamita.storage import model_directory

TOKENS = [[1, 5, 9, 12, 7, 33, 80]]
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": None,
}  # fmt: skip


def made(place: Path, resized: int = 0, family: str = "llama", tied: bool = False, **settings: Any) -> np.ndarray:
    """Writes a base and an adapter with random values over it; returns PEFT's logits."""
    config = transformers.AutoConfig.for_model(family, **SIZES, tie_word_embeddings=tied)
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    base.save_pretrained(place / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied embeddings, and of a resized one that is saved
        if resized:
            base.resize_token_embeddings(resized)
        asked = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings
        model = peft.get_peft_model(base, peft.LoraConfig(**asked)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.3 * torch.randn_like(parameter)
            model.save_pretrained(place / "adapter")
            return model(torch.tensor(TOKENS)).logits.numpy()


WHOLE: dict[str, dict[str, Any]] = {
    "an output head": {"modules_to_save": ["lm_head"]},
    "embedding and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "the embedding of a tied model": {"modules_to_save": ["embed_tokens"], "tied": True},
    "both of a tied model": {"modules_to_save": ["embed_tokens", "lm_head"], "tied": True},
    "both of a tied model, tied": {
        "modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True, "tied": True,
    },
    "norms": {"modules_to_save": ["norm"]},
    "norms of heads": {"modules_to_save": ["q_norm"], "family": "qwen3"},
    "a linear map": {"modules_to_save": ["k_proj"]},
    "a feed-forward network": {"modules_to_save": ["mlp"]},
    "more tokens": {"resized": 100},
    "fewer tokens": {"resized": 90},
    "more tokens of a tied model": {"resized": 100, "tied": True},
    "more tokens that are trained": {"resized": 100, "modules_to_save": ["embed_tokens", "lm_head"]},
    "more tokens of a tied model that are trained": {
        "resized": 100, "tied": True, "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on the head of a tied model": {"target_modules": ["q_proj", "lm_head"], "tied": True},
    "some layers, named by a pattern": {"layers_to_transform": [1], "layers_pattern": "layers"},
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_logits_are_pefts_and_those_of_the_merged_model_too(name, tmp_path, capsys):
    expected = made(tmp_path, **WHOLE[name])
    ours = load_runner(tmp_path / "adapter").forward(TOKENS)["logits"]
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = merged(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(theirs, expected, atol=1e-4 * np.abs(expected).max())
    tied = model_directory.load_config(tmp_path / "merged").tie_word_embeddings
    assert tied == (name in ("both of a tied model, tied", "more tokens of a tied model"))


@pytest.mark.parametrize("place", ["", "base_model.model."])
def test_names_of_a_compiled_model(place, tmp_path):
    expected = made(tmp_path, modules_to_save=["norm"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name.replace(place, f"{place}_orig_mod.", 1): array for name, array in load_file(file).items()}, file)
    ours = load_runner(tmp_path / "adapter").forward(TOKENS)["logits"]
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())


def test_a_head_of_its_own_is_not_served_beside_others(tmp_path):
    made(tmp_path, tied=True, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="adapts the output head, which is the base's embedding; load it alone"):
        LLM.load(tmp_path / "base", backend="torch", device="cpu", adapters={"x": tmp_path / "adapter"})
    made(tmp_path, tied=True, resized=100)
    with pytest.raises(ValueError, match=r"replaces model\.embed_tokens\.weight whole, so it cannot be served beside"):
        LLM.load(tmp_path / "base", backend="torch", device="cpu", adapters={"x": tmp_path / "adapter"})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora=True is not supported"),
    "an embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, "linear maps alone are adapted"),
    "tokens": ({"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\] is not supported"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
    "parameters": ({"target_parameters": ["mlp.up_proj.weight"]}, "target_parameters=.* is not supported"),
    "layers twice": ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication=.* is not supported"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_goes_beyond_is_refused_by_name(name, tmp_path):
    settings, words = REFUSED[name]
    made(tmp_path, **settings)
    with pytest.raises(ValueError, match=words):
        load_runner(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not .* the file lacks lm_head\.weight"),
        ({"modules_to_save": ["lm"]}, "the model has no lm"),
        ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head' must be a list of names"),
        ({"layers_pattern": "blocks"}, "layers_pattern='blocks' is not supported"),
        ({"fine_tune_type": "lora", "base_model_name_or_path": None}, "an adapter of mlx-lm's, which is not read"),
    ],
)
def test_settings_that_do_not_fit_the_file(settings, words, tmp_path):
    made(tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ValueError, match=words):
        load_runner(tmp_path / "adapter")
