"""The figures of min-llama's lessons: each computes what it shows."""

import itertools

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

BLUE, ORANGE, GREEN, PURPLE, GREY = "#4a8fdc", "#e08035", "#3fa870", "#9b72d2", "#8b939f"
SIGNED = LinearSegmentedColormap.from_list("signed", [ORANGE, "#8b939f30", BLUE])
AMOUNT = LinearSegmentedColormap.from_list("amount", ["#4a8fdc12", BLUE])


def rotary(figure: Figure) -> None:
    """Two pairs at positions 0 to 5, and the products of one query with one key at all positions."""
    head_dim, theta, positions = 4, 16.0, np.arange(6)
    speeds = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    figure.set_size_inches(7.0, 2.75)
    panels = figure.subplots(1, 3, width_ratios=(1, 1, 1.15))
    for pair, (axes, color) in enumerate(zip(panels[:2], (BLUE, ORANGE), strict=True)):
        circle = np.linspace(0, 2 * np.pi, 100)
        axes.plot(np.cos(circle), np.sin(circle), color=GREY, linewidth=0.7, alpha=0.6)
        for position in positions:
            angle = 0.35 + position * speeds[pair]
            x, y = np.cos(angle), np.sin(angle)
            axes.annotate("", (x, y), (0, 0), arrowprops={
                "arrowstyle": "-|>", "color": color, "alpha": 1 - 0.13 * position, "shrinkA": 0, "shrinkB": 0
            })  # fmt: skip
            axes.text(1.2 * x, 1.2 * y, str(position), ha="center", va="center", fontsize=8)
        axes.set_title(f"pair {pair}: {speeds[pair]:g} radians a position")
        axes.set(xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), aspect="equal", xticks=[], yticks=[])
        axes.spines[:].set_visible(False)

    query, key = np.array([0.9, 0.5, 0.4, 0.6]), np.array([1.0, -0.1, 0.7, 0.2])
    size = 12
    products = np.array([
        [turned(query, place, speeds) @ turned(key, other, speeds) for other in range(size)] for place in range(size)
    ])  # fmt: skip
    axes = panels[2]
    axes.pcolormesh(products, cmap=SIGNED, vmin=-1.9, vmax=1.9)
    axes.invert_yaxis()
    axes.set(aspect="equal", xlabel="position of the key", ylabel="position of the query")
    axes.set_xticks(np.arange(0, size, 3) + 0.5, np.arange(0, size, 3))
    axes.set_yticks(np.arange(0, size, 3) + 0.5, np.arange(0, size, 3))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("query · key: the same along\neach diagonal")


def turned(vector: np.ndarray, position: int, speeds: np.ndarray) -> np.ndarray:
    points = (vector[0::2] + 1j * vector[1::2]) * np.exp(1j * position * speeds)
    return np.stack((points.real, points.imag), -1).reshape(-1)


def norm(figure: Figure) -> None:
    """A stream that grows from layer to layer, and one vector before and after its normalisation."""
    random, layers, width = np.random.default_rng(3), 12, 256
    stream = np.cumsum(random.normal(size=(layers + 1, width)) * np.linspace(0.7, 1.5, layers + 1)[:, None], axis=0)
    before = np.sqrt((stream**2).mean(-1))
    after = np.sqrt(((stream / before[:, None]) ** 2).mean(-1))
    left, first, second = figure.subplots(1, 3, width_ratios=(1.4, 1, 1))
    left.plot(before, color=BLUE, marker="o", markersize=3.5, label="the hidden states")
    left.plot(after, color=ORANGE, marker="o", markersize=3.5, label="after a norm")
    left.set(xlabel="layers passed", ylabel="root mean square", ylim=(0, None), xticks=range(0, layers + 1, 3))
    left.grid(axis="y")
    left.legend(loc="upper left")

    vector = np.array([3.2, -1.1, 0.4, 5.6, -2.9, 1.7, -4.4, 0.9])
    root = np.sqrt((vector**2).mean())
    for axes, numbers, color, title in (
        (first, vector, BLUE, f"x: root mean square {root:.1f}"),
        (second, vector / root, ORANGE, f"x / {root:.1f}"),
    ):
        axes.bar(np.arange(len(numbers)), numbers, color=color, width=0.7)
        size = np.sqrt((numbers**2).mean())
        axes.axhspan(-size, size, color=GREY, alpha=0.18, linewidth=0)
        axes.axhline(0, color=GREY, linewidth=0.7)
        axes.set(title=title, ylim=(-6.3, 6.3), xticks=[])
        axes.spines["bottom"].set_visible(False)
    second.set_yticks([-1, 0, 1])
    second.set_ylim(-6.3 / root, 6.3 / root)


