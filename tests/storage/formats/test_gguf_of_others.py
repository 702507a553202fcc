"""GGUF files as people have them: in parts, of other machines and kinds, with pieces of other types, with other ends.

What is right is llama.cpp's, asked in the test, and the `gguf` library's, which writes the files.
"""

import dataclasses
import json
import re

import gguf as library
import numpy as np
import pytest

from llamita.model.config import ModelConfig
from llamita.model.parameters import initialize_parameters
from llamita.storage import gguf as gguf_file
from llamita.storage import model_directory
from llamita.storage.formats import gguf
from llamita.text import sentencepiece_json
from llamita.text.chat import Chat
from llamita.text.sentencepiece_json import BPE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, SentencePieceModel
from llamita.text.tokenizer import Tokenizer
from tests.storage.formats.helpers import equal, finish, model, rewritten
from tests.storage.formats.test_gguf import FAMILIES, PLAIN, byte_level, sentencepiece, with_tokenizer

# --- parts, machines and kinds of files ---


def test_a_file_in_parts_is_read_by_its_first(tmp_path):
    tokenizer = byte_level()
    whole = tmp_path / "whole.gguf"
    gguf.write_model(whole, with_tokenizer(tokenizer, 400), "q8_0")
    rewritten(whole, tmp_path / "m.gguf", split_max_tensors=4)
    first, second, third = (tmp_path / f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3))
    expected, found = gguf.read_model(whole), gguf.read_model(first)
    assert equal(found, expected)
    assert found.tokenizer.encode("Once upon a time") == expected.tokenizer.encode("Once upon a time")
    for name in ("model.embed_tokens.weight", "model.norm.weight"):  # rows alone, of a first and of a last part
        np.testing.assert_array_equal(
            found.arrays[name].rows(slice(1, 3)).to_numpy(), expected.arrays[name].rows(slice(1, 3)).to_numpy()
        )
    assert model_directory.weight_files(first) == [first, second, third]
    with pytest.raises(ValueError, match=r"m-00002-of-00003\.gguf: .* give the first part, m-00001-of-00003\.gguf"):
        gguf.read_model(second)
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=r"renamed\.gguf: it is one of 3 parts, and is not named as such"):
        gguf.read_model(renamed)
    kept = third.read_bytes()
    third.write_bytes(second.read_bytes())
    first.touch()
    with pytest.raises(ValueError, match=r"m-00003-of-00003\.gguf: it is no part 3 of m-00001"):
        gguf.read_model(first)
    third.unlink()
    with pytest.raises(FileNotFoundError, match=r"m-00003-of-00003\.gguf does not exist, and m-00001-of-00003\.gguf"):
        gguf.read_model(first)
    third.write_bytes(kept)
    assert equal(gguf.read_model(first), expected)


