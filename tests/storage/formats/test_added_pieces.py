"""A `tokenizer.model` with tokens added beside it, in a GGUF file: the ids of llama.cpp, transformers and ours.

python -m tests.storage.formats.test_added_pieces      stores what llama.cpp says anew
"""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import tokenizers

from llamita.storage.formats import gguf
from llamita.storage.gguf_header import read_header
from llamita.text import sentencepiece_json
from llamita.text.chat import Chat
from llamita.text.sentencepiece_codec import SentencePieceCodec
from llamita.text.sentencepiece_json import BPE, BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from llamita.text.tokenizer import Tokenizer
from tests.storage.formats.test_gguf import with_tokenizer
from tests.storage.formats.test_llama_cpp_tokens import by_llama_cpp
from tests.text.test_added_tokens import ENDS, LLAMA, TALK, TEMPLATE, token, write

STORED = Path(__file__).with_name("llama_cpp_added_pieces.json")
PADDING = 5  # rows of the model's embeddings that have no token
WORDS = ("the", "cat", "sat", "on", "mat", "and", "dog", "where", "is", "there", "it")
TEXTS = [
    "", "the cat", "the  cat  sat", "é the caté", "the\ncat\n", "<s>the cat</s>", "<unk>the",
    "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\nit is there", "x<|im_start|>x", "the<|im_start|>cat",
    "<|im_start|><|im_end|>", "<tool_call>the</tool_call>the cat</s>the", "<|im_start|>the<tool_call>the<|im_end|>the",
    "<|IM_START|>", "Ünïcode 😀<tool_call>😀 the", "the<|im_end|>\n\n  cat", "<pad>[PAD]the", "[PAD320]", "the <r0>sat",
]  # fmt: skip
SPACED = [" the cat", "  the  cat ", "the <|im_start|> cat", "the   <tool_call>   cat", "<s> the </s> the", "▁the▁cat"]


def model_of_words() -> bytes:
    """A SentencePiece model that makes words from their left, whatever the version of the library that trains one."""
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<r0>", 0.0, CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    longer = list(dict.fromkeys(f"▁{word}"[:end] for word in WORDS for end in range(2, len(word) + 2)))
    longer += ["▁▁", "<|", "|>", "im", "\nc"]
    letters = sorted({letter for piece in longer for letter in piece} | set("usernaxio_"))
    pieces += [(piece, -float(rank), NORMAL) for rank, piece in enumerate([*longer, *letters])]
    model = sentencepiece_json.SentencePieceModel(tuple(pieces), BPE, byte_fallback=True, removes_extra_spaces=False)
    return sentencepiece_json.serialize(model, {"unk": 0, "bos": 1, "eos": 2})


PROTO = model_of_words()
SIZE = len(sentencepiece_json.parse(PROTO).pieces)
CHATML = {"<|im_start|>": SIZE, "<|im_end|>": SIZE + 1}
CALLS = {"<tool_call>": SIZE + 2, "</tool_call>": SIZE + 3}
DECODER = {
    str(SIZE): token("<|im_start|>", True), str(SIZE + 1): token("<|im_end|>"), str(SIZE + 2): token("<tool_call>"),
}  # fmt: skip

# tokenizer_config.json, further files, model_type, and whether a space at the start of a text is kept apart
CASES = {
    "added_tokens.json": ({}, {"added_tokens": CHATML}, "llama", True),
    "with tags": ({}, {"added_tokens": CHATML | CALLS}, "llama", True),
    "Mistral": (LLAMA, {"added_tokens": CHATML | CALLS}, "mistral", True),
    "Mistral, with BOS": ({**LLAMA, "add_bos_token": True}, {"added_tokens": CALLS}, "mistral", True),
    "Llama, legacy": ({**LLAMA, "legacy": True}, {"added_tokens": CHATML | CALLS}, "llama", False),
    "Llama, no prefix": ({**LLAMA, "add_prefix_space": False}, {"added_tokens": CHATML | CALLS}, "llama", True),
    "added_tokens_decoder": ({"added_tokens_decoder": {**ENDS, **DECODER}}, {}, "llama", True),
    "a control token made plain": (
        {"added_tokens_decoder": {**ENDS, "3": token("<r0>"), str(SIZE): token("<tool_call>")}}, {}, "llama", True,
    ),
    "named by a role": ({"pad_token": "<pad>"}, {"added_tokens": CALLS}, "llama", True),
}  # fmt: skip


def made(name: str, directory: Path) -> Tokenizer:
    """The tokenizer of a case's directory, beside which lies its GGUF file."""
    config, files, model_type, _ = CASES[name]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(PROTO)
    write(directory, config, files, model_type)
    tokenizer = Tokenizer.load(directory)
    gguf.write_model(directory / "m.gguf", with_tokenizer(tokenizer, tokenizer.vocab_size + PADDING))
    return tokenizer


