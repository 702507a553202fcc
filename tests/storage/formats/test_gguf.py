"""GGUF files: settings and tensors as llama.cpp names them, every family and number type, tokenizers, broken files."""

import dataclasses
import functools
import re
import struct
import time

import gguf as library
import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import normalizers

from llamita.data import meadow
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.parameters import initialize_parameters
from llamita.model.rope import RopeScaling, rotary_frequencies
from llamita.storage import gguf as gguf_file
from llamita.storage.formats import gguf
from llamita.storage.formats.foreign import ForeignModel
from llamita.storage.gguf_header import read_header
from llamita.text import sentencepiece_training, word_splitters
from llamita.text.bpe import special_tokens, train_bpe_from_iterator
from llamita.text.huggingface_codec import HuggingFaceCodec
from llamita.text.tokenizer import Tokenizer
from llamita.text.word_splitters import SPLITTERS
from tests.storage.formats.helpers import as_pairs, equal, finish, model, rewritten

GEMMA = {
    "norm_placement": "both",
    "unit_offset_norm": True,
    "hidden_act": "gelu_pytorch_tanh",
    "embedding_multiplier": 32**0.5,
    "attention_multiplier": 8**-0.5,
    "sliding_window": 8,
}
FAMILIES = {
    "llama": {},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head size of its own": {"head_dim": 12},
    "llama 3.2": {"rope_scaling": RopeScaling("llama3", 32.0, 8192), "rope_theta": 500000.0},
    "linear": {"rope_scaling": RopeScaling("linear", 4.0)},
    "yarn": {"rope_scaling": RopeScaling("yarn", 4.0, 64)},
    "qwen2": {"query_key_value_bias": True, "rms_norm_eps": 1e-6, "rope_theta": 1e6},
    "qwen3": {"query_key_norm": True},
    "qwen3 with biases": {"query_key_norm": True, "attention_bias": True},
    "smollm3": {"num_hidden_layers": 5, "layers_without_rope": (3,)},
    "olmo2": {"norm_placement": "after", "query_key_norm": True, "norm_all_heads": True, "tie_word_embeddings": False},
    "granite": {
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.0078125,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    },
    "gemma2": {
        **GEMMA,
        "num_hidden_layers": 4,
        "full_attention_at": (1, 3),
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3": {
        **GEMMA,
        "num_hidden_layers": 7,
        "full_attention_at": (5,),
        "query_key_norm": True,
        "rope_local_base_freq": 10000.0,
        "rope_theta": 1e6,
        "rope_scaling": RopeScaling("linear", 8.0),
    },
}
PLAIN = {"bos_token_id": None, "eos_token_id": None}  # without a tokenizer a file names no special tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_bit_identical(tmp_path, family):
    ours = model(**PLAIN, **FAMILIES[family])
    gguf.write_model(tmp_path / "m.gguf", ours, "f32")
    again = gguf.read_model(tmp_path / "m.gguf")
    if ours.config.unit_offset_norm:  # a norm's weight plus 1, and minus 1 again, is rounded
        again, ours = (without_norms(each) for each in close_norms(again, ours))
    assert equal(again, ours)
    assert again.tokenizer is None


def close_norms(*models):
    """The models, once their norms are known to be within a rounding of each other."""
    first, second = (model.arrays for model in models)
    for name in (name for name in first if name.endswith("norm.weight")):
        np.testing.assert_allclose(first[name].to_numpy(), second[name].to_numpy(), rtol=0, atol=1e-7)
    return models


def without_norms(model):
    kept = {name: array for name, array in model.arrays.items() if not name.endswith("norm.weight")}
    return dataclasses.replace(model, arrays=kept)


def test_gemmas_norms_are_stored_with_their_one(tmp_path):
    ours = model(**PLAIN, **FAMILIES["gemma2"])
    gguf.write_model(tmp_path / "m.gguf", ours)
    tensors = {tensor.name: tensor.data for tensor in library.GGUFReader(tmp_path / "m.gguf").tensors}
    for theirs, canonical in (
        ("post_ffw_norm", "post_feedforward_layernorm"),
        ("ffn_norm", "pre_feedforward_layernorm"),
    ):
        stored = ours.arrays[f"model.layers.1.{canonical}.weight"].to_numpy()
        np.testing.assert_array_equal(tensors[f"blk.1.{theirs}.weight"], stored + np.float32(1))