def attention(figure: Figure) -> None:
    """Scores, the same with the mask, and the weights that a softmax makes of them."""
    words = ["one", "day", "the", "cat", "found", "it"]
    random, size = np.random.default_rng(11), len(words)
    query, key = random.normal(size=(2, size, 16))
    scores = query @ key.T / np.sqrt(16)
    masked = np.where(np.tri(size, dtype=bool), scores, -np.inf)
    weights = np.exp(masked - masked.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    figure.set_size_inches(7.0, 2.9)
    titles = ("scores: query · key / √16", "later positions: −∞", "weights: softmax of each row")
    for number, (axes, values) in enumerate(zip(figure.subplots(1, 3), (scores, masked, weights), strict=True)):
        shown = np.ma.masked_invalid(values)
        if number < 2:
            axes.pcolormesh(shown, cmap=SIGNED, vmin=-2.4, vmax=2.4)
        else:
            axes.pcolormesh(np.where(values > 0, values, np.nan), cmap=AMOUNT, vmin=0, vmax=1)
        for row, column in np.ndindex(size, size):
            value = values[row, column]
            hidden = column > row and number > 0
            text = "−∞" if np.isneginf(value) else "0" if hidden else f"{value:.1f}".replace("-", "−")
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7, alpha=0.55 if hidden else 1)
        axes.invert_yaxis()
        axes.set(aspect="equal", title=titles[number])
        axes.set_xticks(np.arange(size) + 0.5, words, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set_yticks(np.arange(size) + 0.5, words if number == 0 else [""] * size, fontsize=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)


def layer(figure: Figure) -> None:
    """What passes the gate, and a layer as two additions to a stream."""
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.1))
    gate = np.linspace(-6, 4, 200)
    for up, color in ((2.0, BLUE), (1.0, GREEN), (-1.0, ORANGE)):
        left.plot(gate, gate / (1 + np.exp(-gate)) * up, color=color)
        left.text(4.15, 4 / (1 + np.exp(-4)) * up, f"w3 x = {up:g}".replace("-", "−"), color=color, va="center",
                  fontsize=8)  # fmt: skip
    left.axhline(0, color=GREY, linewidth=0.7)
    left.set(xlabel="w1 x", title="silu(w1 x) · w3 x", xlim=(-6, 4))
    left.set_xticks([-6, -4, -2, 0, 2, 4])

    right.set(xlim=(0, 10.2), ylim=(-0.75, 3.4), xticks=[], yticks=[])
    right.spines[:].set_visible(False)
    arrow(right, (0.2, 0), (10.1, 0), BLUE, 3.0)
    right.text(0.2, -0.55, "x", fontsize=10)
    right.text(5.1, -0.55, "h", fontsize=10, ha="center")
    right.text(10.0, -0.55, "result", fontsize=9, ha="right")
    for start, name, color in ((0.9, "attention", ORANGE), (5.7, "feed-forward", GREEN)):
        arrow(right, (start, 0), (start, 1.05), GREY, 1.4)
        box(right, start, 1.5, 1.1, "norm", GREY, 8)
        arrow(right, (start + 0.57, 1.5), (start + 0.95, 1.5), GREY, 1.4)
        box(right, start + 2.15, 1.5, 2.35, name, color, 8)
        right.plot([start + 3.3, start + 3.65], [1.5, 1.5], color=GREY, linewidth=1.4)
        arrow(right, (start + 3.65, 1.5), (start + 3.65, 0.3), GREY, 1.4)
        right.plot(start + 3.65, 0, marker="o", markersize=14, color=BLUE)
        right.text(start + 3.65, -0.02, "+", ha="center", va="center", fontsize=12, color="white")
    said = "each half reads a normalised copy\nand adds its result to the stream"
    right.text(5.1, 2.75, said, ha="center", va="center", fontsize=8.5)


