"""Triton's kernels against the float64 oracle: by Triton's interpreter, or compiled where there is a GPU."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from llamita.backend.torch.infer.kernels.table_attention import TILE, attention_over_tables, parts_for
from llamita.backend.torch.infer.paged_attention import TableAttention
from llamita.model.config import AttentionSpec
from tests.backend.frameworks import Torch
from tests.backend.paged import HEADS, PagedSequence, check_attention, joined_queries, lay_out
from tests.backend.tolerances import ATTENTION

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STARTS = (0, 15, 16, TILE - 1, TILE, 2 * TILE + 1, 200)

needs_gpu = pytest.param("bf16", marks=pytest.mark.gpu)  # the interpreter multiplies none


def laid_out(chunks, heads, block_size, window, precision="fp32"):
    """Sequences, and their queries, keys and values on the device."""
    sequences, *memories = lay_out(Torch(), chunks, heads, block_size, window, True, precision)
    arrays = (joined_queries(sequences), *memories)
    return sequences, *(Torch().array(array, precision).to(DEVICE) for array in arrays)


def check(mixed_BNH: torch.Tensor, sequences: list[PagedSequence], precision: str = "fp32", **spec) -> None:
    assert mixed_BNH.dtype == Torch().dtype(precision)
    check_attention(mixed_BNH.cpu().double().numpy(), sequences, ATTENTION["torch"][precision], **spec)


@pytest.mark.parametrize("precision", ["fp32", "fp16", needs_gpu])
@pytest.mark.parametrize(("heads", "window"), [*zip(HEADS, (0, 20, 1, 100, 0), strict=True)], ids=str)
def test_single_queries_attend_as_by_the_oracle(heads, window, precision):
    sequences, q_BNH, keys, values = laid_out([(start, 1) for start in STARTS], heads, 4, window, precision)
    attention = TableAttention.of(
        attention_over_tables, [sequence.span for sequence in sequences], AttentionSpec(window=window), DEVICE
    )
    check(attention.attend(q_BNH, keys, values), sequences, precision)


@pytest.mark.parametrize("spec", [AttentionSpec(0.3), AttentionSpec(soft_cap=0.7), AttentionSpec(0.3, 0.7)], ids=str)
def test_scores_are_scaled_and_capped_as_by_the_oracle(spec):
    sequences, q_BNH, keys, values = laid_out([(start, 1) for start in STARTS], (6, 2, 12), 4, 0)
    spans = [sequence.span for sequence in sequences]
    attention = TableAttention.of(attention_over_tables, spans, spec, DEVICE)
    check(attention.attend(q_BNH, keys, values), sequences, spec=spec)


@pytest.mark.parametrize(("block_size", "parts"), [(1, 1), (3, 2), (16, 8)])
def test_however_keys_are_cut(block_size, parts):
    """Into parts of which some are empty; queries, too, as they lie beside keys and values in one product."""
    sequences, queries, keys, values = laid_out([(start, 1) for start in STARTS], (6, 2, 12), block_size, 0)
    attention = TableAttention.of(
        attention_over_tables, [sequence.span for sequence in sequences], AttentionSpec(), DEVICE
    )
    beside_BGH = torch.cat([queries, torch.full((len(STARTS), 4, 12), 1e6, device=DEVICE)], dim=1)
    q_BNH = beside_BGH[:, :6]
    mixed_BNH = attention_over_tables(
        q_BNH,
        keys,
        values,
        attention.tables_BM,
        attention.lengths_B,
        block_size,
        AttentionSpec(),
        parts,
    )
    check(mixed_BNH, sequences)


def test_what_no_query_sees_may_be_anything():
    """NaN in the rest of a sequence's last block, and in all blocks of others."""
    sequences, q_BNH, keys, values = laid_out([(5, 1), (70, 1)], (4, 1, 6), 16, 0)
    for memory, which in ((keys, "k_SKH"), (values, "v_SKH")):
        clean = torch.full_like(memory, torch.nan)
        for sequence in sequences:
            slots = (sequence.span.blocks[:, None] * 16 + np.arange(16)).ravel()[: sequence.span.stop]
            clean[torch.from_numpy(slots)] = torch.from_numpy(getattr(sequence, which)).to(DEVICE)
        memory.copy_(clean)
    attention = TableAttention.of(
        attention_over_tables, [sequence.span for sequence in sequences], AttentionSpec(), DEVICE
    )
    check(attention.attend(q_BNH, keys, values), sequences)


@pytest.mark.parametrize(("sequences", "key_heads"), [(1, 1), (1, 8), (256, 8)])
def test_the_number_of_parts_is_a_power_of_two(sequences, key_heads):
    parts = parts_for(sequences, key_heads, DEVICE)
    assert 1 <= parts <= 32
    assert parts & (parts - 1) == 0
