"""A tokenizer.json that says something else than the files beside it, or decodes in an unusual way."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, pre_tokenizers, processors

from llamita.text.sentencepiece_codec import SentencePieceCodec
from llamita.text.tokenizer import Tokenizer
from tests.text.test_added_tokens import (
    ENDS,
    FAST,
    LLAMA,
    ROLES,
    SENTENCEPIECE,
    TALK,
    TEMPLATE,
    TEXTS,
    byte_level,
    check,
    token,
    write,
)

transformers = pytest.importorskip("transformers")

CONVERTED = json.loads(SENTENCEPIECE.converted().to_str())
MARKS = {"3": token("<|im_start|>", True), "4": token("<|im_end|>", True)}
SPACED = [*TEXTS, "ﬁ ½ ＡＢＣ", "caf\u00e9 cafe\u0301"]


def changed(**parts: Any) -> dict[str, Any]:
    """The tokenizer.json of the SentencePiece model, with other parts."""
    return {**CONVERTED, **parts}


def with_names_for_reserved_tokens() -> dict[str, Any]:
    """As people do with Gemma: tokens that are kept for a meaning to come get a name, in tokenizer.json alone."""
    text = json.dumps(CONVERTED)
    return json.loads(text.replace('"<r0>"', '"<|im_start|>"').replace('"<r1>"', '"<|im_end|>"'))


def with_another_piece() -> dict[str, Any]:
    vocab = dict(CONVERTED["model"]["vocab"])
    last = max(vocab, key=vocab.__getitem__)
    vocab["zzz"] = vocab.pop(last)
    merges = [pair for pair in CONVERTED["model"]["merges"] if last not in ("".join(pair), *pair)]
    return changed(model={**CONVERTED["model"], "vocab": vocab, "merges": merges})


def metaspace(scheme: str) -> dict[str, Any]:
    splits = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    return changed(normalizer=None, pre_tokenizer=splits)


UNPREFIXED = changed(
    normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    decoder={"type": "Sequence", "decoders": CONVERTED["decoder"]["decoders"][:3]},
)
NFKC = changed(
    normalizer={"type": "Sequence", "normalizers": [{"type": "NFKC"}, *CONVERTED["normalizer"]["normalizers"]]}
)
# tokenizer.json, tokenizer_config.json, the model's type
BESIDE_MODEL: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "names for reserved tokens": (with_names_for_reserved_tokens(), FAST | ROLES, "llama"),
    "the same and the decoder": (
        with_names_for_reserved_tokens(), {**FAST, **ROLES, "added_tokens_decoder": {**ENDS, **MARKS}}, "gemma2",
    ),
    "the same in Llama's way": (
        with_names_for_reserved_tokens(), {**LLAMA, **ROLES, "added_tokens_decoder": {**ENDS, **MARKS}}, "llama",
    ),
    "the same of Mistral": (with_names_for_reserved_tokens(), LLAMA | ROLES, "mistral"),
    "another piece": (with_another_piece(), FAST | ROLES, "llama"),
    "a normalisation": (NFKC, FAST | ROLES, "llama"),
    "a normalisation, of Mistral": (NFKC, LLAMA | ROLES, "mistral"),
    "a space before the first text alone": (metaspace("first"), FAST | ROLES, "llama"),
    "the same in Mistral's way": (metaspace("first"), LLAMA | ROLES, "mistral"),
    "the same, legacy": (metaspace("first"), {**LLAMA, **ROLES, "legacy": True}, "mistral"),
    "no space before a text": (UNPREFIXED, FAST | ROLES, "llama"),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE_MODEL)
def test_a_json_that_says_otherwise_counts_before_the_model(name: str, tmp_path: Path) -> None:
    spec, config, model_type = BESIDE_MODEL[name]
    (tmp_path / "tokenizer.model").write_bytes(SENTENCEPIECE.proto)
    write(tmp_path, config, {"tokenizer": spec}, model_type)
    ours = check(tmp_path, SPACED)
    assert not isinstance(ours.codec, SentencePieceCodec)


@pytest.mark.parametrize("spec", [CONVERTED, metaspace("always"), metaspace("first")], ids=["", "always", "first"])
def test_a_json_that_says_the_same_leaves_the_model_to_be_read(spec: dict[str, Any], tmp_path: Path) -> None:
    """So that a GGUF file gets its pieces and their scores. In Llama's way the settings say where a space goes."""
    (tmp_path / "tokenizer.model").write_bytes(SENTENCEPIECE.proto)
    write(tmp_path, LLAMA | ROLES, {"tokenizer": spec})
    ours = check(tmp_path, leading_space=False)
    assert isinstance(ours.codec, SentencePieceCodec)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_model_alone_without_a_space_before_its_texts(legacy: bool, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(SENTENCEPIECE.proto)
    write(tmp_path, {**LLAMA, **ROLES, "add_prefix_space": False, "legacy": legacy}, {})
    check(tmp_path)


@pytest.mark.parametrize("add_bos", [True, False, None])
@pytest.mark.parametrize("json_begins", [True, False, None])
def test_which_file_says_that_texts_begin_with_bos(
    json_begins: bool | None, add_bos: bool | None, tmp_path: Path
) -> None:
    """A tokenizer.json before the settings; and what is saved begins texts for transformers as it does here."""
    (tmp_path / "tokenizer.model").write_bytes(SENTENCEPIECE.proto)
    begins = processors.TemplateProcessing("<s>:0 $A:0", special_tokens=[("<s>", 1)])
    post = json.loads(begins.__getstate__()) if json_begins else None
    files = {} if json_begins is None else {"tokenizer": changed(post_processor=post)}
    write(tmp_path, {**LLAMA, **ROLES} | ({} if add_bos is None else {"add_bos_token": add_bos}), files)
    ours = Tokenizer.load(tmp_path)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)("the cat").input_ids
    old = add_bos is None if json_begins is None else add_bos and not json_begins
    if old:  # transformers 4 began a text with it, and so do the models
        assert ours.adds_bos
    else:
        assert ids == ours.encode("the cat", bos=ours.adds_bos)
    ours.save(tmp_path / "copy")
    again = Tokenizer.load(tmp_path / "copy")
    assert (again.adds_bos, again.begins_texts) == (ours.adds_bos, ours.begins_texts)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")("the cat").input_ids
    assert ids == again.encode("the cat", bos=again.adds_bos)


