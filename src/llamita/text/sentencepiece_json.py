"""A SentencePiece BPE model as a `tokenizers.Tokenizer`, so that other libraries open what is saved here; and back.

Reads the few fields of the model's protocol buffer that decide ids, and nothing else of it
(https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto).

Why the ids are equal. SentencePiece merges any two neighbours whose concatenation is a piece, best score first,
leftmost among equals; `tokenizers` merges listed pairs, first in the list first. All pairs that make a piece are
listed here, best piece first, so the same pairs may merge in both, and both rank them alike unless two ways to make
one and the same piece compete. They never do: as long as both have chosen alike, two neighbours that would make a
piece are a state that the piece alone would pass through (no merge has crossed the outer edges), and it passes
through one state of two parts only. This needs scores that differ between pieces, and no user-defined or unused
pieces: `convert` gives None otherwise.

One tie is let through, since Llama 2 has it: runs of spaces with one score that is below all others. They merge when
nothing else can, and where no other piece holds two spaces, how a run merges depends on its length alone; there
`agree_on_spaces` compares the two libraries length by length.
"""

import collections
import itertools
import json
import re
import struct
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece.Type
BPE = 2  # TrainerSpec.ModelType
SPACE_MARK = "▁"
DOUBLE_MARK = normalizers.Replace(tokenizers.Regex(rf"\A{SPACE_MARK}"), SPACE_MARK * 2)
"""Keeps the first space of a text apart from the one that `Metaspace` puts before texts that have none."""


SPLIT_AT_SPACES = {
    "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
}  # fmt: skip
"""Gemma's: where a text's spaces have become marks, it splits nothing."""


@dataclass(frozen=True)
class SentencePieceModel:
    """A SentencePiece model as far as it decides ids: pieces as (text, score, type) in the order of their ids."""

    pieces: tuple[tuple[str, float, int], ...]
    model_type: int = 1
    byte_fallback: bool = False
    whitespace_as_suffix: bool = False
    normalizes: bool = False
    adds_dummy_prefix: bool = True
    removes_extra_spaces: bool = True
    escapes_spaces: bool = True


def parse(proto: bytes) -> SentencePieceModel:
    """Read a serialized ModelProto; absent fields have the defaults of its definition."""
    pieces = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(proto):
        if number == 1:
            piece = dict(_fields(_message(value)))
            score = struct.unpack("<f", _message(piece.get(2, bytes(4))))[0]
            pieces.append((_message(piece[1]).decode(), score, int(piece.get(3, NORMAL))))
        elif number == 2:
            trainer = dict(_fields(_message(value)))
        elif number == 3:
            normalizer = dict(_fields(_message(value)))
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=int(trainer.get(3, 1)),
        byte_fallback=bool(trainer.get(35, 0)),
        whitespace_as_suffix=bool(trainer.get(24, 0)),
        normalizes=bool(normalizer.get(2, b"")),
        adds_dummy_prefix=bool(normalizer.get(3, 1)),
        removes_extra_spaces=bool(normalizer.get(4, 1)),
        escapes_spaces=bool(normalizer.get(5, 1)),
    )


def without_dummy_prefix(proto: bytes) -> bytes:
    """Returns the model that puts no space before a text."""
    fields = [(number, _message(value)) for number, value in _fields(proto)]
    normalizer = b"".join(value for number, value in fields if number == 3)
    # Of a field that stands twice, the last counts.
    return b"".join(_field(*field) for field in fields if field[0] != 3) + _field(3, normalizer + _field(3, 0))


def with_unused(proto: bytes, names: Container[str]) -> bytes:
    """Returns the model in which no text becomes those pieces."""
    result = []
    for number, value in _fields(proto):
        message = _message(value)
        if number == 1 and _message(dict(_fields(message))[1]).decode() in names:
            message += _field(3, UNUSED)
        result.append(_field(number, message))
    return b"".join(result)


def serialize(model: SentencePieceModel, ids: Mapping[str, int]) -> bytes:
    """The inverse of `parse`: a ModelProto; `ids` are those of unk, bos, eos and pad, -1 for none."""
    trainer = [
        (3, model.model_type),
        (4, len(model.pieces)),
        (24, model.whitespace_as_suffix),
        (35, model.byte_fallback),
    ]
    trainer += [(number, ids.get(role, -1)) for number, role in ((40, "unk"), (41, "bos"), (42, "eos"), (43, "pad"))]
    normalizer = [(3, model.adds_dummy_prefix), (4, model.removes_extra_spaces), (5, model.escapes_spaces)]
    pieces = (
        _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _field(3, kind)
        for text, score, kind in model.pieces
    )
    return (
        b"".join(_field(1, piece) for piece in pieces)
        + _field(2, b"".join(_field(*field) for field in trainer))
        + _field(3, _field(1, b"identity") + b"".join(_field(*field) for field in normalizer))
    )


