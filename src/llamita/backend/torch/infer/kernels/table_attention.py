"""Attention of single queries over blocks of keys and values where they lie, as Triton kernels.

Nothing is gathered: each program follows a sequence's table of blocks. The keys of a sequence are divided into parts,
so that few sequences still fill a GPU (as in flash decoding, Dao et al. 2023), and a second kernel joins the parts.
Needs Triton, and a GPU or its interpreter (TRITON_INTERPRET=1).

Letters beyond the usual: M blocks of a table, P parts, R query heads of a key head, filled up.
"""

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from llamita.model.config import AttentionSpec

TILE = 64
"""Keys that a program takes at a time."""
LEAST_ROWS = 16
"""Rows of the smallest product of tensor cores: the query heads of a key head are filled up to it."""
MOST_PARTS = 32


def attention_over_tables(
    q_BNH: Tensor,
    keys: Tensor,
    values: Tensor,
    tables_BM: Tensor,
    lengths_B: Tensor,
    block_size: int,
    spec: AttentionSpec,
    parts: int = 0,
) -> Tensor:
    """Computes softmax(Q K^T / sqrt(H)) V for the last position of each of B sequences: (B, N, H).

    `keys` and `values` are a layer's memory (slots, K, H), contiguous; position p of sequence b lies in slot
    `tables_BM[b, p // block_size] * block_size + p % block_size`. Its query sees the `lengths_B[b]` positions that
    there are, or with a window in `spec` the last so many of them; blocks that it does not see are not looked up.
    `spec` has another scale and a soft cap of scores too. `parts`, a power of two, is into how many the keys of a
    sequence are divided; 0 leaves it to the device.
    """
    B, N, H = q_BNH.shape
    K = keys.shape[1]
    parts = parts or parts_for(B, K, q_BNH.device)
    assert q_BNH.stride()[1:] == (H, 1), "the heads of a query lie one after the other"
    assert keys.is_contiguous()
    assert values.is_contiguous()
    mixed_BNPH = torch.empty(B, N, parts, H, dtype=torch.float32, device=q_BNH.device)
    largest_BNP = torch.empty(B, N, parts, dtype=torch.float32, device=q_BNH.device)
    total_BNP, joined_BNH = torch.empty_like(largest_BNP), torch.empty(B, N, H, dtype=q_BNH.dtype, device=q_BNH.device)
    rows, columns = max(triton.next_power_of_2(N // K), LEAST_ROWS), max(triton.next_power_of_2(H), 16)
    with torch.cuda.device(q_BNH.device) if q_BNH.device.type == "cuda" else contextlib.nullcontext():
        _attend_to_part[(B, K, parts)](
            q_BNH, keys, values, tables_BM, lengths_B, mixed_BNPH, largest_BNP, total_BNP,
            q_BNH.stride(0), *tables_BM.stride(), 1 / math.sqrt(H) if spec.scale is None else spec.scale,
            K, N // K, rows, H, columns, block_size, spec.window, spec.soft_cap, parts, TILE,
        )  # fmt: skip
        _join_parts[(B * N,)](mixed_BNPH, largest_BNP, total_BNP, joined_BNH, H, columns, parts)
    return joined_BNH


def parts_for(sequences: int, key_heads: int, device: torch.device) -> int:
    """Returns the number of parts to divide the keys into, so that every multiprocessor has a few programs."""
    if device.type != "cuda":
        return 2
    wanted = 4 * torch.cuda.get_device_properties(device).multi_processor_count // (sequences * key_heads)
    return min(MOST_PARTS, triton.next_power_of_2(max(wanted, 1)))


# Recorded steps and others differ in strides: compiled once for both.
@triton.jit(do_not_specialize=["table_stride", "block_stride"], do_not_specialize_on_alignment=["tables"])
def _attend_to_part(
    q, keys, values, tables, lengths, mixed_out, largest_out, total_out,
    q_stride, table_stride, block_stride, scale,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Attends to one part of a sequence's keys, for the query heads of one key head: a running softmax over tiles."""
    sequence, key_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    first = 0
    if WINDOW:
        first = tl.maximum(length - WINDOW, 0)
    share = tl.cdiv(tl.cdiv(length - first, PARTS), TILE) * TILE
    begin = first + part * share
    end = tl.minimum(begin + share, length)

    rows_R, columns_H = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    heads_R = key_head * GROUP + rows_R
    real_RH = (rows_R < GROUP)[:, None] & (columns_H < HEAD)[None, :]
    q_RH = tl.load(q + sequence * q_stride + heads_R[:, None] * HEAD + columns_H[None, :], mask=real_RH, other=0.0)
    largest_R = tl.full((ROWS,), -1e30, tl.float32)  # finite, so that it can be subtracted
    total_R = tl.zeros((ROWS,), tl.float32)
    mixed_RH = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(begin, end, TILE):
        positions_T = tile + tl.arange(0, TILE)
        seen_T = positions_T < end
        places_T = sequence * table_stride + positions_T // BLOCK * block_stride
        blocks_T = tl.load(tables + places_T, mask=seen_T, other=0)
        slots_T = blocks_T.to(tl.int64) * BLOCK + positions_T % BLOCK
        places_TH = (slots_T * KEY_HEADS + key_head)[:, None] * HEAD + columns_H[None, :]
        real_TH = seen_T[:, None] & (columns_H < HEAD)[None, :]
        k_TH = tl.load(keys + places_TH, mask=real_TH, other=0.0)
        v_TH = tl.load(values + places_TH, mask=real_TH, other=0.0)
        scores_RT = tl.dot(q_RH, tl.trans(k_TH), input_precision="ieee") * scale
        if SOFT_CAP:
            scores_RT = SOFT_CAP * (2 * tl.sigmoid(2 * scores_RT / SOFT_CAP) - 1)  # cap * tanh(score / cap)
        scores_RT = tl.where(seen_T[None, :], scores_RT, float("-inf"))
        new_R = tl.maximum(largest_R, tl.max(scores_RT, 1))
        weights_RT = tl.exp(scores_RT - new_R[:, None])
        shrink_R = tl.exp(largest_R - new_R)
        total_R = total_R * shrink_R + tl.sum(weights_RT, 1)
        mixed_RH = mixed_RH * shrink_R[:, None] + tl.dot(weights_RT.to(v_TH.dtype), v_TH, input_precision="ieee")
        largest_R = new_R
    out_R = (sequence * KEY_HEADS * GROUP + heads_R) * PARTS + part
    tl.store(mixed_out + out_R[:, None] * HEAD + columns_H[None, :], mixed_RH, mask=real_RH)
    tl.store(largest_out + out_R, largest_R, mask=rows_R < GROUP)
    tl.store(total_out + out_R, total_R, mask=rows_R < GROUP)


@triton.jit
def _join_parts(mixed_in, largest_in, total_in, joined, HEAD: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """Joins the parts of one query head, each weighed by its share of the softmax; an empty part weighs nothing."""
    row, columns_H, parts_P = tl.program_id(0), tl.arange(0, COLUMNS), tl.arange(0, PARTS)
    largest_P = tl.load(largest_in + row * PARTS + parts_P)
    shrink_P = tl.exp(largest_P - tl.max(largest_P, 0))
    total = tl.sum(tl.load(total_in + row * PARTS + parts_P) * shrink_P, 0)
    places_PH = (row * PARTS + parts_P)[:, None] * HEAD + columns_H[None, :]
    mixed_PH = tl.load(mixed_in + places_PH, mask=(columns_H < HEAD)[None, :], other=0.0)
    mixed_H = tl.sum(mixed_PH * shrink_P[:, None], 0) / total
    tl.store(joined + row * HEAD + columns_H, mixed_H.to(joined.dtype.element_ty), mask=columns_H < HEAD)
