"""Small models that tests of backends share: configurations, weights, tokens, and gradients by PyTorch's autograd."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from llamita.backend.torch.model import layers
from llamita.backend.torch.model.weights import build_model, tensor_from_host
from llamita.data.batches import IGNORE_INDEX, Batch
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.parameters import initialize_parameters
from llamita.model.presets import preset
from llamita.model.quantization import SCALE
from llamita.model.rope import RopeScaling
from llamita.storage import files, model_directory

KINDS = {"multi-head": 4, "grouped-query": 2, "multi-query": 1}
VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head size of its own": {"head_dim": 6},
    "classifier": {"num_labels": 3},
    "theta": {"rope_theta": 500.0, "rms_norm_eps": 1e-3},
    "linear scaling": {"rope_scaling": RopeScaling("linear", 3.0)},
    "llama3 scaling": {"rope_scaling": RopeScaling("llama3", 8.0, 64), "rope_theta": 500.0},
    "yarn scaling": {"rope_scaling": RopeScaling("yarn", 4.0, 64, beta_fast=8.0), "rope_theta": 500.0},
    "sliding window": {"sliding_window": 6},
    "sliding window in later layers": {"sliding_window": 6, "full_attention_layers": 1, "query_key_value_bias": True},
    "qwen2": {"query_key_value_bias": True, "tie_word_embeddings": True},
    "qwen3": {"query_key_norm": True, "head_dim": 12},
    "qwen3 with biases and a window": {"query_key_norm": True, "attention_bias": True, "sliding_window": 6},
} | {kind: {"num_key_value_heads": K} for kind, K in KINDS.items()}

SWITCHES = {
    "smollm 3": {"layers_without_rope": (1,), "tie_word_embeddings": True},
    "olmo 2": {"norm_placement": "after", "query_key_norm": True, "norm_all_heads": True},
    "granite 3": {
        "embedding_multiplier": 12.0, "attention_multiplier": 0.3, "residual_multiplier": 0.22, "logits_scaling": 8.0,
    },
    "gemma 2": {
        "hidden_act": "gelu_pytorch_tanh", "norm_placement": "both", "unit_offset_norm": True,
        "embedding_multiplier": 32**0.5, "attention_multiplier": 24**-0.5, "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0, "sliding_window": 6, "full_attention_at": (1,), "tie_word_embeddings": True,
    },
    "gemma 3": {
        "hidden_act": "gelu_pytorch_tanh", "norm_placement": "both", "unit_offset_norm": True,
        "embedding_multiplier": 32**0.5, "query_key_norm": True, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
        "rope_scaling": RopeScaling("linear", 8.0), "sliding_window": 6, "full_attention_at": (1,),
    },
}  # fmt: skip
"""The families whose switches no other has; transformers' models of them are in torch/model/test_families.py."""


def small(**changes) -> ModelConfig:
    values = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    return ModelConfig(**(values | changes))


def shrunk(name: str, full: bool = False) -> ModelConfig:
    """A preset with its head counts and ratios, two layers, width at most 256, vocabulary at most 512."""
    config = preset(name)
    width, heads = config.hidden_size, config.num_attention_heads
    head_dim = config.head_dim
    if width > 256 and not full:
        head_dim = max(2, 256 // heads // 2 * 2)
        width = heads * head_dim
    return dataclasses.replace(
        config,
        hidden_size=width,
        head_dim=head_dim,
        intermediate_size=config.intermediate_size * width // config.hidden_size,
        num_hidden_layers=2,
        vocab_size=config.vocab_size if full else min(512, config.vocab_size),
        bos_token_id=None,
        eos_token_id=None,
    )


def perturbed(config: ModelConfig, seed: int = 1) -> dict[str, HostArray]:
    """Fresh values, norms and biases moved off their ones and zeros, so that a wrong one shows."""
    random, arrays = np.random.default_rng(seed), {}
    for name, values in initialize_parameters(config, seed):
        if values.ndim == 1:
            values = values + 0.3 * random.standard_normal(values.shape).astype(np.float32)
        arrays[name] = HostArray.from_numpy(values)
    return arrays


def random_tokens(config: ModelConfig, *shape: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, config.vocab_size, shape, dtype=np.int32)


def random_labels(config: ModelConfig, *shape: int) -> np.ndarray:
    labels = np.random.default_rng(3).integers(0, config.num_labels or config.vocab_size, shape, dtype=np.int32)
    labels[:, :2] = IGNORE_INDEX
    return labels


def save(config: ModelConfig, arrays: Mapping[str, HostArray], directory: Path, dtype: str = "F32") -> Path:
    with files.atomic_directory(directory) as temporary:
        model_directory.save_config(temporary, config, dtype)
        model_directory.save_tensors(temporary, arrays)
    return directory


def dequantized(stored: Mapping[str, HostArray]) -> dict[str, np.ndarray]:
    """The numbers that int8 and int4 arrays stand for, unpacked with PyTorch's operators; float32 under their names."""
    meant = {}
    for name in (name for name in stored if not name.endswith(SCALE)):
        values = tensor_from_host(stored[name])
        if name + SCALE not in stored:
            meant[name] = values.float().numpy()
            continue
        scale = tensor_from_host(stored[name + SCALE]).float()
        if values.dtype == torch.uint8:  # two numbers a byte, the first in its lower half, 8 standing for 0
            values = torch.stack((values & 15, values >> 4), -1).flatten(-2).float() - 8
            scale = scale.repeat_interleave(32, dim=-1)
            width = min(values.shape[-1], scale.shape[-1])
            values, scale = values[:, :width], scale[:, :width]
        meant[name] = (values.float() * (scale if scale.ndim == 2 else scale[:, None])).numpy()
    return meant


def loss_by_pytorch(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Nats per target, by PyTorch's own cross entropy over all logits."""
    segments_BT = None if batch.segments_BT is None else torch.from_numpy(batch.segments_BT)
    logits_BTV = model(torch.from_numpy(batch.tokens_BT), segments_BT=segments_BT).logits_BTV
    labels = torch.from_numpy(batch.labels_BT).long().flatten()
    return F.cross_entropy(logits_BTV.flatten(0, 1), labels, ignore_index=IGNORE_INDEX)


def gradients_by_pytorch(
    config: ModelConfig, arrays: Mapping[str, HostArray], batch: Batch
) -> tuple[float, dict[str, np.ndarray]]:
    """The loss and its gradients by PyTorch's autograd, through the readable form of each operation."""
    model = build_model(config, arrays, operations=layers.PLAIN)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    loss = loss_by_pytorch(model, batch)
    loss.backward()
    pairs = [zip(item.parts, item.split(item.parameter.grad), strict=True) for item in model.fused_parameters()]
    return loss.item(), {name: gradient.double().numpy() for group in pairs for name, gradient in group}
