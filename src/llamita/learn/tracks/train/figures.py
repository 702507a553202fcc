"""The figures of the training track's lessons: each computes what it shows."""

from collections import Counter
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

BLUE, ORANGE, GREEN, PURPLE, GREY = "#4a8fdc", "#e08035", "#3fa870", "#9b72d2", "#8b939f"
TEXT = (
    "One sunny evening, Pip the mouse was in the barn. He got a blue scarf from a crow. Then he took it to the pond to"
    " show Clara the deer. On the way, Pip lost the scarf. The next day, Clara found it and brought it back. From then"
    " on, Pip had the blue scarf. When Pip came back to the barn, he was happy."
)
MERGES = ((97, 98), (98, 99), (99, 100), (257, 100))


def pairs(figure: Figure) -> None:
    """The number of tokens of a story after each merge, and the first tokens learned."""
    words = Counter(tuple(word.encode()) for word in TEXT.replace(" ", "\n ").split("\n"))
    names = {byte: chr(byte).replace(" ", "␣") for byte in range(256)}
    lengths, labels = [sum(len(word) * count for word, count in words.items())], []
    while True:
        counts: Counter = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                counts[pair] += count
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        if counts[pair] < 2:
            break
        new = 256 + len(labels)
        names[new] = names[pair[0]] + names[pair[1]]
        labels.append((names[new], counts[pair]))
        words = Counter({_merged(word, pair, new): count for word, count in words.items()})
        lengths.append(sum(len(word) * count for word, count in words.items()))
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
    left.plot(lengths, color=BLUE)
    left.set(
        xlabel="merges learned", ylabel="tokens of one story", ylim=(0, None), title=f"{lengths[0]} bytes at first"
    )
    left.grid(axis="y")
    shown = labels[:9]
    right.barh(range(len(shown)), [count for _, count in shown], color=ORANGE, height=0.65)
    right.set_yticks(range(len(shown)), [name for name, _ in shown])
    right.invert_yaxis()
    right.set(xlabel="times the pair occurs", title="the first tokens (␣ is a space)")


def encoding(figure: Figure) -> None:
    """A word as boxes, a merge a line."""
    rank = {pair: place for place, pair in enumerate(MERGES)}
    names = {byte: chr(byte) for byte in range(256)}
    for place, (first, second) in enumerate(MERGES):
        names[256 + place] = names[first] + names[second]
    steps, word = [], tuple(b"abcd")
    while True:
        found = [pair for pair in pairwise(word) if pair in rank]
        chosen = min(found, key=lambda pair: rank[pair]) if found else None
        steps.append((word, chosen))
        if chosen is None:
            break
        word = _merged(word, chosen, 256 + rank[chosen])
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
    figure.set_size_inches(7.0, 2.4)
    for row, (word, chosen) in enumerate(steps):
        x, joined = 0.0, False
        for place, token in enumerate(word):
            here = word[place : place + 2] == chosen
            width = len(names[token]) * 0.9
            color = ORANGE if here or joined else BLUE
            left.add_patch(Rectangle((x, -row - 0.32), width, 0.64, facecolor=color, alpha=0.35, edgecolor=color))
            left.text(x + width / 2, -row, names[token], ha="center", va="center")
            x, joined = x + width + 0.14, here
        ranks = [f"{names[a]}·{names[b]}: {rank.get((a, b), '—')}" for a, b in pairwise(word)]
        left.text(4.6, -row, "     ".join(ranks), va="center")
    left.set(
        xlim=(-0.1, 9.6), ylim=(-len(steps) + 0.4, 0.7), title="the pairs, and their places in the list", xticks=[]
    )
    left.set_yticks([])
    left.spines[:].set_visible(False)
    right.axis("off")
    right.set_title("merges in the order learned")
    for place, (first, second) in enumerate(MERGES):
        right.text(0.25, 0.85 - 0.22 * place, f"{place}:  {names[first]} + {names[second]}", transform=right.transAxes)


def loss(figure: Figure) -> None:
    """-log p over p, and the loss of a logit over its lead on the others."""
    left, right = figure.subplots(1, 2)
    p = np.linspace(0.002, 1, 500)
    left.plot(p, -np.log(p), color=BLUE)
    for at, color in ((1 / 512, ORANGE), (0.1, GREEN), (0.9, PURPLE)):
        left.plot(at, -np.log(at), "o", color=color)
        left.annotate(f"p = {at:.3g}: {-np.log(at):.2f}", (at, -np.log(at)), (8, 3), textcoords="offset points")
    left.set(xlabel="probability of the token that came", ylabel="loss, nats", xlim=(-0.02, 1.05), ylim=(0, 6.8))
    lead = np.linspace(-6, 12, 300)
    for vocabulary, color in ((2, GREEN), (512, BLUE), (128_000, PURPLE)):
        value = np.log1p((vocabulary - 1) * np.exp(-lead))
        right.plot(lead, value, color=color, label=f"{vocabulary:,} tokens")
    right.set(xlabel="the right logit, less all others (equal)", ylabel="loss, nats", ylim=(0, None))
    right.legend()


