"""Token shards on disk: what is in a data directory, written in one pass and read through memory maps.

    DATA/manifest.json              counts, hashes, the tokenizer's identity, where the text came from
    DATA/train-00000.bin, ...       token ids, little-endian uint16 (uint32 where the vocabulary is larger than 65,536)
    DATA/train-documents.bin        little-endian int64: where each document starts in the stream, then its length
    DATA/validation-...             the same for the validation split, where there is one
    DATA/tokenizer/                 the tokenizer that made the ids
    DATA/parts.bin                  only in a part of a corpus (llamita prepare --shard): what merge.py needs

All shards of a split but the last hold the same number of tokens, and documents may cross from one to the next.
This file knows nothing about where text comes from or how rows are made.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from llamita.text.tokenizer import Tokenizer

FORMAT = "llamita token shards"
VERSION = 1
MANIFEST = "manifest.json"
PARTS = "parts.bin"
INDEX_DTYPE = np.dtype("<i8")
GROUP_BYTES = 2 * INDEX_DTYPE.itemsize  # of a group of documents in parts.bin
VERIFY_TOKENS = 1 << 22


@dataclass(frozen=True)
class DataFile:
    """One file of a split."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitManifest:
    """One split. Characters and bytes (UTF-8) are of the documents' text, so without BOS, EOS or separators:
    nats per token * tokens / characters are nats per character."""

    documents: int
    tokens: int
    characters: int
    bytes: int
    longest_document: int
    """Tokens of the longest document, BOS and EOS included."""
    shard_tokens: int
    """Tokens in every shard but the last."""
    shards: tuple[DataFile, ...]
    index: DataFile


@dataclass(frozen=True)
class Part:
    """The part of a corpus that a data directory holds: the groups of documents number - 1, number - 1 + of, ..."""

    number: int
    """From 1 to `of`."""
    of: int
    group_characters: int
    group_documents: int
    """The sizes at which a group of documents ends."""
    groups: DataFile
    """Little-endian int64 [groups, 2]: the documents of each group in the training and the validation split."""


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    tokenizer_hash: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    adds_bos: bool
    """Whether each document starts with bos_id."""
    adds_eos: bool
    """Whether each document ends with eos_id."""
    dtype: str
    empty_documents: int
    """Documents without text, left out."""
    source: dict[str, Any]
    """The options that chose and split the text."""
    splits: dict[str, SplitManifest] = field(default_factory=dict)
    part: Part | None = None
    """Left out of the file where the directory holds a whole corpus."""

    def to_json(self) -> str:
        values = {name: value for name, value in asdict(self).items() if name != "part" or value is not None}
        return json.dumps({"format": FORMAT, "version": VERSION, **values}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, data_dir: Path | str) -> Manifest:
        """Read DATA/manifest.json; ValueError where it is not one."""
        path = Path(data_dir) / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{data_dir} holds no prepared data ({MANIFEST} is missing); run llamita prepare")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if (values.pop("format"), values.pop("version")) != (FORMAT, VERSION):
                raise ValueError("another format or version")
            splits = {name: _split_from_json(split) for name, split in values.pop("splits").items()}
            part = values.pop("part", None)
            return cls(splits=splits, part=part and Part(**{**part, "groups": DataFile(**part["groups"])}), **values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a manifest this version reads ({error}); prepare the data again") from None


class TokenShards:
    """One split of a data directory, read through memory maps.

    verify=True (the default) reads the split once and checks every SHA-256 and that no id is out of vocabulary;
    verify=False checks only the files' sizes. ValueError names the file that fails.
    """

    def __init__(self, data_dir: Path | str, split: str = "train", verify: bool = True) -> None:
        self.data_dir = Path(data_dir)
        self.split = split
        self.manifest = Manifest.load(data_dir)
        if split not in self.manifest.splits:
            raise ValueError(
                f"{data_dir} has no split {split!r}, only {sorted(self.manifest.splits)}; "
                "prepare it with --validation-share or --validation-files"
            )
        info = self.manifest.splits[split]
        self.num_documents = info.documents
        self.num_tokens = info.tokens
        self.num_characters = info.characters
        self.num_bytes = info.bytes
        self.dtype = np.dtype(self.manifest.dtype)
        self._shard_tokens = info.shard_tokens
        self._shards = [self._map(file, self.dtype) for file in info.shards]
        self.document_starts = self._map(info.index, INDEX_DTYPE)
        total = sum(len(shard) for shard in self._shards)
        if len(self.document_starts) != info.documents + 1 or int(self.document_starts[-1]) != info.tokens != total:
            raise ValueError(f"{self.data_dir / info.index.file} and the shards of {split!r} do not match the manifest")
        if verify:
            self.verify()

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document, as stored."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        start, end = int(self.document_starts[index]), int(self.document_starts[index + 1])
        return self.window(start, end - start)

    def window(self, start: int, length: int) -> np.ndarray:
        """Token ids start .. start + length of the split's stream, cut at its end."""
        end = min(start + length, self.num_tokens)
        if not 0 <= start <= self.num_tokens:
            raise IndexError(f"token {start} of {self.num_tokens}")
        pieces = []
        while start < end:
            shard, offset = divmod(start, self._shard_tokens)
            piece = self._shards[shard][offset : offset + end - start]
            pieces.append(piece)
            start += len(piece)
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, dtype=self.dtype), *pieces])

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise ValueError where these ids were not made by `tokenizer`."""
        _check_tokenizer(self.manifest, tokenizer, self.data_dir)

    def verify(self) -> None:
        """Read everything: ValueError where a file's SHA-256 or an id is wrong."""
        info = self.manifest.splits[self.split]
        for data_file, array in zip((*info.shards, info.index), (*self._shards, self.document_starts), strict=True):
            path = self.data_dir / data_file.file
            digest = hashlib.sha256()
            largest = 0
            for start in range(0, len(array), VERIFY_TOKENS):
                piece = array[start : start + VERIFY_TOKENS]
                digest.update(piece.view(np.uint8).data)
                largest = max(largest, int(piece.max()))
            if digest.hexdigest() != data_file.sha256:
                raise ValueError(f"{path} has changed: its SHA-256 is not that of the manifest; prepare the data again")
            if data_file is not info.index and largest >= self.manifest.vocab_size:
                raise ValueError(
                    f"{path} holds token {largest}, and the vocabulary ends at {self.manifest.vocab_size - 1}; "
                    "prepare the data again"
                )

    def _map(self, data_file: DataFile, dtype: np.dtype) -> np.ndarray:
        path = self.data_dir / data_file.file
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; prepare the data again")
        size = path.stat().st_size
        if size != data_file.bytes:
            raise ValueError(f"{path} has {size} bytes, the manifest says {data_file.bytes}; prepare the data again")
        return np.asarray(np.memmap(path, dtype=dtype, mode="r")) if size else np.zeros(0, dtype=dtype)


