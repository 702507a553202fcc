"""llama2.c's binary models: written as its readers expect, read back bit for bit, broken ones refused."""

import struct

import numpy as np
import pytest

from llamita.storage.formats import llama2c
from tests.storage.formats.helpers import as_pairs, equal, model


@pytest.mark.parametrize("tied", [True, False])
def test_version_0_is_laid_out_as_run_c_reads_it(tmp_path, tied):
    ours = model(tie_word_embeddings=tied)
    llama2c.write_model(tmp_path / "m.bin", ours, version=0)
    header = np.fromfile(tmp_path / "m.bin", dtype="<i4", count=7)
    assert header.tolist() == [32, 64, 2, 4, 2, 96 if tied else -96, 16]
    numbers = np.fromfile(tmp_path / "m.bin", dtype="<f4", offset=28)

    def take(*shape):
        nonlocal numbers
        size = int(np.prod(shape))
        taken, numbers = numbers[:size].reshape(shape), numbers[size:]
        return taken

    def stack(name, change=lambda weight: weight):
        return np.stack([change(ours.arrays[f"model.layers.{i}.{name}.weight"].to_numpy()) for i in range(2)])

    D, C, V, KV, H, S = 32, 64, 96, 16, 8, 16
    assert np.array_equal(take(V, D), ours.arrays["model.embed_tokens.weight"].to_numpy())
    assert np.array_equal(take(2, D), stack("input_layernorm"))
    assert np.array_equal(take(2, D, D), stack("self_attn.q_proj", lambda weight: as_pairs(weight, H)))
    assert np.array_equal(take(2, KV, D), stack("self_attn.k_proj", lambda weight: as_pairs(weight, H)))
    assert np.array_equal(take(2, KV, D), stack("self_attn.v_proj"))
    assert np.array_equal(take(2, D, D), stack("self_attn.o_proj"))
    assert np.array_equal(take(2, D), stack("post_attention_layernorm"))
    assert np.array_equal(take(2, C, D), stack("mlp.gate_proj"))
    assert np.array_equal(take(2, D, C), stack("mlp.down_proj"))
    assert np.array_equal(take(2, C, D), stack("mlp.up_proj"))
    assert np.array_equal(take(D), ours.arrays["model.norm.weight"].to_numpy())
    angles = np.arange(S)[:, None] * 10000.0 ** (-np.arange(0, H, 2) / H)
    np.testing.assert_allclose(take(S, H // 2), np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(take(S, H // 2), np.sin(angles), atol=1e-6)
    if not tied:
        assert np.array_equal(take(V, D), ours.arrays["lm_head.weight"].to_numpy())
    assert len(numbers) == 0
    assert llama2c.is_model(tmp_path / "m.bin")
    assert equal(llama2c.read_model(tmp_path / "m.bin"), ours)


@pytest.mark.parametrize("tied", [True, False])
def test_version_1_is_read_as_it_is_exported(tmp_path, tied):
    """The file is put together here, by the order of llama2.c's export."""
    ours = model(tie_word_embeddings=tied)

    def layers(name, change=lambda weight: weight):
        return [change(ours.arrays[f"model.layers.{i}.{name}.weight"].to_numpy()) for i in range(2)]

    parts = [
        *layers("input_layernorm"), *layers("post_attention_layernorm"), ours.arrays["model.norm.weight"].to_numpy(),
        ours.arrays["model.embed_tokens.weight"].to_numpy(),
        *layers("self_attn.q_proj", lambda weight: as_pairs(weight, 8)),
        *layers("self_attn.k_proj", lambda weight: as_pairs(weight, 8)),
        *layers("self_attn.v_proj"), *layers("self_attn.o_proj"), *layers("mlp.gate_proj"), *layers("mlp.down_proj"),
        *layers("mlp.up_proj"),
    ]  # fmt: skip
    if not tied:
        parts.append(ours.arrays["lm_head.weight"].to_numpy())
    head = struct.pack("<Ii7iB", 0x616B3432, 1, 32, 64, 2, 4, 2, 96, 16, tied).ljust(256, b"\0")
    (tmp_path / "m.bin").write_bytes(head + b"".join(part.tobytes() for part in parts))
    assert equal(llama2c.read_model(tmp_path / "m.bin"), ours)


@pytest.mark.parametrize("tied", [True, False])
def test_version_2_keeps_norms_and_rounds_matrices_in_groups(tmp_path, tied):
    ours = model(tie_word_embeddings=tied)
    llama2c.write_model(tmp_path / "m.bin", ours, version=2)
    content = (tmp_path / "m.bin").read_bytes()
    assert struct.unpack("<Ii7iBi", content[:41]) == (0x616B3432, 2, 32, 64, 2, 4, 2, 96, 16, tied, 32)
    norms = np.frombuffer(content, dtype="<f4", count=5 * 32, offset=256)
    assert np.array_equal(norms[-32:], ours.arrays["model.norm.weight"].to_numpy())
    embedding = ours.arrays["model.embed_tokens.weight"].to_numpy().reshape(-1, 32)
    numbers = np.frombuffer(content, dtype=np.int8, count=96 * 32, offset=256 + 640).reshape(-1, 32)
    scales = np.frombuffer(content, dtype="<f4", count=96, offset=256 + 640 + 96 * 32)
    np.testing.assert_allclose(scales, np.abs(embedding).max(axis=1) / 127, rtol=1e-6)
    assert (np.abs(numbers * scales[:, None] - embedding) <= scales[:, None] * 0.5001).all()
    assert (np.abs(numbers).max(axis=1) == 127).all()

    again = llama2c.read_model(tmp_path / "m.bin")
    for name, array in ours.arrays.items():
        error = np.abs(again.arrays[name].to_numpy() - array.to_numpy())
        assert error.max() <= np.abs(array.to_numpy()).max() / 127 * 0.5001
    llama2c.write_model(tmp_path / "again.bin", again, version=2)
    assert (tmp_path / "again.bin").read_bytes() == content


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_theta": 500000.0}, "rope_theta=500000.0"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps=1e-06"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"head_dim": 10}, "head_dim=10"),
        ({"num_labels": 2}, "num_labels=2"),
    ],
)
def test_what_the_form_cannot_hold_is_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=f"cannot hold a model with {words}"):
        llama2c.write_model(tmp_path / "m.bin", model(**changes))
    assert not list(tmp_path.iterdir())


