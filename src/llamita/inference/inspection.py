"""Looks inside a language model while it reads a text: what it expects next, layer by layer, and where its heads look.

Asks a runner for residual streams and attention, and works in numpy; the logits of a text are made a few positions at a
time, so that neither a large vocabulary nor many layers fill the memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llamita.backend.interface import Runner
from llamita.backend.sampling import NOT_FINITE
from llamita.text.tokenizer import Tokenizer

MAX_TOKENS = 512
"""Longest text: attention takes heads * tokens * tokens numbers for each layer asked for."""
MAX_TOP, MAX_LENS_TOP = 20, 5
MAX_LOGITS = 2**22
"""Numbers in the logits that are held at a time: 17 MB in float32, which is faster than more."""
DECIMALS = 7
"""Of an attention weight in `Inspection.to_dict`: as many as float32 tells apart near one."""


@dataclass(frozen=True)
class Piece:
    """A token and its text: bytes that are no whole character as U+FFFD, a control token by its name.

    The text is empty without a tokenizer, and for ids that only the model has.
    """

    id: int
    text: str


@dataclass(frozen=True)
class Candidate(Piece):
    """A token that may come next, and its natural log-probability."""

    logprob: float


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """The attention of a layer, from 0: float32 (N, T, T), the weight with which head n at position t looks at s."""

    layer: int
    weights: np.ndarray


@dataclass(frozen=True, eq=False)
class Inspection:
    """What `look_inside` found. Candidates come the likeliest first, of equals the lower id."""

    layers: int
    heads: int
    tokens: tuple[Piece, ...]
    next: tuple[tuple[Candidate, ...], ...]
    """The model's own prediction after each token."""
    lens: tuple[tuple[tuple[Candidate, ...], ...], ...] | None
    """The same read from the residual stream below: row 0 from the embedding, row l after l layers; the last is the
    model's own. At most five candidates each."""
    attention: tuple[AttentionMap, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain lists, numbers and texts, as JSON takes them; attention to seven decimals."""
        return {
            "layers": self.layers,
            "heads": self.heads,
            "tokens": [asdict(piece) for piece in self.tokens],
            "next": _plain(self.next),
            "lens": None if self.lens is None else [_plain(row) for row in self.lens],
            "attention": [
                {"layer": each.layer, "weights": each.weights.astype(np.float64).round(DECIMALS).tolist()}
                for each in self.attention
            ],
        }


def look_inside(
    runner: Runner,
    tokenizer: Tokenizer | None,
    tokens: Sequence[int],
    *,
    top: int = 5,
    attention: Sequence[int] = (),
    lens: bool = False,
    adapter: str | None = None,
) -> Inspection:
    """Returns what a model expects after each token, the `top` likeliest, and on request more of what leads there.

    `attention` are layers, from 0, whose attention weights are wanted; with `lens` the residual stream of every layer
    is read as though it were the last (the logit lens). `adapter` is a loaded one's name. ValueError for a classifier,
    a text of no token or of too many, layers that the model lacks, a `top` that is not 1 to 20, and logits that are not
    finite.
    """
    config = runner.config
    _check(runner, tokens, top, attention)
    layers = config.num_hidden_layers
    streams = ["embedding", *(f"layers.{layer}" for layer in range(layers))]
    wanted = list(dict.fromkeys(int(layer) for layer in attention))
    places = [*(streams if lens else streams[-1:]), *(f"layers.{layer}.attention" for layer in wanted)]
    found = runner.forward([list(tokens)], places, adapter, logits="none")

    def read(place: str, count: int) -> tuple[tuple[Candidate, ...], ...]:
        rows = _likeliest(runner, found[place], count, adapter)
        return tuple(tuple(Candidate(i, piece_text(tokenizer, i), logprob) for i, logprob in row) for row in rows)

    predicted = read(streams[-1], top)
    below = [read(place, min(top, MAX_LENS_TOP)) for place in streams[:-1]] if lens else []
    return Inspection(
        layers,
        config.num_attention_heads,
        tuple(Piece(int(token), piece_text(tokenizer, int(token))) for token in tokens),
        predicted,
        (*below, tuple(row[:MAX_LENS_TOP] for row in predicted)) if lens else None,
        tuple(AttentionMap(layer, found[f"layers.{layer}.attention"][0]) for layer in wanted),
    )


def _check(runner: Runner, tokens: Sequence[int], top: int, attention: Sequence[int]) -> None:
    config = runner.config
    longest = min(MAX_TOKENS, config.max_position_embeddings)
    if config.num_labels:
        raise ValueError("this model is a classifier and predicts no tokens; look inside a language model")
    if not 1 <= len(tokens) <= longest:
        raise ValueError(f"the text has {len(tokens)} tokens; give 1 to {longest}")
    if not 1 <= top <= MAX_TOP:
        raise ValueError(f"top={top} must be 1 to {MAX_TOP}")
    for layer in attention:
        if not 0 <= layer < config.num_hidden_layers:
            raise ValueError(f"attention={layer} is no layer of this model: give 0 to {config.num_hidden_layers - 1}")


def _likeliest(
    runner: Runner, stream_1TD: np.ndarray, count: int, adapter: str | None
) -> Iterator[list[tuple[int, float]]]:
    """Yields for each position the likeliest tokens and their log-probabilities, were this the last layer's stream."""
    positions = max(1, MAX_LOGITS // runner.config.vocab_size)
    for start in range(0, stream_1TD.shape[1], positions):
        logits_TV = runner.logit_lens(stream_1TD[:, start : start + positions], adapter)[0]
        largest_T1 = logits_TV.max(-1, keepdims=True)
        if not np.isfinite(largest_T1).all():
            raise ValueError(NOT_FINITE)
        scores_TV = logits_TV - largest_T1
        totals_T = np.log(np.exp(scores_TV).sum(-1, dtype=np.float64))
        rows_T, columns = np.arange(len(scores_TV)), []
        for _ in range(min(count, scores_TV.shape[1])):
            ids_T = scores_TV.argmax(-1)
            columns.append(zip(ids_T.tolist(), (scores_TV[rows_T, ids_T] - totals_T).tolist(), strict=True))
            scores_TV[rows_T, ids_T] = -np.inf
        yield from map(list, zip(*columns, strict=True))


def piece_text(tokenizer: Tokenizer | None, token_id: int) -> str:
    """Returns a token's text as a `Piece` has it."""
    return "" if tokenizer is None or token_id >= tokenizer.vocab_size else tokenizer.piece(token_id)


def _plain(rows: Sequence[Sequence[Candidate]]) -> list[list[dict[str, Any]]]:
    return [[asdict(candidate) for candidate in row] for row in rows]