def convert(model: SentencePieceModel) -> tokenizers.Tokenizer | None:
    """The tokenizer with the same ids, or None where the proof does not hold or the text is normalised."""
    normal = {text: score for text, score, kind in model.pieces if kind == NORMAL}
    kinds = {kind for _, _, kind in model.pieces}
    if model.model_type != BPE or model.normalizes or model.removes_extra_spaces or not model.escapes_spaces:
        return None
    if kinds & {USER_DEFINED, UNUSED} or model.whitespace_as_suffix:
        return None
    longer = sorted((text for text in normal if len(text) > 1), key=lambda text: -normal[text])
    if not _ties_are_harmless(longer, normal):
        return None
    merges = [pair for text in longer for pair in _pairs(text, normal)]
    unknown = next(text for text, _, kind in model.pieces if kind == UNKNOWN)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={text: token_id for token_id, (text, _, _) in enumerate(model.pieces)},
            merges=merges,
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    )
    steps = [normalizers.Prepend(SPACE_MARK)] if model.adds_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE_MARK)])
    ends = [decoders.Strip(" ", 1, 0)] if model.adds_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    special = [text for text, _, kind in model.pieces if kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in special])
    return tokenizer


def convert_loosely(proto: bytes, for_llama: bool, prefix: str) -> tokenizers.Tokenizer | None:
    """The tokenizer that transformers makes of a BPE model, of those too that `convert` has no proof for.

    Its LlamaTokenizer (`for_llama`) leaves a model's normalisation out; `prefix` is that of `prefix_texts`. None for
    models of another kind.
    """
    model = parse(proto)
    if model.model_type != BPE or model.whitespace_as_suffix:
        return None
    normal = {text: score for text, score, kind in model.pieces if kind == NORMAL}
    symbols = [text for text, _, kind in model.pieces if kind == USER_DEFINED]
    places = {text: place for place, (text, _, _) in enumerate(model.pieces)}
    longer = sorted((text for text in normal if len(text) > 1), key=lambda text: (-normal[text], places[text]))
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab=places,
            merges=[pair for text in longer for pair in _pairs(text, normal)],
            unk_token=next(text for text, _, kind in model.pieces if kind == UNKNOWN),
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
            ignore_merges=bool(symbols) and not for_llama,
        )
    )
    prefix_texts(tokenizer, prefix if for_llama or model.adds_dummy_prefix else "never")
    if not for_llama:
        steps: list[normalizers.Normalizer] = []
        if charsmap := _charsmap(proto):
            steps.append(normalizers.Precompiled(charsmap))
        if model.removes_extra_spaces:
            steps += [normalizers.Replace(tokenizers.Regex(r"\A +| +\z"), "")]
            steps += [normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
        if model.escapes_spaces:
            steps.append(normalizers.Replace(" ", SPACE_MARK))
        if model.adds_dummy_prefix and prefix == "always":
            steps.append(DOUBLE_MARK)
        tokenizer.normalizer = normalizers.Sequence(steps)
        splits = [tokenizer.pre_tokenizer] if model.adds_dummy_prefix else []
        if symbols:
            pattern = "|".join(re.escape(text) for text in sorted(symbols, key=len, reverse=True))
            splits.append(pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    special = [text for text, _, kind in model.pieces if kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in special])
    if for_llama:
        tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in symbols])
    return tokenizer


def agrees(spec: Mapping[str, Any], model: SentencePieceModel, prefix: str | None) -> bool:
    """Whether a tokenizer.json gives the ids of a SentencePiece model, as far as its settings tell.

    It does where it has the same pieces under the same ids, finds no other tokens in texts than the model does, and
    changes or splits no text that the model leaves as it is. `prefix` says which texts get the dummy prefix by the
    model (that of `prefix_texts`); None where other files say so for both.
    """
    listed = (spec.get("model") or {}).get("vocab") or {}
    vocabulary = listed if isinstance(listed, dict) else {piece: number for number, (piece, _) in enumerate(listed)}
    added = {token["content"]: token for token in spec.get("added_tokens") or []}
    ids = {text: number for number, (text, _, _) in enumerate(model.pieces)}
    if {**vocabulary, **{name: token["id"] for name, token in added.items()}} != ids:
        return False
    ordinary = {text for text, _, kind in model.pieces if kind not in (UNKNOWN, CONTROL, USER_DEFINED)}
    if ordinary & added.keys() or any(token.get("lstrip") or token.get("rstrip") for token in added.values()):
        return False
    scheme = _scheme(spec, changes_text=model.normalizes or model.removes_extra_spaces)
    return scheme is not None and prefix in (None, scheme)


