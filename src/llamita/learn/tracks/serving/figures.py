"""The figures of the serving track: each draws what its lesson says, from numbers that it computes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

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


def heads(figure: Figure) -> None:
    """Four positions of six numbers as three heads: each cell has the head of its number and the position."""
    L, D, H = 4, 6, 3
    E = D // H
    numbers = np.arange(L * D)  # number // D is its position, number % D // E its head
    figure.set_size_inches(7, 2.15)
    panels = figure.subplots(1, 3, width_ratios=(6.2, 8.6, 8.6))
    arrangements = (
        (numbers.reshape(1, L, D), "from the linear layer", f"(N, L, D) = (1, {L}, {D})"),
        (numbers.reshape(L, H, E).transpose(1, 0, 2), "divided, then exchanged", f"(N, H, L, E) = (1, {H}, {L}, {E})"),
        (numbers.reshape(H, L, E), "wrong: in one step", f"(N, H, L, E) = (1, {H}, {L}, {E})"),
    )
    for axes, (array, title, label) in zip(panels, arrangements, strict=True):
        for (block, row, column), number in np.ndenumerate(array):
            x = column + block * (E + 0.7)  # a block is a head, but for the first array, which is one block
            cell(axes, x, row, (BLUE, ORANGE, GREEN)[number % D // E])
            axes.text(x + 0.5, row + 0.5, str(number // D), ha="center", va="center", color="white")
        if len(array) > 1:
            for block in range(H):
                axes.text(block * (E + 0.7) + E / 2, L + 0.45, f"head {block}", ha="center", va="center", fontsize=8)
        margin = 0.1 if len(array) == 1 else 0.6
        axes.set(xlim=(-margin, x + 1 + margin), ylim=(L + 0.8, -0.1), aspect="equal", title=title, xlabel=label)
        bare(axes)


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


def layers(figure: Figure) -> None:
    """The size of rows before and after RMSNorm, with squares in float32 and in float16; what passes the gate."""
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    sizes, eps = np.geomspace(1e-5, 5e4, 400), 1e-5
    for dtype, colour, style in ((np.float32, BLUE, "-"), (np.float16, ORANGE, "--")):
        x = np.outer(sizes, [1, -1, -1, 1]).astype(dtype)
        with np.errstate(over="ignore"):
            y = x / np.sqrt((x * x).mean(-1, keepdims=True) + dtype(eps))
        after = np.sqrt((y.astype(np.float64) ** 2).mean(-1))
        left.semilogx(sizes, after, color=colour, linestyle=style, label=f"squares in {dtype.__name__}")
    for size, name in ((eps**0.5, " root of\n epsilon"), (256, " 256")):
        left.vlines(size, 0, 1, color=GREY, linestyle=":", linewidth=1)
        left.text(size, 0.2, name, va="center", color=GREY, fontsize=8)
    left.set(title="RMSNorm, epsilon = 1e-5", xlabel="root mean square of x", ylim=(0, 1.3))
    left.set_ylabel("root mean square of the result")
    left.legend(loc="upper left", ncols=2, fontsize=8, handlelength=1.6, columnspacing=1)
    gate = np.linspace(-6, 4, 200)
    for up, colour in ((2, BLUE), (1, GREEN), (-1, ORANGE)):
        passed = gate / (1 + np.exp(-gate)) * up
        right.plot(gate, passed, color=colour)
        right.text(4.15, passed[-1], f"up(x) = {up}".replace("-", "−"), color=colour, va="center", fontsize=8)
    right.set(title="silu(gate(x)) · up(x)", xlabel="gate(x)", xlim=(-6, 4))


class Shape(NamedTuple):
    """The sizes of a known model that decide how many parameters it has."""

    name: str
    V: int
    D: int
    C: int
    layers: int
    H: int
    """Query heads."""
    K: int
    """Heads of keys and values."""
    E: int
    tied: bool
    """Whether the logits come from the embeddings' own matrix."""
    qkv_bias: bool = False
    head_norms: bool = False


