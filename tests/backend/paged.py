"""Runs given tokens through the paged memory, cut into chunks, and gives the logits of every position.

Stands where the engine would: it knows tables and chunks, and picks no token.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from llamita.backend.interface import CacheLayout, ScheduledChunk
from llamita.model.config import AttentionSpec
from tests import reference
from tests.backend.frameworks import Framework, normal
from tests.backend.tolerances import relative_difference

PLAIN = AttentionSpec()


def shuffled_tables(layout: CacheLayout, lengths: Sequence[int], seed: int = 0) -> list[tuple[np.ndarray, ...]]:
    """A table a group for each of several sequences, over blocks in no order."""
    random = np.random.default_rng(seed)
    free = [random.permutation(layout.blocks) for _ in layout.windows]
    needed = [-(-length // layout.block_size) for length in lengths]
    borders = np.cumsum([0, *needed])
    assert borders[-1] <= layout.blocks
    return [tuple(blocks[begin:end].astype(np.int32) for blocks in free) for begin, end in itertools.pairwise(borders)]


def without_unseen(tables: Sequence[np.ndarray], layout: CacheLayout, start: int) -> tuple[np.ndarray, ...]:
    """The tables with -1 for each block of which no query from `start` on sees anything, as an engine has them."""
    seen = []
    for table, window in zip(tables, layout.windows, strict=True):
        first = max(0, start - window + 1) // layout.block_size if window else 0
        seen.append(np.where(np.arange(len(table)) < first, -1, table).astype(np.int32))
    return tuple(seen)


def paged_logits(
    framework: Framework,
    model: Any,
    rows: Sequence[np.ndarray],
    cuts: Sequence[Sequence[int]],
    block_size: int = 4,
    exact: bool = False,
    spare: int = 3,
) -> list[np.ndarray]:
    """Logits (T, V) of each row, row i being read in chunks of `cuts[i]` tokens.

    Step j runs the j-th chunk of all rows. The memory begins full of large numbers, so that reading what was never
    written shows. `exact`: by PyTorch's exact mode.
    """
    lengths = [len(row) for row in rows]
    assert [sum(cut) for cut in cuts] == lengths
    blocks = sum(-(-length // block_size) for length in lengths) + spare
    layout = CacheLayout(block_size, blocks, model.config.attention_windows)
    cache = framework.kv_cache.PagedKVCache(model.config, layout, model.model.norm.weight.dtype)
    framework.fill(cache, 50 * normal(blocks * block_size, model.config.num_key_value_heads, model.config.head_dim))
    tables = shuffled_tables(layout, lengths)
    starts, found = [0] * len(rows), [[] for _ in rows]
    for step in range(max(map(len, cuts))):
        now = [i for i, cut in enumerate(cuts) if step < len(cut)]
        now.sort(key=lambda i: cuts[i][step] > 1)  # single tokens first
        chunks = [
            ScheduledChunk(
                sequence_id=i,
                tokens=tuple(map(int, rows[i][starts[i] : starts[i] + cuts[i][step]])),
                start=starts[i],
                tables=without_unseen(tables[i], layout, starts[i]),
            )
            for i in now
        ]
        use = cache.step(chunks, exact) if exact else cache.step(chunks)
        tokens = [token for chunk in chunks for token in chunk.tokens]
        padding = (use.padded if exact else len(tokens)) - len(tokens)
        tokens_1T = np.array([tokens + [0] * padding])
        logits_TV = framework.cached_logits(model, tokens_1T, use)[: len(tokens)]
        ends = np.cumsum([len(chunk.tokens) for chunk in chunks])
        for i, part in zip(now, np.split(logits_TV, ends[:-1]), strict=True):
            found[i].append(part)
            starts[i] += len(part)
    return [np.concatenate(parts) for parts in found]


def even_cuts(length: int, chunk: int, prompt: int | None = None) -> list[int]:
    """Chunks of `chunk` tokens over the prompt (all, where not said), then single ones."""
    prompt = length if prompt is None else prompt
    whole, rest = divmod(prompt, chunk)
    return [chunk] * whole + [rest] * (rest > 0) + [1] * (length - prompt)


# --- attention alone ---

HEADS = [(4, 4, 8), (6, 2, 12), (4, 1, 6), (8, 2, 32), (3, 3, 64)]  # query heads, key heads, head size
STARTS = [(0, 1), (0, 17), (1, 1), (63, 1), (64, 1), (60, 9), (130, 40), (7, 3)]  # start and length of a chunk
SPARE = 4


class PagedSequence:
    """Random queries, keys and values of one sequence, and where they lie in a memory."""

    def __init__(self, span: Any, q_TNH: np.ndarray, k_SKH: np.ndarray, v_SKH: np.ndarray) -> None:
        self.span, self.q_TNH, self.k_SKH, self.v_SKH = span, q_TNH, k_SKH, v_SKH

    def expected(self, spec: AttentionSpec = PLAIN) -> np.ndarray:
        """(T, N, H) by the oracle, head by head over all positions from 0 on."""
        N = self.q_TNH.shape[1]
        group = N // self.k_SKH.shape[1]
        queries, keys = np.arange(self.span.start, self.span.stop), np.arange(self.span.stop)
        allowed = keys <= queries[:, None]
        if self.span.window:
            allowed &= keys > queries[:, None] - self.span.window
        q_TNH, k_SKH, v_SKH = (x.astype(np.float64) for x in (self.q_TNH, self.k_SKH, self.v_SKH))
        heads = [
            reference.attention(
                q_TNH[:, n], k_SKH[:, n // group], v_SKH[:, n // group], allowed, spec.scale, spec.soft_cap
            )
            for n in range(N)
        ]
        return np.stack(heads, axis=1)


def lay_out(
    framework: Framework,
    chunks: Sequence[tuple[int, int]],
    heads: tuple[int, int, int],
    block_size: int,
    window: int,
    shuffled: bool,
    precision: str = "fp32",
) -> tuple[list[PagedSequence], np.ndarray, np.ndarray]:
    """Sequences with their keys and values in one memory (S, K, H), large numbers everywhere else; -1 for unseen
    blocks. All are numbers that the precision holds exactly, so that the oracle starts from the same."""
    N, K, H = heads
    counts = [-(-(start + length) // block_size) for start, length in chunks]
    blocks = sum(counts) + SPARE
    order = np.random.default_rng(0).permutation(blocks) if shuffled else np.arange(blocks)
    memories = [100 * normal(blocks * block_size, K, H, precision=precision, seed=seed) for seed in (1, 2)]
    sequences, taken = [], 0
    for number, ((start, length), count) in enumerate(zip(chunks, counts, strict=True)):
        table = order[taken : taken + count].astype(np.int32)
        taken += count
        stop = start + length
        slots = (table[:, None] * block_size + np.arange(block_size)).ravel()[:stop]
        k_SKH, v_SKH = (normal(stop, K, H, precision=precision, seed=10 + 2 * number + which) for which in (0, 1))
        memories[0][slots], memories[1][slots] = k_SKH, v_SKH
        table[: max(0, start - window + 1) // block_size if window else 0] = -1
        chunk = ScheduledChunk(0, (0,) * length, start)
        span = framework.paged_attention.Span.of(chunk, table, block_size, window)
        sequences.append(
            PagedSequence(span, normal(length, N, H, precision=precision, seed=1000 + number), k_SKH, v_SKH)
        )
    return sequences, *memories


def joined_queries(sequences: Sequence[PagedSequence]) -> np.ndarray:
    return np.concatenate([sequence.q_TNH for sequence in sequences])


def check_attention(found_TNH: np.ndarray, sequences: Sequence[PagedSequence], tolerance: float, **spec: Any) -> None:
    """The rows of all sequences, as the oracle has them."""
    expected_TNH = np.concatenate([sequence.expected(**spec) for sequence in sequences])
    assert relative_difference(found_TNH, expected_TNH) < tolerance
