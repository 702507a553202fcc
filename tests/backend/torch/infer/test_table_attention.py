"""Triton's kernels against the float64 oracle: by Triton's interpreter, or compiled where there is a GPU."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from llamita.backend.torch.infer.kernels.table_attention import TILE, attention_over_tables, parts_for
from llamita.backend.torch.infer.paged_attention import TableAttention
from llamita.model.config import AttentionSpec
from tests.backend.torch.infer.test_paged_attention import HEADS, Sequence_, lay_out

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
STARTS = (0, 15, 16, TILE - 1, TILE, 2 * TILE + 1, 200)

needs_gpu = pytest.param(torch.bfloat16, marks=pytest.mark.gpu, id="bfloat16")  # the interpreter multiplies none


def queries(sequences: list[Sequence_], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([sequence.q_TNH for sequence in sequences])).to(dtype)


def check(mixed_BNH: torch.Tensor, sequences: list[Sequence_]) -> None:
    expected_BNH = np.concatenate([sequence.expected() for sequence in sequences])
    difference = np.abs(mixed_BNH.cpu().double().numpy() - expected_BNH).max()
    assert difference < TOLERANCE[mixed_BNH.dtype] * np.abs(expected_BNH).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, needs_gpu], ids=str)
@pytest.mark.parametrize(("heads", "window"), [*zip(HEADS, (0, 20, 1, 100, 0), strict=True)], ids=str)
def test_single_queries_attend_as_by_the_oracle(heads, window, dtype):
    sequences, keys, values = lay_out([(start, 1) for start in STARTS], heads, 4, window, True, dtype)
    attention = TableAttention.of(
        attention_over_tables, [sequence.span for sequence in sequences], AttentionSpec(window=window), DEVICE
    )
    q_BNH = queries(sequences, dtype).to(DEVICE)
    check(attention.attend(q_BNH, keys.to(DEVICE), values.to(DEVICE)), sequences)


@pytest.mark.parametrize(("block_size", "parts"), [(1, 1), (3, 2), (16, 8)])
def test_however_keys_are_cut(block_size, parts):
    """Into parts of which some are empty; queries, too, as they lie beside keys and values in one product."""
    sequences, keys, values = lay_out([(start, 1) for start in STARTS], (6, 2, 12), block_size, 0, True)
    attention = TableAttention.of(
        attention_over_tables, [sequence.span for sequence in sequences], AttentionSpec(), DEVICE
    )
    beside_BGH = torch.cat([queries(sequences, torch.float32), torch.full((len(STARTS), 4, 12), 1e6)], dim=1)
    q_BNH = beside_BGH.to(DEVICE)[:, :6]
    mixed_BNH = attention_over_tables(
        q_BNH,
        keys.to(DEVICE),
        values.to(DEVICE),
        attention.tables_BM,
        attention.lengths_B,
        block_size,
        AttentionSpec(),
        parts,
    )
    check(mixed_BNH, sequences)


def test_what_no_query_sees_may_be_anything():
    """NaN in the rest of a sequence's last block, and in all blocks of others."""
    sequences, keys, values = lay_out([(5, 1), (70, 1)], (4, 1, 6), 16, 0, True)
    for memory, which in ((keys, "k_SKH"), (values, "v_SKH")):
        clean = torch.full_like(memory, torch.nan)
        for sequence in sequences:
            slots = (sequence.span.blocks[:, None] * 16 + np.arange(16)).ravel()[: sequence.span.stop]
            clean[torch.from_numpy(slots)] = torch.from_numpy(getattr(sequence, which)).float()
        memory.copy_(clean)
    attention = TableAttention.of(
        attention_over_tables, [sequence.span for sequence in sequences], AttentionSpec(), DEVICE
    )
    q_BNH = queries(sequences, torch.float32).to(DEVICE)
    check(attention.attend(q_BNH, keys.to(DEVICE), values.to(DEVICE)), sequences)


@pytest.mark.parametrize(("sequences", "key_heads"), [(1, 1), (1, 8), (256, 8)])
def test_the_number_of_parts_is_a_power_of_two(sequences, key_heads):
    parts = parts_for(sequences, key_heads, DEVICE)
    assert 1 <= parts <= 32
    assert parts & (parts - 1) == 0