SHAPES = (
    Shape("Qwen2 0.5B", 151936, 896, 4864, 24, 14, 2, 64, True, qkv_bias=True),
    Shape("Qwen3 0.6B", 151936, 1024, 3072, 28, 16, 8, 128, True, head_norms=True),
    Shape("Llama 3.2 1B", 128256, 2048, 8192, 16, 32, 8, 64, True),
    Shape("Llama 2 7B", 32000, 4096, 11008, 32, 32, 32, 128, False),
)


def matrices(shape: Shape) -> dict[str, tuple[int, int]]:
    """Returns the matrices of one layer in the order of use, each (outputs, inputs)."""
    D, C, queries, keys = shape.D, shape.C, shape.H * shape.E, shape.K * shape.E
    attention = {"q_proj": (queries, D), "k_proj": (keys, D), "v_proj": (keys, D), "o_proj": (D, queries)}
    return attention | {"gate_proj": (C, D), "up_proj": (C, D), "down_proj": (D, C)}


def parameters(shape: Shape) -> dict[str, int]:
    """Returns how many parameters each part of a model has."""
    sizes = {name: rows * columns for name, (rows, columns) in matrices(shape).items()}
    attention = sum(sizes[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    small = 2 * shape.D + shape.qkv_bias * (shape.H + 2 * shape.K) * shape.E + shape.head_norms * 2 * shape.E
    return {
        "embeddings": shape.V * shape.D,
        "attention": shape.layers * attention,
        "feed-forward": shape.layers * (sum(sizes.values()) - attention),
        "lm_head": 0 if shape.tied else shape.V * shape.D,
        "norms and biases": shape.layers * small + shape.D,
    }


def model(figure: Figure) -> None:
    """The matrices of one layer to scale, and the shares of the parts in the parameters of four models."""
    figure.set_size_inches(7, 4.3)
    above, below = figure.subplots(2, 1, height_ratios=(1.25, 1))
    example = SHAPES[1]
    x = 0.0
    for name, (rows, columns) in matrices(example).items():
        colour = GREEN if name in ("gate_proj", "up_proj", "down_proj") else ORANGE
        height, width = rows / example.D, columns / example.D
        above.add_patch(Rectangle((x, 0), width, height, facecolor=colour, linewidth=0))
        above.text(x + width / 2, height + 0.18, name, ha="center", va="center", fontsize=8)
        size = f"{rows}\n× {columns}"
        above.text(x + width / 2, height / 2, size, ha="center", va="center", fontsize=8, color="white")
        x += width + 0.3
    higher = f"would be {example.V / example.C:.0f} times as high as gate_proj"
    said = f"embed_tokens, {example.V} × {example.D},\n{higher}"
    above.text(2.9, 2.75, said, ha="center", va="center", fontsize=8, color=BLUE)
    above.set(xlim=(-0.1, x), ylim=(0, 3.4), aspect="equal")
    above.set_xlabel(f"the matrices of one layer of {example.name}, to scale")
    bare(above)

    colours = {"embeddings": BLUE, "attention": ORANGE, "feed-forward": GREEN, "lm_head": GREY}
    for place, shape in enumerate(SHAPES):
        counts, left = parameters(shape), 0.0
        for part, colour in colours.items():
            share = 100 * counts[part] / sum(counts.values())
            below.barh(place, share, left=left, color=colour, height=0.72, label=part if place == 0 else None)
            if counts[part]:
                below.text(left + share / 2, place, f"{share:.0f}", ha="center", va="center", fontsize=8, color="white")
            left += share
        below.text(101, place, f"{sum(counts.values()) / 1e6:,.0f} million", va="center", fontsize=8)
    below.set_yticks(range(len(SHAPES)), [shape.name for shape in SHAPES])
    below.set(xlim=(0, 100), ylim=(len(SHAPES) - 0.5, -0.5), xlabel="percent of the parameters")
    below.tick_params(axis="y", length=0)
    below.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, fontsize=8, handlelength=1)


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


def generate(figure: Figure) -> None:
    """The scores of each call of the model: a prompt at once or in chunks, then single tokens."""
    prompt, new, gap = 10, 4, 0.3  # between the rows of two calls
    figure.set_size_inches(7, 3.3)
    for axes, chunk in zip(figure.subplots(1, 2, sharey=True), (prompt, 4), strict=True):
        spans = calls(prompt, new, chunk)
        for number, (first, last) in enumerate(spans):
            y = first + gap * number
            colour = ORANGE if last <= prompt else BLUE
            for query, key in np.ndindex(last - first, last):
                cell(axes, key, y + query, colour, 1.0 if key <= first + query else 0.25)
            count = f"{last - first} × {last} = {(last - first) * last}"
            axes.text(last + 0.4, y + (last - first) / 2, count, va="center", fontsize=8)
        most = max((last - first) * last for first, last in spans)
        name = "the prompt at once" if chunk == prompt else f"chunks of {chunk}"
        axes.set(xlim=(0, 17.5), ylim=(y + 1, 0), aspect="equal", title=f"{name}: {most} scores at most")
        axes.set(xlabel="key", ylabel="query")
        axes.xaxis.set_label_coords(spans[-1][1] / 2 / 17.5, -0.03)
        bare(axes)


def calls(prompt: int, new: int, chunk: int) -> list[tuple[int, int]]:
    """Returns for each call of the model the positions that it computes, from the first to before the last."""
    spans = [(first, min(first + chunk, prompt)) for first in range(0, prompt, chunk)]
    return spans + [(place, place + 1) for place in range(prompt, prompt + new - 1)]  # the last token is not run


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


def prefix(figure: Figure) -> None:
    """The pages of three texts with common beginnings, as a tree, in the colour of the text that computed them."""
    size = 4
    texts = {
        "A": "the fox sat by the river in the grass and saw a fish",
        "B": "the fox sat by the river in the snow and found a scarf",
        "C": "the fox sat by a fire and saw the river in the sky",
    }
    pages = prefix_pages([line.split() for line in texts.values()], size)
    figure.set_size_inches(7, 2.3)
    axes = figure.subplots()
    for tokens, (page, users) in pages.items():
        depth, row, full = (len(tokens) - 1) // size, users[0], len(tokens) % size == 0
        x, y, colour = 1.15 * depth, 1.4 * row, (BLUE, ORANGE, GREEN)[row]
        if depth:
            before = 1.4 * pages[tokens[: depth * size]][1][0]
            line = np.array([[x - 0.15, before], [x - 0.075, before], [x - 0.075, y], [x, y]])
            axes.plot(line[:, 0], line[:, 1] + 0.5, color=GREY, linewidth=1)
        fill, style, ink = (colour, "-", {"color": "white"}) if full else ("none", "--", {})
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor=fill, edgecolor=colour, linestyle=style))
        said = f"page {page}: {', '.join(list(texts)[user] for user in users)}"
        axes.text(x + 0.5, y + 0.33, " ".join(tokens[depth * size :]), ha="center", va="center", fontsize=8.5, **ink)
        axes.text(x + 0.5, y + 0.7, said, ha="center", va="center", fontsize=8, **ink)
    axes.set(xlim=(-0.02, 4.5), ylim=(3.9, -0.1), xlabel="each page: its tokens, its number, the texts that use it")
    bare(axes)


def prefix_pages(texts: Sequence[Sequence[str]], size: int) -> dict[tuple[str, ...], tuple[int, list[int]]]:
    """Returns the pages that texts take one after the other, by all tokens up to a page's end: number and texts."""
    pages: dict[tuple[str, ...], tuple[int, list[int]]] = {}
    for number, text in enumerate(texts):
        for first in range(0, len(text), size):
            tokens = tuple(text[: first + size])
            pages.setdefault(tokens, (len(pages), []))[1].append(number)
    return pages


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


def cell(axes: Axes, x: float, y: float, colour: str, alpha: float = 1.0) -> None:
    axes.add_patch(Rectangle((x + 0.04, y + 0.04), 0.92, 0.92, facecolor=colour, alpha=alpha, linewidth=0))


def bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(-1, keepdims=True))


FIGURES: dict[str, Callable[[Figure], None]] = {
    "basics": basics,
    "attention": attention,
    "heads": heads,
    "rope": rope,
    "grouped": grouped,
    "layers": layers,
    "model": model,
    "sampling": sampling,
    "cache": cache,
    "generate": generate,
    "quantize": quantize,
    "flash": flash,
    "batching": batching,
    "paged": paged,
    "prefix": prefix,
    "speculative": speculative,
}
