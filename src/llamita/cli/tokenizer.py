"""`llamita tokenizer train`: flags, progress and a summary. The work lies in text/bpe.py."""

import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from llamita.text.bpe import TokenizerTrainingConfig

MEASURED_BYTES = 16_000_000  # of the text, for the summary's bytes per token


def train(config: TokenizerTrainingConfig) -> None:
    """Train a tokenizer on text files and write it as a directory that transformers opens.

    Examples:
      llamita tokenizer train input.txt --vocab-size 4096 --output tokenizer
      llamita tokenizer train input.txt --vocab-size 259 --output bytes      (no merges: a token is a byte)
      llamita tokenizer train a.txt b.txt --vocab-size 8000 --kind sentencepiece --reserved-tokens 8
    """
    from rich.console import Console
    from rich.table import Table

    from llamita.progress import ProgressBar
    from llamita.text.bpe import special_tokens, train_tokenizer

    began = time.perf_counter()
    with ProgressBar("reading text", unit="MB") as bar:
        known = 0

        def show(done: int, total: int) -> None:
            nonlocal known
            if total != known:
                bar.begin("reading text", known := total)
            if done < total:
                bar.update(done, done / 1e6)
            else:  # the libraries do not say how far the merging has come
                bar.begin("merging pairs")

        tokenizer = train_tokenizer(config, show)
        bar.begin("measuring")
        tokens, size, whole = _measure(config.output, config.files)
    special = len(special_tokens(config.reserved_tokens))
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    learned = tokenizer.vocab_size - special - 256
    table.add_row("vocabulary", f"{tokenizer.vocab_size:,} tokens: {special} special, 256 bytes, {learned:,} learned")
    share = "the whole text" if whole else f"the first {size / 1e6:.0f} MB of the text"
    table.add_row("compression", f"{size / max(1, tokens):.2f} bytes per token on {share}")
    table.add_row("time", f"{time.perf_counter() - began:.1f} s")
    console = Console()
    console.print(table)
    console.print(f"wrote {config.output}", highlight=False, soft_wrap=True, markup=False)
    names = " ".join(shlex.quote(str(file)) for file in config.files)
    command = f"llamita prepare --files {names} --tokenizer {shlex.quote(str(config.output))} --output data"
    console.print(f"next: {command}", highlight=False, soft_wrap=True, markup=False)


def _measure(tokenizer_path: Path, files: Sequence[Path]) -> tuple[int, int, bool]:
    """Returns the tokens and bytes of the text, or of its first MEASURED_BYTES, and whether that was all of it."""
    from llamita.text.corpus import read_chunks
    from llamita.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(tokenizer_path)
    tokens = size = 0
    for chunk in read_chunks(files):
        if size >= MEASURED_BYTES:
            return tokens, size, False
        tokens += len(tokenizer.encode(chunk))
        size += len(chunk.encode())
    return tokens, size, True
