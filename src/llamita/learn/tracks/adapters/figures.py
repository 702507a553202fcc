"""The figures of the lessons: each function draws one into the matplotlib figure that it is given.

What is shown is computed here. The colours are of a middle brightness, to be read on white and on black; letters and
axes have those of whoever draws.
"""

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle

BLUE, ORANGE, GREEN, RED, GREY = "#3b82c4", "#e0823d", "#3f9e5a", "#cf4f5b", "#8a8f98"


def basics(figure: Any) -> None:
    axes = figure.subplots()
    eps, size = 1e-5, np.geomspace(1e-5, 1, 200)
    x = np.random.default_rng(0).normal(size=64)
    x /= np.sqrt((x * x).mean())
    root = size[:, None]  # of the mean square of size * x
    lengths = {
        "inside: x / sqrt(mean + eps)": (size[:, None] * x / np.sqrt(root**2 + eps), BLUE),
        "outside: x / (sqrt(mean) + eps)": (size[:, None] * x / (root + eps), ORANGE),
        "left out": (size[:, None] * x / root, GREY),
    }
    for label, (y, colour) in lengths.items():
        axes.semilogx(size, np.sqrt((y * y).mean(axis=-1)), color=colour, label=label)
    labelled(axes, "root mean square of x", "root mean square of the result")
    axes.legend(fontsize=7)


def attention(figure: Any) -> None:
    """Four positions of six numbers and three heads: the head that each number comes to."""
    length, heads, size = 4, 3, 2
    number = np.arange(length * heads * size)
    right = np.empty_like(number)
    for head, block in enumerate(number.reshape(length, heads, size).transpose(1, 0, 2)):
        right[block.ravel()] = head
    wrong = np.empty_like(number)
    for head, block in enumerate(number.reshape(heads, length, size)):
        wrong[block.ravel()] = head
    titles = ("(length, heads, d_k), then exchanged", "straight to (heads, length, d_k)")
    for axes, owner, title in zip(figure.subplots(1, 2), (right, wrong), titles, strict=True):
        for place, head in np.ndenumerate(owner.reshape(length, heads * size)):
            axes.add_patch(rectangle(place[1], place[0], (BLUE, ORANGE, GREEN)[head]))
            axes.text(
                place[1] + 0.5, place[0] + 0.5, f"head {head}", ha="center", va="center", fontsize=6, color="white"
            )
        axes.set_xlim(0, heads * size)
        axes.set_ylim(length, 0)
        axes.set_xticks(np.arange(heads * size) + 0.5, [str(place) for place in range(heads * size)])
        axes.set_yticks(np.arange(length) + 0.5, [str(place) for place in range(length)])
        axes.set_title(title, fontsize=8)
        labelled(axes, "number of the vector", "position")


def training(figure: Any) -> None:
    axes = figure.subplots()
    iterations = np.arange(26)

    def rate(
        begin: float = 7, end: float = 21, least: float = 0.1, length: float = 14, stop: bool = True
    ) -> np.ndarray:
        falling = least + 0.5 * (1 + np.cos(np.pi * (iterations - begin) / length)) * (1 - least)
        after = np.where(iterations > end, least, falling) if stop else falling
        return np.where(iterations < 7, iterations / 7, after)

    axes.plot(iterations, rate(stop=False), color=RED, label="goes on along the cosine", linewidth=1)
    axes.plot(iterations, rate(begin=0, length=21), color=GREEN, label="the fall is counted from 0", linewidth=1)
    axes.plot(iterations, rate(least=0.0), color=GREY, label="falls to 0, not to the minimum", linewidth=1)
    axes.plot(iterations, rate(length=21), color=ORANGE, label="the fall takes 21 iterations", linewidth=1)
    axes.plot(iterations, rate(), color=BLUE, linewidth=2.5, label="as it should be")
    labelled(axes, "iteration (warmup_iters=7, cosine_cycle_iters=21)", "learning rate")
    axes.legend(fontsize=7)


def tokenizer(figure: Any) -> None:
    axes = figure.subplots()
    text = "low lower lowest new newer newest wide wider widest slow slower slowest " * 3
    words = Counter(tuple(bytes([byte]) for byte in (" " + word).encode()) for word in text.split())
    counts, merges = [sum(len(word) * count for word, count in words.items())], []
    for _ in range(24):
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(b"".join(best).decode().replace(" ", "_"))
        merged: Counter[tuple[bytes, ...]] = Counter()
        for word, count in words.items():
            shorter: list[bytes] = []
            for token in word:
                if shorter and (shorter[-1], token) == best:
                    shorter[-1] = b"".join(best)
                else:
                    shorter.append(token)
            merged[tuple(shorter)] += count
        words = merged
        counts.append(sum(len(word) * count for word, count in words.items()))
    axes.step(range(len(counts)), counts, where="post", color=BLUE)
    for number, merge in enumerate(merges[:12], 1):
        axes.text(number + 0.1, counts[number] + 4, merge, fontsize=7, rotation=45, color=ORANGE)
    axes.set_ylim(0, counts[0] * 1.1)
    labelled(axes, "merges", "tokens of the text")


FIGURES: dict[str, Callable[[Any], None]] = {
    "basics": basics,
    "attention": attention,
    "training": training,
    "tokenizer": tokenizer,
}


def rectangle(x: float, y: float, colour: str) -> Rectangle:
    return Rectangle((x + 0.04, y + 0.04), 0.92, 0.92, facecolor=colour, edgecolor="none")


def labelled(axes: Any, below: str, beside: str) -> None:
    axes.set_xlabel(below, fontsize=8)
    axes.set_ylabel(beside, fontsize=8)
    axes.tick_params(labelsize=7)
