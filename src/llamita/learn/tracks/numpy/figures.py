"""The figures of the lessons: each function draws one into the matplotlib figure that it is given.

What is shown is computed here. The colours are of a middle brightness, to be read on white and on black; letters and
axes have those of whoever draws.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

BLUE, ORANGE, GREEN, RED, GREY = "#3b82c4", "#e0823d", "#3f9e5a", "#cf4f5b", "#8a8f98"


def functions(figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    x = np.array([1.0, -0.5, 2.0, 0.3, 1.6])
    for number, (factor, colour) in enumerate(((0.5, GREEN), (1.0, BLUE), (2.0, ORANGE))):
        place = np.arange(5) + 0.27 * (number - 1)
        left.bar(place, softmax(factor * x), 0.25, color=colour, label=f"softmax({factor:g} x)")
    left.set_xticks(range(5), [f"{value:g}" for value in x])
    labelled(left, "the elements of x", "share")
    left.legend(fontsize=7)
    t = np.linspace(-6, 4, 200)
    right.plot(t, t / (1 + np.exp(-t)), color=BLUE, label="SiLU")
    right.plot(t, np.maximum(t, 0), color=GREY, linestyle="--", label="ReLU")
    labelled(right, "x", "")
    right.legend(fontsize=7)


def norm(figure: Any) -> None:
    axes = figure.subplots()
    x = np.random.default_rng(0).normal(size=(40, 2)) * np.array([2.0, 1.0])
    y = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)
    for before, after in zip(x, y, strict=True):
        axes.plot(*np.stack([before, after]).T, color=GREY, linewidth=0.6, alpha=0.6)
    axes.scatter(*x.T, s=14, color=ORANGE, label="x")
    axes.scatter(*y.T, s=14, color=BLUE, label="x / root of the mean square")
    axes.set_aspect("equal")
    labelled(axes, "first number", "second number")
    axes.legend(fontsize=7)


def rotary(figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    size, theta = 16, 100.0
    speeds = theta ** (-2 * np.arange(size // 2) / size)
    for pair, colour in zip((0, 1, 2, 4, 7), (RED, ORANGE, GREEN, BLUE, GREY), strict=True):
        left.plot(np.arange(33), np.arange(33) * speeds[pair], color=colour, label=f"pair {pair}")
    left.set_ylim(0, 4 * np.pi)
    left.set_yticks([0, 2 * np.pi, 4 * np.pi], ["0", "1 turn", "2 turns"])
    labelled(left, "position", "angle")
    left.legend(fontsize=7)
    query, key = np.random.default_rng(2).normal(size=(2, size // 2, 2)) @ np.array([1, 1j])
    distance = np.arange(33)
    for start, colour, width in ((0, ORANGE, 4.0), (50, BLUE, 1.2)):
        turned_query = query * np.exp(1j * speeds * (start + distance[:, None]))
        turned_key = key * np.exp(1j * speeds * start)
        products = (turned_query * turned_key.conj()).real.sum(axis=-1)
        right.plot(distance, products, color=colour, linewidth=width, label=f"the key at position {start}")
    labelled(right, "distance from the key to the query", "dot product")
    right.legend(fontsize=7)


def attention(figure: Any) -> None:
    axes = figure.subplots()
    generator = np.random.default_rng(1)
    query, key = generator.normal(size=(4, 8)), generator.normal(size=(7, 8))
    seen = np.arange(7)[None, :] <= np.arange(3, 7)[:, None]
    weights = softmax(np.where(seen, query @ key.T / np.sqrt(8), -np.inf))
    shown = axes.imshow(np.where(seen, weights, np.nan), cmap="viridis", vmin=0, vmax=1)
    for row, column in np.ndindex(4, 7):
        text = f"{weights[row, column]:.2f}" if seen[row, column] else "-"
        colour = ("black" if weights[row, column] > 0.6 else "white") if seen[row, column] else GREY
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(7))
    axes.set_yticks(range(4), [f"{position}" for position in range(3, 7)])
    labelled(axes, "position of the key", "position of the query")
    coloured(figure, shown, axes, "weight")


def weights(figure: Any) -> None:
    axes = figure.subplots()
    x = np.exp2(np.linspace(-24, 20, 4000)).astype(np.float32)
    short = ((x.view(np.uint32).astype(np.uint64) + 0x8000) >> 16).astype(np.uint32) << 16
    with np.errstate(over="ignore"):
        halves = x.astype(np.float16).astype(np.float64)
    errors = {"float16": np.abs(halves - x) / x, "bfloat16": np.abs(short.view(np.float32) - x.astype(np.float64)) / x}
    for (name, error), colour in zip(errors.items(), (ORANGE, BLUE), strict=True):
        inside = np.isfinite(error)
        blocks = np.array_split(np.arange(inside.sum()), 80)
        greatest = [error[inside][block].max() for block in blocks]
        axes.loglog([float(x[inside][block].mean()) for block in blocks], greatest, color=colour, label=name)
    axes.axvline(65504, color=GREY, linestyle="--", linewidth=0.8)
    axes.text(80000, 0.1, "float16 ends", fontsize=7, color=GREY)
    labelled(axes, "size of the number", "greatest relative error")
    axes.legend(fontsize=7)


def layer(figure: Any) -> None:
    axes = figure.subplots()
    gate, up = np.meshgrid(np.linspace(-4, 4, 121), np.linspace(-3, 3, 91))
    result = gate / (1 + np.exp(-gate)) * up
    shown = axes.imshow(result, origin="lower", extent=(-4, 4, -3, 3), cmap="coolwarm", vmin=-8, vmax=8, aspect="auto")
    axes.contour(gate, up, result, levels=np.arange(-8, 9, 2), colors=GREY, linewidths=0.6)
    labelled(axes, "g, from gate_proj", "u, from up_proj")
    coloured(figure, shown, axes, "SiLU(g) u")


def choice(figure: Any) -> None:
    axes = figure.subplots()
    logits, number = np.array([2.0, 1.2, 1.0, 0.4, -0.5, -1.0]), 0.7
    colours = (BLUE, ORANGE, GREEN, RED, GREY, "#9a6fc0")
    for row, temperature in enumerate((0.5, 1.0, 2.0)):
        shares = softmax(logits / temperature)
        starts = np.cumsum(shares) - shares
        chosen = int((np.cumsum(shares) <= number).sum())
        for token in range(6):
            height = 0.8 if token == chosen else 0.5
            axes.barh(row, shares[token], height, left=starts[token], color=colours[token])
            if shares[token] > 0.05:
                middle = starts[token] + shares[token] / 2
                axes.text(middle, row, str(token), ha="center", va="center", fontsize=8, color="white")
    axes.axvline(number, color=GREY, linestyle="--")
    axes.set_yticks(range(3), ["0.5", "1", "2"])
    labelled(axes, "running sum of the probabilities; the number is 0.7", "temperature")


def cache(figure: Any) -> None:
    axes = figure.subplots()
    prompt, count = 20, np.arange(1, 201)
    without = np.cumsum(prompt + count - 1)
    axes.plot(count, without, color=ORANGE, label="without: everything again for each token")
    axes.plot(count, prompt + count - 1, color=BLUE, label="with: the prompt, then one for each token")
    axes.set_yscale("log")
    labelled(axes, "tokens written after a prompt of 20", "positions through the model")
    axes.legend(fontsize=7)


def loss(figure: Any) -> None:
    axes = figure.subplots()
    others = np.array([0.5, 1.5, -1.0, 0.0])
    logit = np.linspace(-6, 8, 281)
    probability = np.array([softmax(np.append(value, others))[0] for value in logit])
    losses = -np.log(probability)
    axes.plot(logit, losses, color=BLUE, label="loss: -log p")
    axes.plot(
        logit, np.gradient(losses, logit), color=ORANGE, linewidth=4, alpha=0.6, label="slope of the loss, measured"
    )
    axes.plot(logit, probability - 1, color=RED, linewidth=1.2, label="p - 1")
    axes.axhline(0, color=GREY, linewidth=0.6)
    labelled(axes, "logit of the label; the others stay", "")
    axes.legend(fontsize=7)


def optimizer(figure: Any) -> None:
    axes = figure.subplots()
    steep = np.array([0.05, 1.0])
    first, second = np.meshgrid(np.linspace(-1, 9, 101), np.linspace(-2.2, 2.2, 81))
    axes.contour(first, second, steep[0] * first**2 + steep[1] * second**2, levels=12, colors=GREY, linewidths=0.6)
    start = np.array([8.0, 2.0])
    plain, adam = [start], [start]
    m, v = np.zeros(2), np.zeros(2)
    for step in range(1, 41):
        plain.append(plain[-1] - 0.9 * 2 * steep * plain[-1])
        gradient = 2 * steep * adam[-1]
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        adam.append(adam[-1] - 0.3 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8))
    axes.plot(*np.array(plain).T, color=ORANGE, marker=".", markersize=3, label="gradient descent, lr 0.9")
    axes.plot(*np.array(adam).T, color=BLUE, marker=".", markersize=3, label="AdamW, lr 0.3")
    axes.plot(0, 0, marker="*", color=GREEN, markersize=12)
    labelled(axes, "first parameter", "second parameter")
    axes.legend(fontsize=7)


FIGURES: dict[str, Callable[[Any], None]] = {
    "functions": functions,
    "norm": norm,
    "rotary": rotary,
    "attention": attention,
    "weights": weights,
    "layer": layer,
    "choice": choice,
    "cache": cache,
    "loss": loss,
    "optimizer": optimizer,
}


def softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def coloured(figure: Any, shown: Any, axes: Any, label: str) -> None:
    """Adds the scale of a picture's colours."""
    bar = figure.colorbar(shown, ax=axes, shrink=0.8)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def labelled(axes: Any, below: str, beside: str) -> None:
    axes.set_xlabel(below, fontsize=8)
    axes.set_ylabel(beside, fontsize=8)
    axes.tick_params(labelsize=7)