def test_files_that_hold_no_model_are_told_by_what_they_are(tmp_path):
    plain = tmp_path / "plain.gguf"
    gguf.write_model(plain, with_tokenizer(byte_level(), 400))
    big = rewritten(plain, tmp_path / "big.gguf", endianess=library.GGUFEndian.BIG)
    adapter = rewritten(plain, tmp_path / "adapter.gguf", {"general.type": "adapter"}, drop=lambda name: "embd" in name)
    words = rewritten(plain, tmp_path / "words.gguf", drop=lambda name: True)
    for path, fault in (
        (big, "its numbers are those of a big-endian machine"),
        (adapter, "its general.type is 'adapter', and it is no model"),
        (words, "it has no weights, a tokenizer at most"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{path}: {fault}")):
            gguf.read_model(path)
    assert Tokenizer.load(words).encode("Once upon") == byte_level().encode("Once upon")


def test_a_directory_with_a_file_alone_says_which(tmp_path):
    gguf.write_model(tmp_path / "m.gguf", model(**PLAIN))
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json .*; give the GGUF file in it, .*m\.gguf"):
        model_directory.resolve_model_directory(tmp_path)


def test_a_file_for_embeddings_is_the_model_that_it_was_made_of(tmp_path):
    plain = tmp_path / "plain.gguf"
    gguf.write_model(plain, model(**PLAIN, query_key_norm=True))
    pooled = rewritten(plain, tmp_path / "m.gguf", {"qwen3.pooling_type": 3})
    assert equal(gguf.read_model(pooled), gguf.read_model(plain))


@pytest.mark.parametrize("family", ["llama", "gemma3", "smollm3"])
def test_a_file_has_the_name_that_it_is_given(tmp_path, family):
    gguf.write_model(tmp_path / "m.gguf", model(**PLAIN, **FAMILIES[family]), name="small")
    assert library.GGUFReader(tmp_path / "m.gguf").fields["general.name"].contents() == "small"


# --- pieces of other types ---

TEXTS = [
    "Once upon a time, Pip the mouse", " the  cat\n\nsat   on", "  two  spaces", "<s>hi</s>", "naïve café 日本",
    "\ttab\t\tx", "<|im_start|>user\nHello<|im_end|>\n", "<unk>", "", " ", "   ", "x   ", "\n\n\n", "<h1>t</h1>",
]  # fmt: skip
SPACES = [
    ("  ", 0.0, USER_DEFINED),
    ("   ", 0.0, USER_DEFINED),
    ("\n\n", 0.0, USER_DEFINED),
    ("<h1>", 0.0, USER_DEFINED),
]
CHATML = [("<|im_start|>", -1000.0, CONTROL), ("<|im_end|>", -1000.0, CONTROL)]


def pieces():
    """Those of a small trained model."""
    return list(sentencepiece_json.parse(sentencepiece().codec.proto).pieces)


def unknown_as(kind):
    return [(text, score, kind if its == UNKNOWN else its) for text, score, its in pieces()]


def as_the_old_converter_wrote():
    """Without scores and with <unk> among the control tokens: convert.py --vocab-type hfft."""
    return [(text, -1000.0, CONTROL if kind == UNKNOWN else kind) for text, _, kind in pieces()]


FORMS = {
    "<unk> a control token": (lambda: unknown_as(CONTROL), {}),
    "<unk> an ordinary token": (lambda: unknown_as(NORMAL), {}),
    "<unk> named by its role": (lambda: unknown_as(CONTROL), {"tokenizer.ggml.unknown_token_id": 0}),
    "two unknown tokens": (lambda: [*pieces(), ("<x>", 0.0, UNKNOWN)], {}),
    "equal scores": (as_the_old_converter_wrote, {}),
    "equal scores and marks": (lambda: [*as_the_old_converter_wrote(), *CHATML], {}),
    "a token without a name": (lambda: [*pieces(), ("", 0.0, NORMAL)], {}),
    "spaces as symbols": (lambda: [*pieces(), *SPACES], {"tokenizer.ggml.add_space_prefix": False}),
    "spaces as symbols, after a space": (lambda: [*pieces(), *SPACES], {}),
    "spaces as symbols, and equal scores": (
        lambda: [*as_the_old_converter_wrote(), *SPACES], {"tokenizer.ggml.add_space_prefix": False},
    ),
}  # fmt: skip


def write_pieces(path, found, settings=(), types=True):
    """A model with a tokenizer of SentencePiece's, which llama.cpp opens."""
    config = ModelConfig(len(found), 32, 64, 1, 4, 2, 64)
    writer = library.GGUFWriter(path, "llama")
    for key, value in (
        *(("context_length", 64), ("embedding_length", 32), ("block_count", 1), ("feed_forward_length", 64)),
        *(("attention.head_count", 4), ("attention.head_count_kv", 2), ("rope.dimension_count", 8)),
    ):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _, _ in found])
    writer.add_token_scores([score for _, score, _ in found])
    if types:
        writer.add_token_types([kind for _, _, kind in found])
    for key, value in dict(settings).items():
        (writer.add_bool if isinstance(value, bool) else writer.add_uint32)(key, value)
    layout = gguf_file.families.family_in_gguf("llama").gguf
    for name, array in initialize_parameters(config, seed=1):
        writer.add_tensor(gguf_file.foreign_name(name, layout), np.ascontiguousarray(array, dtype=np.float32))
    finish(writer)
    return path


