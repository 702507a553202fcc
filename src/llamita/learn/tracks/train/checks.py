"""The checks of the training track: each runs one function of the reader's on fixed inputs, and so the solution's.

`mine` holds the modules under judgement by their names, `right` those of the solutions. What a function calls of its
own file is taken from `right`, so that a mistake shows where it is made and nowhere else. `tensors` is the framework's
own: numpy to its arrays and back.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from tensors import array, boolean, half, tensor

from llamita.learn.checking import Check, Outputs

IGNORE = -100
TEXTS = (
    "the cat sat on the mat. The cat's hat sat there too; the rat saw that hat.",
    "Max's  cap!\n\n  In 1984, x_1 = 42 (or so)...\tThe end. \n",
    "Zoë naïvely ate 3 crêpes — 日本語のテキスト、mmmmm, aaaa aaaaaa aaa 🦙🦙",
)
LONGER = " ".join((*TEXTS, "banana bandana ananas", "low lower lowest, new newer newest, wide wider widest " * 3))
"""What merges are learned from: with ties, and with runs of one letter."""
MERGES = (
    (97, 98),
    (98, 99),
    (99, 100),
    (256, 257),
    (257, 100),
    (101, 101),
    (260, 101),
    (98, 258),
    (97, 262),
    (32, 256),
    (99, 32),
)
"""Merges in an order in which the first that fits from the left is not the first that was learned."""


def split(mine: Any, right: Any) -> Outputs:
    found = {}
    for text in (*TEXTS, "  two\tspaces \n", "don't_stop 2x", " ", "a-b -c - d"):
        words = listed(mine.bpe.words_of(text), str)
        for place, word in enumerate(right.bpe.words_of(text)):
            length = len(words[place]) if place < len(words) else 0
            found[f"the length of words_of({text!r})[{place}], which should be {word!r},"] = np.array(length)
        found[f"the number of words of {text!r}"] = np.array(len(words))
        found[f"characters of the words of {text!r}"] = np.array([ord(letter) for word in words for letter in word])
    return found


def pair_counts(mine: Any, right: Any) -> Outputs:
    words = {(1, 2, 3): 2, (2, 3): 5, (1, 2, 1, 2): 3, (7, 7, 7): 1, (7, 7, 7, 7, 4): 2, (9,): 4, (): 1}
    return counted("count of", mine.bpe.count_pairs(words), [*right.bpe.count_pairs(words), (3, 1), (3, 2), (9, 9)])


def choice(mine: Any, right: Any) -> Outputs:
    tables = (
        {(5, 6): 2, (1, 9): 7, (3, 3): 4},
        {(5, 6): 4, (2, 9): 7, (2, 8): 7, (3, 1): 7, (1, 1): 6},
        {(300, 1): 3, (97, 257): 3, (97, 98): 3},
        {(4, 9): 7, (2, 9): 7, (3, 8): 7},
        {(4, 4): 1, (4, 5): 9},
    )
    return {f"the pair of {table}": np.array(mine.bpe.most_frequent(dict(table))) for table in tables}


def merging(mine: Any, right: Any) -> Outputs:
    found = {}
    for tokens, pair in (
        ((1, 2, 3, 1, 2), (1, 2)), ((7, 7, 7), (7, 7)), ((7, 7, 7, 7, 7, 1), (7, 7)), ((1, 1, 2, 2), (1, 2)),
        ((2, 1, 2, 1), (1, 2)), ((5,), (5, 5)), ((3, 4), (4, 3)), ((1, 2), (1, 2)),
    ):  # fmt: skip
        name = f"merged({tokens}, {pair}, 9)"
        found[name] = np.array(listed(mine.bpe.merged(tokens, pair, 9), int))
    return found


def learned(mine: Any, right: Any) -> Outputs:
    for name in ("words_of", "count_pairs", "most_frequent", "merged"):
        setattr(mine.bpe, name, getattr(right.bpe, name))
    found = {}
    short = (("abc def", "ghi"), ("ab", "ab"), ("a",))
    for size, texts in ((256, TEXTS), (259, TEXTS), (290, (LONGER,)), (400, TEXTS), *((400, each) for each in short)):
        merges = listed(mine.bpe.train(list(texts), size), tuple)
        of = str(list(texts)) if texts in short else f"{len(texts)} texts of {sum(map(len, texts))} characters"
        found[f"merges of train({of}, {size})"] = np.array(merges, dtype=int).reshape(-1, 2)
    return found


def encoded(mine: Any, right: Any) -> Outputs:
    mine.bpe.words_of, mine.bpe.merged = right.bpe.words_of, right.bpe.merged
    learned_merges = right.bpe.train([LONGER], 330)
    found = {}
    for text in ("abcd", "abcdee", "c c abc abc", "abcabc bcd abcde abcdee", "eeeee ee", "", "ab ab  ab"):
        found[f"tokens of {text!r} by MERGES"] = np.array(listed(mine.bpe.encode(text, MERGES), int))
    for text in (*TEXTS, "unseen words: 北京 lowest banana"):
        found[f"tokens of {text!r} by merges learned"] = np.array(listed(mine.bpe.encode(text, learned_merges), int))
    return found


def decoded(mine: Any, right: Any) -> Outputs:
    merges = right.bpe.train([LONGER], 330)
    found = {}
    for text in (*TEXTS, ""):
        tokens = right.bpe.encode(text, merges)
        found[f"characters decoded of the tokens of {text!r}"] = characters(mine.bpe.decode(tokens, merges))
    tokens = right.bpe.encode("🦙 a", ())
    for cut in (tokens[1:], tokens[:3], [*tokens[:2], 97, 0xFF, 98]):
        found[f"characters decoded of {cut}"] = characters(mine.bpe.decode(cut, merges))
    return found


def shifting(mine: Any, right: Any) -> Outputs:
    rows = tensor(np.array([[5, 3, 8, 2, 9, 9], [4, 4, 7, 6, 1, 2], [1, 9, 9, 9, 9, 9]]))
    before = array(rows)
    inputs, labels = mine.loss.shifted(rows, 9)
    return {"inputs": array(inputs), "labels": array(labels), "change of the rows passed in": array(rows) - before}


def logits_and_labels() -> tuple[np.ndarray, np.ndarray]:
    labels = np.array([[2, IGNORE, 0, 6, IGNORE], [IGNORE, IGNORE, 3, IGNORE, IGNORE], [1, 1, 5, 4, 0]])
    return 2 * numbers(1, 3, 5, 7) + 1.5, labels


def unlikely() -> tuple[np.ndarray, np.ndarray]:
    """Logits of 200 for token 0 and of 0 for the others, whose probability is too small for float32; labels."""
    return np.array([[[200.0, 0, 0]] * 3] * 2), np.array([[1, 0, IGNORE], [0, IGNORE, 2]])


def summed(mine: Any, right: Any) -> Outputs:
    logits, labels = logits_and_labels()
    run = mine.loss.summed_cross_entropy
    found = {"sum": array(run(tensor(logits), tensor(labels)))}
    found["sum of logits of about 1000"] = array(run(tensor(logits + 1000), tensor(labels)))
    found["sum of logits of about -1000"] = array(run(tensor(logits - 1000), tensor(labels)))
    found["sum of bfloat16 logits"] = array(run(half(logits), tensor(labels)))
    found["sum where probabilities are too small for float32"] = array(run(*map(tensor, unlikely())))
    none = np.full_like(labels, IGNORE)
    found["sum where no label is scored"] = array(run(tensor(logits), tensor(none)))
    return found


def mean(mine: Any, right: Any) -> Outputs:
    mine.loss.summed_cross_entropy = right.loss.summed_cross_entropy
    logits, labels = (tensor(each) for each in logits_and_labels())
    found = {"mean": array(mine.loss.cross_entropy(logits, labels))}
    found["mean where no label is scored"] = array(mine.loss.cross_entropy(logits, 0 * labels + IGNORE))
    return found


def update(mine: Any, right: Any) -> Outputs:
    found: dict[str, np.ndarray] = {}
    for label, epsilon, decay in (("", 0.02, 0.3), (" without decay", 1e-8, 0.0)):
        parameter, m, v = tensor(numbers(1, 3, 4)), tensor(np.zeros((3, 4))), tensor(np.zeros((3, 4)))
        for t in range(1, 7):
            gradient = tensor(numbers(10 + t, 3, 4))
            given = {"parameter": parameter, "gradient": gradient, "m": m, "v": v}
            before = {name: array(each) for name, each in given.items()}
            parameter, m, v = mine.adamw.adamw_update(parameter, gradient, m, v, t, 0.05, 0.8, 0.95, epsilon, decay)
            if t in (1, 2, 6):
                names = zip(("parameter", "m", "v"), (parameter, m, v), strict=True)
                found |= {f"{name} after update {t}{label}": array(each) for name, each in names}
            if t == 1:
                for name, each in given.items():
                    found[f"change of the {name} that was passed in{label}"] = array(each) - before[name]
    return found


def decay(mine: Any, right: Any) -> Outputs:
    shapes = ((3, 4), (4,), (1,), (1, 4), (4, 1), (2, 3, 4), ())
    decays = [mine.adamw.decays(tensor(np.ones(shape))) for shape in shapes]
    return {f"decays of the shapes {shapes}": np.array([bool(each) for each in decays], dtype=float)}


def schedule(mine: Any, right: Any) -> Outputs:
    found = {}
    for peak, minimum, warmup, steps in ((0.6, 0.06, 4, 20), (0.6, 0.06, 0, 8), (1.0, 0.0, 1, 5), (0.3, 0.3, 2, 6)):
        rates = [mine.schedule.learning_rate(step, peak, minimum, warmup, steps) for step in range(steps + 3)]
        name = f"rates of steps 0 to {steps + 2} (peak {peak}, minimum {minimum}, {warmup} of {steps} steps warm up)"
        found[name] = np.array(rates, dtype=float)
    return found


def gradients() -> dict[str, np.ndarray]:
    return {"matrix": numbers(1, 3, 4), "vector": 3 * numbers(2, 5), "scalar": np.array([-2.0])}


def norm(mine: Any, right: Any) -> Outputs:
    one = {"one": tensor(numbers(3, 2, 3))}
    several = {name: tensor(value) for name, value in gradients().items()}
    return {"norm of one": array(mine.clipping.global_norm(one)), "norm": array(mine.clipping.global_norm(several))}


def clip(mine: Any, right: Any) -> Outputs:
    mine.clipping.global_norm = right.clipping.global_norm
    found = {}
    for limit in (0.5, 5.0, 100.0):
        given = {name: tensor(value) for name, value in gradients().items()}
        clipped, before = mine.clipping.clipped(given, limit)
        found |= {f"{name} at a limit of {limit:g}": array(clipped[name]) for name in gradients()}
        found[f"norm at a limit of {limit:g}"] = array(before)
        changes = [np.abs(array(given[name]) - value.astype(np.float32)).max() for name, value in gradients().items()]
        found[f"change of what was passed in at a limit of {limit:g}"] = np.array(changes)
    nothing = {name: 0 * tensor(value) for name, value in gradients().items()}
    clipped, _ = mine.clipping.clipped(nothing, 1.0)
    found["matrix of zeros"] = array(clipped["matrix"])
    small = {"matrix": tensor(np.array([[1.2e-6, -1.6e-6]]))}
    clipped, _ = mine.clipping.clipped(small, 1e-6)
    found["a million times the matrix of a norm of 2e-6 at a limit of 1e-6"] = 1e6 * array(clipped["matrix"])
    return found


def small_batches() -> list[SimpleNamespace]:
    """Batches of different sizes, with different shares of scored labels."""
    labels = [[[0, 2, IGNORE], [1, IGNORE, IGNORE]], [[2, 1, 0], [1, 1, 2]], [[IGNORE, IGNORE, 2]]]
    return [
        SimpleNamespace(x=tensor(4 * numbers(seed, *np.shape(each), 4)), labels=tensor(np.array(each)))
        for seed, each in enumerate(labels)
    ]


def small_loss(right: Any) -> Any:
    def summed_loss(parameters: Any, batch: Any) -> Any:
        return right.loss.summed_cross_entropy(batch.x @ parameters["weight"] + parameters["bias"], batch.labels)

    return summed_loss


def small_parameters() -> dict[str, Any]:
    return {"weight": tensor(2 * numbers(11, 4, 3)), "bias": tensor(numbers(12, 3))}


def accumulated(mine: Any, right: Any) -> Outputs:
    found = {}
    for count in (1, 3):
        loss, gradient = mine.loop.mean_gradients(small_loss(right), small_parameters(), small_batches()[:count])
        found |= {f"gradient of {name}, {count} batches": array(gradient[name]) for name in ("weight", "bias")}
        found[f"loss, {count} batches"] = array(loss)
    return found


def stepped(mine: Any, right: Any) -> Outputs:
    mine.loop.mean_gradients = right.loop.mean_gradients
    found = {}
    for clip in (0.3, 50.0):
        settings = right.loop.Settings(steps=10, peak=0.2, minimum=0.02, warmup_steps=3, clip=clip)
        optimizer, parameters = right.adamw.AdamW(beta1=0.8, epsilon=0.5), small_parameters()
        for step in range(5):
            parameters, loss, length = mine.loop.train_step(
                small_loss(right), parameters, optimizer, small_batches(), step, settings
            )
            if step in (0, 4):
                found |= {f"{name} after step {step}, clip {clip}": array(parameters[name]) for name in parameters}
                found |= {f"loss of step {step}, clip {clip}": array(loss)}
                found |= {f"norm of step {step}, clip {clip}": array(length)}
    return found


DOCUMENTS = ([11, 12, 13], [21, 22], [31, 32, 33, 34, 35, 36, 37, 38, 39], [41], [51, 52, 53])


def packing(mine: Any, right: Any) -> Outputs:
    found = {}
    for count, length in ((5, 5), (2, 4), (3, 4), (5, 17), (1, 8)):
        rows, owners = mine.packing.packed(DOCUMENTS[:count], length, 99)
        found[f"rows of {count} documents, length {length}"] = table(rows)
        found[f"numbers of {count} documents, length {length}"] = table(owners)
    return found


def packed_rows(right: Any) -> tuple[np.ndarray, np.ndarray]:
    rows, owners = right.packing.packed(DOCUMENTS, 7, 99)
    return np.array(rows), np.array(owners)


def packed_labels(mine: Any, right: Any) -> Outputs:
    rows, owners = packed_rows(right)
    return {"labels": array(mine.packing.packed_labels(tensor(rows), tensor(owners)))}


def mask(mine: Any, right: Any) -> Outputs:
    found = mine.packing.document_mask(tensor(packed_rows(right)[1]))
    values = array(found)
    return {"whether the mask holds booleans": np.array(float(boolean(found))), "mask": values}


def positions(mine: Any, right: Any) -> Outputs:
    return {"positions": array(mine.packing.positions_of(tensor(packed_rows(right)[1])))}


TURNS = (("user", [10, 11, 12]), ("assistant", [20, 21]), ("user", [13]), ("assistant", [22]), ("user", [14, 15]))
MARKERS = {"user": 1, "assistant": 2}


def instructions(mine: Any, right: Any) -> Outputs:
    found = {}
    for count in (2, 4, 5):
        inputs, labels = mine.instructions.inputs_and_labels(TURNS[:count], MARKERS, 3)
        found[f"inputs of {count} turns"] = np.array(listed(inputs, int))
        found[f"labels of {count} turns"] = np.array(listed(labels, int))
    return found


def factors(mine: Any, right: Any) -> Outputs:
    uniform = np.linspace(0, 1, 18).reshape(2, 9) ** 2
    a, b = mine.lora.fresh_factors(tensor(uniform), 5)
    return {"A": array(a), "B": array(b)}


def adapter(square: bool) -> list[Any]:
    """x, weight, A and B; of a square weight, where a transposed one fits too, or of another."""
    width, out = (5, 5) if square else (6, 4)
    shapes = ((2, 3, width), (out, width), (2, width), (out, 2))
    return [tensor(numbers(seed, *shape)) for seed, shape in enumerate(shapes, 20)]


def adapted(mine: Any, right: Any) -> Outputs:
    found = {}
    for square in (False, True):
        x, weight, a, b = adapter(square)
        where = " of a square weight" if square else ""
        found[f"result{where}"] = array(mine.lora.adapted(x, weight, a, b, 6.0))
    found["result with alpha 1"] = array(mine.lora.adapted(x, weight, a, b, 1.0))
    return found


def merged_weight(mine: Any, right: Any) -> Outputs:
    _, *given = adapter(True)
    before = [array(each) for each in given]
    found = {"weight": array(mine.lora.merged_weight(*given, 6.0))}
    for name, each, old in zip(("weight", "A", "B"), given, before, strict=True):
        found[f"change of the {name} that was passed in"] = array(each) - old
    return found


def log_probs(mine: Any, right: Any) -> Outputs:
    logits, labels = logits_and_labels()
    found = {"sums": array(mine.dpo.answer_log_probs(tensor(logits), tensor(labels)))}
    found["sums of logits of about 1000"] = array(mine.dpo.answer_log_probs(tensor(logits + 1000), tensor(labels)))
    few = array(mine.dpo.answer_log_probs(*map(tensor, unlikely())))
    found["sums where probabilities are too small for float32"] = few
    return found


def preference(mine: Any, right: Any) -> Outputs:
    four = [tensor(-8 + 2 * numbers(seed, 6)) for seed in range(30, 34)]
    found = {f"loss at beta {beta}": array(mine.dpo.dpo_loss(*four, beta)) for beta in (0.1, 0.7)}
    for size in (3000.0, -3000.0):
        one = [tensor(np.array([size / 2, -4.0])), tensor(np.array([-size / 2, -5.0])), four[2][:2], four[3][:2]]
        found[f"loss where a margin is about {size:g}"] = array(mine.dpo.dpo_loss(*one, 0.5))
    return found


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Hidden states, and which tokens are real: padding behind, in front, on both sides, nowhere."""
    real = np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0]], dtype=bool)
    return numbers(40, 5, 5, 3), real


