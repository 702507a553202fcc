"""Attention of one step's queries over keys and values that lie in blocks.

Four ways: a batch of single queries, the same by kernels that follow the tables of blocks, a chunk of one sequence,
and the exact one, whose result for a query does not depend on what else is computed with it. Each takes the queries
(T, N, H) and a layer's whole memory (slots, K, H), whose numbers are converted to their type.

Letters beyond the usual: M blocks of a table, G query heads of a key head, R all queries of a key head, U keys of a
tile.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llamita.backend.step_layout import BlockSpan, blocks_side_by_side
from llamita.backend.torch.model.attention import attention, attention_fused, scaled
from llamita.model.config import AttentionSpec

TILE = 64
"""Keys that the exact mode takes at a time, counted from position 0."""
WIDTH = 16
"""Columns of which the exact mode's matrices have a multiple: of others, a row's bits may depend on its place."""
LOWEST = -1e30
"""Stands for the maximum of no scores: finite, so that it can be subtracted."""


class Span(BlockSpan):
    """A span that reads its blocks out of a memory."""

    @cached_property
    def blocks_M(self) -> Tensor:
        return torch.from_numpy(self.blocks.astype(np.int64))

    def gather(self, memory: Tensor) -> Tensor:
        """Returns the contents of the blocks, (S, K, H), S being `keys`."""
        if self.begin is not None:
            return memory[self.begin : self.begin + self.keys]
        blocks_M = self.blocks_M.to(memory.device)
        return memory.unflatten(0, (-1, self.block_size)).index_select(0, blocks_M).flatten(0, 1)[: self.keys]


TableKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, AttentionSpec], Tensor]
"""`kernels.table_attention.attention_over_tables`."""


class Part(Protocol):
    """The attention of some rows of a step, in every layer of a group."""

    def attend(self, q_TNH: Tensor, keys: Tensor, values: Tensor) -> Tensor: ...


class DecodeAttention:
    """One query each of several sequences, the query heads of a key head taken as its rows."""

    def __init__(self, spans: Sequence[Span], spec: AttentionSpec, device: torch.device) -> None:
        self.spans, self.spec = spans, spec
        self.size = spans[0].block_size
        if len(spans) == 1:
            self.mask = self._mask(spans[0].window > 0, device)
            return
        blocks_BM = blocks_side_by_side(spans)
        self.blocks = torch.from_numpy(blocks_BM.astype(np.int64).ravel()).to(device)
        self.mask = self._mask(True, device, blocks_BM.shape[1] * self.size)

    def _mask(self, needed: bool, device: torch.device, keys: int = 0) -> Tensor | None:
        if not needed:
            return None
        rows = [span.seen(np.array([span.start]), span.first + np.arange(keys or span.keys)) for span in self.spans]
        return torch.from_numpy(np.stack(rows)[:, None]).to(device)  # (B, 1, 1, S)

    def attend(self, q_TNH: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        B, N, H = q_TNH.shape
        K = keys.shape[1]
        if B == 1:
            found = [self.spans[0].gather(memory)[None] for memory in (keys, values)]
        else:
            blocks = [memory.unflatten(0, (-1, self.size)).index_select(0, self.blocks) for memory in (keys, values)]
            found = [each.view(B, -1, K, H) for each in blocks]
        k_BSKH, v_BSKH = (each.to(q_TNH.dtype) for each in found)
        q_BKGH = q_TNH.view(B, K, N // K, H)
        if N == K and q_TNH.device.type == "cpu" and q_TNH.dtype != torch.float32:
            q_BKGH = q_BKGH.expand(-1, -1, 2, -1)  # a CPU's kernel takes twice as long for a single row as for two
        k_BKSH, v_BKSH = k_BSKH.transpose(1, 2), v_BSKH.transpose(1, 2)
        if self.spec.soft_cap:
            mixed_BKGH = attention(q_BKGH, k_BKSH, v_BKSH, self.mask, spec=self.spec)
        else:
            mixed_BKGH = F.scaled_dot_product_attention(q_BKGH, k_BKSH, v_BKSH, self.mask, scale=self.spec.scale)
        return mixed_BKGH[:, :, : N // K].reshape(B, N, H)


class TableAttention:
    """One query each of several sequences by Triton's kernels, which read keys and values where they lie.

    `tables_BM` and `lengths_B`, int32, are read anew by each call.
    """

    def __init__(
        self, kernel: TableKernel, tables_BM: Tensor, lengths_B: Tensor, block_size: int, spec: AttentionSpec
    ) -> None:
        self.kernel, self.block_size, self.spec = kernel, block_size, spec
        self.tables_BM, self.lengths_B = tables_BM, lengths_B

    @classmethod
    def of(cls, kernel: TableKernel, spans: Sequence[Span], spec: AttentionSpec, device: torch.device) -> Self:
        """Makes the attention of the last positions of these sequences, all of one window."""
        begins = [span.first // span.block_size for span in spans]
        width = max(begin + len(span.blocks) for begin, span in zip(begins, spans, strict=True))
        tables_BM = np.zeros((len(spans), width), dtype=np.int32)
        for row, (begin, span) in enumerate(zip(begins, spans, strict=True)):
            tables_BM[row, begin : begin + len(span.blocks)] = span.blocks
        lengths_B = np.array([span.stop for span in spans], dtype=np.int32)
        tables, lengths = (torch.from_numpy(x).to(device) for x in (tables_BM, lengths_B))
        return cls(kernel, tables, lengths, spans[0].block_size, spec)

    def attend(self, q_TNH: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.kernel(q_TNH, keys, values, self.tables_BM, self.lengths_B, self.block_size, self.spec)


class ChunkAttention:
    """Consecutive queries of one sequence."""

    def __init__(self, span: Span, spec: AttentionSpec, device: torch.device) -> None:
        self.span, self.spec = span, spec
        self.mask: Tensor | None = None
        if span.window and span.stop > span.window:
            seen = span.seen(np.arange(span.start, span.stop), np.arange(span.first, span.stop))
            self.mask = torch.from_numpy(seen).to(device)

    def attend(self, q_TNH: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        k_SKH, v_SKH = (self.span.gather(memory).to(q_TNH.dtype) for memory in (keys, values))
        q, k, v = (x.transpose(0, 1)[None] for x in (q_TNH, k_SKH, v_SKH))
        mixed_1NTH = attention_fused(q, k, v, self.mask, causal=self.mask is None, spec=self.spec)
        return mixed_1NTH[0].transpose(0, 1)


class ExactAttention:
    """A chunk over fixed tiles of keys, with a running softmax (Milakov & Gimelshein 2018, arXiv:1805.02867).

    Tiles are counted from position 0 and products have a fixed shape, whatever the chunk: so a query's result is the
    same bits however its sequence is cut. A tile of which a query sees nothing changes nothing.
    """

    def __init__(self, span: Span, spec: AttentionSpec) -> None:
        self.span, self.spec = span, spec
        self.begin = span.first // TILE * TILE
        self.padding = -span.queries % 16
        queries = np.pad(np.arange(span.start, span.stop), (0, self.padding), mode="edge")
        held = np.arange(self.begin, -(-span.stop // TILE) * TILE)
        seen = span.seen(queries, held) & (held >= span.first) & (held < span.stop)
        self.hidden_TS = torch.from_numpy(~seen)

    def attend(self, q_TNH: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        T, N, H = q_TNH.shape
        K = keys.shape[1]
        q_KRH = self._queries(q_TNH, K)
        largest_KR1 = torch.full((K, q_KRH.shape[1], 1), LOWEST)
        total_KR1 = torch.zeros_like(largest_KR1)
        k_KSH, v_KSH = (self._tiles(memory) for memory in (keys, values))
        v_KSH = F.pad(v_KSH, (0, -H % WIDTH))
        mixed_KRH = torch.zeros(*q_KRH.shape[:-1], v_KSH.shape[-1])
        for tile in range(0, self.hidden_TS.shape[1], TILE):
            v_KUH = v_KSH[:, tile : tile + TILE]
            scores_KRU = self._scores(q_KRH, k_KSH, tile)
            new_KR1 = torch.maximum(largest_KR1, scores_KRU.amax(-1, keepdim=True))
            weights_KRU, shrink_KR1 = torch.exp(scores_KRU - new_KR1), torch.exp(largest_KR1 - new_KR1)
            total_KR1 = total_KR1 * shrink_KR1 + weights_KRU.sum(-1, keepdim=True)
            mixed_KRH = mixed_KRH * shrink_KR1 + weights_KRU @ v_KUH
            largest_KR1 = new_KR1
        mixed_KGTH = (mixed_KRH[..., :H] / total_KR1).view(K, N // K, -1, H)
        return mixed_KGTH.permute(2, 0, 1, 3).flatten(1, 2)[:T]

    def probabilities(self, q_TNH: Tensor, keys: Tensor) -> Tensor:
        """Returns the probabilities (N, T, stop) with which each query looks at each position, tile by tile too."""
        T, N, _ = q_TNH.shape
        K = keys.shape[1]
        q_KRH, k_KSH = self._queries(q_TNH, K), self._tiles(keys)
        scores = [self._scores(q_KRH, k_KSH, tile) for tile in range(0, self.hidden_TS.shape[1], TILE)]
        largest_KR1 = torch.full((K, q_KRH.shape[1], 1), LOWEST)
        for scores_KRU in scores:
            largest_KR1 = torch.maximum(largest_KR1, scores_KRU.amax(-1, keepdim=True))
        weights = [torch.exp(scores_KRU - largest_KR1) for scores_KRU in scores]
        total_KR1 = torch.zeros_like(largest_KR1)
        for weights_KRU in weights:
            total_KR1 = total_KR1 + weights_KRU.sum(-1, keepdim=True)
        shares_KRS = torch.cat([weights_KRU / total_KR1 for weights_KRU in weights], dim=-1)
        shares_NTS = shares_KRS.view(N, -1, shares_KRS.shape[-1])[:, :T, : self.span.stop - self.begin]
        return F.pad(shares_NTS, (self.begin, 0))

    def _queries(self, q_TNH: Tensor, K: int) -> Tensor:
        """Returns the queries (K, R, H) of each key head, padding included."""
        q_TKGH = F.pad(q_TNH, (0, 0, 0, 0, 0, self.padding)).unflatten(1, (K, -1))
        return q_TKGH.permute(1, 2, 0, 3).flatten(1, 2)

    def _scores(self, q_KRH: Tensor, k_KSH: Tensor, tile: int) -> Tensor:
        """Returns the scores (K, R, U) of one tile of keys."""
        scores_KRU = scaled(q_KRH @ k_KSH[:, tile : tile + TILE].mT, q_KRH.shape[-1], self.spec)
        hidden_TU = self.hidden_TS[:, tile : tile + TILE]
        return scores_KRU.masked_fill(hidden_TU.repeat(q_KRH.shape[1] // len(hidden_TU), 1), -math.inf)

    def _tiles(self, memory: Tensor) -> Tensor:
        """Returns (K, S, H) in whole tiles, zeros standing where there is nothing to be seen."""
        x_SKH = self.span.gather(memory)
        before, after = self.span.first - self.begin, -self.span.stop % TILE
        return F.pad(x_SKH, (0, 0, 0, 0, before, after)).transpose(0, 1).contiguous()
