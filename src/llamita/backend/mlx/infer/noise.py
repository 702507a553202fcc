"""Random numbers that are a function of seed, position and token id, and of nothing else.

No generator is advanced: every number is a hash of its three coordinates, so a draw does not depend on the batch, the
chunk, or what was drawn before. Whole-number operations alone make the bits, in wrapping 64-bit arithmetic, so that
they are the same on every device and in every backend; only the last two logarithms are a device's own. On the CPU
these are float64. Metal has none: there they are float32, taken from the nearer end of the interval so that they are
as fine in both tails, and a draw is the CPU's unless its two best scores are within about a millionth of each other.
Knows nothing of logits.

Letters beyond the usual: R rows, C some ids of the vocabulary.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

# Odd multipliers of good bit mixers: splitmix64 (Steele et al. 2014) and its variant 13 by Stafford.
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FIRST, SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
SIGN = np.uint64(1 << 63)
STEPS = 2.0**52


class GumbelNoise:
    """Noise that makes an argmax a draw: argmax(scores + noise) is distributed as softmax(scores) (Gumbel 1954)."""

    def __init__(self, size: int, dtype: mx.Dtype = mx.float64) -> None:
        self.dtype = dtype  # float64, or float32 where a device has no wider one
        self._codes_V = mx.array(mix(np.arange(1, size + 1, dtype=np.uint64) * GOLDEN))
        self._first, self._sign = mx.array(np.array(FIRST)), mx.array(np.array(SIGN))

    def rows(self, keys_R2: mx.array, ids_C: mx.array | None = None) -> mx.array:
        """Returns noise [R, V] for the `stream_keys` of the rows, or [R, C] for some ids alone."""
        codes_V = self._codes_V if ids_C is None else self._codes_V[ids_C]
        # A random multiple of a random code, mixed once more: all that differs from row to row is a full 64-bit key.
        bits_RV = (codes_V ^ keys_R2[:, :1]) * keys_R2[:, 1:]
        bits_RV = (bits_RV ^ (bits_RV >> 32)) * self._first
        # The upper 52 bits as a signed number, halfway between two of 2^52 steps: never 0 or 1, and the logarithm of
        # the likeliest tokens, near log(1), has steps as fine as 2^-52.
        steps_RV = (bits_RV ^ self._sign) >> 12
        if self.dtype == mx.float64:
            return -mx.log(-mx.log((steps_RV.astype(mx.float64) + 0.5) * (1 / STEPS)))
        below_RV, above_RV = (
            (steps.astype(mx.float32) + 0.5) * (1 / STEPS) for steps in (steps_RV, int(STEPS) - 1 - steps_RV)
        )
        return -mx.log(-mx.where(below_RV < 0.5, mx.log(below_RV), mx.log1p(-above_RV)))


def stream_keys(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """Returns two uint64 for each row, [R, 2], that all 64 bits of seed and position decide; the second is odd."""
    seed_R = np.array(seeds, dtype=np.uint64)
    position_R = np.array(positions, dtype=np.uint64)
    first_R = mix(mix(seed_R ^ SECOND) + position_R * GOLDEN)
    return np.stack([first_R, mix(first_R + GOLDEN) | np.uint64(1)], axis=1)


def mix(bits: np.ndarray) -> np.ndarray:
    """Permutes the 64-bit numbers so that each bit of the result depends on all of the argument."""
    bits = (bits ^ (bits >> 30)) * FIRST
    bits = (bits ^ (bits >> 27)) * SECOND
    return bits ^ (bits >> 31)