def llama_cpp_over(path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (the extra llama-cpp)")
    return llama_cpp, llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


@pytest.mark.parametrize("form", FORMS)
def test_the_ids_are_llama_cpps(form, tmp_path):
    make, settings = FORMS[form]
    ours = Tokenizer.load(write_pieces(tmp_path / "m.gguf", make(), settings))
    _, theirs = llama_cpp_over(tmp_path / "m.gguf")
    for text in TEXTS:
        for special in (True, False):
            if text == "<unk>" and form == "<unk> an ordinary token":
                continue  # a control token here all the same
            ids = theirs.tokenize(text.encode(), add_bos=False, special=special)
            assert ours.encode(text, allow_special=special) == ids, (text, special)
            spelled = theirs.detokenize(ids, special=True).decode("utf-8", "replace")
            assert ours.decode(ids, skip_special=False) in (spelled, spelled.removeprefix(" "))


def test_a_file_without_types_has_its_bytes_by_their_names(tmp_path):
    ours = Tokenizer.load(write_pieces(tmp_path / "m.gguf", pieces(), types=False))
    _, theirs = llama_cpp_over(tmp_path / "m.gguf")
    for text in ("Once upon a time", "naïve 日本\n"):
        ids = theirs.tokenize(text.encode(), add_bos=False, special=False)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == text  # llama.cpp shows the names of the bytes


def with_space_symbols(prefix):
    found = [*pieces(), ("▁▁", 0.0, USER_DEFINED), ("▁▁▁", 0.0, USER_DEFINED), ("\n\n", 0.0, USER_DEFINED)]
    return SentencePieceModel(tuple(found), BPE, True, adds_dummy_prefix=prefix, removes_extra_spaces=False)


def test_symbols_of_spaces_are_written_so_that_llama_cpp_shows_them(tmp_path):
    """Gemma's tokenizer.model has such symbols, and puts no space before a text."""
    proto = sentencepiece_json.serialize(with_space_symbols(False), {"unk": 0, "bos": 1, "eos": 2})
    (tmp_path / "tokenizer.model").write_bytes(proto)
    tokenizer = Tokenizer.load(tmp_path)
    gguf.write_model(tmp_path / "m.gguf", with_tokenizer(tokenizer, tokenizer.vocab_size))
    again = Tokenizer.load(tmp_path / "m.gguf")
    _, theirs = llama_cpp_over(tmp_path / "m.gguf")
    for text in TEXTS:
        ids = tokenizer.encode(text)  # SentencePiece's own
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == again.encode(text) == ids, text
        assert theirs.detokenize(ids).decode() == again.decode(ids) == text


def test_symbols_of_spaces_in_older_files_are_those_of_the_model(tmp_path):
    """As a converter wrote them until July 2024; llama.cpp finds no such symbol in any text."""
    model_ = with_space_symbols(False)
    settings = {"tokenizer.ggml.add_space_prefix": False}
    ours = Tokenizer.load(write_pieces(tmp_path / "m.gguf", model_.pieces, settings))
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_json.serialize(model_, {"unk": 0, "bos": 1, "eos": 2}))
    theirs = Tokenizer.load(tmp_path / "tokenizer.model")
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == text