def test_groups_that_do_not_divide_are_refused(tmp_path):
    with pytest.raises(ValueError, match="intermediate_size=48 must be a multiple of 32"):
        llama2c.write_model(tmp_path / "m.bin", model(intermediate_size=48), version=2)


@pytest.mark.parametrize("version", [0, 2])
def test_broken_files_are_refused(tmp_path, version):
    path = tmp_path / "m.bin"
    llama2c.write_model(path, model(), version)
    content = path.read_bytes()
    for end in (0, 3, 7, 20, 27, 30, 100, 255, 300, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"m\.bin"):
            llama2c.read_model(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="its header asks for"):
        llama2c.read_model(path)
    at = 0 if version == 0 else 8
    for place, value in ((0, 2**30), (1, -5), (2, 2**30), (3, 0), (4, 3), (5, 2**31 - 1), (6, -1)):
        damaged = bytearray(content)
        struct.pack_into("<i", damaged, at + 4 * place, value)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"m\.bin"):
            llama2c.read_model(path)


def test_an_unknown_version_is_named(tmp_path):
    (tmp_path / "m.bin").write_bytes(struct.pack("<Ii", 0x616B3432, 3) + bytes(300))
    with pytest.raises(ValueError, match="of version 3; Llamita reads 0, 1 and 2"):
        llama2c.read_model(tmp_path / "m.bin")