def texts_of(name: str) -> list[str]:
    return TEXTS + SPACED if CASES[name][3] else TEXTS


@pytest.mark.parametrize("name", CASES)
def test_the_ids_are_those_that_llama_cpp_gave(name, tmp_path):
    tokenizer = made(name, tmp_path)
    again = Tokenizer.load(tmp_path / "m.gguf")
    assert not CASES[name][0] or (again.adds_bos, again.begins_texts) == (tokenizer.adds_bos, tokenizer.begins_texts)
    for role in ("bos", "eos", "unk", "pad"):
        assert getattr(again, f"{role}_id") == getattr(tokenizer, f"{role}_id")
    assert again.special_ids == tokenizer.special_ids
    stored = json.loads(STORED.read_text())[name]
    for text, (with_special, plain) in zip(texts_of(name), stored, strict=True):
        for found in (tokenizer, again):
            assert found.encode(text, allow_special=True) == with_special, text
            assert found.encode(text) == plain, text
        assert again.decode(with_special, skip_special=False) == tokenizer.decode(with_special, skip_special=False)


@pytest.mark.parametrize("name", CASES)
def test_the_ids_are_those_of_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = made(name, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in texts_of(name):
        assert tokenizer.encode(text, allow_special=True) == theirs(text, add_special_tokens=False).input_ids, text


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_ids_are_those_of_llama_cpp(name, tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (the extra llama-cpp)")
    tokenizer = made(name, tmp_path)
    again, texts = Tokenizer.load(tmp_path / "m.gguf"), TEXTS + SPACED
    for special in (True, False):
        expected = by_llama_cpp(tmp_path / "m.gguf", texts, special)
        assert [again.encode(text, allow_special=special) for text in texts] == expected
        ours = [tokenizer.encode(text, allow_special=special) for text in texts_of(name)]
        assert ours == expected[: len(ours)]


@pytest.mark.slow
@pytest.mark.parametrize("config", [{}, {**LLAMA, "add_prefix_space": False}], ids=["a prefix", "no prefix"])
def test_the_ids_of_real_text_are_those_of_llama_cpp(config, tmp_path, shared_data):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (the extra llama-cpp)")
    shutil.copy(shared_data / "llama2-tokenizer" / "tokenizer.model", tmp_path)
    write(tmp_path, config, {"added_tokens": {"<|im_start|>": 32000, "<|im_end|>": 32001, "<tool_call>": 32002}})
    tokenizer = Tokenizer.load(tmp_path)
    gguf.write_model(tmp_path / "m.gguf", with_tokenizer(tokenizer, 32064))
    again = Tokenizer.load(tmp_path / "m.gguf")
    lines = (shared_data / "wikitext-2" / "valid.txt").read_text("utf-8")[:100_000].splitlines()
    texts = [f"<|im_start|>user\n{line}<tool_call> {line[::-1]}</s>{line}" for line in lines] + lines
    for text, expected in zip(texts, by_llama_cpp(tmp_path / "m.gguf", texts, special=True), strict=True):
        assert tokenizer.encode(text, allow_special=True) == again.encode(text, allow_special=True) == expected, text


def test_the_list_is_that_of_llama_cpps_converter(tmp_path):
    """Pieces, then added tokens by their kind, then padding up to the rows of the embeddings."""
    made("added_tokens_decoder", tmp_path)
    metadata = read_header(tmp_path / "m.gguf").metadata
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    pieces = sentencepiece_json.parse(PROTO).pieces
    assert list(zip(tokens, kinds, strict=True))[:SIZE] == [(text, kind) for text, _, kind in pieces]
    assert tokens[SIZE:] == ["<|im_start|>", "<|im_end|>", "<tool_call>", *(f"[PAD{SIZE + n}]" for n in range(3, 8))]
    # `<|im_end|>` is a mark of conversations, which Llamita keeps out of texts as it does control tokens.
    assert kinds[SIZE:] == [CONTROL, CONTROL, USER_DEFINED, *[UNUSED] * PADDING]
    assert (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
    scores = metadata["tokenizer.ggml.scores"]
    longer = [number for number, (text, _, kind) in enumerate(pieces) if kind == NORMAL and len(text) > 1]
    assert sorted(longer, key=lambda number: -scores[number]) == longer


def test_a_conversation_is_the_same_from_both(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(PROTO)
    write(tmp_path, {"chat_template": TEMPLATE}, {"added_tokens": CHATML})
    tokenizer = Tokenizer.load(tmp_path)
    gguf.write_model(tmp_path / "m.gguf", with_tokenizer(tokenizer, SIZE + 2))
    again = Tokenizer.load(tmp_path / "m.gguf")
    assert list(Chat(again).encode(TALK).tokens) == list(Chat(tokenizer).encode(TALK).tokens)


def test_a_space_at_the_start_of_a_text_is_kept_apart_in_the_file(tmp_path):
    """As SentencePiece and llama.cpp do, and transformers' LlamaTokenizer does not."""
    tokenizer = made("Llama, legacy", tmp_path)
    again = Tokenizer.load(tmp_path / "m.gguf")
    for text in (" the cat", "  the  cat "):
        assert again.encode(text) == SentencePieceCodec(PROTO).encode(text) != tokenizer.encode(text)


def test_a_saved_copy_is_written_alike(tmp_path):
    tokenizer = made("Mistral", tmp_path)
    tokenizer.save(tmp_path / "copy")
    shutil.copy(tmp_path / "config.json", tmp_path / "copy")
    assert not (tmp_path / "copy" / "tokenizer.model").exists()
    gguf.write_model(
        tmp_path / "again.gguf", with_tokenizer(Tokenizer.load(tmp_path / "copy"), tokenizer.vocab_size + PADDING)
    )
    one, other = (read_header(tmp_path / name).metadata for name in ("m.gguf", "again.gguf"))
    for key in ("tokens", "token_type", "scores", "add_space_prefix", "add_bos_token"):
        assert one[f"tokenizer.ggml.{key}"] == other[f"tokenizer.ggml.{key}"]


# --- what llama.cpp does not have ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "files", "words"),
    [
        ({"added_tokens_decoder": {str(SIZE): token("<x>", lstrip=True)}}, {}, "'<x>' is a token with the flag lstrip"),
        ({"added_tokens_decoder": {str(SIZE): token("<x>", rstrip=True)}}, {}, "'<x>' is a token with the flag rstrip"),
        ({"added_tokens_decoder": {str(SIZE): token("x", single_word=True)}}, {}, "'x' .* the flag single_word"),
        ({"added_tokens_decoder": {**ENDS, "1": token("<s>", True, lstrip=True)}}, {}, "'<s>' .* the flag lstrip"),
        (LLAMA, {"added_tokens": CHATML}, 'the first text alone, .*"legacy": true'),
        ({"legacy": False}, {"added_tokens": CHATML}, "the first text alone"),
        ({}, {"added_tokens": {"<ab": SIZE, "b>": SIZE + 1}}, "'<ab' and 'b>', one may begin within the other"),
        (
            {**LLAMA, "legacy": True, "unk_token": "<unk>", "pad_token": "<a>"},
            {"added_tokens": {"<a>": SIZE, "[<a>]": SIZE + 1}}, r"'<a>' is looked for before '\[<a>\]'",
        ),
        ({"pad_token": "▁the"}, {}, "'▁the' is a piece of ordinary text as well"),
    ],
)  # fmt: skip
def test_what_llama_cpp_does_otherwise_is_refused_by_name(config, files, words, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(PROTO)
    write(tmp_path, config, files)
    with pytest.raises(ValueError, match=f"llama.cpp has SentencePiece's BPE with added tokens, .*{words}") as fault:
        gguf.write_model(tmp_path / "m.gguf", with_tokenizer(Tokenizer.load(tmp_path), 400))
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda spec: spec["model"].update(byte_fallback=False), "not spelled by pieces of one byte"),
        (lambda spec: spec["model"].update(ignore_merges=True), "not spelled by pieces of one byte"),
        (lambda spec: spec["model"]["merges"].pop(), "no merge makes its piece"),
        (lambda spec: spec["model"]["merges"].append(spec["model"]["merges"].pop(0)), None),
        (lambda spec: spec.update(normalizer={"type": "NFC"}), "changes or splits a text"),
        (lambda spec: spec.update(pre_tokenizer={"type": "Whitespace"}), "changes or splits a text"),
    ],
)
def test_a_tokenizer_json_of_another_kind_is_refused(change, words, tmp_path):
    """A change of the order of merges is a change of scores, which a file can hold."""
    tokenizer = made("added_tokens.json", tmp_path)
    spec = json.loads(json.dumps(tokenizer.codec.spec))
    change(spec)
    if words is None:
        assert sentencepiece_json.revert(spec).pieces != sentencepiece_json.revert(tokenizer.codec.spec).pieces
        return
    tokenizers.Tokenizer.from_str(json.dumps(spec))
    with pytest.raises(ValueError, match=words):
        sentencepiece_json.revert(spec)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        found = {}
        for name in CASES:
            made(name, Path(place) / name)
            path, texts = Path(place) / name / "m.gguf", texts_of(name)
            found[name] = list(zip(by_llama_cpp(path, texts, True), by_llama_cpp(path, texts, False), strict=True))
        lines = (f"{json.dumps(name)}: {json.dumps(ids)}" for name, ids in found.items())
        STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
