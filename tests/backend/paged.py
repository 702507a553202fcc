"""Runs given tokens through the paged memory, cut into chunks, and gives the logits of every position.

Stands where the engine would: it knows tables and chunks, and picks no token.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from llamita.backend.interface import CacheLayout, ScheduledChunk
from tests.backend.frameworks import Framework, normal


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
