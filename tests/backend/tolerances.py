"""How far a result may be from the exact one: the one place that maps a precision to its tolerance.

Neighbouring numbers of a precision are apart by 2^-23 (fp32), 2^-10 (fp16) or 2^-7 (bf16) of their size; rounding once
is off by half of that, and an operation of several steps rounds in between. Most tolerances are a share of the largest
magnitude of the expected result: OPERATION is a few such distances, BLOCK is for some twenty operations in a row, MODEL
for a whole small model. ELEMENT is held by each element for itself.
"""

import numpy as np

OPERATION = {"fp32": 2e-6, "fp16": 3e-3, "bf16": 2e-2}
BLOCK = {"fp32": 5e-6, "fp16": 6e-3, "bf16": 4e-2}
ATTENTION = {
    "torch": {"fp32": 2e-6, "fp16": 2e-3, "bf16": 1e-2},
    "mlx": {"fp32": 2e-6, "bf16": 2e-2},
}
"""By backend: bfloat16 has 8 bits, and rounds weights as well as results; in MLX on a CPU, scores too."""
MODEL = {"fp32": 1e-5, "bf16": 5e-2}
QUANTIZED = {"fp32": 1e-5, "bf16": 3e-2}
"""Of a small model over int8 or int4 weights: two layers in bfloat16 in different orders of summation."""
DEQUANTIZED_TRAINING = {"torch": (1e-6, 1e-5), "mlx": (1e-5, 1e-5)}
"""Of loss and gradient norm of an adapter over quantised weights, beside the same weights dequantised, by backend."""
DECODING = {"bf16": 0.1, "fp16": 0.02}
"""Of log-probabilities of a small model, decoded from a cache beside read as a whole, in nats."""
ELEMENT = {"fp32": 1e-5, "bf16": 2e-2}
"""Of an element's own magnitude, and as much in addition."""
DRAW = {"torch": 1e-12, "mlx": 1e-5}
"""Of the probabilities that a token is drawn with, by backend: MLX's exponential is good to a millionth in float64."""
BORDER = {"torch": 1e-9, "mlx": 1e-5}
"""How near its border a mass or a share has to be for rounding to decide what is kept."""


def assert_each_close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Fails where an element differs by more than `tolerance` of itself and of one."""
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def relative_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a share of the largest magnitude."""
    found, expected = (np.asarray(each, dtype=np.float64) for each in (found, expected))
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Fails with the element that differs most, and both its values."""
    found, expected = (np.atleast_1d(np.asarray(each, dtype=np.float64)) for each in (found, expected))
    assert found.shape == expected.shape, f"the result has shape {found.shape}, PyTorch's has {expected.shape}"
    difference = np.abs(found - expected)
    difference[np.isnan(difference)] = np.inf
    scale = np.abs(expected).max() or 1.0
    worst = np.unravel_index(int(difference.argmax()), difference.shape)
    place = ", ".join(map(str, worst))
    assert difference[worst] <= tolerance * scale, (
        f"element [{place}] differs most: {found[worst]:.8g} here, {expected[worst]:.8g} from PyTorch; that is "
        f"{difference[worst] / scale:.1e} of the largest magnitude, and {tolerance:.1e} is allowed; "
        f"{int((difference > tolerance * scale).sum())} of {difference.size} elements are past it"
    )
