"""A GGUF file of small blocks runs as it is where there are kernels for them, and is dequantised where a type is asked
for."""

import gguf
import numpy as np
import pytest

pytest.importorskip("numba", reason="the kernels need Numba")

from llamita.backend.torch.infer.kernels.choice import supported
from llamita.backend.torch.infer.kernels.tiles import Form
from llamita.backend.torch.infer.runner import load_runner
from llamita.storage.formats import gguf as gguf_format
from llamita.storage.gguf import load_tensors
from tests.storage.formats.helpers import model, rewritten

FORMS = {
    "Q8_0": Form("int8", "float16"),
    "Q4_0": Form("int4", "float16"),
    "Q4_1": Form("int4", "float16", minimum=True),
}


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
    foreign = model(hidden_size=64, intermediate_size=96)
    gguf_format.write_model(folder / "plain.gguf", foreign)
    return rewritten(folder / "plain.gguf", folder / "model.gguf", {}, gguf.GGMLQuantizationType[kind])


def test_it_runs_as_it_is(file, kind) -> None:
    runner = load_runner(file)
    block = runner.model.model.layers[0]
    assert {module.kernel.form for module in (block.self_attn.qkv_proj, block.mlp.down_proj)} == {FORMS[kind]}
    assert runner.model.model.embed_tokens.kernel.form == FORMS[kind]
    plain = load_runner(file, dtype="float32")
    found, wanted = (each.forward(TOKENS)["logits"] for each in (runner, plain))
    assert np.abs(found - wanted).max() < 2e-2 * np.abs(wanted).max()
    stored = load_tensors(file)
    for name, array in runner.weights().items():
        np.testing.assert_array_equal(array.to_numpy(), stored[name].to_numpy())


def test_it_is_dequantised_where_a_type_is_asked_for(file, kind) -> None:
    runner = load_runner(file, dtype="float32")
    assert runner.model.model.layers[0].self_attn.qkv_proj.kernel.form == Form("float32")
    assert runner.weight_bytes > 3 * load_runner(file).weight_bytes


def test_damaged_weights_are_refused(file, kind, tmp_path) -> None:
    found = next(tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == "blk.1.ffn_down.weight")
    damaged = bytearray(file.read_bytes())
    damaged[found.data_offset : found.data_offset + 2] = np.float16(np.inf).tobytes()
    (tmp_path / "model.gguf").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN or infinite values"):
        load_runner(tmp_path / "model.gguf")
