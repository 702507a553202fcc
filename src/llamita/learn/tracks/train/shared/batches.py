"""Batches, a model's files, and texts that a model writes: what the three programs of this folder share."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bpe import decode, encode, words_of
from config import END, PADDING, Sizes
from framework import floats, integers, to_numpy, without_gradients
from llama import logits_of
from loss import IGNORE_INDEX
from packing import document_mask, positions_of

MERGES_FILE, MODEL_FILE = Path("merges.json"), Path("trained.npz")


class Batch(NamedTuple):
    """Rows ready for the model: integers (B, T), and a mask of booleans (B, T, T)."""

    tokens: Any
    labels: Any
    positions: Any
    mask: Any


def batch_of(tokens: Any, labels: Any, numbers: Any) -> Batch:
    """Returns a batch of rows, all (B, T); numbers say which document a token is of, 0 for padding."""
    return Batch(tokens, labels, positions_of(numbers), document_mask(numbers))


def batch_of_texts(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Batch:
    """Returns a batch of pairs of inputs and labels, a text a row, padded behind."""
    width = max(len(inputs) for inputs, _ in rows)
    tokens = [[*inputs, *[PADDING] * (width - len(inputs))] for inputs, _ in rows]
    labels = [[*labels, *[IGNORE_INDEX] * (width - len(labels))] for _, labels in rows]
    numbers = [[1] * len(inputs) + [0] * (width - len(inputs)) for inputs, _ in rows]
    return batch_of(integers(tokens), integers(labels), integers(numbers))


def drawn(count: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Yields the numbers of `size` rows of `count`, without end; every row comes once before any comes again."""
    random = np.random.default_rng(seed)
    waiting = np.zeros(0, dtype=np.int64)
    while True:
        while len(waiting) < size:
            waiting = np.concatenate([waiting, random.permutation(count)])
        yield waiting[:size]
        waiting = waiting[size:]


def written(
    parameters: dict[str, Any], sizes: Sizes, tokens: Sequence[int], most: int, temperature: float, seed: int
) -> list[int]:
    """Returns what the model writes after some tokens, up to END, which is left out; at 0, the likeliest tokens."""
    random = np.random.default_rng(seed)
    row = list(tokens)
    for _ in range(most):
        batch = batch_of_texts([(row, row)])
        logits = without_gradients(lambda batch=batch: logits_of(parameters, sizes, *batch[:1], *batch[2:])[0, -1])
        token = int(logits.argmax())
        if temperature > 0:
            weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
            token = int(random.choice(len(weights), p=weights / weights.sum()))
        if token == END:
            break
        row.append(token)
    return row[len(tokens) :]


def encoder(merges: Sequence[tuple[int, int]]) -> Callable[[str], list[int]]:
    """Returns `encode` for these merges, with each word's tokens remembered: the words of a world are few."""
    tokens_of = cache(lambda word: encode(word, merges))
    return lambda text: [token for word in words_of(text) for token in tokens_of(word)]


def text_of(tokens: Sequence[int], merges: Sequence[tuple[int, int]]) -> str:
    """Returns the text of tokens; those that no text has are left out."""
    return decode([token for token in tokens if token < 256 + len(merges)], merges)


def save(parameters: dict[str, Any], merges: Sequence[tuple[int, int]]) -> None:
    """Writes a model and its tokenizer into this directory."""
    MERGES_FILE.write_text(json.dumps(merges), "utf-8")
    np.savez(MODEL_FILE, **{name: to_numpy(parameter) for name, parameter in parameters.items()})


def load() -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """Returns what `save` wrote; ValueError where it has not yet."""
    if not MODEL_FILE.is_file() or not MERGES_FILE.is_file():
        raise ValueError(f"{MODEL_FILE} and {MERGES_FILE} are not here; python train.py writes them")
    with np.load(MODEL_FILE) as file:
        parameters = {name: floats(file[name]) for name in file.files}
    return parameters, [(first, second) for first, second in json.loads(MERGES_FILE.read_text("utf-8"))]
