"""Rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864) in both layouts of the pairs."""

import numpy as np


def angles(positions: np.ndarray, head_size: int, theta: float) -> np.ndarray:
    """Returns the angle in radians by which each pair turns at each position.

    positions: (T,), integers, gaps allowed; the first position of a text is 0. theta: a number, `rope_theta`
    in config.json. The result: (T, head_size / 2), float32 or float64: pair i (from 0) at position p has the angle
    p * theta ** (-2 * i / head_size).

    Source: section 3.2.2 of the paper.
    """
    # to do: a speed for each pair, then all products of positions and speeds.
    speeds = theta ** (-2 * np.arange(head_size // 2) / head_size)
    return positions[:, None] * speeds[None, :]
    # done


def rotate_halves(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Returns x with its pairs turned, where pair i is the numbers i and i + H / 2 of a head, as Hugging Face has it.

    x: (..., T, H); angles: (T, H / 2). A pair (a, b) turned by the angle w is (a cos w - b sin w, a sin w + b cos w):
    the first number goes to the place of a, the second to the place of b. The result is a new array with the shape and
    the dtype of x.

    Source: equation 34 of the paper, with another order of the coordinates.
    """
    # to do: the two halves of the last axis, turned, and side by side again.
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate((a * cos - b * sin, a * sin + b * cos), axis=-1).astype(x.dtype)
    # done


def rotate_neighbours(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """The same where pair i is the numbers 2 * i and 2 * i + 1 of a head, as in Meta's files and in llama2.c.

    x: (..., T, H); angles: (T, H / 2). The result is a new array with the shape and the dtype of x.
    """
    # to do: `x[..., 0::2]` is every other number from the first; the results go back to the same places.
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = np.cos(angles), np.sin(angles)
    turned = np.empty_like(x)
    turned[..., 0::2] = a * cos - b * sin
    turned[..., 1::2] = a * sin + b * cos
    return turned
    # done
