"""Text to ids and back for a SentencePiece `tokenizer.model`, through the `sentencepiece` library, with its ids.

What SentencePiece itself does, and this passes on: control symbols and byte pieces never come out of text, whatever
it spells; user-defined symbols, where a model has any, always do. A space and `▁` (U+2581) are one and the same to
it, so a literal `▁` decodes to a space. With the usual dummy prefix a text is encoded with a space put before it,
which decoding takes away again (`strips_leading_space`).
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from llamita.text import sentencepiece_json

SPACE_MARK = "▁"


class SentencePieceCodec:
    """A SentencePiece model: same attributes as HuggingFaceCodec."""

    def __init__(self, proto: bytes) -> None:
        self.proto = proto
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(proto)
        processor = self._processor
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
        self.strips_leading_space = sentencepiece_json.parse(proto).adds_dummy_prefix
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

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
        return SentencePieceCodec, (self.proto,)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._processor.encode(text) for text in texts]

    def encode_with_special(self, text: str) -> list[int]:
        """Each stretch between special tokens is encoded as a text of its own, dummy prefix included."""
        ids: list[int] = []
        for part in self._special.split(text):
            if part in self.special_tokens:
                ids.append(self.special_tokens[part])
            else:
                ids.extend(self._processor.encode(part))
        return ids

    def encode_with_offsets(self, text: str, allow_special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the characters that each stands for: [start, end) in the text as it was given."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        position = 0
        for part in self._special.split(text) if allow_special else [text]:
            if allow_special and part in self.special_tokens:
                ids.append(self.special_tokens[part])
                offsets.append((position, position + len(part)))
            else:
                inner, places = self._with_places(part)
                ids += inner
                offsets += [(position + start, position + end) for start, end in places]
            position += len(part)
        return ids, offsets

    def _with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encode: Any = self._processor.encode
        if hasattr(self._processor, "encode_as_offset_mapping"):
            found = encode(text, out_type="offset_mapping")
            return found["ids"], found["offsets"]
        pieces = encode(text, out_type="immutable_proto").pieces  # before sentencepiece 0.2.2
        return [piece.id for piece in pieces], [(piece.begin, piece.end) for piece in pieces]

    def fingerprint(self) -> str:
        return hashlib.sha256(self.proto).hexdigest()

    def write(self, directory: Path) -> None:
        """Write tokenizer.model, and the same tokenizer as tokenizer.json where that form can hold it."""
        (directory / "tokenizer.model").write_bytes(self.proto)
        converted = sentencepiece_json.convert(sentencepiece_json.parse(self.proto))
        if converted is not None and sentencepiece_json.agree_on_spaces(converted, self._processor):
            converted.save(str(directory / "tokenizer.json"), pretty=True)


def _known(token_id: int) -> int | None:
    return None if token_id < 0 else token_id