def test_layers_that_llama_cpp_would_turn_otherwise_are_refused(tmp_path):
    ours = model(**PLAIN, layers_without_rope=(1,))
    with pytest.raises(ValueError, match=r"layers_without_rope=\(1,\); llama.cpp's code has \(\)"):
        gguf.write_model(tmp_path / "m.gguf", ours)


def test_tensors_and_settings_are_llama_cpps(tmp_path):
    ours = model(**PLAIN)
    gguf.write_model(tmp_path / "m.gguf", ours, "f32", name="small")
    reader = library.GGUFReader(tmp_path / "m.gguf")
    settings = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.architecture": "llama", "general.name": "small", "llama.context_length": 16, "llama.block_count": 2,
        "llama.embedding_length": 32, "llama.feed_forward_length": 64, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 8, "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 96, "general.file_type": 0,
    }  # fmt: skip
    assert {key: settings[key] for key in expected} == expected
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    weights = {name: array.to_numpy() for name, array in ours.arrays.items()}
    assert set(tensors) == {
        "token_embd.weight", "output_norm.weight",
        *(f"blk.{i}.{name}.weight" for i in range(2) for name in (
            "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")),
    }  # fmt: skip
    assert np.array_equal(
        tensors["blk.1.attn_q.weight"], as_pairs(weights["model.layers.1.self_attn.q_proj.weight"], 8)
    )
    assert np.array_equal(
        tensors["blk.0.attn_k.weight"], as_pairs(weights["model.layers.0.self_attn.k_proj.weight"], 8)
    )
    assert np.array_equal(tensors["blk.0.attn_v.weight"], weights["model.layers.0.self_attn.v_proj.weight"])
    assert np.array_equal(tensors["blk.1.ffn_gate.weight"], weights["model.layers.1.mlp.gate_proj.weight"])
    assert np.array_equal(tensors["token_embd.weight"], weights["model.embed_tokens.weight"])


def test_qwens_queries_are_not_reordered(tmp_path):
    ours = model(**PLAIN, query_key_norm=True)
    gguf.write_model(tmp_path / "m.gguf", ours)
    tensors = {tensor.name: tensor.data for tensor in library.GGUFReader(tmp_path / "m.gguf").tensors}
    assert np.array_equal(
        tensors["blk.0.attn_q.weight"], ours.arrays["model.layers.0.self_attn.q_proj.weight"].to_numpy()
    )


def test_llama_3s_frequencies_are_divided_as_llama_cpp_does(tmp_path):
    ours = model(**PLAIN, **FAMILIES["llama 3.2"])
    gguf.write_model(tmp_path / "m.gguf", ours)
    factors = next(t.data for t in library.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "rope_freqs.weight")
    scaled = rotary_frequencies(ours.config.head_dim, ours.config.rope_theta, ours.config.rope_scaling)[0]
    plain = 500000.0 ** (-np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(plain / factors, scaled, rtol=1e-6)


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("llama3", 8.0, 8192),
        RopeScaling("llama3", 2.5, 2048),
        RopeScaling("llama3", 32.0, 131072),
        RopeScaling("llama3", 4.0, 5000, high_freq_factor=8.0),
    ],
)
def test_any_scaling_of_llama_3s_kind_is_read_from_its_divisors(tmp_path, scaling):
    ours = model(**PLAIN, head_dim=64, rope_theta=500000.0, rope_scaling=scaling)
    gguf.write_model(tmp_path / "m.gguf", ours)
    assert gguf.read_model(tmp_path / "m.gguf").config == ours.config


def test_divisors_of_another_kind_are_refused(tmp_path, monkeypatch):
    ours = model(**PLAIN, head_dim=64, rope_theta=500000.0, rope_scaling=RopeScaling("llama3", 8.0, 8192))
    plain = rotary_frequencies(64, 500000.0, None)[0]
    for divisors in (np.linspace(1, 8, 32), np.full(32, 8.0), np.full(32, np.nan), np.zeros(32)):
        with np.errstate(divide="ignore"):
            wrong = (plain / divisors).astype(np.float32)
        monkeypatch.setattr(
            gguf, "rotary_frequencies", lambda dim, theta, scaling, wrong=wrong: (wrong if scaling else plain, 1.0)
        )
        gguf.write_model(tmp_path / "m.gguf", ours)
        monkeypatch.undo()
        with pytest.raises(ValueError, match=r"rope_freqs\.weight holds a scaling of rotary positions other than"):
            gguf.read_model(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("numbers", "stored", "error"), [("f16", "F16", 2**-11), ("bf16", "BF16", 2**-8), ("q8_0", "F32", 1 / 127)]
)
def test_numbers_of_fewer_bits(tmp_path, numbers, stored, error):
    ours = model(**PLAIN)
    gguf.write_model(tmp_path / "m.gguf", ours, numbers)
    again = gguf.read_model(tmp_path / "m.gguf")
    for name, array in ours.arrays.items():
        read = again.arrays[name]
        assert read.dtype == ("F32" if len(array.shape) == 1 else stored)
        difference = np.abs(read.to_numpy() - array.to_numpy())
        assert difference.max() <= error * np.abs(array.to_numpy()).max() * 1.01
    if numbers != "q8_0":  # what fits is kept as it is
        gguf.write_model(tmp_path / "again.gguf", dataclasses.replace(again), numbers)
        assert equal(gguf.read_model(tmp_path / "again.gguf"), again)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K"])
