"""Text to token ids and back, by a tokenizer.json (of this course's small model) or a tokenizer.model (Llama 2's)."""

import os

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as JsonTokenizer

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_MODEL = "tokenizer.model"


class Tokenizer:
    """The tokenizer of a model; `tokenizer_model` names its file, by default one of the two in this directory.

    `bos_id` and `eos_id` mark the beginning and the end of a text, `pad_id` fills rows up and occurs in no text.
    """

    def __init__(self, max_len: int | None = None, tokenizer_model: str | None = None) -> None:
        found = [name for name in (tokenizer_model, TOKENIZER_JSON, TOKENIZER_MODEL) if name and os.path.isfile(name)]
        if not found or (tokenizer_model and found[0] != tokenizer_model):
            raise ValueError(f"there is no {tokenizer_model or f'{TOKENIZER_JSON} or {TOKENIZER_MODEL}'} here")
        self.max_len = max_len
        self.model_path = found[0]
        self.json = JsonTokenizer.from_file(found[0]) if found[0].endswith(".json") else None
        if self.json is not None:
            self.n_words = self.json.get_vocab_size()
            self.bos_id, self.eos_id, self.pad_id = self._special_ids()
        else:
            self.pieces = SentencePieceProcessor(model_file=found[0])
            self.n_words = self.pieces.vocab_size()
            self.bos_id, self.eos_id = self.pieces.bos_id(), self.pieces.eos_id()
            self.pad_id = self.pieces.piece_to_id("<0x00>")  # a byte that no text has

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """Returns the ids of a text, at most max_len of them, and those of its beginning and end where asked for."""
        ids = self.json.encode(s, add_special_tokens=False).ids if self.json else self.pieces.encode(s)
        return [self.bos_id] * bos + ids[: self.max_len] + [self.eos_id] * eos

    def decode(self, t: list[int]) -> str:
        """Returns the text of the ids."""
        return self.json.decode(t, skip_special_tokens=True) if self.json else self.pieces.decode(t)

    def _special_ids(self) -> tuple[int, int, int]:
        """Beginning, end and padding. Without a token of its own, a beginning is the end of the text before, and
        padding is the byte 0."""
        vocabulary = self.json.get_vocab()

        def first(*names: str) -> int:
            return next(vocabulary[name] for name in names if name in vocabulary)

        end = first("<|end_of_text|>", "<|endoftext|>", "</s>", "<|im_end|>")
        begin = first("<|begin_of_text|>", "<s>", "<|endoftext|>", "<|end_of_text|>", "<|im_start|>")
        return begin, end, first("<|pad|>", "<pad>", "<0x00>", "\u0100")
