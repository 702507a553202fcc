"""Reads a model directory: the sizes from `config.json`, the weights from `model.safetensors` or its parts."""

import json
from pathlib import Path

import mlx.core as mx
from config import ModelConfig, read_config
from safetensors.mlx import load_file


def load(directory: str | Path, dtype: mx.Dtype = mx.float32) -> tuple[ModelConfig, dict[str, mx.array]]:
    """Returns a model's sizes and its weights by their names, all of one dtype; ValueError where there are none."""
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file():
        files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    config, weights = read_config(directory), {}
    for name in files:
        if not (directory / name).is_file():
            raise ValueError(f"{directory} has no {name}; expected a Hugging Face model directory")
        weights |= {key: value.astype(dtype) for key, value in load_file(directory / name).items()}
    return config, weights
