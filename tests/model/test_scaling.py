"""The dial of depth: its rules at points that are known from their papers, and how it grows."""

import pytest

from llamita.model.scaling import at_depth, learning_rate, model_at_depth, row_length, tokens_in_batch


def test_the_rules_at_the_budgets_of_their_paper():
    """Bi et al. 2024, table 2: their 7B model used 2304 rows of 4096 tokens (9.4M) at 4.2e-4, for about 8.4e22
    operations; the fit is near both."""
    compute = 8.4e22
    assert tokens_in_batch(compute) == pytest.approx(2304 * 4096, rel=0.15)
    assert learning_rate(compute) == pytest.approx(4.2e-4, rel=0.05)


@pytest.mark.parametrize("vocab_size", [688, 32000])
def test_all_grows_with_the_depth_but_the_learning_rate_falls(vocab_size):
    entries = [at_depth(depth, vocab_size) for depth in range(2, 33)]
    for name in ("parameters", "tokens", "flops", "steps"):
        values = [getattr(entry, name) for entry in entries]
        assert values == sorted(values)
    rates = [entry.learning_rate for entry in entries]
    assert rates == sorted(rates, reverse=True)
    for entry in entries:
        assert 20 * entry.parameters <= entry.tokens < 20 * entry.parameters + entry.batch_size * entry.sequence_length
        assert entry.model.hidden_size == 64 * entry.depth
        assert entry.model.head_dim == 64
        assert entry.model.num_hidden_layers == entry.depth


def test_what_is_given_stands():
    entry = at_depth(4, 688, sequence_length=128, batch_size=8)
    assert (entry.sequence_length, entry.batch_size) == (128, 8)
    assert entry.steps == -(-20 * entry.parameters // (8 * 128))
    assert model_at_depth(4, 688, sequence_length=4096).max_position_embeddings == 4096


def test_rows_grow_with_the_width_between_their_bounds():
    assert [row_length(width) for width in (64, 128, 256, 768, 1024, 2048)] == [256, 256, 512, 1536, 2048, 2048]


@pytest.mark.parametrize("depth", [0, -1, 129])
def test_a_depth_out_of_bounds_is_refused(depth):
    with pytest.raises(ValueError, match=f"depth={depth} must be a number of blocks from 1 to 128"):
        at_depth(depth, 100)
