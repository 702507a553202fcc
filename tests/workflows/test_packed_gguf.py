"""A GGUF file of small blocks runs as it is where there are kernels for them, and is dequantised where a type is asked
for."""

import gguf
import numpy as np
import pytest
import torch

pytest.importorskip("numba", reason="the kernels need Numba")

from llamita.backend.torch.infer.kernels.choice import supported
from llamita.backend.torch.infer.kernels.tiles import Form
from llamita.backend.torch.infer.runner import load_runner
from llamita.storage.formats import gguf as gguf_format
from llamita.storage.gguf import load_tensors
from tests.backend.torch.infer.served import Served, requests
from tests.storage.formats.helpers import model, rewritten

Q4_K, Q6_K = Form("int4", "int8", minimum=True), Form("int6", "int8", group=16)
FORMS = {
    "Q8_0": Form("int8", "float16"),
    "Q4_0": Form("int4", "float16"),
    "Q4_1": Form("int4", "float16", minimum=True),
    "Q4_K": Q4_K,
    "Q6_K": Q6_K,
    "Q4_K_M": Q4_K,
}
OTHERS = {"qkv_proj": Q6_K._replace(minimum=True), "down_proj": Q6_K, "embed_tokens": Q6_K}
"""Forms in a file of Q4_K_M where they are not Q4_K: queries and keys of four bits and values of six share one."""


def kind_of(tensor: str) -> gguf.GGMLQuantizationType:
    """Returns the kind of a tensor in a file of Q4_K_M."""
    larger = any(name in tensor for name in ("attn_v", "ffn_down", "token_embd"))
    return gguf.GGMLQuantizationType.Q6_K if larger else gguf.GGMLQuantizationType.Q4_K


@pytest.fixture(autouse=True)
def with_kernels(monkeypatch) -> None:
    monkeypatch.setenv("LLAMITA_KERNELS", supported()[0])


TOKENS = [[1, 5, 9, 30, 2, 77]]


@pytest.fixture(scope="module", params=FORMS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def file(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp(kind)
    width, head, inner = (256, 64, 512) if "_K" in kind else (64, 8, 96)
    shape = {"hidden_size": width, "head_dim": head, "intermediate_size": inner, "max_position_embeddings": 128}
    gguf_format.write_model(folder / "plain.gguf", model(**shape))
    kinds = kind_of if kind == "Q4_K_M" else gguf.GGMLQuantizationType[kind]
    return rewritten(folder / "plain.gguf", folder / "model.gguf", {}, kinds)


def test_it_runs_as_it_is(file, kind) -> None:
    runner = load_runner(file)
    named = {name.rpartition(".")[2]: module for name, module in runner.model.named_modules()}
    for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens"):
        assert named[name].kernel.form == (OTHERS.get(name, Q4_K) if kind == "Q4_K_M" else FORMS[kind])
    plain = load_runner(file, dtype="float32")
    found, wanted = (each.forward(TOKENS)["logits"] for each in (runner, plain))
    assert np.abs(found - wanted).max() < 2e-2 * np.abs(wanted).max()
    stored = load_tensors(file)
    for name, array in runner.weights().items():
        np.testing.assert_array_equal(array.to_numpy(), stored[name].to_numpy())


def error_of(runner, plain) -> float:
    """Returns by how much logits while serving differ from those of the same texts, as a share of these."""
    served = Served(runner, [requests(96, count=3, longest=40)], None, blocks=60, max_sequences=3)
    differences, sizes = [], []
    for key, text in served.texts.items():
        wanted_TV = plain.forward([text])["logits"][0]
        for position, rows in served.logits_of(key).items():
            differences += [row_V - wanted_TV[position - 1] for row_V in rows]
            sizes += [wanted_TV[position - 1]] * len(rows)
    assert len(differences) > 50
    return float(np.sqrt(np.mean(np.square(differences)) / np.mean(np.square(sizes))))


def test_it_decodes_as_it_is(file, kind) -> None:
    runner, plain = load_runner(file), load_runner(file, dtype="float32")
    decodes = "_K" in kind  # heads of 8 fill no vector
    assert (runner._decoder is not None) == decodes
    found = error_of(runner, plain)
    assert found < 3e-2  # of bytes for activations, 1 to 2%
    assert (runner.cache_dtype, plain.cache_dtype) == (torch.float16 if decodes else torch.float32, torch.float32)
    assert runner.kernels.endswith("keys and values in float16") == decodes
    runner.cache_dtype = torch.float32  # which bytes leave nothing of
    assert found == pytest.approx(error_of(runner, plain), rel=0.25)


def test_it_is_dequantised_where_a_type_is_asked_for(file, kind) -> None:
    runner = load_runner(file, dtype="float32")
    assert runner.model.model.layers[0].self_attn.qkv_proj.kernel.form == Form("float32")
    assert runner.weight_bytes > 3 * load_runner(file).weight_bytes


def test_damaged_weights_are_refused(file, kind, tmp_path) -> None:
    found = next(tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == "blk.1.ffn_down.weight")
    damaged = bytearray(file.read_bytes())
    scale = found.data_offset + (208 if found.tensor_type.name == "Q6_K" else 0)
    damaged[scale : scale + 2] = np.float16(np.inf).tobytes()
    (tmp_path / "model.gguf").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN or infinite values"):
        load_runner(tmp_path / "model.gguf")