def adamw(figure: Figure) -> None:
    """The first steps of Adam for a constant gradient and a noisy one, with the bias corrected and without."""
    beta1, beta2, steps = 0.9, 0.95, 40
    random = np.random.default_rng(1)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, gradients, title in (
        (panels[0], np.ones(steps), "a gradient of 1"),
        (panels[1], 0.5 + random.normal(size=steps), "a mean of 0.5, with noise of 1"),
    ):
        m = v = 0.0
        sizes: dict[str, list[float]] = {"corrected": [], "not corrected": [], "only m corrected": []}
        for t, gradient in enumerate(gradients, 1):
            m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2
            one, two = 1 - beta1**t, 1 - beta2**t
            sizes["corrected"].append((m / one) / np.sqrt(v / two))
            sizes["not corrected"].append(m / np.sqrt(v))
            sizes["only m corrected"].append((m / one) / np.sqrt(v))
        for (name, values), color in zip(sizes.items(), (BLUE, GREY, ORANGE), strict=True):
            axes.plot(range(1, steps + 1), values, color=color, label=name)
        axes.set(xlabel="update t", title=title)
        axes.grid(axis="y")
    panels[0].set_ylabel("step / learning rate")
    panels[0].legend()


def schedule(figure: Figure) -> None:
    """Warm-up and half a cosine, step by step for a short run, and for a long one."""
    panels = figure.subplots(1, 2)
    for axes, steps, warmup, style in ((panels[0], 6, 2, "o-"), (panels[1], 300, 20, "-")):
        minimum = 0.0 if steps == 6 else 0.05
        step = np.arange(steps)
        progress = (step + 1 - warmup) / (steps - warmup)
        fall = minimum + (1 - minimum) * (1 + np.cos(np.pi * progress)) / 2
        rates = np.where(step < warmup, (step + 1) / warmup, fall)
        axes.axvspan(-0.5, warmup - 0.5, color=ORANGE, alpha=0.15, linewidth=0)
        axes.plot(step, rates, style, color=BLUE, markersize=5)
        axes.set(xlabel="step", title=f"{steps} steps, {warmup} of them warm-up", ylim=(0, 1.12))
        axes.grid(axis="y")
        if steps == 6:
            for place, rate in zip(step, rates, strict=True):
                axes.annotate(f"{rate:.3g}", (place, rate), (5, 5), textcoords="offset points", fontsize=8)
    panels[0].set_ylabel("learning rate / peak")


def clipping(figure: Figure) -> None:
    """Gradients of two numbers: clipped by the norm, and number by number."""
    random = np.random.default_rng(4)
    gradients = random.normal(size=(7, 2)) * np.array([1.6, 1.2])
    limit = 1.0
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    figure.set_size_inches(7.0, 3.2)
    for axes, clipped, title in (
        (panels[0], gradients * np.minimum(1, limit / norms), "by the norm: the direction stays"),
        (panels[1], np.clip(gradients, -limit, limit), "each number: the direction turns"),
    ):
        angle = np.linspace(0, 2 * np.pi, 100)
        if axes is panels[0]:
            axes.plot(limit * np.cos(angle), limit * np.sin(angle), color=GREY, linewidth=1, linestyle="--")
        else:
            axes.add_patch(Rectangle((-1, -1), 2, 2, fill=False, edgecolor=GREY, linestyle="--"))
        for before, after in zip(gradients, clipped, strict=True):
            axes.plot(*zip((0, 0), before, strict=True), color=ORANGE, linewidth=1, alpha=0.7)
            axes.plot(*zip((0, 0), after, strict=True), color=BLUE, linewidth=2)
            axes.plot(*after, "o", color=BLUE, markersize=4)
        axes.set(title=title, aspect="equal")
        axes.axhline(0, color=GREY, linewidth=0.5)
        axes.axvline(0, color=GREY, linewidth=0.5)


def loop(figure: Figure) -> None:
    """The weights of labels of two parts of different sizes, in both kinds of mean."""
    counts = np.array([90, 10])
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    place = np.arange(counts.sum())
    owner = np.repeat([0, 1], counts)
    left.plot(place, 100 / counts.sum() * np.ones_like(place), color=BLUE, label="one mean over all")
    left.plot(place, (100 / len(counts) / counts)[owner], color=ORANGE, label="the mean of two means")
    left.axvline(counts[0] - 0.5, color=GREY, linewidth=0.8, linestyle="--")
    left.set(xlabel="scored label (90 of the first part, 10 of the second)", ylabel="its weight, %", ylim=(0, 5.6))
    left.legend(loc="upper left")
    losses = np.array([1.0, 3.0])
    means = (float(losses @ counts / counts.sum()), float(losses.mean()))
    right.bar(range(2), means, color=(BLUE, ORANGE), width=0.6)
    right.set_xticks(range(2), ["one mean", "mean of means"])
    for at, value in enumerate(means):
        right.text(at, value + 0.04, f"{value:.2f}", ha="center")
    right.set(title="loss, the parts' being 1 and 3", ylim=(0, 2.4))