def generate(figure: Figure) -> None:
    """One row of logits as probabilities at four temperatures."""
    words = ["garden", "house", "river", "cake", "moon", "engine"]
    logits = np.array([3.1, 2.6, 1.9, 1.0, 0.1, -1.2])
    panels = figure.subplots(1, 5, sharey=True, width_ratios=(1.1, 1, 1, 1, 1))
    places = np.arange(len(words))
    panels[0].barh(places, logits, color=GREY, height=0.66)
    panels[0].axvline(0, color=GREY, linewidth=0.7)
    panels[0].set(title="logits", xlim=(-1.7, 3.9))
    for place, value in zip(places, logits, strict=True):
        panels[0].text(max(value, 0) + 0.12, place, f"{value:g}".replace("-", "−"), va="center", fontsize=7.5)
    panels[0].set_yticks(places, words)
    panels[0].invert_yaxis()
    for axes, temperature, color in zip(panels[1:], (0.0, 0.5, 1.0, 2.0), (PURPLE, BLUE, GREEN, ORANGE), strict=True):
        if temperature == 0:
            shares = np.eye(len(words))[logits.argmax()]
        else:
            shares = np.exp(logits / temperature)
            shares /= shares.sum()
        axes.barh(places, shares, color=color, height=0.66)
        for place, share in zip(places, shares, strict=True):
            inside = share > 0.7
            axes.text(share - 0.04 if inside else share + 0.04, place, f"{share:.2f}", va="center", fontsize=7.5,
                      ha="right" if inside else "left", **({"color": "white"} if inside else {}))  # fmt: skip
        axes.set(title=f"T = {temperature:g}", xlim=(0, 1.05))
    for axes in panels:
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)
    for axes in panels[1:]:
        axes.spines["left"].set_color(GREY)
    panels[0].spines["left"].set_visible(False)


