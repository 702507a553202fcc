"""`llamita prepare`: flags, a progress bar and a summary. The work lies in data/prepare.py."""

from __future__ import annotations

import sys

from llamita.data.prepare import PrepareConfig, Progress


def run(config: PrepareConfig) -> None:
    """Turn text into the token files that training reads.

    Examples:
      llamita prepare --source text --files input.txt --separator file --split tail --no-bos --no-eos \
--tokenizer TOKENIZER --output DATA
      llamita prepare --source wikitext --files wiki.train.tokens --validation-files wiki.valid.tokens \
--tokenizer TOKENIZER --output DATA
      llamita prepare --source meadow --documents 20000 --tokenizer TOKENIZER --output DATA
    """
    from rich.console import Console
    from rich.table import Table

    from llamita.data.prepare import prepare
    from llamita.data.unfinished import place_of
    from llamita.progress import ProgressBar

    with ProgressBar("reading", unit="MB") as bar:
        known: int | None = None

        def show(progress: Progress) -> None:
            nonlocal known
            if progress.total_bytes != known:
                bar.begin("reading", known := progress.total_bytes)
            bar.update(progress.bytes, progress.bytes / 1e6, describe(progress))

        try:
            manifest = prepare(config, on_progress=show)
        finally:
            if place_of(config.output).is_dir():
                print(f"{config.output} is unfinished; the same command with --resume goes on", file=sys.stderr)
    table = Table("split", box=None, pad_edge=False)
    for name in ("documents", "tokens", "characters", "characters per token"):
        table.add_column(name, justify="right")
    for name, split in manifest.splits.items():
        ratio = f"{split.characters / max(1, split.tokens):.2f}"
        table.add_row(name, f"{split.documents:,}", f"{split.tokens:,}", f"{split.characters:,}", ratio)
    console = Console()
    console.print(table)
    if manifest.empty_documents:
        console.print(f"{manifest.empty_documents:,} documents without text were left out")
    console.print(f"wrote {config.output}", highlight=False, soft_wrap=True)


def describe(progress: Progress) -> str:
    """Returns how much has been read and encoded, in words."""
    return f"{progress.documents:,} documents, {progress.tokens:,} tokens"
