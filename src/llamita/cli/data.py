"""`llamita data`: rows as a model will see them, with counts over them; parts merged; tasks over Meadow's stories.

The counting lies in data/inspect.py, merging in data/merge.py, the tasks in data/meadow_tasks.py.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from llamita.data.packing import RowMode

if TYPE_CHECKING:
    from rich.text import Text

    from llamita.data.packing import Row
    from llamita.text.tokenizer import Tokenizer

STYLES = {"scored": "green", "read": "yellow", "padding": "bright_black"}


@dataclass(frozen=True)
class ShowConfig:
    """The options of `llamita data show`."""

    data: tyro.conf.Positional[Path]
    """A data directory that `llamita prepare` wrote."""
    split: str = "train"
    """The split to show: train or validation."""
    mode: RowMode = "pack"
    """The way documents become rows, as in training."""
    sequence_length: int = 256
    """Tokens a model reads per row."""
    within_documents: bool = False
    """Keep attention inside a document."""
    rows: int = 4
    """Number of rows to print."""
    first: int = 0
    """The first row to print; in random mode, the number of the batch to print."""


def show(config: ShowConfig) -> None:
    """Look at prepared data as a model will see it.

    Prints decoded rows with what is scored, only read, or padding; counts of truncated, empty and fully masked rows;
    and how many validation documents are in the training split too.
    """
    import numpy as np
    from rich.console import Console

    from llamita.data.batches import BatchIterator
    from llamita.data.inspect import count_rows, documents_cut, documents_in_both
    from llamita.data.packing import Rows, RowsConfig
    from llamita.data.shards import TokenShards, load_tokenizer

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters that a corpus has
    shards = TokenShards(config.data, config.split)
    manifest = shards.manifest
    tokenizer = load_tokenizer(config.data)
    rows_config = RowsConfig(config.mode, config.sequence_length, config.within_documents)
    rows = Rows(shards, rows_config, manifest.bos_id, manifest.eos_id, manifest.pad_id)
    if config.rows < 0 or not 0 <= config.first < len(rows):
        raise ValueError(f"first={config.first} must be at least 0 and below {len(rows)}, the number of rows")

    console = Console(highlight=False, soft_wrap=True)
    colours = console.color_system is not None
    if config.rows:
        console.print(legend(colours))
    indices = np.arange(config.first, min(config.first + config.rows, len(rows)))
    if config.mode == "random" and config.rows:
        indices = BatchIterator(rows, config.rows, seed=0).row_ids(config.first)
    for index in indices.tolist():
        row = rows.row(index)
        scored = int(row.label_mask.sum())
        console.rule(f"row {index:,} of {len(rows):,}: {scored} of {len(row.tokens)} tokens scored", style="dim")
        console.print(row_text(row, tokenizer, colours))
    console.rule(f"{config.data} {config.split}", style="dim")
    console.print(
        f"{shards.num_documents:,} documents, {shards.num_tokens:,} tokens, {shards.num_characters:,} characters; "
        f"{manifest.empty_documents:,} empty documents left out when the data was prepared"
    )
    counts = count_rows(rows)
    if counts.looked_at < counts.rows:
        console.print(f"counts over {counts.looked_at:,} of {counts.rows:,} rows:")
    every = counts.looked_at * rows.block
    console.print(
        f"{counts.looked_at:,} rows: {counts.truncated:,} truncated (they end inside a document), "
        f"{counts.empty:,} empty, {counts.fully_masked:,} fully masked; "
        f"{counts.targets / every:.1%} of their tokens scored, {counts.padding / every:.1%} padding"
    )
    console.print(f"{documents_cut(rows):,} of {shards.num_documents:,} documents lie whole in no row")
    if {"train", "validation"} <= manifest.splits.keys():
        other = TokenShards(config.data, "validation" if config.split == "train" else "train", verify=False)
        train, validation = (shards, other) if config.split == "train" else (other, shards)
        both = documents_in_both(train, validation)
        console.print(f"{both:,} of {validation.num_documents:,} validation documents are in the training split too")


def row_text(row: Row, tokenizer: Tokenizer, colours: bool) -> Text:
    """Returns a row for the terminal; without colours, text that is read but not scored stands between ⟦ and ⟧."""
    from rich.text import Text

    from llamita.data.inspect import marked_text

    text = Text()
    for mark, stretch, tokens in marked_text(row, tokenizer):
        stretch = f"<padding x {tokens}>" if mark == "padding" else visible(stretch)
        if mark == "read" and not colours:
            stretch = f"⟦{stretch}⟧"
        text.append(stretch, style=STYLES[mark])
    return text


def legend(colours: bool) -> Text:
    """Returns the legend of the colours or brackets of `row_text`."""
    from rich.text import Text

    if not colours:
        return Text("⟦read, not scored⟧ scored <padding>")
    return Text.assemble(*((name + " ", STYLES[mark]) for mark, name in
                           (("scored", "scored"), ("read", "read, not scored"), ("padding", "padding"))))  # fmt: skip


def visible(text: str) -> str:
    """Returns the text with symbols for control characters but line ends and tabs: no corpus steers the terminal."""
    return "".join(chr(0x2400 + ord(c)) if c < " " and c not in "\n\t" else "␡" if c == "\x7f" else c for c in text)


@dataclass(frozen=True)
class MergeConfig:
    """The options of `llamita data merge`."""

    data: tyro.conf.Positional[tuple[Path, ...]]
    """All parts that llamita prepare --shard wrote, in any order, or whole data directories, one after another."""
    output: Path
    """The data directory to write."""
    overwrite: bool = False
    """Replace a data directory that exists."""


def merge(config: MergeConfig) -> None:
    """Put data directories together: parts of one corpus, or one corpus after the other.

    The parts i/n that n machines prepared become the data directory that one machine would have written, byte for byte.

    Examples:
      llamita data merge PART-1 PART-2 --output DATA
    """
    from llamita.data.merge import merge as merged

    manifest = merged(config.data, config.output, config.overwrite)
    for name, split in manifest.splits.items():
        print(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens")
    print(f"wrote {config.output}")


@dataclass(frozen=True)
class MeadowTasksConfig:
    """The options of `llamita data meadow-tasks`."""

    output: Path
    """The file to write: JSON lines."""
    kind: Literal["sft", "preferences", "labels"] = "sft"
    """sft: conversations about a story; preferences: a question with a right and a wrong answer; labels: stories that
    end happy or sad."""
    count: int = 1000
    """Number of records to write."""
    split: Literal["train", "validation"] = "train"
    """train: stories that pre-training may have seen; validation: stories held out of it."""
    turns: int = 1
    """sft: number of questions that a conversation asks about its story."""
    seed: int = 0
    """Chooses the stories; the seed of `llamita prepare --source meadow` gives the same ones."""
    overwrite: bool = False
    """Replace a file that exists."""


def meadow_tasks(config: MeadowTasksConfig) -> None:
    """Write tasks over the stories of Meadow, as the JSON lines that tuning reads.

    Examples:
      llamita data meadow-tasks --kind sft --count 8000 --output train.jsonl
      llamita data meadow-tasks --kind labels --count 500 --split validation --output validation.jsonl
    """
    from llamita.data import meadow_tasks as tasks

    kind, split = config.kind, config.split
    tasks.write(config.output, kind, config.seed, config.count, split, config.turns, config.overwrite)
    print(f"wrote {config.output}: {config.count:,} records of the kind {kind}, {split} split")