def begins_texts(spec: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json puts a special token before a text."""
    for step in _steps(spec.get("post_processor"), "processors"):
        if step.get("type") == "TemplateProcessing":
            return "SpecialToken" in next(iter(step.get("single") or []), {})
    return False


def _scheme(spec: Mapping[str, Any], changes_text: bool) -> str | None:
    """Which texts get a space before them, by the settings of a tokenizer.json; None where it does more with a text.

    `changes_text`: a normalisation is no more.
    """
    scheme = "never"
    for step in _steps(spec.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend":
            scheme = "always"
        elif not changes_text and step not in _marks_of_spaces():
            return None
    for step in _steps(spec.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
        elif step != SPLIT_AT_SPACES:
            return None
    return scheme


def revert(spec: Mapping[str, Any]) -> SentencePieceModel:
    """The inverse of both, from a tokenizer's JSON: added tokens are control tokens, or symbols of the user's.

    The pieces' scores are no longer known; any that fall in the order of the merges give the same ids. ValueError names
    what llama.cpp does otherwise: it looks for added tokens first, the longest first, and puts the dummy prefix before
    each text between them.
    """
    model, listed = spec["model"], {token["content"]: token for token in spec["added_tokens"]}
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    bytes_ = {f"<0x{byte:02X}>" for byte in range(256)}
    if not model.get("byte_fallback") or model.get("ignore_merges") or not bytes_ <= model["vocab"].keys():
        raise ValueError("its characters outside the vocabulary are not spelled by pieces of one byte")
    made = {"".join(pair) for pair in merges}
    # Marks of spaces, as Gemma lists them, are in no text as it is given: they are pieces like others.
    listed = {name: token for name, token in listed.items() if name.strip(SPACE_MARK) or name not in made}
    _check_added(listed, is_normalized=bool(spec["normalizer"]))
    others = {name for name, token in listed.items() if token["special"] or SPACE_MARK in name}
    symbols = listed.keys() - others  # found before any piece is
    merges = [pair for pair in merges if symbols.isdisjoint((*pair, "".join(pair)))]
    made -= symbols
    if both := next((name for name in others if name in made or (len(name) == 1 and name in model["vocab"])), None):
        raise ValueError(f"its token {both!r} is a piece of ordinary text as well")
    names = model["vocab"].keys() - bytes_ - listed.keys()
    ranks: dict[str, int] = {}
    for text, pairs in itertools.groupby(merges, "".join):
        if text in ranks or set(pairs) != set(_pairs(text, names)):
            raise ValueError(f"its merges that make {text!r} are not all those that pieces allow, one after another")
        ranks[text] = len(ranks)
    for text in names - made:
        if next(_pairs(text, names), None) or not names.issuperset(text):
            raise ValueError(f"no merge makes its piece {text!r}")
    kinds = {name: CONTROL if token["special"] else USER_DEFINED for name, token in listed.items()}
    kinds |= dict.fromkeys(bytes_, BYTE)
    kinds[model.get("unk_token")] = UNKNOWN
    ids = model["vocab"] | {name: token["id"] for name, token in listed.items()}
    pieces = [(f"[PAD{number}]", 0.0, UNUSED) for number in range(max(ids.values()) + 1)]
    for name, number in ids.items():
        pieces[number] = (name, float(-ranks.get(name, 0)), kinds.get(name, NORMAL))
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=BPE,
        byte_fallback=True,
        adds_dummy_prefix=_prefixes_texts(spec),
        removes_extra_spaces=False,
    )


def _check_added(tokens: Mapping[str, Mapping[str, Any]], is_normalized: bool) -> None:
    """Refuses added tokens that a search for the longest first, in a text as it is given, would find elsewhere."""
    flags = ("lstrip", "rstrip", "single_word", *(["normalized"] if is_normalized else []))
    for name, token in tokens.items():
        if flag := next((flag for flag in flags if token[flag]), None):
            raise ValueError(f"{name!r} is a token with the flag {flag}")
    starts = collections.defaultdict(set)
    for name in tokens:
        for cut in range(1, len(name)):
            starts[name[:cut]].add(name)
    for name in tokens:
        for cut in range(1, len(name)):
            within = starts[name[cut:]] - {name}
            if len(set(name)) == 1:  # runs of a character fall into the same parts either way
                within = {other for other in within if set(other) != set(name)}
            if other := next(iter(within), None):
                raise ValueError(f"of its tokens {name!r} and {other!r}, one may begin within the other")
    late = {name for name, token in tokens.items() if token["normalized"]}  # looked for where no other was found
    for name in tokens.keys() - late:
        if other := next((other for other in late if name in other), None):
            raise ValueError(f"its token {name!r} is looked for before {other!r}, which holds it")


def _prefixes_texts(spec: Mapping[str, Any]) -> bool:
    """Whether a space is put before each text between added tokens; ValueError where it is before some alone."""

    def form(steps: list[normalizers.Normalizer], *schemes: str) -> list[list[Any]]:
        return [[json.loads(step.__getstate__()) for step in part] for part in (steps, map(_metaspace, schemes))]

    first, marks = normalizers.Prepend(SPACE_MARK), normalizers.Replace(" ", SPACE_MARK)
    given = [_steps(spec["normalizer"], "normalizers"), _steps(spec["pre_tokenizer"], "pretokenizers")]
    if given[0] and given[1] == [SPLIT_AT_SPACES]:
        given[1] = []
    if given in (form([first, marks]), form([], "always"), form([marks, DOUBLE_MARK], "always")):
        return True
    if given in (form([marks]), form([], "never")):
        return False
    if given in (form([], "first"), form([marks], "first")):
        raise ValueError(
            "it puts a space before the first text alone, and not before each that follows a special token; "
            '"legacy": true in tokenizer_config.json makes it do so'
        )
    raise ValueError("it changes or splits a text before it looks for pieces")


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Any]:
    """The steps of a part of a tokenizer's JSON, in their order."""
    if part is None:
        return []
    return [step for inner in part[key] for step in _steps(inner, key)] if key in part else [part]


def _marks_of_spaces() -> list[dict[str, Any]]:
    """The steps of a normalisation that write a text's spaces as marks."""
    return [json.loads(step.__getstate__()) for step in (normalizers.Replace(" ", SPACE_MARK), DOUBLE_MARK)]


def _metaspace(scheme: str) -> pre_tokenizers.Metaspace:
    return pre_tokenizers.Metaspace(SPACE_MARK, prepend_scheme=scheme, split=False)


def _charsmap(proto: bytes) -> bytes:
    """The rules of normalisation, compiled by SentencePiece; empty where there are none."""
    normalizer = next((value for number, value in _fields(proto) if number == 3), b"")
    return _message(dict(_fields(_message(normalizer))).get(2, b""))


def prefix_texts(tokenizer: tokenizers.Tokenizer, scheme: str) -> None:
    """Makes the tokenizer put a space before a text as transformers' LlamaTokenizer does, by `scheme`.

    always: before each text between added tokens; first: before one that nothing precedes; never.
    """
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = _metaspace(scheme)
    strip = [decoders.Strip(" ", 1, 0)] if scheme != "never" else []
    steps = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)


