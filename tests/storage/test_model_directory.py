"""Files that exist whole or not at all, read back as written, and broken ones refused by name."""

import json
import os
import struct

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from llamita.model.host_array import HostArray
from llamita.model.presets import preset
from llamita.storage import files, model_directory, safetensors


def arrays():
    return {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array(7, dtype=np.int64),
        "c": np.zeros((0, 4), dtype=np.float16),
        "d": np.arange(5, dtype=np.uint8),
    }


def test_what_is_written_the_library_reads_and_back(tmp_path):
    model_directory.save_tensors(tmp_path, {name: HostArray.from_numpy(a) for name, a in arrays().items()})
    theirs = load_file(tmp_path / "model.safetensors")
    save_file(arrays(), tmp_path / "theirs.safetensors")
    ours = model_directory.load_tensors(tmp_path, "theirs")
    assert set(theirs) == set(ours) == set(arrays())
    for name, expected in arrays().items():
        for read in (theirs[name], ours[name].to_numpy()):
            assert read.dtype == expected.dtype
            np.testing.assert_array_equal(read, expected)


def test_bfloat16_bits_are_kept(tmp_path):
    bits = np.array([0x3F80, 0xC020, 0x7F80], dtype=np.uint16)  # 1, -2.5, infinity
    model_directory.save_tensors(tmp_path, {"x": HostArray.from_bf16_bits(bits)})
    read = model_directory.load_tensors(tmp_path)["x"]
    assert read.dtype == "BF16"
    np.testing.assert_array_equal(read.to_numpy(), np.array([1, -2.5, np.inf], dtype=np.float32))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.get_tensor("x").tolist() == [1, -2.5, float("inf")]


def test_shards_and_their_index(tmp_path, monkeypatch):
    monkeypatch.setattr(model_directory, "MAX_SHARD_BYTES", 30)
    tensors = {name: HostArray.from_numpy(a) for name, a in arrays().items()}
    model_directory.save_tensors(tmp_path, tensors)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 2
    read = model_directory.load_tensors(tmp_path)
    for name, expected in arrays().items():
        np.testing.assert_array_equal(read[name].to_numpy(), expected)
    index["weight_map"]["a"] = "../outside.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must lie in the same directory"):
        model_directory.load_tensors(tmp_path)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"x": entry()}, b"1234", "truncated: x ends at byte 8, the file holds 4"),
        ({"x": entry(shape=(3,))}, b"12345678", "x of shape .3. and F32 cannot fill 8 bytes"),
        ({"x": entry(dtype="F13")}, b"12345678", "x has dtype 'F13'"),
        ({"x": entry(), "y": entry(offsets=(4, 12))}, b"1" * 12, "y begins at byte 4, expected 8; tensors overlap"),
        ({"x": entry(shape=(-2,))}, b"12345678", "header entry of 'x' is broken"),
        ({"x": entry(offsets=(8, 0))}, b"12345678", "header entry of 'x' is broken"),
        ({"x": {"dtype": "F32"}}, b"", "header entry of 'x' is broken"),
        ([1, 2], b"", "broken header: expected an object"),
        (b"{not json", b"", "broken header"),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path, header, data, words):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    with pytest.raises(ValueError, match=words) as error:
        model_directory.load_tensors(tmp_path)
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 2**60) + b"{}"])
def test_files_too_short_for_their_header(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        model_directory.load_tensors(tmp_path)


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    def interrupted():
        with files.atomic_directory(tmp_path / "model") as temporary:
            (temporary / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())
    for text in ("first", "second"):
        with files.atomic_directory(tmp_path / "model", overwrite=True) as temporary:
            (temporary / "file").write_text(text)
        assert [p.name for p in tmp_path.iterdir()] == ["model"]
        assert (tmp_path / "model" / "file").read_text() == text
    with pytest.raises(FileExistsError, match="exists already"), files.atomic_directory(tmp_path / "model"):
        pass


def test_a_file_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "state.json"
    files.atomic_write(path, "old")
    files.atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.stat(path).st_mode & 0o777 == 0o666 & ~files._umask()
    with pytest.raises(TypeError):
        files.atomic_write(path, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]
    assert path.read_bytes() == b"new"


def test_an_index_may_list_what_a_model_does_not_need(tmp_path):
    """Rotary tables and a tied head, which transformers leaves out of the files; anything else is missing."""
    arrays = {"model.norm.weight": HostArray.from_numpy(np.ones(4, dtype=np.float32))}
    safetensors.write_safetensors(tmp_path / "model-00001-of-00001.safetensors", arrays)
    for more, words in ((("model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight"), ""), (("x",), "holds x")):
        listed = dict.fromkeys((*arrays, *more), "model-00001-of-00001.safetensors")
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
        if words:
            with pytest.raises(ValueError, match=words):
                model_directory.load_tensors(tmp_path)
        else:
            assert list(model_directory.load_tensors(tmp_path)) == ["model.norm.weight"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.fp16.safetensors", "if its weights are those in model.fp16.safetensors, rename that"),
        ("model-00001-of-00002.safetensors", "model.safetensors.index.json, which lists them, is missing"),
    ],
)
def test_weights_under_another_name_are_named(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=words):
        model_directory.load_tensors(tmp_path)


def test_a_user_s_path_finds_its_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; expected a model directory or a training run"):
        model_directory.resolve_model_directory(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        model_directory.resolve_model_directory(tmp_path)
    for name in ("last", "best"):
        (tmp_path / name).mkdir()
        model_directory.save_config(tmp_path / name, preset("tiny"))
        assert model_directory.resolve_model_directory(tmp_path) == tmp_path / name
    assert model_directory.resolve_model_directory(tmp_path / "last") == tmp_path / "last"
    assert model_directory.load_config(tmp_path / "best") == preset("tiny")
