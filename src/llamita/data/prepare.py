"""From a source of text to a data directory: split, encode, write; the work behind `llamita prepare`.

Documents stream from the source through the encoding processes to the shards, so a corpus may be larger than memory.
Knows nothing about how sources are read, how text is encoded, or how files are laid out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llamita.data.encoding import Encoder, encode_in_order
from llamita.data.shards import MANIFEST, Manifest, SplitManifest, SplitWriter
from llamita.data.sources import Source, SourceKind
from llamita.data.splitting import TRAIN, VALIDATION, HowToSplit, SplitText
from llamita.data.textfiles import Separator
from llamita.storage.files import atomic_directory, atomic_write
from llamita.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class PrepareConfig:
    """The options of `llamita prepare`."""

    output: Path
    """The data directory to write."""
    tokenizer: Path
    """A tokenizer's directory or file; it is copied into the data directory."""
    source: SourceKind = "text"
    """text: plain files; wikitext: WikiText files; jsonl: JSON lines; hub: a Hugging Face dataset; meadow: stories."""
    files: tuple[Path, ...] = ()
    """The files of text, wikitext and jsonl, in order."""
    validation_files: tuple[Path, ...] = ()
    """Files for the validation split, instead of a share of the others."""
    validation_share: float = 0.1
    """The share of documents (or characters) that goes to validation; 0 for none."""
    split: HowToSplit = "document"
    """document: each document by a hash of its text and the seed; tail: the last share of all characters, cutting
    even inside a document."""
    separator: Separator = "blank-line"
    """What lies between documents in a text file; file: each file is one document."""
    text_field: str = "text"
    """The field (jsonl) or column (hub) that holds a document."""
    dataset: str = ""
    """The name of a dataset on the Hugging Face hub, or a local directory of one."""
    dataset_config: str | None = None
    """The dataset's configuration, where it has several."""
    dataset_split: str = "train"
    """The dataset's split to read."""
    validation_dataset_split: str | None = None
    """The dataset's split for validation, instead of a share of the other."""
    rows_are_lines: bool = False
    """The dataset's rows are lines of WikiText: put them together to articles."""
    documents: int | None = None
    """Read at most this many documents (meadow: write so many stories, and a validation share more)."""
    seed: int = 0
    """Chooses Meadow's stories and the documents that go to validation."""
    bos: bool = True
    """Put the beginning-of-sequence token before each document, where the tokenizer has one."""
    eos: bool = True
    """Put the end-of-sequence token after each document, where the tokenizer has one."""
    workers: int | None = None
    """Encoding processes; as many as cores when not given. The result does not depend on it."""
    overwrite: bool = False
    """Replace a data directory that exists."""
    shard_tokens: int = 1 << 27
    """Tokens in a shard file."""


@dataclass(frozen=True)
class Progress:
    """The progress of a preparation; total_bytes is None where it is not known."""

    documents: int
    tokens: int
    bytes: int
    total_bytes: int | None
    seconds: float


def prepare(config: PrepareConfig, on_progress: Callable[[Progress], None] | None = None) -> Manifest:
    """Write the data directory that `config` describes and return its manifest.

    Everything goes to a temporary sibling first, which vanishes on any error or Ctrl-C. The bytes written depend on the
    text, the tokenizer and the options alone, not on the number of workers.
    """
    _check_options(config)
    split_text = SplitText(*_sources(config), config.validation_share, config.split, config.seed)
    tokenizer = Tokenizer.load(config.tokenizer)
    bos, eos = config.bos and tokenizer.bos_id is not None, config.eos and tokenizer.eos_id is not None
    encoder = Encoder(config.tokenizer, tokenizer.hash, bos, eos)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    _check_output(config)
    split_text.check()
    try:
        with atomic_directory(config.output, overwrite=config.overwrite) as directory:
            splits = _write_splits(config, split_text, encoder, dtype, directory, on_progress)
            _check_splits(splits, split_text, config)
            manifest = Manifest(
                tokenizer_hash=tokenizer.hash,
                vocab_size=tokenizer.vocab_size,
                bos_id=tokenizer.bos_id,
                eos_id=tokenizer.eos_id,
                pad_id=tokenizer.pad_id,
                adds_bos=encoder.bos,
                adds_eos=encoder.eos,
                dtype=dtype.name,
                empty_documents=split_text.empty_documents,
                source=_describe(config),
                splits=splits,
            )
            tokenizer.save(directory / "tokenizer")
            atomic_write(directory / MANIFEST, manifest.to_json())
            return manifest
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        # A full disk shows at a write, which does not know its file.
        raise OSError(error.errno, error.strerror, str(config.output)) from error