def agree_on_spaces(converted: tokenizers.Tokenizer, processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether both give the same ids for runs of 1 to 200 spaces between words and around them."""
    texts = [text for length in range(200) for text in ("a" + " " * length + "a", " " * length)]
    finds = converted.encode_special_tokens
    converted.encode_special_tokens = True  # as text: some may be spaces themselves
    found = converted.encode_batch(texts, add_special_tokens=False)
    converted.encode_special_tokens = finds
    return all(encoding.ids == ids for encoding, ids in zip(found, processor.encode(texts), strict=True))


def _pairs(text: str, names: Container[str]) -> Iterator[tuple[str, str]]:
    """The ways to make a piece of two."""
    cuts = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
    return (pair for pair in cuts if pair[0] in names and pair[1] in names)


def _ties_are_harmless(longer: list[str], scores: dict[str, float]) -> bool:
    counts = collections.Counter(scores[text] for text in longer)
    tied = {text for text in longer if counts[scores[text]] > 1}
    if not tied:
        return True
    spaces_only = all(not text.strip(SPACE_MARK) for text in tied)
    lowest = {scores[text] for text in tied} == {scores[longer[-1]]}
    return spaces_only and lowest and not any(SPACE_MARK * 2 in text for text in longer if text not in tied)


def _field(number: int, value: int | bytes) -> bytes:
    """A field of a protocol buffer message: bytes with their length, or a varint (negative ones in 64 bits)."""
    if isinstance(value, bytes):
        return _as_varint(number << 3 | 2) + _as_varint(len(value)) + value
    return _as_varint(number << 3) + _as_varint(value % 2**64)


def _as_varint(number: int) -> bytes:
    result = bytearray()
    while number >= 0x80:
        result.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*result, number])


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protocol buffer message: an int for a varint, bytes for all else."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        wire_type = key & 7
        if wire_type == 0:
            number, position = _varint(message, position)
            yield key >> 3, number
            continue
        if wire_type == 2:
            size, position = _varint(message, position)
        elif wire_type in (1, 5):
            size = {1: 8, 5: 4}[wire_type]
        else:
            raise ValueError(f"field {key >> 3} has the unknown wire type {wire_type}")
        if position + size > len(message):
            raise ValueError("the file ends in the middle of a field")
        yield key >> 3, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        if position >= len(message):
            raise ValueError("the file ends in the middle of a number")
        byte = message[position]
        position += 1
        result |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return result, position


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number stands where a message was expected")
    return value
