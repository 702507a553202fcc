"""Training a tokenizer: byte-level BPE here, SentencePiece through sentencepiece_training.py.

Knows nothing of how text is encoded afterwards (tokenizer.py) or what the command line prints (cli/tokenizer.py).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tokenizers
import tyro
from tokenizers import decoders, models, pre_tokenizers, trainers

from llamita.storage.files import atomic_directory
from llamita.text import corpus, sentencepiece_training
from llamita.text.huggingface_codec import HuggingFaceCodec
from llamita.text.tokenizer import BOS, EOS, TOKENIZER_FILES, UNKNOWN, Tokenizer

MIN_FREQUENCY = 2  # a pair that occurs once teaches nothing about text


@dataclass(frozen=True)
class TokenizerTrainingConfig:
    """The options of `llamita tokenizer train`."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Text files in UTF-8; every character counts, line ends too."""
    vocab_size: int
    """Number of tokens: 3 special ones, the reserved ones, 256 bytes, and as many merges as remain."""
    output: Path = Path("tokenizer")
    """The directory to write, in the form that transformers opens."""
    kind: Literal["bpe", "sentencepiece"] = "bpe"
    """bpe: byte-level BPE, any text comes back exactly; sentencepiece: a SentencePiece model like Llama 2's."""
    reserved_tokens: int = 0
    """Special tokens `<r0>`, `<r1>`, ... to give a meaning later (chat roles, for one)."""
    overwrite: bool = False
    """Replace an output directory that exists."""

    def __post_init__(self) -> None:
        if self.reserved_tokens < 0:
            raise ValueError(f"reserved_tokens={self.reserved_tokens} must not be negative")


Progress = Callable[[int, int], None]  # bytes read so far, bytes in all


def train_tokenizer(config: TokenizerTrainingConfig, on_progress: Progress | None = None) -> Tokenizer:
    """Train on the files and write the output directory, whole or not at all; the same text gives the same tokenizer.

    Files are streamed; byte-level training keeps one count per distinct word in memory, SentencePiece the whole text.
    Raises ValueError or OSError with one line: a file missing, empty or not UTF-8, a vocabulary too small to hold every
    byte or larger than the text allows, an output directory that exists.
    """
    files = [Path(file) for file in config.files]
    total = corpus.check_files(files)
    check_vocab_size(config.vocab_size, config.reserved_tokens)
    _check_output(config.output, config.overwrite)
    with atomic_directory(config.output, overwrite=config.overwrite) as temporary:
        chunks = corpus.read_chunks(files, (lambda done: on_progress(done, total)) if on_progress else None)
        if config.kind == "bpe":
            tokenizer = train_bpe_from_iterator(chunks, config.vocab_size, config.reserved_tokens)
        else:
            names = special_tokens(config.reserved_tokens)
            codec = sentencepiece_training.train(chunks, config.vocab_size, names)
            tokenizer = Tokenizer.from_codec(codec)
        tokenizer.save(temporary)
    return tokenizer


def train_bpe_from_iterator(texts: Iterable[str], vocab_size: int, reserved_tokens: int = 0) -> Tokenizer:
    """A byte-level BPE learned from texts (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; on bytes as GPT-2).

    Ids: `<unk>` 0, `<s>` 1, `</s>` 2, `<r0>`, ..., then 256 bytes, then merges in the order learned. A vocabulary
    with no room for merges is a byte model. Raises ValueError where the texts hold too few pairs for `vocab_size`.
    """
    check_vocab_size(vocab_size, reserved_tokens)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=special_tokens(reserved_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_not_empty(texts), trainer)
    reached = tokenizer.get_vocab_size()
    if reached < vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} is more than the text allows: its pairs that occur {MIN_FREQUENCY} or more times "
            f"give {reached} tokens; ask for {reached} or fewer, or give more text"
        )
    return Tokenizer.from_codec(HuggingFaceCodec(tokenizer))


def special_tokens(reserved_tokens: int) -> list[str]:
    """The special tokens in the order of their ids, from 0."""
    return [UNKNOWN, BOS, EOS, *(f"<r{index}>" for index in range(reserved_tokens))]


def check_vocab_size(vocab_size: int, reserved_tokens: int) -> None:
    """Raise ValueError for a vocabulary that has no room for the special tokens and every byte."""
    special = len(special_tokens(reserved_tokens))
    if vocab_size < special + 256:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {special} special tokens and 256 bytes need {special + 256} or more"
        )


def _check_output(output: Path, overwrite: bool) -> None:
    """Raise where the output exists and may not be replaced: only a directory of nothing but a tokenizer ever is."""
    if not output.exists():
        return
    if not output.is_dir():
        raise FileExistsError(f"{output} is a file; the tokenizer needs a directory of its own")
    if not overwrite:
        raise FileExistsError(f"{output} exists already; choose another --output, or replace it with --overwrite")
    others = sorted(file.name for file in output.iterdir() if file.name not in TOKENIZER_FILES)
    if others:
        raise FileExistsError(
            f"{output} holds more than a tokenizer ({others[0]}); it is not replaced: choose another name"
        )


def _not_empty(texts: Iterable[str]) -> Iterator[str]:
    """The texts; raises ValueError at the end where there was no character in them."""
    found = False
    for text in texts:
        found = found or bool(text)
        yield text
    if not found:
        raise ValueError("no text to learn from")