def _write_splits(
    config: PrepareConfig,
    split_text: SplitText,
    encoder: Encoder,
    dtype: np.dtype,
    directory: Path,
    on_progress: Callable[[Progress], None] | None,
) -> dict[str, SplitManifest]:
    """Encode everything into files of `directory`, train before validation in the result."""
    started = time.monotonic()
    workers = config.workers or _cores()
    with ExitStack() as stack:
        writers: dict[str, SplitWriter] = {}
        encoded_groups = stack.enter_context(closing(encode_in_order(split_text, encoder, workers)))
        for group in encoded_groups:
            for split, part in group.items():
                if split not in writers:
                    writer = SplitWriter(directory, split, dtype, config.shard_tokens)
                    writers[split] = stack.enter_context(writer)
                writers[split].add(part.tokens, part.lengths, part.characters, part.bytes)
            if on_progress is not None:
                documents, tokens, size = (
                    sum(getattr(writer, name) for writer in writers.values())
                    for name in ("documents", "tokens", "bytes")
                )
                seconds = time.monotonic() - started
                on_progress(Progress(documents, tokens, size, split_text.total_bytes, seconds))
        return {split: writers[split].finish() for split in (TRAIN, VALIDATION) if split in writers}


def _sources(config: PrepareConfig) -> tuple[Source, Source | None]:
    """The source of the training text, and that of the validation text where it has its own."""
    train = Source(
        kind=config.source,
        files=config.files,
        separator=config.separator,
        text_field=config.text_field,
        dataset=config.dataset,
        dataset_config=config.dataset_config,
        dataset_split=config.dataset_split,
        rows_are_lines=config.rows_are_lines,
        limit=config.documents,
        seed=config.seed,
    )
    if config.source == "meadow":
        count = round((config.documents or 0) * config.validation_share)
        validation = replace(train, corpus="validation", limit=max(1, count))
        return train, validation if config.validation_share else None
    if config.validation_files:
        return train, replace(train, files=config.validation_files, limit=None)
    if config.validation_dataset_split:
        return train, replace(train, dataset_split=config.validation_dataset_split, limit=None)
    return train, None


def _check_options(config: PrepareConfig) -> None:
    """Here and not in the dataclass, where tyro would turn one line into a box."""
    if not 0 <= config.validation_share < 1:
        raise ValueError(f"validation_share={config.validation_share} must be at least 0 and below 1")
    if config.workers is not None and config.workers < 1:
        raise ValueError(f"workers={config.workers} must be at least 1")
    if config.shard_tokens < 1:
        raise ValueError(f"shard_tokens={config.shard_tokens} must be at least 1")
    if config.documents is not None and config.documents < 1:
        raise ValueError(f"documents={config.documents} must be at least 1")


def _check_output(config: PrepareConfig) -> None:
    """Overwriting replaces prepared data only, never a directory of something else."""
    output = config.output
    if not output.exists():
        return
    if not config.overwrite:
        raise FileExistsError(f"{output} exists already; choose another --output, or pass --overwrite to replace it")
    if not output.is_dir() or (any(output.iterdir()) and not (output / MANIFEST).is_file()):
        raise FileExistsError(
            f"{output} is not a data directory, so --overwrite leaves it alone; choose another --output"
        )


def _check_splits(splits: dict[str, SplitManifest], split_text: SplitText, config: PrepareConfig) -> None:
    count = sum(split.documents for split in splits.values())
    if not count:
        where = ", ".join(map(str, config.files)) or config.dataset or config.source
        raise ValueError(f"no text in {where}: {split_text.empty_documents} documents, all of them empty")
    for split in (TRAIN, *([VALIDATION] if split_text.wants_validation else [])):
        if split not in splits:
            raise ValueError(
                f"the {split} split would be empty: {count} documents, validation_share={config.validation_share}; "
                "change --validation-share or --seed, pass --split tail, or --validation-share 0 for none"
            )


def _describe(config: PrepareConfig) -> dict[str, Any]:
    """The options that decide what is written, as JSON has them."""
    elsewhere = {"output", "tokenizer", "workers", "overwrite", "shard_tokens"}
    values = {name: value for name, value in asdict(config).items() if name not in elsewhere}
    return {
        name: [str(path) for path in value] if isinstance(value, tuple) else value for name, value in values.items()
    }


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
