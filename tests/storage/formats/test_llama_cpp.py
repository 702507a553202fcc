"""llama.cpp reads our GGUF files: the same ids, the same logits, the same greedy story. Needs llama-cpp-python."""

import ctypes
from pathlib import Path

import gguf as library
import numpy as np
import pytest

from llamita.backend.torch.infer.kernels.choice import supported
from llamita.backend.torch.infer.runner import load_runner, runner_over
from llamita.backend.torch.model.reordered import weights_held_in_blocks
from llamita.data import meadow
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.parameters import initialize_parameters
from llamita.model.rope import RopeScaling
from llamita.storage import gguf as gguf_file
from llamita.storage.formats import gguf
from llamita.storage.formats.foreign import ForeignModel
from llamita.storage.gguf_header import read_header
from llamita.text import sentencepiece_training
from llamita.text.bpe import special_tokens, train_bpe_from_iterator
from llamita.text.tokenizer import Tokenizer
from tests.storage.formats.helpers import finish
from tests.storage.formats.test_gguf import DEQUANTISED

pytestmark = pytest.mark.slow
llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which is compiled")

FAMILIES = {
    "llama": {},
    "untied, head size of its own": {"tie_word_embeddings": False, "head_dim": 24},
    "biases": {"attention_bias": True},
    "llama 3.2": {"rope_scaling": RopeScaling("llama3", 32.0, 8192), "rope_theta": 500000.0},
    "linear": {"rope_scaling": RopeScaling("linear", 4.0)},
    "yarn": {"rope_scaling": RopeScaling("yarn", 4.0, 64)},
    "qwen2": {"query_key_value_bias": True, "rope_theta": 1e6},
    "qwen3": {"query_key_norm": True, "rope_theta": 1e6},
}
PROMPTS = ["One rainy morning,", "  two  spaces and Pip", "naïve café 日本 1234"]


def tokenizer_of(kind: str) -> Tokenizer:
    stories = list(meadow.corpus(0, 300, "train"))
    if kind == "bpe":
        return train_bpe_from_iterator(stories, 400)
    return Tokenizer.from_codec(sentencepiece_training.train(stories, 400, special_tokens(0)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_ids_and_logits_are_llama_cpps(tmp_path, family, kind):
    tokenizer = tokenizer_of(kind)
    config = ModelConfig(400, 64, 128, 3, 4, 2, 256, **({"tie_word_embeddings": True} | FAMILIES[family]))
    generator = np.random.default_rng(0)
    arrays = {}
    for name, values in initialize_parameters(config, seed=1):
        moved = values + generator.normal(0, 0.3, values.shape).astype(np.float32) if values.ndim == 1 else values
        arrays[name] = HostArray.from_numpy(moved.astype(np.float32))
    gguf.write_model(tmp_path / "m.gguf", ForeignModel(config, arrays, tokenizer), "f32")
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), verbose=False, logits_all=True, n_ctx=256, seed=0)
    ours = runner_over(config, arrays)
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt, bos=True)
        assert theirs.tokenize(prompt.encode(), add_bos=True, special=False) == ids
    ids = [1, *np.random.default_rng(2).integers(3, 400, size=150).tolist()]
    theirs.eval(ids)
    logits, expected = ours.forward([ids])["logits"][0], np.array(theirs.scores[: len(ids)])
    # llama.cpp keeps keys and values in half precision.
    assert np.abs(logits - expected).max() < 5e-3 * np.abs(expected).max()
    best = np.sort(logits, axis=-1)
    clear = best[:, -1] - best[:, -2] > 2 * np.abs(logits - expected).max()
    assert (logits.argmax(-1) == expected.argmax(-1))[clear].all()


# --- number types ---


class Traits(ctypes.Structure):
    """The beginning of ggml's `ggml_type_traits`."""

    _fields_ = [
        ("name", ctypes.c_char_p), ("block", ctypes.c_int64), ("interleaved", ctypes.c_int64),
        ("size", ctypes.c_size_t), ("is_quantized", ctypes.c_bool), ("to_float", ctypes.c_void_p),
    ]  # fmt: skip


def by_ggml(raw: np.ndarray, kind: library.GGMLQuantizationType, count: int) -> np.ndarray:
    """Blocks dequantised by llama.cpp's own code."""
    (file, *_) = (Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*")
    traits_of = ctypes.CDLL(str(file)).ggml_get_type_traits
    traits_of.restype, traits_of.argtypes = ctypes.POINTER(Traits), [ctypes.c_int]
    numbers = np.zeros(count, np.float32)
    signature = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    signature(traits_of(int(kind)).contents.to_float)(raw.ctypes.data, numbers.ctypes.data, count)
    return numbers


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random scales are NaN at times, on both sides
@pytest.mark.parametrize("kind", DEQUANTISED, ids=lambda kind: kind.name)
def test_every_number_type_is_dequantised_to_llama_cpps_bits(tmp_path, kind):
    block, size = library.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, size=(8, 8 * size), dtype=np.uint8)
    writer = library.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", raw, raw_dtype=kind)
    finish(writer)
    ours = gguf_file._array(read_header(tmp_path / "m.gguf"), "x").to_numpy().reshape(-1)
    assert np.isfinite(ours).mean() > 0.5
    np.testing.assert_array_equal(ours, by_ggml(raw, kind, 64 * block))


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q6_K"])
def test_a_file_that_llama_cpp_quantised_runs_in_its_own_blocks(tmp_path, kind, monkeypatch):
    """Both round activations to bytes, each in groups of its own; in float32 the numbers are those of the file."""
    pytest.importorskip("numba", reason="the kernels need Numba")
    monkeypatch.setenv("LLAMITA_KERNELS", supported()[0])
    config = ModelConfig(400, 256, 512, 3, 4, 2, 256)
    arrays = {name: HostArray.from_numpy(values) for name, values in initialize_parameters(config, seed=1)}
    gguf.write_model(tmp_path / "f32.gguf", ForeignModel(config, arrays, tokenizer_of("bpe")), "f32")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    paths = [str(tmp_path / name).encode() for name in ("f32.gguf", "m.gguf")]
    assert llama_cpp.llama_model_quantize(*paths, options) == 0
    kinds = {tensor.tensor_type.name for tensor in library.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds == {"F32", "Q6_K"} | ({"Q4_K"} if kind == "Q4_K_M" else set())
    runner, plain = load_runner(tmp_path / "m.gguf"), load_runner(tmp_path / "m.gguf", dtype="float32")
    held = weights_held_in_blocks(runner.model)
    assert {weight.form.numbers for weight in held} <= {"int4", "int6"}
    tokens = [1, *range(5, 60)]
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), verbose=False, logits_all=True, n_ctx=256, seed=0)
    theirs.eval(tokens)
    ours, exact = (each.forward([tokens])["logits"][0] for each in (runner, plain))
    size = np.sqrt(np.mean(exact**2))
    for found in (ours, theirs.scores[: len(tokens)]):
        assert np.sqrt(np.mean((found - exact) ** 2)) < 3e-2 * size
