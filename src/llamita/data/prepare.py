"""From a source of text to a data directory: split, encode, write; the work behind `llamita prepare`.

Documents stream from the source through the encoding processes to the shards, so a corpus may be larger than memory.
Knows nothing about how sources are read, how text is encoded, or how files are laid out.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from llamita.data import encoding
from llamita.data.encoding import Encoder, encode_in_order, grouped
from llamita.data.shards import (
    GROUP_BYTES,
    INDEX_DTYPE,
    MANIFEST,
    PARTS,
    DataFile,
    HashedFile,
    Manifest,
    Part,
    SplitManifest,
    SplitWriter,
    WriterState,
    check_output,
)
from llamita.data.sources import Source, SourceKind, files_in
from llamita.data.splitting import TRAIN, VALIDATION, HowToSplit, SplitText
from llamita.data.textfiles import Separator
from llamita.data.unfinished import Unfinished, unfinished
from llamita.storage.files import atomic_write
from llamita.text.tokenizer import Tokenizer

JOURNAL_BYTES = 1 << 27
"""Bytes of text between two entries of the journal."""


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
    """The files of text, wikitext and jsonl, in order; a directory stands for all files in it, sorted."""
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
    """Replace a data directory that exists, and give up one that is unfinished."""
    resume: bool = False
    """Go on with a preparation that was interrupted or killed, given the same options."""
    shard: str = ""
    """i/n: encode the i-th of n parts alone, as one of n machines that all read the same text; llamita data merge puts
    the parts together. A part is every n-th group of documents, each about a megabyte."""
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

    Everything goes to a hidden sibling first, which vanishes on an error; one that may pass (Ctrl-C, a full disk, a
    process that died) leaves it to be resumed, once there is enough of it. The bytes written depend on the text, the
    tokenizer and the options alone: not on the number of workers, nor on how often the preparation was resumed.
    """
    _check_options(config)
    part, parts = _part(config.shard)
    config = replace(config, files=files_in(config.files), validation_files=files_in(config.validation_files))
    split_text = SplitText(*_sources(config), config.validation_share, config.split, config.seed)
    tokenizer = Tokenizer.load(config.tokenizer)
    bos, eos = config.bos and tokenizer.bos_id is not None, config.eos and tokenizer.eos_id is not None
    encoder = Encoder(config.tokenizer, tokenizer.hash, bos, eos)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    check_output(config.output, config.overwrite)
    split_text.check()
    identity = {name: value for name, value in _describe(config).items() if name not in ("files", "validation_files")}
    identity |= {"shard": config.shard, "shard_tokens": config.shard_tokens, "tokenizer": tokenizer.hash}
    identity |= {"files (names, sizes, times)": _on_disk(config), "groups": _group_sizes()}
    try:
        with unfinished(config.output, identity, config.resume, config.overwrite) as work:
            splits, groups = _write_splits(config, split_text, encoder, dtype, work, (part, parts), on_progress)
            if not config.shard:
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
                part=None if groups is None else Part(part, parts, *_group_sizes(), groups),
            )
            tokenizer.save(work.directory / "tokenizer")
            atomic_write(work.directory / MANIFEST, manifest.to_json())
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
    work: Unfinished,
    part: tuple[int, int],
    on_progress: Callable[[Progress], None] | None,
) -> tuple[dict[str, SplitManifest], DataFile | None]:
    """Encode everything into files, train before validation in the result; and the file of a part's groups.

    What an earlier process wrote, as the journal has it, is read again but not encoded again.
    """
    started = time.monotonic()
    workers = config.workers or _cores()
    done = int(work.progress.get("groups", 0))
    with ExitStack() as stack:

        def open_writer(split: str, state: WriterState | None = None) -> SplitWriter:
            return stack.enter_context(SplitWriter(work.directory, split, dtype, config.shard_tokens, state))

        earlier = work.progress.get("splits", {})
        writers = {split: open_writer(split, WriterState.from_json(state)) for split, state in earlier.items()}
        of_part = HashedFile(work.directory / PARTS, keep=done * GROUP_BYTES) if config.shard else None
        if of_part is not None:
            stack.callback(of_part.release)
        own = islice(grouped(split_text), part[0] - 1, None, part[1])
        recorded = sum(writer.bytes for writer in writers.values())
        for group in stack.enter_context(closing(encode_in_order(islice(own, done, None), encoder, workers))):
            for split, encoded in group.items():
                if split not in writers:
                    writers[split] = open_writer(split)
                writers[split].add(encoded.tokens, encoded.lengths, encoded.characters, encoded.bytes)
            if of_part is not None:
                counts = [len(group[split].lengths) if split in group else 0 for split in (TRAIN, VALIDATION)]
                of_part.write(np.array(counts, dtype=INDEX_DTYPE))
            done += 1
            documents, tokens, size = (
                sum(getattr(writer, name) for writer in writers.values()) for name in ("documents", "tokens", "bytes")
            )
            if size - recorded >= JOURNAL_BYTES:
                if of_part is not None:
                    of_part.sync()
                states = {split: asdict(writer.state()) for split, writer in writers.items()}
                work.record({"groups": done, "splits": states})
                recorded = size
            if on_progress is not None:
                seconds = time.monotonic() - started
                on_progress(Progress(documents, tokens, size, split_text.total_bytes, seconds))
        splits = {split: writers[split].finish() for split in (TRAIN, VALIDATION) if split in writers}
        return splits, None if of_part is None else of_part.close()


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


def _part(shard: str) -> tuple[int, int]:
    """The number of the part to encode, from 1, and the number of parts: (2, 8) of 2/8, and (1, 1) of an empty text."""
    if not shard:
        return 1, 1
    found = re.fullmatch(r"(\d+)/(\d+)", shard, re.ASCII)
    number, of = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= of:
        raise ValueError(f"shard={shard!r} must be i/n with 1 <= i <= n, as in 2/8")
    return number, of


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
    elsewhere = {"output", "tokenizer", "workers", "overwrite", "resume", "shard", "shard_tokens"}
    values = {name: value for name, value in asdict(config).items() if name not in elsewhere}
    return {
        name: [str(path) for path in value] if isinstance(value, tuple) else value for name, value in values.items()
    }


def _on_disk(config: PrepareConfig) -> str:
    """A hash over name, size and time of change of each file: a resumed preparation must find them as they were."""
    digest = hashlib.sha256()
    for path in (*config.files, None, *config.validation_files):  # None: where the training text ends
        status = path.stat() if path is not None and path.is_file() else None
        digest.update(repr((str(path), status and (status.st_size, status.st_mtime_ns))).encode())
    return digest.hexdigest()


def _group_sizes() -> tuple[int, int]:
    return encoding.GROUP_CHARACTERS, encoding.GROUP_DOCUMENTS


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