def packing(figure: Figure) -> None:
    """The mask of a packed row, and its positions and labels."""
    numbers = np.array([1, 1, 1, 2, 2, 2, 2, 3, 3, 0])
    length = len(numbers)
    mask = (numbers[:, None] == numbers[None, :]) & np.tri(length, dtype=bool)
    begins = np.append(True, numbers[1:] != numbers[:-1])
    positions = np.arange(length) - np.maximum.accumulate(np.where(begins, np.arange(length), 0))
    scored = np.append((numbers[1:] == numbers[:-1]) & (numbers[1:] != 0), False)
    colors = {0: GREY, 1: BLUE, 2: ORANGE, 3: GREEN}
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    figure.set_size_inches(7.0, 3.2)
    for query, key in np.ndindex(length, length):
        color = colors[int(numbers[query])] if mask[query, key] else GREY
        alpha = 0.75 if mask[query, key] else 0.1
        left.add_patch(Rectangle((key, query), 0.92, 0.92, facecolor=color, alpha=alpha, linewidth=0))
    left.set(xlim=(0, length), ylim=(length, 0), aspect="equal", xlabel="key", ylabel="query", title="who sees whom")
    _bare(left)
    rows = (
        ("document", [str(number) for number in numbers]),
        ("position", [str(position) for position in positions]),
        ("next token\nscored", ["yes" if each else "–" for each in scored]),
    )
    for row, (name, values) in enumerate(rows):
        right.text(-0.4, row + 0.5, name, ha="right", va="center")
        for place, value in enumerate(values):
            color = colors[int(numbers[place])]
            right.add_patch(Rectangle((place, row + 0.1), 0.9, 0.8, facecolor=color, alpha=0.35, linewidth=0))
            right.text(place + 0.45, row + 0.5, value, ha="center", va="center", fontsize=8)
    right.set(xlim=(-3.4, length), ylim=(len(rows), 0), title="three documents and padding, 0")
    right.set_aspect(1.3)
    _bare(right)


def instructions(figure: Figure) -> None:
    """A conversation of two turns: the row that is read, and the labels."""
    words = ["<user>", "what", "colour", "?", "<end>", "<assistant>", "red", ".", "<end>"]
    is_said = np.array([False] * 6 + [True] * 3)
    axes = figure.subplots()
    figure.set_size_inches(7.0, 1.9)
    for place, word in enumerate(words[:-1]):
        color = BLUE if is_said[place] else GREY
        axes.add_patch(Rectangle((place, 0.1), 0.94, 0.8, facecolor=color, alpha=0.35, linewidth=0))
        axes.text(place + 0.47, 0.5, word, ha="center", va="center", fontsize=8)
    for place, (word, said) in enumerate(zip(words[1:], is_said[1:], strict=True)):
        color = ORANGE if said else GREY
        box = Rectangle((place, 1.1), 0.94, 0.8, facecolor=color, alpha=0.55 if said else 0.12, linewidth=0)
        axes.add_patch(box)
        axes.text(place + 0.47, 1.5, word if said else "–", ha="center", va="center", fontsize=8)
    axes.text(-0.15, 0.5, "input", ha="right", va="center")
    axes.text(-0.15, 1.5, "label", ha="right", va="center")
    axes.set(xlim=(-0.9, len(words) - 1), ylim=(2, 0))
    _bare(axes)


def lora(figure: Figure) -> None:
    """Numbers to learn by rank, and how well a product of thin matrices can be a given change."""
    left, right = figure.subplots(1, 2)
    width, ranks = 4096, np.array([1, 4, 16, 64, 256])
    left.bar(range(len(ranks)), 2 * width * ranks / 1e6, color=BLUE, width=0.65)
    left.axhline(width * width / 1e6, color=ORANGE, label="the whole matrix")
    left.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    left.set(
        xlabel="rank",
        ylabel="million numbers to learn",
        title=f"a matrix of {width} by {width}",
        yscale="log",
        ylim=(None, 150),
    )
    left.legend(loc="upper left")
    random = np.random.default_rng(0)
    decay = np.exp(-np.arange(64) / 6)
    for singular, color, name in ((decay, GREEN, "a change of low rank"), (np.ones(64), GREY, "a change of full rank")):
        u, _, v = np.linalg.svd(random.normal(size=(64, 64)))
        values = np.linalg.svd(u @ np.diag(singular) @ v, compute_uv=False) ** 2
        right.plot(np.arange(65), np.append(0, np.cumsum(values)) / values.sum(), color=color, label=name)
    right.set(xlabel="rank of the adapter (64 by 64)", ylabel="share of the change", ylim=(0, 1.05))
    right.legend(loc="lower right")


