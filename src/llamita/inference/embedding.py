"""Turns texts into vectors: a model's states after the final norm, pooled over the tokens of each text.

Works in numpy on what a runner captures; no logits are made. Knows nothing of tokenizers.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import numpy as np

from llamita.backend.interface import Runner

Pooling = Literal["mean", "last"]
MAX_TOKENS = 8192
"""Tokens of a batch, padding included: its states take 67 MB in float32 at a width of 2048."""


def embed(
    runner: Runner,
    rows: Sequence[Sequence[int] | np.ndarray],
    pooling: Pooling = "mean",
    normalize: bool = True,
    adapter: str | None = None,
) -> np.ndarray:
    """Returns a vector for each text, float32 (n, D): the `mean` of its states after the final norm, or the `last`.

    `rows` are token ids. Texts run together padded on the right, which causal attention does not see and no mean
    counts. With `normalize` vectors have length one, so that their products are cosines. `adapter` is a loaded one's
    name. ValueError for a text of no token or of more than the model has positions, another pooling, and states that
    are not finite.
    """
    longest = runner.config.max_position_embeddings
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling={pooling!r} must be one of {', '.join(get_args(Pooling))}")
    lengths = [len(row) for row in rows]
    for number, length in enumerate(lengths):
        if not 1 <= length <= longest:
            raise ValueError(f"text {number} has {length} tokens and must have 1 to {longest}, the model's positions")
    vectors_nD = np.empty((len(rows), runner.config.hidden_size), np.float32)
    for numbers in _batches(lengths):
        tokens_BT = np.zeros((len(numbers), max(lengths[i] for i in numbers)), np.int64)
        for b, i in enumerate(numbers):
            tokens_BT[b, : lengths[i]] = rows[i]
        states_BTD = runner.forward(tokens_BT, ["norm"], adapter, logits="none")["norm"]
        for states_TD, i in zip(states_BTD, numbers, strict=True):
            own_TD = states_TD[: lengths[i]]
            vectors_nD[i] = own_TD[-1] if pooling == "last" else own_TD.mean(0, dtype=np.float64)
    if not np.isfinite(vectors_nD).all():
        raise ValueError("the model's states are not finite; its weights hold NaN or infinity, or overflow this dtype")
    if normalize:
        norms_n1 = np.linalg.norm(vectors_nD.astype(np.float64), axis=-1, keepdims=True)
        vectors_nD = (vectors_nD / np.maximum(norms_n1, np.finfo(np.float32).tiny)).astype(np.float32)
    return vectors_nD


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yields the numbers of the texts that run together, shortest first, so that little of a batch is padding."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > MAX_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
