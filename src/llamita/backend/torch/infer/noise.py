"""Random numbers that are a function of seed, position and token id, and of nothing else.

No generator is advanced: every number is a hash of its three coordinates, so a draw does not depend on the batch, the
chunk, or what was drawn before. Whole-number operations alone make the bits, in wrapping 64-bit arithmetic, so that
they are the same on every device; only the last two logarithms are a device's own. Knows nothing of logits.

Letters beyond the usual: R rows, C some ids of the vocabulary.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Integers = TypeVar("Integers", np.ndarray, Tensor)  # int64, wrapping

# Odd multipliers of good bit mixers, as signed numbers: splitmix64 (Steele et al. 2014) and its variant 13 by Stafford.
GOLDEN = -0x61C8864680B583EB
FIRST, SECOND = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


class GumbelNoise:
    """Noise that makes an argmax a draw: argmax(scores + noise) is distributed as softmax(scores) (Gumbel 1954)."""

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        ids = np.arange(1, size + 1, dtype=np.int64) * np.int64(GOLDEN)
        self.codes_V = torch.from_numpy(mix(ids)).to(device)

    def rows(self, keys_R2: Tensor, ids_C: Tensor | None = None) -> Tensor:
        """Returns float64 noise [R, V] for the `stream_keys` of the rows, or [R, C] for some ids alone."""
        codes_V = self.codes_V if ids_C is None else self.codes_V[ids_C]
        # A random multiple of a random code, mixed once more: all that differs from row to row is a full 64-bit key.
        bits_RV = (codes_V ^ keys_R2[:, :1]) * keys_R2[:, 1:]
        bits_RV ^= _shifted(bits_RV, 32)
        bits_RV *= FIRST
        # The upper 52 bits, halfway between two of 2^52 steps: never 0 or 1, and the logarithm of the likeliest
        # tokens, near log(1), has steps as fine as 2^-52.
        uniform_RV = (bits_RV >> 12).double().add_(2.0**51 + 0.5).mul_(2.0**-52)
        return uniform_RV.log_().neg_().log_().neg_()


def stream_keys(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """Returns two int64 for each row, [R, 2], that all 64 bits of seed and position decide; the second is odd."""
    seed_R = np.array(seeds, dtype=np.uint64).view(np.int64)
    position_R = np.array(positions, dtype=np.int64)
    first_R = mix(mix(seed_R ^ np.int64(SECOND)) + position_R * np.int64(GOLDEN))
    return np.stack([first_R, mix(first_R + np.int64(GOLDEN)) | 1], axis=1)


def mix(bits: Integers) -> Integers:
    """Permutes the 64-bit numbers so that each bit of the result depends on all of the argument."""
    bits = (bits ^ _shifted(bits, 30)) * FIRST
    bits = (bits ^ _shifted(bits, 27)) * SECOND
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Integers, count: int) -> Integers:
    """Returns the bits moved to the right with zeros after them, though the numbers are signed."""
    return (bits >> count) & ((1 << (64 - count)) - 1)
