"""Text to ids and back for a SentencePiece `tokenizer.model`, through the `sentencepiece` library, with its ids.

What SentencePiece itself does, and this passes on: control symbols and byte pieces never come out of text, whatever
it spells; user-defined symbols, where a model has any, always do. A space and `▁` (U+2581) are one and the same to
it, so a literal `▁` decodes to a space. With the usual dummy prefix a text is encoded with a space put before it,
which decoding takes away again (`strips_leading_space`).
"""

import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import processors

from llamita.text import sentencepiece_json

SPACE_MARK = "▁"


class SentencePieceCodec:
    """A SentencePiece model: same attributes as HuggingFaceCodec.

    `prefix` says which texts between special tokens get the dummy prefix: always, or the first if the text begins with
    it. `encode` is for texts without special tokens, and the same for both. `marks` are user-defined symbols that
    control a model; decoding shows them.
    """

    def __init__(self, proto: bytes, prefix: str = "always", marks: frozenset[str] = frozenset()) -> None:
        self.proto, self.prefix, self.marks = proto, prefix, marks
        self._processor = processor = _processor(proto)
        self.vocab_size = processor.get_piece_size()
        if self.vocab_size == 0:
            raise ValueError("it holds no pieces")
        self.special_tokens: dict[str, int] = {}
        self.bytes_of_id = [b""] * self.vocab_size
        for token_id in range(self.vocab_size):
            piece = processor.id_to_piece(token_id)
            if processor.IsControl(token_id) or processor.IsUnknown(token_id):
                self.special_tokens[piece] = token_id
            elif processor.IsByte(token_id):
                self.bytes_of_id[token_id] = bytes([int(piece[3:5], 16)])
            else:
                self.bytes_of_id[token_id] = piece.replace(SPACE_MARK, " ").encode()
        self.bos_id, self.eos_id = _known(processor.bos_id()), _known(processor.eos_id())
        self.unk_id, self.pad_id = _known(processor.unk_id()), _known(processor.pad_id())
        model = sentencepiece_json.parse(proto)
        self.strips_leading_space = model.adds_dummy_prefix
        self._user_defined = frozenset(
            text for text, _, kind in model.pieces if kind == sentencepiece_json.USER_DEFINED
        )
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.special_tokens |= {mark: processor.piece_to_id(mark) for mark in sorted(marks)}

    @classmethod
    def from_file(cls, path: Path) -> "SentencePieceCodec":
        """Read a tokenizer.model; ValueError names the file and the fault."""
        proto = path.read_bytes()
        try:
            return cls(proto)
        except Exception as fault:  # the library raises RuntimeErrors with a C++ place in them
            reason = " ".join(str(fault).split())
            raise ValueError(f"{path} is not a SentencePiece model: {reason}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePieceCodec, (self.proto, self.prefix, self.marks)

    def with_prefix(self, prefix: str) -> "SentencePieceCodec":
        """This codec with another `prefix`, or never one."""
        if prefix == "never":
            if not self.strips_leading_space:
                return self
            return SentencePieceCodec(sentencepiece_json.without_dummy_prefix(self.proto), "always", self.marks)
        return SentencePieceCodec(self.proto, prefix, self.marks)

    def with_marks(self, names: Iterable[str]) -> "SentencePieceCodec":
        """This codec, or one in which those user-defined symbols are `marks`."""
        marks = self.marks | self._user_defined.intersection(names)
        return self if marks == self.marks else SentencePieceCodec(self.proto, self.prefix, marks)

    @property
    def added(self) -> tuple[str, ...]:
        """The user-defined symbols, which come out of any text that spells them."""
        return tuple(sorted(self._user_defined))

    def knows(self, token: tokenizers.AddedToken) -> bool:
        """Whether a token's text is a piece of any kind."""
        token_id = self._processor.piece_to_id(token.content)
        return self._processor.id_to_piece(token_id) == token.content

    def has(self, token: tokenizers.AddedToken) -> bool:
        """Whether a token is a piece that is found in texts, or kept out of them, as the token says."""
        is_plain = not (token.lstrip or token.rstrip or token.single_word)
        return is_plain and self.knows(token) and token.content in (self.special_tokens.keys() | self._user_defined)

    def encode(self, text: str) -> list[int]:
        return self._plain.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._plain.encode(text) for text in texts]

    def encode_with_special(self, text: str) -> list[int]:
        """Each stretch between special tokens is encoded as a text of its own, with the dummy prefix that it gets."""
        ids: list[int] = []
        for place, part in enumerate(self._special.split(text)):
            if place % 2:  # what splits
                ids.append(self.special_tokens[part])
            else:
                ids.extend(self._processor_at(place).encode(part))
        return ids

    def encode_with_offsets(self, text: str, allow_special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the characters that each stands for: [start, end) in the text as it was given."""
        if not allow_special:
            return _with_places(self._plain, text)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        position = 0
        for place, part in enumerate(self._special.split(text)):
            if place % 2:
                ids.append(self.special_tokens[part])
                offsets.append((position, position + len(part)))
            else:
                inner, places = _with_places(self._processor_at(place), part)
                ids += inner
                offsets += [(position + start, position + end) for start, end in places]
            position += len(part)
        return ids, offsets

    def _processor_at(self, place: int) -> sentencepiece.SentencePieceProcessor:
        return self._processor if place == 0 or self.prefix == "always" else self._without_prefix

    def spelled(self, name: str) -> bytes:
        """The bytes of a special token."""
        return name.encode()

    @functools.cached_property
    def _without_prefix(self) -> sentencepiece.SentencePieceProcessor:
        return _processor(sentencepiece_json.without_dummy_prefix(self.proto))

    @functools.cached_property
    def _plain(self) -> sentencepiece.SentencePieceProcessor:
        """To SentencePiece, marks are pieces that no text becomes."""
        return _processor(sentencepiece_json.with_unused(self.proto, self.marks)) if self.marks else self._processor

    def fingerprint(self) -> str:
        return hashlib.sha256(self.proto).hexdigest()

    def converted(self) -> tokenizers.Tokenizer | None:
        """The same tokenizer in the form of a tokenizer.json, where that can hold it."""
        found = sentencepiece_json.convert(sentencepiece_json.parse(self.proto))
        return found if found is not None and sentencepiece_json.agree_on_spaces(found, self._processor) else None

    def write(self, directory: Path, begin: int | None = None) -> None:
        """Write tokenizer.model, and the same tokenizer as tokenizer.json where that form can hold it.

        `begin` is the token that other programs are to put before a text.
        """
        (directory / "tokenizer.model").write_bytes(self.proto)
        converted = self.converted()
        if converted is not None:
            if self.prefix == "first":
                sentencepiece_json.prefix_texts(converted, self.prefix)
            if begin is not None:
                name = self._processor.id_to_piece(begin)
                converted.post_processor = processors.TemplateProcessing(
                    f"{name}:0 $A:0", special_tokens=[(name, begin)]
                )
            converted.save(str(directory / "tokenizer.json"), pretty=True)


def _processor(proto: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto)
    return processor


def _with_places(processor: sentencepiece.SentencePieceProcessor, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    encode: Any = processor.encode
    if hasattr(processor, "encode_as_offset_mapping"):
        found = encode(text, out_type="offset_mapping")
        return found["ids"], found["offsets"]
    pieces = encode(text, out_type="immutable_proto").pieces  # before sentencepiece 0.2.2
    return [piece.id for piece in pieces], [(piece.begin, piece.end) for piece in pieces]


def _known(token_id: int) -> int | None:
    return None if token_id < 0 else token_id
