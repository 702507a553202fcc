"""The table, and what is counted from it, against published numbers."""

import dataclasses

import numpy as np
import pytest

from llamita.model.parameters import initialize_parameters, parameter_table
from llamita.model.presets import preset
from llamita.model.sizes import count_parameters, flops_per_token, kv_bytes_per_token


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("stories-260k", 260_032),  # the sizes that llama2.c states for its models
        ("stories-15m", 15_191_712),
        ("stories-42m", 41_689_600),
        ("stories-110m", 109_529_856),
        ("llama-2-7b", 6_738_415_616),  # Touvron et al. 2023
    ],
)
def test_parameter_counts(name, total):
    assert count_parameters(preset(name)).total == total


def test_the_39m_preset_has_39m_parameters():
    assert round(count_parameters(preset("lillm-39m")).total / 1e6) == 39


def test_counts_tell_matrices_from_the_embedding():
    tied = preset("stories-15m")
    counts = count_parameters(tied)
    assert counts.embedding == 32000 * 288
    assert counts.total - counts.matrices == (2 * 6 + 1) * 288  # only the norms multiply nothing
    untied = count_parameters(dataclasses.replace(tied, tie_word_embeddings=False))
    assert untied.matrices == counts.matrices
    assert untied.total == counts.total + counts.embedding


def test_flops_and_cache_bytes():
    config = preset("stories-15m")
    matrices = count_parameters(config).matrices
    assert flops_per_token(config, 256) == 6 * matrices + 12 * 6 * 288 * 256
    assert kv_bytes_per_token(preset("llama-2-7b"), 2) == 2 * 32 * 4096 * 2


def test_every_row_appears_once_and_only_matrices_decay():
    table = parameter_table(preset("scratch", attention_bias=True, mlp_bias=True))
    assert len({row.name for row in table}) == len(table)
    for row in table:
        assert row.weight_decay == (len(row.shape) == 2)


def test_initial_values_depend_on_seed_and_name_alone():
    config = preset("tiny", num_hidden_layers=1)
    first = dict(initialize_parameters(config, seed=3))
    again = dict(initialize_parameters(dataclasses.replace(config, num_hidden_layers=2), seed=3))
    other = dict(initialize_parameters(config, seed=4))
    name = "model.layers.0.mlp.down_proj.weight"
    np.testing.assert_array_equal(first[name], again[name])
    assert not np.array_equal(first[name], other[name])
    assert not np.array_equal(first[name].ravel()[:100], first["model.embed_tokens.weight"].ravel()[:100])


def test_gpt_2_scales_residual_projections_by_depth():
    config = preset("scratch")
    stds = {row.name: row.initialization.std for row in parameter_table(config, "gpt-2")}
    assert stds["model.layers.0.self_attn.q_proj.weight"] == 0.02
    assert stds["model.layers.3.self_attn.o_proj.weight"] == pytest.approx(0.02 / 8**0.5)
    with pytest.raises(ValueError, match="initialization='xavier'"):
        parameter_table(config, "xavier")
