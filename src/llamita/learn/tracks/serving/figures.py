"""The figures of the serving track: each draws what its lesson says, from numbers that it computes."""

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#4c8dd6", "#e08a3c", "#4fa66a", "#8a8a8a"


def basics(figure: Figure) -> None:
    """SiLU beside ReLU, and the sigmoid that makes it."""
    x = np.linspace(-6, 6, 241)
    sigmoid = 1 / (1 + np.exp(-x))
    axes = figure.subplots()
    axes.plot(x, x * sigmoid, color=BLUE, label="silu(x) = x · sigmoid(x)")
    axes.plot(x, np.maximum(x, 0), color=ORANGE, linestyle="--", label="relu(x)")
    axes.plot(x, sigmoid, color=GREY, linestyle=":", label="sigmoid(x)")
    axes.set_xlabel("x")
    axes.set_ylim(-1, 4)
    axes.legend()


def attention(figure: Figure) -> None:
    """Weights of eight random queries over twelve keys of size 64: without the scale one key takes nearly all."""
    query, key = (np.random.default_rng(seed).normal(size=(rows, 64)) for seed, rows in ((0, 8), (1, 12)))
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, scale, title in ((left, 1.0, "without the scale"), (right, 64**-0.5, "scale = 1 / sqrt(64)")):
        image = axes.imshow(softmax(query @ key.T * scale), vmin=0, vmax=1, cmap="viridis")
        axes.set_title(title)
        axes.set_xlabel("key")
    left.set_ylabel("query")
    figure.colorbar(image, ax=[left, right], label="weight", shrink=0.6)


def rope(figure: Figure) -> None:
    """The product of a query of ones with a key of ones, over the distance between them, of pairs and of all."""
    distances = np.arange(0, 65)
    speeds = 10000.0 ** (-np.arange(0, 64, 2) / 64)
    products = np.cos(distances[:, None] * speeds) / 32  # (distance, pair), each of two coordinates of a pair
    axes = figure.subplots()
    for pair, colour in ((0, GREY), (8, ORANGE), (16, GREEN)):
        axes.plot(distances, 32 * products[:, pair], color=colour, alpha=0.7, label=f"pair {pair} alone")
    axes.plot(distances, products.sum(1), color=BLUE, linewidth=2.5, label="all 32 pairs, mean")
    axes.set_xlabel("distance between query and key, in positions")
    axes.set_ylabel("product")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def grouped(figure: Figure) -> None:
    """Which keys three queries see that are the last of seven positions: aligned to the last key, and to the first."""
    L, S = 3, 7
    figure.set_size_inches(7, 1.9)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, first, title in ((left, S - L, "right: query i at S - L + i"), (right, 0, "wrong: query i at i")):
        seen = np.arange(S) <= np.arange(first, first + L)[:, None]
        axes.imshow(seen, cmap="Blues", vmin=-0.5, vmax=1.5)
        axes.set_title(title)
        axes.set_xlabel("key")
        axes.set_xticks(range(S))
        axes.set_yticks(range(L), [f"query {i}" for i in range(L)])
        for row, column in np.argwhere(~seen):
            axes.text(column, row, "-inf", ha="center", va="center", color=GREY, fontsize=8)


def sampling(figure: Figure) -> None:
    """Probabilities of the 25 likeliest of a thousand tokens, and how many each rule keeps."""
    p = np.sort(softmax(2.0 * np.random.default_rng(4).normal(size=1000)))[::-1]
    axes = figure.subplots()
    axes.bar(np.arange(25), p[:25], color=BLUE)
    before = np.cumsum(p) - p
    rules = (
        ("top_k = 5", 5, ORANGE),
        ("min_p = 0.3", int((p >= 0.3 * p[0]).sum()), GREEN),
        ("top_p = 0.3", int((before < 0.3).sum()), GREY),
    )
    for name, count, colour in rules:
        axes.axvline(count - 0.5, color=colour, linestyle="--", label=f"{name} keeps {count}, {p[:count].sum():.0%}")
    axes.set_xlabel("token, from the most likely down")
    axes.set_ylabel("probability")
    axes.legend()


def cache(figure: Figure) -> None:
    """Positions that the model computes for a prompt of 100 tokens and the tokens after it."""
    new = np.arange(0, 201)
    axes = figure.subplots()
    axes.plot(new, np.cumsum(100 + new), color=ORANGE, label="without a cache")
    axes.plot(new, 100 + new, color=BLUE, label="with a cache")
    axes.set_yscale("log")
    axes.set_xlabel("new tokens after a prompt of 100")
    axes.set_ylabel("positions computed in all")
    axes.legend()