def model(figure: Figure) -> None:
    """The shapes of a small model's arrays, from tokens to logits: they are those of a forward in numpy."""
    shapes = forward_shapes(batch=2, seqlen=7, vocab=512, dim=64, heads=8, kv_heads=4, hidden=176)
    figure.set_size_inches(7.0, 3.5)
    axes = figure.subplots()
    axes.set(xlim=(0, 14), ylim=(-1.15, 5.75), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    main = (("tokens", 1.0, GREY), ("embeddings", 3.65, BLUE), ("4 layers", 7.0, BLUE), ("norm", 10.35, BLUE),
            ("logits", 13.0, PURPLE))  # fmt: skip
    for name, x, color in main:
        box(axes, x, 0, 1.9 if name != "embeddings" else 2.1, name, color)
        axes.text(x, -0.85, shape_text(shapes[name]), ha="center", va="center", fontsize=8.5)
    for (_, x, _), (_, other, _) in itertools.pairwise(main):
        arrow(axes, (x + 1.08, 0), (other - 1.08, 0), GREY, 1.4)

    axes.add_patch(FancyBboxPatch((0.25, 1.65), 13.5, 3.75, boxstyle="round,pad=0,rounding_size=0.2", facecolor=BLUE,
                                  alpha=0.08, linewidth=0))  # fmt: skip
    axes.plot([6.1, 0.5], [0.55, 1.65], color=BLUE, alpha=0.35, linewidth=1)
    axes.plot([7.9, 13.5], [0.55, 1.65], color=BLUE, alpha=0.35, linewidth=1)
    axes.text(0.55, 5.02, "inside one layer", fontsize=9, style="italic", va="center")
    rows = (
        (4.1, ORANGE, (("query", 2.9), ("key", 5.3), ("scores", 7.7), ("gathered", 10.2), ("added", 12.65))),
        (2.6, GREEN, (("gate", 5.3), ("up", 7.7), ("passed", 10.2), ("down", 12.65))),
    )
    labels = {"key": "key, value", "gathered": "weights · value", "added": "output", "gate": "gate w1", "up": "up w3",
              "passed": "silu(gate) · up", "down": "down w2"}  # fmt: skip
    for y, color, parts in rows:
        for name, x in parts:
            axes.text(x, y + 0.2, labels.get(name, name), ha="center", va="center", fontsize=8.5, color=color,
                      fontweight="bold")  # fmt: skip
            axes.text(x, y - 0.4, shape_text(shapes[name]), ha="center", va="center", fontsize=8)
    axes.text(0.55, 4.0, "attention", fontsize=8.5, va="center")
    axes.text(0.55, 2.5, "feed-forward", fontsize=8.5, va="center")


def shape_text(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def forward_shapes(
    batch: int, seqlen: int, vocab: int, dim: int, heads: int, kv_heads: int, hidden: int
) -> dict[str, tuple[int, ...]]:
    """The shapes of what a layer computes, by computing it; rotation and mask are left out, they change none."""
    random, size = np.random.default_rng(0), dim // heads
    tokens = random.integers(vocab, size=(batch, seqlen))
    table = random.normal(size=(vocab, dim))
    x = table[tokens]
    query = (x @ random.normal(size=(dim, heads * size))).reshape(batch, seqlen, heads, size).transpose(0, 2, 1, 3)
    key = (x @ random.normal(size=(dim, kv_heads * size))).reshape(batch, seqlen, kv_heads, size).transpose(0, 2, 1, 3)
    scores = query @ key.repeat(heads // kv_heads, axis=1).transpose(0, 1, 3, 2)
    gathered = scores @ key.repeat(heads // kv_heads, axis=1)
    added = gathered.transpose(0, 2, 1, 3).reshape(batch, seqlen, -1) @ random.normal(size=(heads * size, dim))
    gate, up = (added @ random.normal(size=(dim, hidden)) for _ in range(2))
    passed = gate / (1 + np.exp(-np.clip(gate, -50, 50))) * up
    down = passed @ random.normal(size=(hidden, dim))
    arrays = {
        "tokens": tokens, "embeddings": x, "query": query, "key": key, "scores": scores, "gathered": gathered,
        "added": added, "gate": gate, "up": up, "passed": passed, "down": down, "4 layers": x + down,
        "norm": x + down, "logits": (x + down)[:, -1:] @ table.T,
    }  # fmt: skip
    return {name: array.shape for name, array in arrays.items()}


def optimizer(figure: Figure) -> None:
    """Paths of plain steps and of AdamW's in a valley, and how small the running means are before their correction."""
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    stretch, start, zero = np.array([1.0, 30.0]), np.array([-4.3, 0.95]), np.array([-1.6, -0.8])
    x, y = np.meshgrid(np.linspace(-5, 1.6, 120), np.linspace(-1.3, 1.3, 80))
    left.contour(x, y, (stretch[0] * x**2 + stretch[1] * y**2) / 2, levels=[0.3, 1.2, 3, 6, 10, 15], colors=GREY,
                 linewidths=0.7, alpha=0.6)  # fmt: skip
    for name, path, color in (
        ("plain steps", plain_path(start, stretch, 60, 0.06), ORANGE),
        ("Adam", adam_path(start, stretch, zero, 60, 0.15, 0.0), BLUE),
        ("AdamW", adam_path(start, stretch, zero, 60, 0.15, 0.25), GREEN),
    ):
        left.plot(path[:, 0], path[:, 1], color=color, marker=".", markersize=4, linewidth=1.2, label=name)
    left.plot(0, 0, marker="+", color=GREY, markersize=10, markeredgewidth=1.5)
    left.text(0.15, 0.1, "least loss", fontsize=7.5)
    left.plot(*zero, marker="o", color=GREY, markersize=5)
    left.text(zero[0] + 0.15, zero[1], "weights of 0", fontsize=7.5, va="center")
    left.set(title="60 steps from the left", xticks=[], yticks=[], ylim=(-1.3, 1.7))
    left.spines[:].set_visible(False)
    left.legend(loc="upper center", ncols=3, fontsize=7.5, handlelength=1.2, columnspacing=1.0)

    steps = np.arange(1, 2001)
    for beta, color, name, place in (
        (0.9, BLUE, "m, beta1 = 0.9", (15, 0.7)),
        (0.999, ORANGE, "v, beta2 = 0.999", (2.5, 0.13)),
    ):
        right.plot(steps, running_mean(np.ones(len(steps)), beta), color=color)
        right.text(*place, name, color=color, fontsize=8)
    right.axhline(1, color=GREEN, linestyle="--")
    right.text(1.1, 0.93, "both, corrected", color=GREEN, fontsize=8)
    right.set(xscale="log", xlabel="step", ylim=(0, 1.08), title="share of the true mean that is reached")
    right.grid(axis="y")


def plain_path(start: np.ndarray, stretch: np.ndarray, steps: int, rate: float) -> np.ndarray:
    path = [start]
    for _ in range(steps):
        path.append(path[-1] - rate * stretch * path[-1])
    return np.array(path)


def adam_path(
    start: np.ndarray, stretch: np.ndarray, zero: np.ndarray, steps: int, rate: float, decay: float
) -> np.ndarray:
    path, mean, square = [start], np.zeros(2), np.zeros(2)
    for step in range(1, steps + 1):
        gradient = stretch * path[-1]
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        alpha = rate * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        moved = path[-1] - alpha * mean / (np.sqrt(square) + 1e-8)
        path.append(moved - rate * decay * (moved - zero))
    return np.array(path)


def running_mean(values: np.ndarray, beta: float) -> np.ndarray:
    mean, means = 0.0, []
    for value in values:
        mean = beta * mean + (1 - beta) * value
        means.append(mean)
    return np.array(means)


def classifier(figure: Figure) -> None:
    """A batch of texts of different lengths, padded at their ends, and the position that is labelled."""
    texts = ["a warm and funny film", "dull", "I laughed until I cried , twice", "not for me"]
    rows = [["<s>", *text.split()] for text in texts]
    width = max(map(len, rows))
    real = np.array([[column < len(row) for column in range(width)] for row in rows])
    last = real.sum(axis=1) - 1
    figure.set_size_inches(7.0, 2.6)
    axes = figure.subplots()
    for row, words in enumerate(rows):
        for column in range(width):
            chosen, padding = column == last[row], not real[row, column]
            face, alpha = (ORANGE, 0.9) if chosen else (GREY, 0.1) if padding else (BLUE, 0.25)
            axes.add_patch(Rectangle((column + 0.04, row + 0.08), 0.92, 0.84, facecolor=face, alpha=alpha, linewidth=0))
            axes.text(column + 0.5, row + 0.5, "pad" if padding else words[column], ha="center", va="center",
                      fontsize=8, alpha=0.6 if padding else 1.0, **({"color": "white", "fontweight": "bold"}
                      if chosen else {}))  # fmt: skip
        arrow(axes, (width + 0.1, row + 0.5), (width + 0.6, row + 0.5), ORANGE, 1.4)
        axes.text(width + 0.7, row + 0.5, f"hidden[{row}, {last[row]}]", va="center", fontsize=8.5, family="monospace")
    axes.set(xlim=(0, width + 2.3), ylim=(len(rows), -0.05))
    axes.set_xticks(np.arange(width) + 0.5, np.arange(width), fontsize=8)
    axes.set_yticks(np.arange(len(rows)) + 0.5, np.arange(len(rows)), fontsize=8)
    axes.set_ylabel("row of the batch")
    axes.set_xlabel("position", loc="left")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def box(axes: Axes, x: float, y: float, width: float, text: str, color: str, size: float = 9) -> None:
    axes.add_patch(FancyBboxPatch((x - width / 2, y - 0.42), width, 0.84, boxstyle="round,pad=0,rounding_size=0.18",
                                  facecolor=color, edgecolor="none", zorder=3))  # fmt: skip
    axes.text(x, y, text, ha="center", va="center", fontsize=size, color="white", fontweight="bold", zorder=4)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, width: float) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9 + width, color=color, linewidth=width,
                                   shrinkA=0, shrinkB=0, zorder=2))  # fmt: skip


FIGURES = {
    "rotary": rotary,
    "norm": norm,
    "attention": attention,
    "layer": layer,
    "generate": generate,
    "model": model,
    "optimizer": optimizer,
    "classifier": classifier,
}
