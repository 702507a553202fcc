"""The order of what rotary positions turn: pairs (2 i, 2 i + 1) in other people's files, halves (i, i + H/2) here."""

import re

import numpy as np

from llamita.model.host_array import HostArray

ROTATED = re.compile(r"model\.layers\.\d+\.self_attn\.[qk]_proj\.weight")
"""The canonical names of what is reordered."""


def halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Returns rows that rotate pairs (2 i, 2 i + 1), reordered to rotate (i, i + H/2)."""
    return rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def to_halves(array: HostArray, head_dim: int) -> HostArray:
    """Returns a query or key projection whose rows were in pairs."""
    return array.with_numbers(halves(array.raw(), head_dim))


def to_pairs(array: HostArray, head_dim: int) -> HostArray:
    """Inverts `to_halves`."""
    rows = array.raw()
    return array.with_numbers(rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape))
