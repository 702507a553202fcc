"""The tokenizer inside a GGUF file: SentencePiece pieces, or a byte-level BPE with the name of its way to split words.

Knows the keys of the file and nothing of tensors.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import tokenizers
from tokenizers import AddedToken, decoders, models, processors

from llamita.model.config import ModelConfig
from llamita.storage.gguf import END_TOKENS
from llamita.storage.gguf_header import read_header
from llamita.text import sentencepiece_json, word_splitters
from llamita.text.huggingface_codec import HuggingFaceCodec
from llamita.text.sentencepiece_codec import SentencePieceCodec
from llamita.text.sentencepiece_json import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    SPACE_MARK,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
)
from llamita.text.word_splitters import SPLITTERS

if TYPE_CHECKING:
    from llamita.text.tokenizer import Tokenizer

KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # our roles, and their names in a file
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
DEFAULTS = {"llama": {"bos": 1, "eos": 2, "unk": 0}}
"""The tokens of the roles where the settings of a kind of tokenizer do not say."""


def write(writer: gguf.GGUFWriter, tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Adds the tokenizer's settings; the tokens are as many as the model's embeddings. ValueError where llama.cpp has
    no such tokenizer."""
    codec = tokenizer.codec
    if isinstance(codec, SentencePieceCodec):
        _write_sentencepiece(writer, sentencepiece_json.parse(codec.proto), config.vocab_size)
    elif codec.marks_spaces:
        _write_sentencepiece(writer, _as_sentencepiece(codec), config.vocab_size)
    else:
        _write_byte_level(writer, codec, config.vocab_size)
    for role, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        token_id = getattr(tokenizer, f"{role}_id")
        if token_id is not None:
            add(token_id)
    writer.add_add_bos_token(tokenizer.begins_texts)
    writer.add_add_eos_token(False)
    known = {tokenizer.eos_id, *(codec.special_tokens.get(name) for name in END_TOKENS)}
    further = [token_id for token_id in config.eos_token_ids if token_id not in known]
    for token_id, add in zip(further, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(token_id)  # there is room for two
    templates = [{"name": name, "template": source} for name, source in tokenizer.chat_templates.items()]
    if templates:
        writer.add_chat_template(templates)


def has_tokenizer(path: Path) -> bool:
    """Returns whether a GGUF file holds a tokenizer."""
    return read_header(path).metadata.get("tokenizer.ggml.model") not in (None, "none", "no_vocab")


def read(path: Path) -> tuple[HuggingFaceCodec | SentencePieceCodec, dict[str, Any], dict[str, int | None]]:
    """Returns the codec of a file's tokenizer, what would be its tokenizer_config.json, and the token of each role.

    ValueError, naming the file, where it has none, or one of a kind that is not read.
    """
    metadata = read_header(path).metadata
    kind = metadata.get("tokenizer.ggml.model")
    try:
        if kind in (None, "none", "no_vocab"):
            raise ValueError("the file holds no tokenizer; give one with --tokenizer")
        codec = _codec(metadata, kind)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    roles: dict[str, int | None] = {}
    for role, key in KEYS.items():
        found = metadata.get(f"tokenizer.ggml.{key}_token_id", DEFAULTS.get(kind, {}).get(role))
        roles[role] = found if isinstance(found, int) and 0 <= found < codec.vocab_size else None
    config: dict[str, Any] = {"clean_up_tokenization_spaces": False, "add_bos_token": _begins_texts(metadata, kind)}
    if templates := _chat_templates(metadata):
        config["chat_template"] = templates
    return codec, config, roles


def _codec(metadata: Mapping[str, Any], kind: str) -> HuggingFaceCodec | SentencePieceCodec:
    tokens = metadata.get("tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens or ())
    if not isinstance(tokens, list) or not isinstance(types, list) or len(types) != len(tokens):
        raise ValueError("tokenizer.ggml.tokens and tokenizer.ggml.token_type do not fit together")
    tokens = [text or f"[EMPTY_{number}]" for number, text in enumerate(tokens)]  # as llama.cpp names them
    try:
        if kind == "llama":
            return _read_sentencepiece(metadata, tokens, types)
        if kind == "gpt2":
            return _read_byte_level(metadata, tokens, types)
    except ValueError:
        raise
    except Exception as fault:  # the libraries raise bare exceptions
        raise ValueError(f"the tokenizer cannot be used: {' '.join(str(fault).split())}") from None
    raise ValueError(f"tokenizer.ggml.model={kind!r} is not supported; Llamita reads llama and gpt2")


def _begins_texts(metadata: Mapping[str, Any], kind: str) -> bool:
    """Returns whether llama.cpp puts the BOS token before a text."""
    splitter = SPLITTERS.get(metadata.get("tokenizer.ggml.pre", ""))
    usual = kind == "llama" or (splitter is not None and splitter.begins_texts)
    return bool(metadata.get("tokenizer.ggml.add_bos_token", usual))


def _chat_templates(metadata: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    """Returns the chat template, or several with their names."""
    default = metadata.get("tokenizer.chat_template")
    prefix = "tokenizer.chat_template."
    keys = [key for key in metadata if key.startswith(prefix)]
    named = [{"name": key.removeprefix(prefix), "template": metadata[key]} for key in keys]
    if not named:
        return default
    return [*([{"name": "default", "template": default}] if default else []), *named]


def _as_sentencepiece(codec: HuggingFaceCodec) -> SentencePieceModel:
    try:
        return sentencepiece_json.revert(codec.spec)
    except ValueError as error:
        raise ValueError(
            f"llama.cpp has SentencePiece's BPE with added tokens, and this tokenizer is another: {error}"
        ) from None


def _write_sentencepiece(writer: gguf.GGUFWriter, model: SentencePieceModel, size: int) -> None:
    if model.model_type != BPE:
        raise ValueError("llama.cpp has SentencePiece's BPE, and this tokenizer is of another kind of SentencePiece's")
    padding = [(f"[PAD{token_id}]", 0.0, UNUSED) for token_id in range(len(model.pieces), size)]
    pieces = [*model.pieces, *padding]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([_as_in_texts(text, kind) for text, _, kind in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([kind for _, _, kind in pieces])
    writer.add_add_space_prefix(model.adds_dummy_prefix)


def _write_byte_level(writer: gguf.GGUFWriter, codec: HuggingFaceCodec, size: int) -> None:
    splitter = word_splitters.name_of(codec.spec)
    if splitter is None or codec.spec["model"].get("type") != "BPE":
        raise ValueError("llama.cpp has no way to split words as this tokenizer does; leave the tokenizer out")
    names = {token_id: name for name, token_id in codec.vocabulary.items()}
    added = {token["id"]: token for token in codec.spec["added_tokens"]}
    texts, types = [], []
    for token_id in range(max(size, codec.vocab_size)):
        token = added.get(token_id)
        texts.append(names.get(token_id, f"[PAD{token_id}]"))
        known = CONTROL if token and token["special"] else USER_DEFINED if token else NORMAL
        types.append(known if token_id in names else UNUSED)
    merges = codec.spec["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])


def _read_sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int]
) -> HuggingFaceCodec | SentencePieceCodec:
    scores = metadata.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    if len(scores) != len(tokens):
        raise ValueError("tokenizer.ggml.scores and tokenizer.ggml.tokens do not fit together")
    if "tokenizer.ggml.token_type" not in metadata:
        types = [BYTE if BYTE_PIECE.fullmatch(text) else NORMAL for text in tokens]
    kinds = _with_one_unknown(types, metadata)
    texts = [_as_in_texts(text, kind) for text, kind in zip(tokens, kinds, strict=True)]
    model = SentencePieceModel(
        pieces=tuple(zip(texts, scores, kinds, strict=True)),
        model_type=BPE,
        byte_fallback=True,
        adds_dummy_prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
        removes_extra_spaces=False,
    )
    ids = {role: metadata.get(f"tokenizer.ggml.{key}_token_id", -1) for role, key in KEYS.items()}
    converted = _with_symbols_as_control_tokens(model) if USER_DEFINED in types else None
    if converted is None:  # SentencePiece finds a symbol with spaces by its marks
        pieces = tuple((text.replace(" ", SPACE_MARK), score, kind) for text, score, kind in model.pieces)
        return SentencePieceCodec(sentencepiece_json.serialize(dataclasses.replace(model, pieces=pieces), ids))
    symbols = [AddedToken(text, normalized=False) for text, _, kind in model.pieces if kind == USER_DEFINED]
    return HuggingFaceCodec(_beginning(converted, metadata, "llama", tokens)).with_added(symbols)


def _as_in_texts(piece: str, kind: int) -> str:
    """Returns a piece as a file has it: a symbol of the user's is looked for in texts before their spaces are marked.

    Files of before July 2024 have the marks in symbols too, and llama.cpp finds no such symbol in any text.
    """
    return piece.replace(SPACE_MARK, " ") if kind == USER_DEFINED else piece


def _with_one_unknown(types: list[int], metadata: Mapping[str, Any]) -> list[int]:
    """Returns the types with one unknown token, the first that a file has, else the one that it names by its role.

    Some files have that as a control token, or as an ordinary one.
    """
    known = types.index(UNKNOWN) if UNKNOWN in types else metadata.get("tokenizer.ggml.unknown_token_id", 0)
    if not isinstance(known, int) or not 0 <= known < len(types):
        raise ValueError("the file names no unknown token, which a SentencePiece tokenizer has")
    others = [CONTROL if kind == UNKNOWN else kind for kind in types]
    return [*others[:known], UNKNOWN, *others[known + 1 :]]


def _with_symbols_as_control_tokens(model: SentencePieceModel) -> tokenizers.Tokenizer | None:
    """Returns the tokenizer that looks for the user's symbols first, as for control tokens; None for a model that has
    no such form.

    So does llama.cpp, and puts the dummy prefix before the text that follows a symbol. SentencePiece does not.
    """
    size = max(number for number, (_, _, kind) in enumerate(model.pieces, 1) if kind != UNUSED)
    pieces = [(text, score, CONTROL if kind == USER_DEFINED else kind) for text, score, kind in model.pieces[:size]]
    unknown = next(number for number, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN)
    used = dataclasses.replace(model, pieces=tuple(pieces))
    return SentencePieceCodec(sentencepiece_json.serialize(used, {"unk": unknown})).converted()


def _read_byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> HuggingFaceCodec:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in SPLITTERS:
        raise ValueError(
            f"tokenizer.ggml.pre={name!r} is not supported; give the model's tokenizer.json with --tokenizer. Llamita "
            f"reads {', '.join(SPLITTERS)}"
        )
    splitter = SPLITTERS[name]
    merges = [_pair(text) for text in metadata.get("tokenizer.ggml.merges") or ()]
    made = {text for pair in merges for text in (*pair, "".join(pair))}  # to llama.cpp no less for being unused
    used = {
        text: number
        for number, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != UNUSED or text in made
    }
    special = {text for text, number in used.items() if types[number] in (CONTROL, UNKNOWN)}
    added = special | {text for text, number in used.items() if types[number] == USER_DEFINED}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=used, merges=merges, ignore_merges=splitter.whole_words))
    tokenizer.pre_tokenizer = splitter.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    if splitter.nfc:
        tokenizer.normalizer = splitter.normalizer()
    in_order = sorted(added, key=used.__getitem__)
    tokenizer.add_tokens([AddedToken(text, special=text in special, normalized=False) for text in in_order])
    return HuggingFaceCodec(_beginning(tokenizer, metadata, "gpt2", tokens))


def _beginning(
    tokenizer: tokenizers.Tokenizer, metadata: Mapping[str, Any], kind: str, tokens: list[str]
) -> tokenizers.Tokenizer:
    """Returns the tokenizer, which now begins texts as llama.cpp does."""
    bos = metadata.get("tokenizer.ggml.bos_token_id", DEFAULTS.get(kind, {}).get("bos"))
    if _begins_texts(metadata, kind) and isinstance(bos, int) and 0 <= bos < len(tokens):
        text = tokens[bos]
        tokenizer.post_processor = processors.TemplateProcessing(f"{text}:0 $A:0", special_tokens=[(text, bos)])
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    """Returns the two tokens of a merge; the first has a character at least, which may be the space between them."""
    place = merge.find(" ", 1)
    if place < 0:
        raise ValueError(f"tokenizer.ggml.merges holds {merge!r}, which is no pair")
    return merge[:place], merge[place + 1 :]
