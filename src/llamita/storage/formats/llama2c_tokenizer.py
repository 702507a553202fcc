"""llama2.c's `tokenizer.bin`: the pieces of a SentencePiece BPE with their scores, spaces written as spaces.

A file says neither how many tokens there are nor of what kind they are: it ends with the last, and the first three are
`<unk>`, `<s>` and `</s>`.
"""

import math
import struct
from pathlib import Path

from llamita.text import sentencepiece_json
from llamita.text.sentencepiece_codec import SPACE_MARK, SentencePieceCodec
from llamita.text.sentencepiece_json import BPE, BYTE, CONTROL, NORMAL, UNKNOWN, SentencePieceModel
from llamita.text.tokenizer import Tokenizer

NAMES = {1: b"\n<s>\n", 2: b"\n</s>\n"}  # what llama2.c makes of <s> and </s>
LONGEST_PIECE = 1000


def read(path: Path) -> Tokenizer:
    """Read a tokenizer; ValueError, naming the file, where it is broken."""
    content = path.read_bytes()
    pieces: list[tuple[str, float, int]] = []
    position = 4
    while position < len(content):
        if position + 8 > len(content):
            raise ValueError(f"{path} is truncated: it ends inside token {len(pieces)}")
        score, length = struct.unpack_from("<fI", content, position)
        text = content[position + 8 : position + 8 + length]
        position += 8 + length
        if length > LONGEST_PIECE or len(text) < length or not math.isfinite(score):
            raise ValueError(f"{path} is no tokenizer of llama2.c's, or truncated: token {len(pieces)} is broken")
        try:
            pieces.append(_piece(len(pieces), text.decode("utf-8"), score))
        except UnicodeDecodeError:
            raise ValueError(f"{path} is no tokenizer of llama2.c's: token {len(pieces)} is no UTF-8") from None
    if len(pieces) < 4 or pieces[0][0] != "<unk>":
        raise ValueError(f"{path} is no tokenizer of llama2.c's: it holds {len(pieces)} tokens, the first not <unk>")
    model = SentencePieceModel(tuple(pieces), BPE, byte_fallback=True, removes_extra_spaces=False)
    proto = sentencepiece_json.serialize(model, {"unk": 0, "bos": 1, "eos": 2})
    try:
        return Tokenizer.from_codec(SentencePieceCodec(proto))
    except Exception as fault:  # the library raises RuntimeErrors with a C++ place in them
        raise ValueError(f"{path} is no tokenizer that can be used: {' '.join(str(fault).split())}") from None


def write(path: Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer; ValueError for one that is no SentencePiece BPE whose <unk>, <s> and </s> are 0, 1 and 2."""
    codec = tokenizer.codec
    model = sentencepiece_json.parse(codec.proto) if isinstance(codec, SentencePieceCodec) else None
    if model is None or model.model_type != BPE or (codec.special_tokens.get("<s>"), tokenizer.eos_id) != (1, 2):
        raise ValueError(
            "llama2.c has SentencePiece's BPE, with <unk>, <s> and </s> as tokens 0, 1 and 2; this tokenizer is another"
        )
    texts = [text.replace(SPACE_MARK, " ").encode() for text, _, _ in model.pieces]
    texts = [NAMES.get(token_id, text) for token_id, text in enumerate(texts)]
    with open(path, "wb") as file:
        file.write(struct.pack("<I", max(map(len, texts))))
        for text, (_, score, _) in zip(texts, model.pieces, strict=True):
            file.write(struct.pack("<fI", score, len(text)) + text)


def _piece(token_id: int, text: str, score: float) -> tuple[str, float, int]:
    if token_id == 0:
        return text, score, UNKNOWN
    if token_id in NAMES:
        return text.strip("\n"), score, CONTROL
    is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return text.replace(" ", SPACE_MARK), score, BYTE if is_byte else NORMAL
