"""Runs given tokens through the paged memory, cut into chunks, and gives the logits of every position.

Stands where the engine would: it knows tables and chunks, and picks no token.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from llamita.backend.interface import CacheLayout, ScheduledChunk
from llamita.backend.torch.infer.kv_cache import PagedKVCache
from llamita.backend.torch.model.llama import Llama


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


@torch.inference_mode()
def paged_logits(
    model: Llama,
    rows: Sequence[Tensor],
    cuts: Sequence[Sequence[int]],
    block_size: int = 4,
    exact: bool = False,
    spare: int = 3,
) -> list[Tensor]:
    """Logits (T, V) of each row, row i being read in chunks of `cuts[i]` tokens.

    Step j runs the j-th chunk of all rows. The memory begins full of large numbers, so that reading what was never
    written shows.
    """
    lengths = [len(row) for row in rows]
    assert [sum(cut) for cut in cuts] == lengths
    blocks = sum(-(-length // block_size) for length in lengths) + spare
    layout = CacheLayout(block_size, blocks, model.config.attention_windows)
    weight = model.output_weight_VD
    cache = PagedKVCache(model.config, layout, weight.dtype, weight.device)
    generator = torch.Generator().manual_seed(3)
    for memory in (*cache.keys, *cache.values):
        memory.copy_(50 * torch.randn(memory.shape, generator=generator))
    tables = shuffled_tables(layout, lengths)
    starts, found = [0] * len(rows), [[] for _ in rows]
    for step in range(max(map(len, cuts))):
        now = [i for i, cut in enumerate(cuts) if step < len(cut)]
        now.sort(key=lambda i: cuts[i][step] > 1)  # single tokens first
        chunks = [
            ScheduledChunk(
                sequence_id=i,
                tokens=tuple(rows[i][starts[i] : starts[i] + cuts[i][step]].tolist()),
                start=starts[i],
                tables=without_unseen(tables[i], layout, starts[i]),
            )
            for i in now
        ]
        use = cache.step(chunks, exact)
        tokens_1T = torch.tensor([[token for chunk in chunks for token in chunk.tokens]])
        tokens_1T = F.pad(tokens_1T, (0, use.padded - use.tokens))
        logits_TV = model(tokens_1T, cache=use).logits_BTV[0, : use.tokens]
        for i, part in zip(now, logits_TV.split([len(chunk.tokens) for chunk in chunks]), strict=True):
            found[i].append(part)
            starts[i] += len(part)
    return [torch.cat(parts) for parts in found]


def even_cuts(length: int, chunk: int, prompt: int | None = None) -> list[int]:
    """Chunks of `chunk` tokens over the prompt (all, where not said), then single ones."""
    prompt = length if prompt is None else prompt
    whole, rest = divmod(prompt, chunk)
    return [chunk] * whole + [rest] * (rest > 0) + [1] * (length - prompt)