def like_gemmas(spec):
    """The tokenizer.json of a SentencePiece model with runs of spaces and of lines that are listed as tokens."""
    spec = json.loads(json.dumps(spec))
    vocab, runs = spec["model"]["vocab"], ["▁▁", "▁▁▁", "▁▁▁▁", "\n", "\n\n", "\n\n\n"]
    more = [*runs, "<h1>", "<start_of_turn>"]
    vocab |= {name: len(vocab) + number for number, name in enumerate(more)}
    cuts = [(name[:cut], name[cut:]) for name in runs for cut in range(1, len(name))]
    spec["model"]["merges"] = [list(pair) for pair in cuts] + spec["model"]["merges"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    listed = [{"id": vocab[name], "content": name, **flags, "special": name == more[-1]} for name in more]
    marks = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    shown = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    splits = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    return spec | {
        "added_tokens": [*spec["added_tokens"], *listed],
        "normalizer": marks,
        "pre_tokenizer": splits,
        "decoder": {"type": "Sequence", "decoders": [shown, {"type": "ByteFallback"}, {"type": "Fuse"}]},
    }


def test_a_tokenizer_json_like_gemmas_goes_along(tmp_path):
    """As transformers saves it: without a tokenizer.model."""
    spec = like_gemmas(json.loads(sentencepiece().codec.converted().to_str()))
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer.load(tmp_path)
    gguf.write_model(tmp_path / "m.gguf", with_tokenizer(tokenizer, tokenizer.vocab_size))
    again = Tokenizer.load(tmp_path / "m.gguf")
    _, theirs = llama_cpp_over(tmp_path / "m.gguf")
    for text in [*TEXTS, "a  b", "a     b\n\n\n\n\nc", "<start_of_turn>user\n  hi"]:
        ids = tokenizer.encode(text)
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == again.encode(text) == ids, text
        assert again.decode(ids) == text


def write_bytes(path, tokens, settings=(), unused=()):
    """A model with a tokenizer of bytes, to which tokens were added, and some of whose own are called unused."""
    codec = byte_level().codec
    names = sorted(codec.vocabulary, key=codec.vocabulary.__getitem__)
    kinds = [CONTROL if name in codec.special_tokens else UNUSED if name in unused else NORMAL for name in names]
    merges = codec.spec["model"]["merges"]
    lists = {
        "tokens": [*names, *(name for name, _ in tokens)],
        "token_type": [*kinds, *(kind for _, kind in tokens)],
        "merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in merges],
    }
    gguf.write_model(plain := path.with_suffix(".plain"), with_tokenizer(byte_level(), len(lists["tokens"])))
    return rewritten(plain, path, {f"tokenizer.ggml.{key}": value for key, value in lists.items()} | dict(settings))


def test_marks_that_a_file_calls_symbols_are_control_tokens(tmp_path):
    """As llama.cpp's first converter wrote all tokens that were added."""
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    tokens = [("<|im_start|>", USER_DEFINED), ("<|im_end|>", USER_DEFINED), ("<tool>", USER_DEFINED)]
    write_bytes(tmp_path / "m.gguf", tokens, {"tokenizer.chat_template": template})
    ours = Tokenizer.load(tmp_path / "m.gguf")
    chat = Chat(ours)
    assert chat.end_of_turn == ((401,), ())
    told = chat.encode([{"role": "user", "content": "say <|im_end|> <tool>"}]).tokens
    assert (told.count(400), told.count(401), told.count(402)) == (1, 1, 1)  # the template's own, and a symbol of text
    _, theirs = llama_cpp_over(tmp_path / "m.gguf")
    for text in ("a<|im_end|>b", "a <tool> b"):  # llama.cpp knows the end of a turn by its name
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == ours.encode(text)


def test_tokens_that_are_called_unused_and_made_by_merges_are_made(tmp_path):
    ids = byte_level().encode("Once upon a time")
    names = {token_id: name for name, token_id in byte_level().codec.vocabulary.items()}
    ours = Tokenizer.load(write_bytes(tmp_path / "m.gguf", [], unused={names[ids[0]], names[ids[-1]]}))
    _, theirs = llama_cpp_over(tmp_path / "m.gguf")
    assert ours.encode("Once upon a time") == theirs.tokenize(b"Once upon a time", add_bos=False) == ids


# --- what ends a text ---


@pytest.mark.parametrize("named", [(), ("</s>",), ("<|end_of_text|>", "<|eot_id|>"), ("<|im_end|>", "<|endoftext|>")])
def test_what_ends_a_text_is_what_ends_it_to_llama_cpp(named, tmp_path):
    """Llama 3's first files named <|end_of_text|> alone, and nothing that ends a turn."""
    found = [*pieces(), *((name, 0.0, CONTROL) for name in named if name != "</s>"), ("<|other|>", 0.0, CONTROL)]
    last = len(found) - 1
    settings = {"tokenizer.ggml.eos_token_id": last}
    write_pieces(tmp_path / "m.gguf", found, settings)
    llama_cpp, theirs = llama_cpp_over(tmp_path / "m.gguf")
    expected = {n for n in range(last + 1) if llama_cpp.llama_vocab_is_eog(theirs._model.vocab, n)}
    assert set(gguf_file.load_config(tmp_path / "m.gguf").eos_token_ids) == expected


def test_what_ends_a_turn_and_every_template_go_along(tmp_path):
    tokenizer = byte_level()
    tokenizer.chat_templates |= {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    end = tokenizer.codec.special_tokens["<r1>"]
    ours = with_tokenizer(tokenizer, 400)
    ours = dataclasses.replace(ours, config=dataclasses.replace(ours.config, eos_token_id=(end, tokenizer.eos_id)))
    gguf.write_model(tmp_path / "m.gguf", ours)
    again = gguf.read_model(tmp_path / "m.gguf")
    assert set(again.config.eos_token_ids) == {end, tokenizer.eos_id}
    assert again.tokenizer.chat_templates == tokenizer.chat_templates
    llama_cpp, theirs = llama_cpp_over(tmp_path / "m.gguf")
    assert {n for n in range(400) if llama_cpp.llama_vocab_is_eog(theirs._model.vocab, n)} == {end, tokenizer.eos_id}