def test_other_peoples_quantised_tensors_are_dequantised(tmp_path, kind):
    """Blocks of random bytes with sane scales, dequantised here number by number from ggml's layouts."""
    qtype = library.GGMLQuantizationType[kind]
    generator = np.random.default_rng(0)
    block, size = library.GGML_QUANT_SIZES[qtype]
    rows = generator.integers(0, 256, size=(4, 256 // block, size), dtype=np.uint8)
    halves = generator.uniform(0.01, 0.1, size=(4, 256 // block, 2)).astype(np.float16).view(np.uint8)
    if kind == "Q6_K":
        rows[..., -2:] = halves[..., :2]
    else:
        rows[..., : 2 if kind == "Q4_0" else 4] = halves[..., : 2 if kind == "Q4_0" else 4]
    expected = np.array([[number for part in row for number in BY_HAND[kind](part)] for row in rows])
    writer = library.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", rows.reshape(4, -1), raw_dtype=qtype)
    finish(writer)
    read = gguf_file._array(read_header(tmp_path / "m.gguf"), "x")
    assert read.shape == (4, 256)
    np.testing.assert_allclose(read.to_numpy(), expected, rtol=1e-5, atol=1e-6)


DEQUANTISED = [
    kind for kind in library.GGMLQuantizationType if gguf_file._dequantises(kind) and kind.name not in ("F32", "F16")
]


@pytest.mark.parametrize("kind", DEQUANTISED, ids=lambda kind: kind.name)
def test_every_number_type_that_the_library_dequantises_is_read(tmp_path, kind):
    """In shapes of one, two and three dimensions, beside what the library's own reader and dequantiser make of it."""
    _, size = library.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(1)
    writer = library.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, shape in {"a": (2 * size,), "b": (3, size), "c": (2, 3, 2 * size)}.items():
        writer.add_tensor(name, generator.integers(0, 128, size=shape, dtype=np.uint8), raw_dtype=kind)
    finish(writer)
    header = read_header(tmp_path / "m.gguf")
    for tensor in library.GGUFReader(tmp_path / "m.gguf").tensors:
        read = gguf_file._array(header, tensor.name)
        expected = library.quants.dequantize(np.array(tensor.data), kind)
        assert read.shape == tuple(int(length) for length in reversed(tensor.shape))
        for _ in range(2):
            np.testing.assert_array_equal(read.to_numpy().reshape(-1), expected.astype(np.float32).reshape(-1))
            read.forget(0, 1)
        for wanted in (slice(1, 3), np.array([1, 0, 1])):
            rows = read.rows(wanted)
            assert rows.shape == read.to_numpy()[wanted].shape
            np.testing.assert_array_equal(rows.to_numpy(), read.to_numpy()[wanted])


def half(part, at):
    return float(part[at : at + 2].view(np.float16)[0])


def q4_0(part):
    """16 bytes of two four-bit numbers each: the low ones first, then the high ones; less 8, times the scale."""
    numbers = [int(byte) & 15 for byte in part[2:]] + [int(byte) >> 4 for byte in part[2:]]
    return [half(part, 0) * (number - 8) for number in numbers]


def q4_k(part):
    """8 groups of 32, each with a scale and a minimum of six bits packed into 12 bytes."""
    packed = [int(byte) for byte in part[4:16]]
    scales, minima = [], []
    for j in range(8):
        if j < 4:
            scales.append(packed[j] & 63)
            minima.append(packed[j + 4] & 63)
        else:
            scales.append((packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4)
            minima.append((packed[j + 4] >> 4) | (packed[j] >> 6) << 4)
    result = []
    for pair in range(4):
        bytes_ = [int(byte) for byte in part[16 + 32 * pair : 48 + 32 * pair]]
        for j, numbers in ((2 * pair, [b & 15 for b in bytes_]), (2 * pair + 1, [b >> 4 for b in bytes_])):
            result += [half(part, 0) * scales[j] * number - half(part, 2) * minima[j] for number in numbers]
    return result


def q6_k(part):
    """256 six-bit numbers, four bits in one array and two in another, with 16 signed scales."""
    low, high, scales = part[:128], part[128:192], part[192:208].view(np.int8)
    result = [0.0] * 256
    for n in range(2):
        for l in range(32):  # noqa: E741
            ql, qh = low[64 * n :], int(high[32 * n + l])
            numbers = [
                (int(ql[l]) & 15) | (qh & 3) << 4, (int(ql[l + 32]) & 15) | (qh >> 2 & 3) << 4,
                (int(ql[l]) >> 4) | (qh >> 4 & 3) << 4, (int(ql[l + 32]) >> 4) | (qh >> 6 & 3) << 4,
            ]  # fmt: skip
            for k, number in enumerate(numbers):
                scale = int(scales[8 * n + l // 16 + 2 * k])
                result[128 * n + 32 * k + l] = half(part, 208) * scale * (number - 32)
    return result


BY_HAND = {"Q4_0": q4_0, "Q4_K": q4_k, "Q6_K": q6_k}


# --- tokenizers ---


TEXTS = [
    "Once upon a time, Pip the mouse",
    "  two  spaces\n\nand lines\t",
    "naïve café 日本 1234567 it's DON'T",
    "<s> </s>",
    "",
]


def with_tokenizer(tokenizer: Tokenizer, size: int) -> ForeignModel:
    config = ModelConfig(
        size, 32, 64, 1, 4, 2, 16, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )  # fmt: skip
    arrays = {name: HostArray.from_numpy(a) for name, a in initialize_parameters(config, seed=0)}
    return ForeignModel(config, arrays, tokenizer)


def write_bare(path, tokenizer: Tokenizer, name: str, settings) -> None:
    """A file of a tokenizer alone, with a given name for how it splits words."""
    vocabulary = sorted(tokenizer.codec.vocabulary, key=tokenizer.codec.vocabulary.__getitem__)
    special = tokenizer.codec.special_tokens
    writer = library.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if text in special else 1 for text in vocabulary])
    merges = tokenizer.codec.spec["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_id)
    for key, value in settings.items():
        writer.add_bool(key, value)
    finish(writer)


def byte_level() -> Tokenizer:
    return train_bpe_from_iterator(meadow.corpus(0, 300, "train"), 400, reserved_tokens=2)


def sentencepiece() -> Tokenizer:
    names = special_tokens(0)
    return Tokenizer.from_codec(sentencepiece_training.train(list(meadow.corpus(0, 300, "train")), 400, names))


def split_like(name: str) -> Tokenizer:
    """A byte-level tokenizer that splits words as those of the models do that llama.cpp has this name for."""
    made = tokenizers.Tokenizer.from_str(HuggingFaceCodec.__reduce__(byte_level().codec)[1][0])
    made.pre_tokenizer = SPLITTERS[name].pre_tokenizer()
    if SPLITTERS[name].nfc:
        made.normalizer = normalizers.NFC()
    made.model.ignore_merges = SPLITTERS[name].whole_words
    return Tokenizer.from_codec(HuggingFaceCodec(made))


MAKERS = [byte_level, sentencepiece, *(functools.partial(split_like, name) for name in SPLITTERS)]


@pytest.mark.parametrize(
    ("make", "padding"),
    [
        pytest.param(make, padding, marks=[] if number < 2 or number % 2 == (padding > 0) else pytest.mark.slow)
        for number, make in enumerate(MAKERS)
        for padding in (0, 5)
    ],
)
def test_a_tokenizer_goes_along(tmp_path, make, padding):
    tokenizer = make()
    gguf.write_model(tmp_path / "m.gguf", with_tokenizer(tokenizer, tokenizer.vocab_size + padding))
    again = gguf.read_model(tmp_path / "m.gguf")
    assert again.config.vocab_size == tokenizer.vocab_size + padding
    found = again.tokenizer
    for role in ("bos", "eos", "unk", "pad"):
        assert getattr(found, f"{role}_id") == getattr(tokenizer, f"{role}_id")
    assert found.special_ids == tokenizer.special_ids
    for text in TEXTS + list(meadow.corpus(1, 50, "validation")):
        ids = tokenizer.encode(text)
        assert found.encode(text) == ids
        assert found.decode(ids) == tokenizer.decode(ids)
        assert found.encode(text, allow_special=True) == tokenizer.encode(text, allow_special=True)


def test_a_chat_template_goes_along(tmp_path):
    tokenizer = byte_level()
    tokenizer = Tokenizer(
        tokenizer.codec, {"chat_template": "{{ messages }}"}, {"bos": 1, "eos": 2, "unk": 0, "pad": None}
    )
    gguf.write_model(tmp_path / "m.gguf", with_tokenizer(tokenizer, 400))
    assert gguf.read_model(tmp_path / "m.gguf").tokenizer.chat_template == "{{ messages }}"


def test_a_tokenizer_that_llama_cpp_lacks_is_refused(tmp_path):
    made = tokenizers.Tokenizer.from_str(HuggingFaceCodec.__reduce__(byte_level().codec)[1][0])
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(ValueError, match="no way to split words as this tokenizer does"):
        gguf.write_model(tmp_path / "m.gguf", with_tokenizer(Tokenizer.from_codec(HuggingFaceCodec(made)), 400))


def test_each_way_to_split_words_is_written_under_a_name_that_means_it(tmp_path):
    for name, splitter in SPLITTERS.items():
        made = split_like(name)
        written = word_splitters.name_of(made.codec.spec)
        assert SPLITTERS[written].patterns == splitter.patterns, name
        assert SPLITTERS[written].whole_words == splitter.whole_words, name


def test_a_text_begins_as_the_file_says(tmp_path):
    for name, begins in (("smollm", None), ("llama-bpe", None), ("tekken", False), ("smollm", True)):
        made, path = split_like(name), tmp_path / "m.gguf"
        write_bare(path, made, name, {} if begins is None else {"tokenizer.ggml.add_bos_token": begins})
        again = Tokenizer.load(path)
        expected = SPLITTERS[name].begins_texts if begins is None else begins
        assert (again.begins_texts, again.adds_bos) == (expected, expected)
        again.save(tmp_path / name)
        ids = transformers.AutoTokenizer.from_pretrained(tmp_path / name)("Once upon a time").input_ids
        assert ids == again.encode("Once upon a time", bos=expected)


def test_an_unknown_way_to_split_words_keeps_no_weights_from_being_read(tmp_path):
    made, path = byte_level(), tmp_path / "m.gguf"
    gguf.write_model(path, with_tokenizer(made, 400))
    path.write_bytes(path.read_bytes().replace(b"gpt-2", b"gpt-0"))
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre='gpt-0' is not supported; give the model's"):
        gguf.read_model(path)
    assert gguf.read_model(path, with_tokenizer=False).arrays.keys() == with_tokenizer(made, 400).arrays.keys()


def test_settings_of_a_large_vocabulary_are_read_in_a_moment(tmp_path):
    writer = library.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_token_list([f"token {number}" for number in range(150_000)])
    writer.add_token_types([1] * 150_000)
    writer.add_token_merges([f"a{number} b{number}" for number in range(150_000)])
    finish(writer)
    begun = time.process_time()
    metadata = read_header(tmp_path / "m.gguf").metadata
    print(f"{time.process_time() - begun:.2f} s")
    assert metadata["tokenizer.ggml.tokens"][149_999] == "token 149999"
    assert metadata["tokenizer.ggml.merges"][0] == "a0 b0"


# --- settings that change the mathematics ---


def with_settings(path, settings, **changes):
    """A written model with other settings beside its own."""
    gguf.write_model(plain := path.with_suffix(".plain"), model(**PLAIN, **changes))
    return rewritten(plain, path, settings)


YARN = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({"llama.rope.scaling.factor": 4.0}, RopeScaling("linear", 4.0)),  # without a type it is linear
        ({"llama.rope.scale_linear": 2.5}, RopeScaling("linear", 2.5)),  # the old name
        ({"llama.rope.scale_linear": 2.0, "llama.rope.scaling.factor": 3.0}, RopeScaling("linear", 3.0)),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.0}, None),
        ({"llama.rope.scaling.type": "linear"}, None),
        (YARN, RopeScaling("yarn", 4.0, 64)),  # the first length is all of the context's
        (YARN | {"llama.rope.scaling.original_context_length": 16}, RopeScaling("yarn", 4.0, 16)),
        (YARN | {"llama.rope.scaling.yarn_beta_fast": 16.0}, RopeScaling("yarn", 4.0, 64, beta_fast=16.0)),
        (
            YARN | {"llama.rope.scaling.attn_factor": 2.0},
            RopeScaling("yarn", 4.0, 64, attention_factor=2.0 * (0.1 * np.log(4.0) + 1.0)),
        ),
    ],
)
def test_rotary_scaling_is_read_as_llama_cpp_does(tmp_path, settings, scaling):
    found = gguf_file.load_config(with_settings(tmp_path / "m.gguf", settings, max_position_embeddings=64))
    assert found.rope_scaling == scaling


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"llama.rope.scaling.attn_factor": 2.0}, "rope.scaling.attn_factor=2.0 is not supported but with yarn"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type='longrope' is not supported"),
        (YARN | {"llama.rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor=0.5 is not supported"),
        (YARN | {"llama.rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier=0.1"),
        ({"llama.expert_count": 8}, "llama.expert_count=8 is not supported"),
        ({"llama.logit_scale": 0.0625}, "llama.logit_scale=0.0625 is not supported"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale=0.5 is not supported"),
        ({"llama.attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ({"llama.final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"llama.attention.clamp_kqv": 8.0}, "clamp_kqv=8.0"),
        ({"llama.attention.causal": False}, "attention.causal=False"),
        ({"llama.attention.sliding_window": 8}, "sliding_window=8"),
        ({"llama.attention.value_length": 4}, "attention.value_length=4 is not the head size"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count=4 is not the head size"),
        ({"llama.attention.head_count_kv": [1, 2]}, "differs between layers"),
        ({"llama.a_setting_of_tomorrow": 3}, "llama.a_setting_of_tomorrow=3 is not supported"),
        ({"llama.embedding_length": "wide"}, "m.gguf"),
    ],
)
def test_settings_that_would_change_the_mathematics_are_refused_by_name(tmp_path, settings, words):
    path = with_settings(tmp_path / "m.gguf", settings)
    with pytest.raises(ValueError, match=re.escape(words)):
        gguf_file.load_config(path)


def test_settings_that_change_nothing_are_passed_over(tmp_path):
    neutral = {
        "llama.expert_count": 0, "llama.logit_scale": 1.0, "llama.attention.scale": 0.0, "llama.attention.causal": True,
        "llama.attention.sliding_window": 4096, "llama.rope.scaling.finetuned": True, "general.author": "somebody",
        "llama.attention.head_count_kv": [2, 2], "llama.rope.scaling.attn_factor": 1.0, "quantize.imatrix.file": "x",
    }  # fmt: skip
    path = with_settings(tmp_path / "m.gguf", neutral)
    assert gguf_file.load_config(path) == gguf_file.load_config(path.with_suffix(".plain"))


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sliding_window": 4}, "sliding_window=4"),
        ({"num_labels": 2}, "num_labels=2"),
        ({"rope_scaling": RopeScaling("yarn", 4.0, 64, truncate=False)}, "whole borders"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        gguf.write_model(tmp_path / "m.gguf", model(**changes))


def test_broken_files_are_refused(tmp_path):
    path = tmp_path / "m.gguf"
    gguf.write_model(path, with_tokenizer(byte_level(), 400))
    content = path.read_bytes()
    for end in [*range(0, 400, 7), *range(400, len(content), len(content) // 60), len(content) - 1]:
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"m\.gguf"):
            gguf.read_model(path)
    for place, value in ((4, 9), (8, 2**62), (16, 2**62), (24, 2**63)):  # version, tensors, settings, a key's length
        damaged = bytearray(content)
        struct.pack_into("<I" if place == 4 else "<Q", damaged, place, value)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"m\.gguf"):
            gguf.read_model(path)


def test_a_list_without_end_does_not_hang(tmp_path):
    """A list of 2^60 bytes, on which a reader that trusts the count would loop."""
    key = b"x"
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    for inner in (0, 8, 9):
        (tmp_path / "m.gguf").write_bytes(header + struct.pack("<IIQ", 9, inner, 2**60) + b"\0" * 64)
        with pytest.raises(ValueError, match=r"m\.gguf: it is"):
            gguf.read_model(tmp_path / "m.gguf")


def test_other_architectures_are_named(tmp_path):
    writer = library.GGUFWriter(tmp_path / "m.gguf", "gpt2")
    finish(writer)
    with pytest.raises(ValueError, match=r"general\.architecture='gpt2' is not supported"):
        gguf.read_model(tmp_path / "m.gguf")