def pooled(mine: Any, right: Any) -> Outputs:
    hidden, real = texts()
    return {"states": array(mine.classifier.last_states(tensor(hidden), tensor(real)))}


def classes(mine: Any, right: Any) -> Outputs:
    mine.classifier.last_states = right.classifier.last_states
    hidden, real = texts()
    weight, bias = numbers(41, 3, 3), numbers(42, 3)
    given = [tensor(each) for each in (hidden, real, weight, bias)]
    found = {"log-probabilities": array(mine.classifier.class_log_probs(*given))}
    for name, more in (("a bias of about 500", np.full(3, 500)), ("one bias of about 200", np.array([200, 0, 0]))):
        given[3] = tensor(bias + more)
        found[f"log-probabilities with {name}"] = array(mine.classifier.class_log_probs(*given))
    return found


def classification(mine: Any, right: Any) -> Outputs:
    scores = numbers(43, 5, 3)
    scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
    labels = np.array([2, 0, 1, 1, 2])
    return {"loss": array(mine.classifier.classification_loss(tensor(scores), tensor(labels)))}


def sure_logits(seed: int, count: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits of three classes that are `scale` times too large, and labels drawn from the right ones."""
    random = np.random.default_rng(seed)
    logits = 1.3 * random.normal(size=(count, 3))
    weights = np.exp(logits)
    cumulative = (weights / weights.sum(axis=1, keepdims=True)).cumsum(axis=1)
    return scale * logits, (random.random((count, 1)) > cumulative).sum(axis=1).clip(max=2)


def calibration_error(mine: Any, right: Any) -> Outputs:
    logits, labels = sure_logits(50, 120, 2.5)
    weights = np.exp(logits)
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    run = mine.calibration.expected_calibration_error
    found = {f"error, {bins} bins": np.array(float(run(probabilities, labels, bins))) for bins in (10, 4)}
    edges = np.array([[0.5, 0.25, 0.25], [0.625, 0.25, 0.125], [0.25, 0.75, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    found["error of confidences on the edges of bins"] = np.array(float(run(edges, np.array([0, 0, 1, 1, 0]), 4)))
    return found


def temperature(mine: Any, right: Any) -> Outputs:
    found = {}
    for more, scale in ((0, 3.0), (0, 0.4), (0, 20.0), (1000, 0.4)):
        logits, labels = sure_logits(51, 150, scale)
        with np.errstate(all="ignore"):
            fitted = float(mine.calibration.fitted_temperature(logits + more, labels))
        name = f"temperature of logits that are {scale} times too large"
        found[f"{name}, plus {more}" if more else name] = np.array(fitted)
    return found


CHECKS = (
    Check("words_of", "bpe", split),
    Check("count_pairs", "bpe", pair_counts),
    Check("most_frequent", "bpe", choice),
    Check("merged", "bpe", merging),
    Check("train", "bpe", learned),
    Check("encode", "bpe", encoded),
    Check("decode", "bpe", decoded),
    Check("shifted", "loss", shifting),
    Check("summed_cross_entropy", "loss", summed, rtol=1e-4, atol=2e-3),
    Check("cross_entropy", "loss", mean),
    Check("adamw_update", "adamw", update),
    Check("decays", "adamw", decay),
    Check("learning_rate", "schedule", schedule),
    Check("global_norm", "clipping", norm),
    Check("clipped", "clipping", clip),
    Check("mean_gradients", "loop", accumulated),
    Check("train_step", "loop", stepped),
    Check("packed", "packing", packing),
    Check("packed_labels", "packing", packed_labels),
    Check("document_mask", "packing", mask),
    Check("positions_of", "packing", positions),
    Check("inputs_and_labels", "instructions", instructions),
    Check("fresh_factors", "lora", factors),
    Check("adapted", "lora", adapted),
    Check("merged_weight", "lora", merged_weight),
    Check("answer_log_probs", "dpo", log_probs, atol=1e-3),
    Check("dpo_loss", "dpo", preference),
    Check("last_states", "classifier", pooled),
    Check("class_log_probs", "classifier", classes, atol=1e-4),
    Check("classification_loss", "classifier", classification),
    Check("expected_calibration_error", "calibration", calibration_error),
    Check("fitted_temperature", "calibration", temperature, rtol=2e-3),
)


def numbers(seed: int, *shape: int) -> np.ndarray:
    """Normal numbers, the same in every framework."""
    return np.random.default_rng(seed).normal(size=shape)


def listed(values: Any, kind: type) -> list[Any]:
    """Returns a reader's list; TypeError says what it is where it is none, or holds something else."""
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise TypeError(f"expected a list or tuple, got {'None' if values is None else type(values).__name__}")
    for value in values:
        if not isinstance(value, kind):
            raise TypeError(f"expected a {kind.__name__} in the list, got {type(value).__name__}: {value!r:.40}")
    return list(values)


def table(rows: Any) -> np.ndarray:
    """Returns a reader's list of rows of integers as an array; ValueError where their lengths differ."""
    lengths = [len(listed(row, int)) for row in listed(rows, Sequence)]
    if len(set(lengths)) > 1:
        raise ValueError(f"expected rows of one length, got lengths of {lengths}")
    return np.array(rows)


def characters(text: Any) -> np.ndarray:
    """The code points of a reader's text."""
    if not isinstance(text, str):
        raise TypeError(f"expected a str, got {'None' if text is None else type(text).__name__}")
    return np.array([ord(letter) for letter in text])


def counted(name: str, counts: Any, keys: Sequence[Any]) -> Outputs:
    """The counts of these keys, and how many others there are."""
    if not isinstance(counts, Mapping):
        raise TypeError(f"expected a dict, got {'None' if counts is None else type(counts).__name__}")
    found = {f"{name} {key}": np.array([counts.get(key, 0)]) for key in keys}
    return {**found, "number of other pairs": np.array([len(set(counts) - set(keys))])}