def load_tokenizer(data_dir: Path | str) -> Tokenizer:
    """The tokenizer that lies in DATA/tokenizer; ValueError where it is not the one that made the ids."""
    manifest = Manifest.load(data_dir)
    tokenizer = Tokenizer.load(Path(data_dir) / "tokenizer")
    _check_tokenizer(manifest, tokenizer, Path(data_dir))
    return tokenizer


def check_output(output: Path, overwrite: bool) -> None:
    """Raise FileExistsError where a data directory may not be written.

    Overwriting replaces prepared data only, never a directory of something else.
    """
    if not output.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{output} exists already; choose another --output, or pass --overwrite to replace it")
    if not output.is_dir() or (any(output.iterdir()) and not (output / MANIFEST).is_file()):
        raise FileExistsError(
            f"{output} is not a data directory, so --overwrite leaves it alone; choose another --output"
        )


@dataclass(frozen=True)
class WriterState:
    """How far a split has been written: its counts, and the shards that are complete."""

    documents: int = 0
    tokens: int = 0
    characters: int = 0
    bytes: int = 0
    longest_document: int = 0
    shards: tuple[DataFile, ...] = ()

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> WriterState:
        return cls(**{**values, "shards": tuple(DataFile(**shard) for shard in values["shards"])})


class SplitWriter:
    """Writes one split of a data directory, shard after shard; a context manager, so that files are closed.

    With the `state` of an earlier writer, it goes on there: what that one wrote afterwards is cut off.
    """

    def __init__(
        self, directory: Path, split: str, dtype: np.dtype, shard_tokens: int, state: WriterState | None = None
    ) -> None:
        state = state or WriterState()
        self.directory = directory
        self.split = split
        self.dtype = dtype
        self.shard_tokens = shard_tokens
        self.documents = state.documents
        self.tokens = state.tokens
        self.characters = state.characters
        self.bytes = state.bytes
        self.longest_document = state.longest_document
        self._shards = list(state.shards)
        self._shard: HashedFile | None = None
        index_bytes = (self.documents + 1) * INDEX_DTYPE.itemsize if self.documents else 0
        self._index = HashedFile(directory / f"{split}-documents.bin", keep=index_bytes)
        if begun := self.tokens % shard_tokens:
            self._shard = HashedFile(self._next_shard(), keep=begun * dtype.itemsize)

    def add(self, tokens: np.ndarray, lengths: np.ndarray, characters: int, bytes: int) -> None:
        """Append documents laid end to end in `tokens`, of `lengths` tokens each, made from so much text."""
        assert lengths.sum() == len(tokens)
        if not self.documents:
            self._index.write(np.zeros(1, dtype=INDEX_DTYPE))
        self._index.write((self.tokens + np.cumsum(lengths)).astype(INDEX_DTYPE))
        self.documents += len(lengths)
        self.characters += characters
        self.bytes += bytes
        self.longest_document = max(self.longest_document, int(lengths.max(initial=0)))
        while len(tokens):
            room = self.shard_tokens - self.tokens % self.shard_tokens
            if self._shard is None:
                self._shard = HashedFile(self._next_shard())
            self._shard.write(tokens[:room].astype(self.dtype))
            self.tokens += len(tokens[:room])
            if len(tokens) >= room:
                self._shards.append(self._shard.close())
                self._shard = None
            tokens = tokens[room:]

    def state(self) -> WriterState:
        """Returns what another writer needs to go on from here, once the disk has all that was written."""
        for file in (self._index, self._shard):
            if file is not None:
                file.sync()
        counts = (self.documents, self.tokens, self.characters, self.bytes, self.longest_document)
        return WriterState(*counts, tuple(self._shards))

    def finish(self) -> SplitManifest:
        """Close the files and describe them."""
        if self._shard is not None:
            self._shards.append(self._shard.close())
            self._shard = None
        return SplitManifest(
            self.documents,
            self.tokens,
            self.characters,
            self.bytes,
            self.longest_document,
            self.shard_tokens,
            tuple(self._shards),
            self._index.close(),
        )

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for file in (self._index, self._shard):
            if file is not None:
                file.release()

    def _next_shard(self) -> Path:
        return self.directory / f"{self.split}-{len(self._shards):05d}.bin"


