"""Settles a `config.json` that contradicts the weights beside it as transformers does, with a warning.

Arrays are neither changed nor dropped here: `check_arrays` lets those stand that a model leaves aside.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.parameters import EMBEDDING, LAYER_BIAS, OUTPUT_HEAD, is_left_aside, parameter_table, shortened

COMPARED_BYTES = 1 << 26  # at once


def settled(config: ModelConfig, arrays: Mapping[str, HostArray], directory: Path) -> ModelConfig:
    """Returns the config that the arrays belong to.

    Tied embeddings are untied where the file holds another output head. Biases that a config asks for and the file
    has none of are left out: transformers takes zeros for them. A warning names either, and the arrays that stay
    unused: a head of another kind, biases of linear maps that have none.
    """
    head = arrays.get(OUTPUT_HEAD)
    if head is not None and config.tie_word_embeddings and not config.num_labels and not config.quantization:
        embedding = arrays.get(EMBEDDING, head)
        if head.shape == embedding.shape and not _equal(head, embedding):
            _warn(
                directory,
                f"ties the output head to the embedding, but {OUTPUT_HEAD} in the weights is another: that one is used",
                "set tie_word_embeddings to false",
            )
            config = replace(config, tie_word_embeddings=False)
    for switch in ("attention_bias", "mlp_bias"):
        off = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias} | {switch: False}
        without = replace(config, attention_bias=off["attention_bias"], mlp_bias=off["mlp_bias"])
        rows = {row.name for row in parameter_table(config)} - {row.name for row in parameter_table(without)}
        if rows and arrays and not rows & arrays.keys():
            _warn(directory, f"has {switch} true, but the weights hold no such biases", f"set {switch} to false")
            config = without
    if unused := sorted(name for name in arrays if is_left_aside(config, name)):
        if config.tie_word_embeddings and not config.num_labels:
            unused = [name for name in unused if name != OUTPUT_HEAD]  # the embedding again: nothing is lost
        biases = [name for name in unused if LAYER_BIAS.fullmatch(name)]
        heads = [name for name in unused if name not in biases]
        if heads:
            _warn(
                directory,
                f"names a model that does not use {', '.join(heads)} of the weights",
                "name its class in architectures",
            )
        if biases:
            what = f"says that linear maps have no biases, so that these are not used: {shortened(biases, 2)}"
            _warn(directory, what, "remove them, or set attention_bias or mlp_bias to true,")
    return config


def _equal(first: HostArray, second: HostArray) -> bool:
    """Whether two arrays of one shape hold the same numbers."""
    if first.dtype != second.dtype:
        return np.array_equal(first.to_numpy(), second.to_numpy())
    parts = [np.frombuffer(array.data, np.uint8) for array in (first, second)]
    return all(
        np.array_equal(parts[0][start : start + COMPARED_BYTES], parts[1][start : start + COMPARED_BYTES])
        for start in range(0, len(parts[0]), COMPARED_BYTES)
    )


def _warn(directory: Path, what: str, remedy: str) -> None:
    warnings.warn(f"{directory / 'config.json'} {what}; {remedy} to say so without this warning", stacklevel=2)
