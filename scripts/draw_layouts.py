"""Draws how weights lie in the kernels' blocks, for docs/kernels.md, from where the library itself puts each number.

python scripts/draw_layouts.py docs/images/weight-blocks.png
"""

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from llamita.backend.torch.infer.kernels.blocked import BlockedWeight, blocked_bytes, blocked_floats
from llamita.backend.torch.infer.kernels.gguf_blocks import in_halves

OUTPUTS, INPUTS, LINE, LINES = 16, 32, 64, 2
INSTRUCTIONS = "portable"
COLORS = [*plt.get_cmap("tab20").colors, *plt.get_cmap("tab20c").colors[8:]]  # type: ignore[attr-defined]

Blocked = Callable[[torch.Tensor], BlockedWeight]
"""A weight of whole numbers (O, I) in blocks of some form."""


def floats(dtype: torch.dtype) -> Blocked:
    return lambda weight_OI: blocked_floats(weight_OI.to(dtype), INSTRUCTIONS)  # type: ignore[arg-type]


def int8(weight_OI: torch.Tensor) -> BlockedWeight:
    scales_OG = torch.ones(OUTPUTS, INPUTS // 32, dtype=torch.bfloat16)
    return blocked_bytes(weight_OI.to(torch.int8), scales_OG, 8, INSTRUCTIONS)  # type: ignore[arg-type]


def int4(weight_OI: torch.Tensor) -> BlockedWeight:
    scales_OG = torch.ones(OUTPUTS, INPUTS // 32, dtype=torch.bfloat16)
    halves = in_halves(weight_OI.to(torch.uint8))
    return blocked_bytes(halves, scales_OG, 4, INSTRUCTIONS)  # type: ignore[arg-type]


FORMS: dict[str, tuple[Blocked, int]] = {
    "float32: 4 bytes, one input a line": (floats(torch.float32), 32),
    "bfloat16: 2 bytes, pairs of inputs": (floats(torch.bfloat16), 16),
    "int8, Q8_0: 1 byte, fours of inputs": (int8, 8),
    "int4, Q4_0, Q4_1: half a byte; the inputs of the upper halves are 16 further on": (int4, 4),
}
"""By title: the form, and the bits of a number."""


def place(form: Blocked, zeros: np.ndarray, output: int, number: int) -> tuple[int, bool]:
    """Returns the first byte of a block of zeros that one weight changes, and whether it is only its upper half."""
    weight_OI = torch.zeros(OUTPUTS, INPUTS)
    weight_OI[output, number] = 1
    changed = zeros ^ form(weight_OI).numbers.view(np.uint8)
    first = int(np.flatnonzero(changed)[0])
    return first, changed[first] & 15 == 0


def draw(axes: Axes, title: str, form: Blocked, bits: int) -> None:
    """Draws the first lines of 64 bytes; a cell is a weight, its number that of its input."""
    size, zeros = max(bits // 8, 1), form(torch.zeros(OUTPUTS, INPUTS)).numbers.view(np.uint8)
    for output in range(OUTPUTS):
        for number in range(INPUTS):
            first, upper = place(form, zeros, output, number)
            line, byte = divmod(first // size * size, LINE)
            if line >= LINES:
                continue
            height = 0.5 if bits == 4 else 1.0
            corner = (byte, LINES - 1 - line + (0.5 if bits == 4 and upper else 0.0))
            color = COLORS[number]
            axes.add_patch(Rectangle(corner, size, height, facecolor=color, edgecolor="white", linewidth=0.6))
            middle = (corner[0] + size / 2, corner[1] + height / 2)
            axes.annotate(str(number), middle, ha="center", va="center", fontsize=6, color="black")
    for output in range(OUTPUTS):
        axes.annotate(str(output), (4 * output + 2, LINES + 0.12), ha="center", fontsize=7)
        axes.axvline(4 * output, color="black", linewidth=0.8)
    axes.axvline(LINE, color="black", linewidth=0.8)
    axes.annotate("output", (-0.6, LINES + 0.12), ha="right", fontsize=7)
    for line in range(LINES):
        axes.annotate(
            f"bytes {line * LINE} to {line * LINE + LINE - 1}",
            (-0.6, LINES - 0.5 - line),
            ha="right",
            va="center",
            fontsize=7,
        )
    axes.set(xlim=(-8, LINE + 0.2), ylim=(0, LINES + 0.5))
    axes.set_title(title, fontsize=9, loc="left")
    axes.axis("off")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/draw_layouts.py PICTURE.png")
    figure, rows = plt.subplots(len(FORMS), 1, figsize=(11, 7.4), layout="constrained")
    for axes, (title, (form, bits)) in zip(rows, FORMS.items(), strict=True):
        draw(axes, title, form, bits)
    figure.suptitle(
        "The first 128 bytes of a block of 16 outputs; in each cell the input that its weight multiplies", fontsize=10
    )
    figure.savefig(Path(sys.argv[1]), dpi=130)


if __name__ == "__main__":
    main()