@pytest.mark.parametrize("in_config", [True, False, None])
@pytest.mark.parametrize("in_json", [True, False])
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast"])
def test_a_space_before_texts_of_bytes(name: str, in_json: bool, in_config: bool | None, tmp_path: Path) -> None:
    """GPT-2's class goes by the settings, others by the file."""
    byte_level(tmp_path)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=in_json)
    library.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, {"tokenizer_class": name} | ({} if in_config is None else {"add_prefix_space": in_config}), {})
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    for text in ("the cat", " the cat", "the\ncat", "12 cats"):
        assert ours.encode(text) == theirs(text).input_ids
    ours.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").encode("the cat") == ours.encode("the cat")


def replace(old: str, new: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def strip(start: int, stop: int = 0) -> dict[str, Any]:
    return {"type": "Strip", "content": " ", "start": start, "stop": stop}


BYTES, FUSE, SPACES = {"type": "ByteFallback"}, {"type": "Fuse"}, replace("▁", " ")
DECODERS = {
    "usual": [SPACES, BYTES, FUSE, strip(1)],
    "a pattern": [replace("▁", " ", "Regex"), BYTES, FUSE, strip(1)],
    "a piece shown otherwise": [replace("cat", "CAT"), SPACES, BYTES, FUSE, strip(1)],
    "the same, later": [SPACES, replace("cat", "CAT"), BYTES, FUSE, strip(1)],
    "nested": [{"type": "Sequence", "decoders": [SPACES, BYTES]}, {"type": "Sequence", "decoders": [FUSE, strip(1)]}],
    "no space taken away": [SPACES, BYTES, FUSE],
}


@pytest.mark.parametrize("name", DECODERS)
def test_text_is_that_of_the_decoder(name: str, tmp_path: Path) -> None:
    write(tmp_path, FAST | ROLES, {"tokenizer": changed(decoder={"type": "Sequence", "decoders": DECODERS[name]})})
    check(tmp_path)


@pytest.mark.parametrize(
    "steps",
    [
        [SPACES, BYTES, FUSE, replace("he cat", "HE CAT"), strip(1)],  # in a text, not in a token
        [SPACES, BYTES, FUSE, strip(2)],
        [SPACES, BYTES, FUSE, strip(0, 1)],
        [SPACES, {"type": "WordPiece", "prefix": "##", "cleanup": True}],
        [replace("[a-c]", "x", "Regex"), SPACES, BYTES, FUSE],
    ],
)
def test_a_decoder_that_does_more_is_refused_by_its_steps(steps: list[dict[str, Any]], tmp_path: Path) -> None:
    write(tmp_path, FAST, {"tokenizer": changed(decoder={"type": "Sequence", "decoders": steps})})
    named = ", ".join(step["type"] for step in steps)
    with pytest.raises(ValueError, match=rf"tokenizer\.json .*its decoder is {named}; only byte-level tokens"):
        Tokenizer.load(tmp_path)


def test_a_decoder_of_bytes_that_does_more_is_refused(tmp_path: Path) -> None:
    byte_level(tmp_path)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    library.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).decode(Tokenizer.load(tmp_path).encode("the cat")) == "the cat"
    library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("the", "a")])
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="its decoder is ByteLevel, Replace; only"):
        Tokenizer.load(tmp_path)


def test_templates_by_their_names_in_an_object(tmp_path: Path) -> None:
    byte_level(tmp_path)
    templates = {"default": TEMPLATE, "short": "{{ messages[0].content }}"}
    write(tmp_path, {**FAST, "chat_template": templates}, {})
    ours, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for name in templates:
        text = theirs.apply_chat_template(TALK, tokenize=False, chat_template=ours.chat_templates[name])
        assert theirs.apply_chat_template(TALK, tokenize=False, chat_template=name) == text


@pytest.mark.parametrize("value", [["</s>", "<s>"], 2, {"special": True}])
def test_a_role_that_is_no_token_is_named(value: Any, tmp_path: Path) -> None:
    byte_level(tmp_path)
    write(tmp_path, {**FAST, "eos_token": value}, {})
    with pytest.raises(ValueError, match=r"eos_token in tokenizer_config\.json must be a text, or an object with its"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "decoder", "post_processor", "model"])
def test_a_part_of_tomorrow_is_named(part: str, tmp_path: Path) -> None:
    """The library speaks of an untagged enum."""
    kind = CONVERTED["model"] if part == "model" else {}
    write(tmp_path, FAST, {"tokenizer": changed(**{part: {**kind, "type": "OfTomorrow"}})})
    with pytest.raises(ValueError, match=rf"tokenizers [0-9.]+ knows no {part} of this form; a newer version may"):
        Tokenizer.load(tmp_path)


def test_a_form_that_is_not_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match=r"holds neither a tokenizer\.json .*; Mistral's tekken\.json is not read"
    ):
        Tokenizer.load(tmp_path)
