"""Measures how well a model predicts text: the log-probability of every token, perplexity, bits per byte.

Asks a runner for logits and works in numpy; knows nothing of frameworks, files or training.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from llamita.backend.interface import Forward
from llamita.data.packing import strided_windows

MAX_LOGITS = 2**25  # numbers in the logits of a batch: 128 MB in float32


@dataclass(frozen=True)
class TokenScores:
    """For tokens 1 to T of T + 1, each given all before it: its log-probability in nats, and the likeliest id."""

    log_probabilities_T: np.ndarray
    likeliest_T: np.ndarray


@dataclass(frozen=True)
class Perplexity:
    """The loss over a text, in nats; characters and bytes leave special tokens out."""

    nats: float
    targets: int
    characters: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.targets

    @property
    def perplexity(self) -> float:
        """The exponential of the loss per token; comparable only between models of one tokenizer."""
        return math.exp(self.nats_per_token)

    @property
    def nats_per_character(self) -> float:
        return self.nats / self.characters

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits per byte of the text; comparable between models of any tokenizers."""
        return self.nats / self.bytes / math.log(2)


def score_sequences(
    runner: Forward, sequences: Iterable[np.ndarray], vocab_size: int, batch_size: int = 64
) -> Iterator[TokenScores]:
    """Yields the scores of every token but the first of each sequence, in the order of the sequences.

    Sequences run together padded on the right, which causal attention does not see.
    """
    waiting: list[np.ndarray] = []
    for sequence in sequences:
        longest = max(len(row) for row in [*waiting, sequence])
        if waiting and (len(waiting) == batch_size or (len(waiting) + 1) * longest * vocab_size > MAX_LOGITS):
            yield from _score_batch(runner, waiting)
            waiting = []
        waiting.append(sequence)
    if waiting:
        yield from _score_batch(runner, waiting)


def _score_batch(runner: Forward, sequences: list[np.ndarray]) -> Iterator[TokenScores]:
    T = max(len(sequence) for sequence in sequences) - 1
    tokens_BT = np.zeros((len(sequences), max(T, 1)), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        tokens_BT[row, : len(sequence) - 1] = sequence[:-1]
    logits_BTV = runner.forward(tokens_BT)["logits"]
    for sequence, logits_TV in zip(sequences, logits_BTV, strict=True):
        targets_T = np.asarray(sequence[1:], dtype=np.int64)
        logits_TV = logits_TV[: len(targets_T)]
        largest_T1 = logits_TV.max(axis=-1, keepdims=True, initial=-np.inf)
        normalizer_T = np.log(np.exp(logits_TV - largest_T1).sum(axis=-1, dtype=np.float64)) + largest_T1[:, 0]
        target_logits_T = np.take_along_axis(logits_TV, targets_T[:, None], axis=-1)[:, 0]
        yield TokenScores(target_logits_T - normalizer_T, logits_TV.argmax(axis=-1))


def strided_perplexity(
    runner: Forward,
    tokens: np.ndarray | Iterable[np.ndarray],
    vocab_size: int,
    sequence_length: int,
    stride: int,
    characters: int,
    size: int,
) -> Perplexity:
    """Returns the loss over a stream of tokens, each target scored once, in windows of sequence_length, `stride` apart.

    Several streams, such as documents, are scored each from its own beginning. A stride below sequence_length gives
    each target more context, at the cost of computing it more often. `characters` and `size` (bytes) are those of the
    text. ValueError for a text without a target.
    """
    streams = [tokens] if isinstance(tokens, np.ndarray) else tokens
    scored = []

    def windows() -> Iterator[np.ndarray]:
        for stream in streams:
            for row in strided_windows(stream, sequence_length, stride):
                scored.append(row.label_mask[1:])
                yield row.tokens

    nats, targets = 0.0, 0
    for number, scores in enumerate(score_sequences(runner, windows(), vocab_size)):
        nats -= float(scores.log_probabilities_T[scored[number]].sum())
        targets += int(scored[number].sum())
    if targets == 0:
        raise ValueError("the text has fewer than 2 tokens; that many are needed to predict one from another")
    return Perplexity(nats, targets, characters, size)
