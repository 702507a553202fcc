"""Training a SentencePiece BPE model in the manner of Llama 2's: every byte a piece, no normalisation, spaces kept.

Knows nothing of files. What such a model cannot give back: a literal `▁` (U+2581) decodes to a space, since
SentencePiece writes spaces so; everything else without lone surrogates comes back as it was.
"""

import io
import re
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece

from llamita.text.sentencepiece_codec import SentencePieceCodec

COVERAGE = 0.99995  # of the text's characters; rarer ones are spelled in bytes. Llama 2's value.
TOO_LARGE = re.compile(r"Vocabulary size too high \((\d+)\)\. Please set it to a value <= (\d+)")
TOO_SMALL = re.compile(r"Vocabulary size is smaller than required_chars\. (\d+) vs (\d+)")


def train(chunks: Iterable[str], vocab_size: int, special_tokens: Sequence[str]) -> SentencePieceCodec:
    """A SentencePiece model learned from text; `special_tokens` are <unk>, <s>, </s> and control symbols, from id 0.

    The library holds all lines in memory. Raises ValueError for a vocabulary size that the text does not allow.
    """
    unknown, bos, eos, *reserved = special_tokens
    model = io.BytesIO()
    reading = _Lines(chunks)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(reading),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=COVERAGE,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            unk_piece=unknown,
            bos_piece=bos,
            eos_piece=eos,
            control_symbols=list(reserved),
            max_sentence_length=1 << 24,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as fault:
        raise reading.fault or ValueError(_explain(str(fault), vocab_size)) from None
    return SentencePieceCodec(model.getvalue())


class _Lines:
    """The lines of a text without their ends: SentencePiece learns within lines, and spells a newline as a byte.

    The library turns an exception of its input into a RuntimeError, so the exception itself is kept here.
    """

    def __init__(self, chunks: Iterable[str]) -> None:
        self._chunks = chunks
        self.fault: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for chunk in self._chunks:
                yield from filter(None, chunk.split("\n"))
        except Exception as fault:
            self.fault = fault
            raise


def _explain(message: str, vocab_size: int) -> str:
    """One line in our words for what the library says of a vocabulary size."""
    if found := TOO_LARGE.search(message):
        return (
            f"vocab_size={vocab_size} is more than this text allows: it gives {found[2]} pieces; "
            f"ask for {found[2]} or fewer, or give more text"
        )
    if found := TOO_SMALL.search(message):
        return (
            f"vocab_size={vocab_size} is too small: special tokens, 256 bytes and the characters of this text need "
            f"at least {found[2]}"
        )
    if "sentences_.empty()" in message:
        return "no text to learn from: there is nothing but line ends"
    return "sentencepiece refuses to train: " + " ".join(message.split())