def dpo(figure: Figure) -> None:
    """The loss and the size of its gradient over the margin."""
    margin = np.linspace(-30, 30, 400)
    left, right = figure.subplots(1, 2)
    for beta, color in ((0.05, GREEN), (0.1, BLUE), (0.5, ORANGE)):
        left.plot(margin, np.logaddexp(0, -beta * margin), color=color, label=f"beta {beta}")
        right.plot(margin, beta / (1 + np.exp(beta * margin)), color=color)
    left.axhline(np.log(2), color=GREY, linewidth=0.8, linestyle="--")
    left.text(-29, np.log(2) - 0.35, "log 2: the beginning", fontsize=8)
    left.set(xlabel="margin, nats", ylabel="loss", ylim=(0, 6))
    left.legend()
    right.set(xlabel="margin, nats", ylabel="pull on the margin", ylim=(0, None))


def classifier(figure: Figure) -> None:
    """Rows padded in four ways, and where three ways of finding the last token look."""
    real = np.array([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=bool)
    places = np.arange(real.shape[1])
    ways = (
        ("the last True", np.where(real, places, -1).max(axis=1), GREEN, "o"),
        ("number of tokens - 1", real.sum(axis=1) - 1, ORANGE, "x"),
        ("the last column", np.full(len(real), real.shape[1] - 1), PURPLE, "+"),
    )
    axes = figure.subplots()
    figure.set_size_inches(7.0, 2.5)
    for row, column in np.ndindex(*real.shape):
        color, alpha = (BLUE, 0.4) if real[row, column] else (GREY, 0.12)
        axes.add_patch(Rectangle((column, row + 0.08), 0.95, 0.84, facecolor=color, alpha=alpha, linewidth=0))
    for number, (name, columns, color, marker) in enumerate(ways):
        x = columns + 0.25 + 0.23 * number
        axes.plot(x, np.arange(len(real)) + 0.5, marker, color=color, label=name, markersize=7, markeredgewidth=2)
    names = ("padded behind", "padded in front", "on both sides", "not at all")
    axes.set_yticks(np.arange(len(real)) + 0.5, names)
    axes.set(xlim=(0, 9), ylim=(len(real), 0), xticks=[])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.legend(loc="center right")


def calibration(figure: Figure) -> None:
    """Reliability before and after a temperature, for logits that are twice and a half too large."""
    random = np.random.default_rng(2)
    logits = 1.3 * random.normal(size=(4000, 3))
    weights = np.exp(logits)
    cumulative = (weights / weights.sum(axis=1, keepdims=True)).cumsum(axis=1)
    labels = (random.random((len(logits), 1)) > cumulative).sum(axis=1).clip(max=2)
    panels = figure.subplots(1, 2, sharey=True)
    figure.set_size_inches(7.0, 3.2)
    for axes, scale, title in ((panels[0], 2.5, "too sure"), (panels[1], 1.0, "divided by T = 2.5")):
        weights = np.exp(scale * logits)
        probabilities = weights / weights.sum(axis=1, keepdims=True)
        confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
        place, error = np.ceil(confidence * 10), 0.0
        for k in np.unique(place):
            here = place == k
            share, sure = right[here].mean(), confidence[here].mean()
            error += here.mean() * abs(share - sure)
            axes.bar((k - 0.5) / 10, share, width=0.09, color=BLUE, alpha=0.75)
            axes.plot([(k - 0.95) / 10, (k - 0.05) / 10], [sure, sure], color=ORANGE)
        axes.plot((0.3, 1), (0.3, 1), color=GREY, linestyle="--", linewidth=1)
        axes.set(xlabel="confidence", title=f"{title}: calibration error {error:.3f}", xlim=(0.3, 1), ylim=(0, 1.02))
    panels[0].set_ylabel("share that is right")


FIGURES = {
    "pairs": pairs,
    "encoding": encoding,
    "loss": loss,
    "adamw": adamw,
    "schedule": schedule,
    "clipping": clipping,
    "loop": loop,
    "packing": packing,
    "instructions": instructions,
    "lora": lora,
    "dpo": dpo,
    "classifier": classifier,
    "calibration": calibration,
}


def _merged(word: tuple[int, ...], pair: tuple[int, int], new: int) -> tuple[int, ...]:
    found, place = [], 0
    while place < len(word):
        here = word[place : place + 2] == pair
        found.append(new if here else word[place])
        place += 2 if here else 1
    return tuple(found)


def _bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