class HashedFile:
    """A file that knows its SHA-256 when it is closed. `keep`: bytes of an earlier one to go on behind."""

    def __init__(self, path: Path, keep: int = 0) -> None:
        self.path = path
        # Unbuffered, so that a full disk shows at the write that meets it and never again when the file is closed.
        self._file: BinaryIO = open(path, "r+b" if keep else "wb", buffering=0)  # noqa: SIM115 - close() or release()
        self._digest = hashlib.sha256()
        self._bytes = 0
        while self._bytes < keep and (piece := self._file.read(min(keep - self._bytes, VERIFY_TOKENS))):
            self._digest.update(piece)
            self._bytes += len(piece)
        if self._bytes < keep:
            self.release()
            raise ValueError(f"{path} has {self._bytes} bytes, and {keep} had been written; prepare the data again")
        self._file.truncate(keep)

    def write(self, array: np.ndarray) -> None:
        view = np.ascontiguousarray(array).view(np.uint8).data
        self._digest.update(view)
        self._bytes += len(view)
        while len(view):  # a raw write may take only a part
            view = view[self._file.write(view) :]

    def sync(self) -> None:
        """Wait until the disk has all of it."""
        os.fsync(self._file.fileno())

    def close(self) -> DataFile:
        self.sync()
        self._file.close()
        return DataFile(self.path.name, self._bytes, self._digest.hexdigest())

    def release(self) -> None:
        self._file.close()


def _check_tokenizer(manifest: Manifest, tokenizer: Tokenizer, data_dir: Path) -> None:
    if tokenizer.hash != manifest.tokenizer_hash:
        raise ValueError(
            f"the tokenizer (hash {tokenizer.hash[:12]}) is not the one that made {data_dir} "
            f"(hash {manifest.tokenizer_hash[:12]}); use {data_dir}/tokenizer, or prepare the data again"
        )


def _split_from_json(values: dict[str, Any]) -> SplitManifest:
    shards = tuple(DataFile(**shard) for shard in values.pop("shards"))
    return SplitManifest(shards=shards, index=DataFile(**values.pop("index")), **values)