def quantize(figure: Figure) -> None:
    """The error of rounded weights against the bytes of a weight, for several sizes of a group."""
    w = np.random.default_rng(0).normal(size=(64, 1024))
    axes = figure.subplots()
    for bits, colour in ((3, GREY), (4, ORANGE), (5, GREEN), (8, BLUE)):
        sizes, errors, groups = [], [], (16, 32, 64, 128, 256)
        for group in groups:
            parts = w.reshape(64, -1, group)
            low = parts.min(-1, keepdims=True)
            scale = (parts.max(-1, keepdims=True) - low) / (2**bits - 1)
            rounded = np.round((parts - low) / scale) * scale + low
            errors.append(np.sqrt(((rounded - parts) ** 2).mean()))
            sizes.append(bits + 2 * 16 / group)
        axes.plot(sizes, errors, "o-", color=colour, label=f"{bits} bits")
        for group, size, error in zip(groups, sizes, errors, strict=True):
            if bits == 4 and group in (16, 256):
                text, side = (f"groups of {group}", "left") if group == 16 else (f"of {group}", "right")
                axes.annotate(text, (size, error), textcoords="offset points", xytext=(0, -12), color=GREY, ha=side)
    axes.set_yscale("log")
    axes.set_xlabel("bits of a weight, with a scale and a bias of 16 bits for each group")
    axes.set_ylabel("error, where weights are of size 1")
    axes.legend()


def flash(figure: Figure) -> None:
    """One query over 64 keys in blocks of four: the running maximum, the total, and the output divided by the total."""
    rng = np.random.default_rng(2)
    scores, value = 2 * rng.normal(size=64), rng.normal(size=64)
    maximum, total, output, rows = -np.inf, 0.0, 0.0, []
    for start in range(0, 64, 4):
        part = scores[start : start + 4]
        greatest = max(maximum, part.max())
        weights, correction = np.exp(part - greatest), np.exp(maximum - greatest)
        total, output = total * correction + weights.sum(), output * correction + weights @ value[start : start + 4]
        maximum = greatest
        rows.append((maximum, total, output / total))
    exact = softmax(scores) @ value
    figure.set_size_inches(7, 3.8)
    names = ("maximum", "total", "output / total")
    for axes, values, name in zip(figure.subplots(3, 1, sharex=True), zip(*rows, strict=True), names, strict=True):
        axes.step(range(1, 17), values, where="mid", color=BLUE)
        axes.set_ylabel(name)
    axes.axhline(exact, color=ORANGE, linestyle="--", label="plain attention")
    axes.set_xlabel("blocks of keys taken in")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def batching(figure: Figure) -> None:
    """Four requests in two places, run by the rules of the lesson: chunks of four tokens, then a token a step."""
    requests = [[prompt, new, 0, 0] for prompt, new in ((7, 6), (2, 2), (3, 5), (1, 3))]
    waiting, running, step = list(range(4)), [], 0
    axes = figure.subplots()
    while waiting or running:
        while waiting and len(running) < 2:
            running.append(waiting.pop(0))
        reading = [r for r in running if requests[r][2] < requests[r][0]]
        for r in [r for r in running if r not in reading]:
            requests[r][3] += 1
            axes.barh(r, 1, left=step, color=BLUE, edgecolor="white")
        for r in reading[:1]:
            requests[r][2] = min(requests[r][0], requests[r][2] + 4)
            requests[r][3] += requests[r][2] == requests[r][0]
            axes.barh(r, 1, left=step, color=ORANGE, edgecolor="white")
        running = [r for r in running if requests[r][3] < requests[r][1]]
        step += 1
    axes.barh([0], [0], color=ORANGE, label="reads a chunk of its prompt")
    axes.barh([0], [0], color=BLUE, label="writes a token")
    axes.set_yticks(range(4), [f"request {r}" for r in range(4)])
    axes.invert_yaxis()
    axes.set_xlabel("step")
    axes.legend(loc="lower left")


def paged(figure: Figure) -> None:
    """The pages of three texts that grow in turns, in a pool of sixteen pages of four positions."""
    tables: list[list[int]] = [[], [], []]
    lengths, free = [0, 0, 0], list(range(16))
    for _ in range(13):
        for text, growth in enumerate((1, 2, 1)):
            lengths[text] += growth if lengths[text] < (13, 18, 7)[text] else 0
            while len(tables[text]) * 4 < lengths[text]:
                tables[text].append(free.pop(0))
    memory = np.full((16, 4), np.nan)
    for text, table in enumerate(tables):
        for s in range(lengths[text]):
            memory[table[s // 4], s % 4] = text
    axes = figure.subplots()
    axes.imshow(memory.T, cmap="Set2", vmin=0, vmax=7, aspect="auto")
    for text, table in enumerate(tables):
        for number, page in enumerate(table):
            axes.text(page, -0.75, f"{'ABC'[text]}{number}", ha="center", color=GREY)
    axes.set_xlabel("page of the memory; above it, which page of which text it is")
    axes.set_ylabel("place in the page")
    axes.set_xticks(range(16))
    axes.set_yticks(range(4))


def speculative(figure: Figure) -> None:
    """Tokens settled by a step of the large model, if each guess is right with the same probability."""
    right = np.linspace(0, 1, 101)
    axes = figure.subplots()
    for count, colour in ((2, GREY), (4, BLUE), (8, ORANGE)):
        tokens = sum(right**n for n in range(count + 1))
        axes.plot(right, tokens, color=colour, label=f"{count} guesses")
    axes.set_xlabel("probability that a guess is right")
    axes.set_ylabel("tokens for each step of the large model")
    axes.legend()


def softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(-1, keepdims=True))


FIGURES: dict[str, Callable[[Figure], None]] = {
    "basics": basics,
    "attention": attention,
    "rope": rope,
    "grouped": grouped,
    "sampling": sampling,
    "cache": cache,
    "quantize": quantize,
    "flash": flash,
    "batching": batching,
    "paged": paged,
    "speculative": speculative,
}
