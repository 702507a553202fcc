"""Several data directories as one: the parts that several machines prepared of one corpus, or one corpus after another.

Documents are copied, never encoded again, in pieces of some megabytes. Knows nothing of text or rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llamita.data.shards import (
    GROUP_BYTES,
    INDEX_DTYPE,
    MANIFEST,
    Manifest,
    Part,
    SplitManifest,
    SplitWriter,
    TokenShards,
    check_output,
    load_tokenizer,
)
from llamita.storage import files

PIECE_TOKENS = 1 << 22
SPLITS = ("train", "validation")
JOINED = ("files", "validation_files")

Stretch = tuple[int, int, int]
"""Documents of one directory: its number, the first of them, and the one behind the last."""


def merge(directories: Sequence[Path], output: Path, overwrite: bool = False) -> Manifest:
    """Write one data directory that holds what lies in several, and return its manifest.

    Parts (llamita prepare --shard i/n), in any order, become what one preparation of the whole text would have written,
    byte for byte. Whole directories follow each other as they are given, as if their files had been prepared at once.
    ValueError where a part is missing, where they were not made by the same tokenizer and options, and for a damaged
    directory; FileExistsError for an output that exists.
    """
    if len(directories) < 2:
        raise ValueError(f"there are {len(directories)} data directories to merge; give two or more")
    manifests = [Manifest.load(directory) for directory in directories]
    _check_alike(directories, manifests)
    check_output(output, overwrite)
    parts = [manifest.part for manifest in manifests]
    if any(parts):
        order = _check_parts(directories, manifests)
        directories, manifests = [directories[place] for place in order], [manifests[place] for place in order]
        groups = [_groups(place, manifest.part) for place, manifest in zip(directories, manifests, strict=True)]
        empty, source = manifests[0].empty_documents, manifests[0].source  # each machine has read all of the text
    else:
        groups = []
        empty, source = sum(manifest.empty_documents for manifest in manifests), _joined(manifests)
    tokenizer = load_tokenizer(directories[0])
    splits = {}
    with files.atomic_directory(output, overwrite=overwrite) as temporary, ExitStack() as stack:
        for number, split in enumerate(SPLITS):
            shards = {
                place: TokenShards(directory, split)
                for place, (directory, manifest) in enumerate(zip(directories, manifests, strict=True))
                if split in manifest.splits
            }
            if not shards:
                continue
            infos = [manifests[place].splits[split] for place in shards]
            if groups and len({info.shard_tokens for info in infos}) > 1:
                raise ValueError("the parts differ in --shard-tokens; prepare some of them again")
            writer = SplitWriter(temporary, split, np.dtype(manifests[0].dtype), infos[0].shard_tokens)
            stack.enter_context(writer)
            in_turn = (
                _dealt([group[:, number] for group in groups])
                if groups
                else ((place, 0, info.documents) for place, info in zip(shards, infos, strict=True))
            )
            for place, first, end in in_turn:
                _copy(shards[place], first, end, writer)
            writer.characters = sum(info.characters for info in infos)
            writer.bytes = sum(info.bytes for info in infos)
            splits[split] = _finished(writer, infos)
        manifest = replace(manifests[0], empty_documents=empty, source=source, splits=splits, part=None)
        tokenizer.save(temporary / "tokenizer")
        files.atomic_write(temporary / MANIFEST, manifest.to_json())
    return manifest


def _dealt(groups: Sequence[np.ndarray]) -> Iterator[Stretch]:
    """The documents of each part's groups (int64 [groups]), a group of one part after one of the next, in turn."""
    at = [0] * len(groups)
    for turn in range(len(groups[0])):
        for part, counts in enumerate(groups):
            if turn < len(counts) and counts[turn]:
                yield part, at[part], at[part] + int(counts[turn])
                at[part] += int(counts[turn])


def _copy(shards: TokenShards, first: int, end: int, writer: SplitWriter) -> None:
    starts = shards.document_starts
    while first < end:
        limit = int(starts[first]) + PIECE_TOKENS
        stop = min(end, max(first + 1, int(np.searchsorted(starts, limit, side="right")) - 1))
        bounds = np.asarray(starts[first : stop + 1]).astype(np.int64)
        writer.add(shards.window(int(bounds[0]), int(bounds[-1] - bounds[0])), np.diff(bounds), 0, 0)
        first = stop


def _finished(writer: SplitWriter, infos: Sequence[SplitManifest]) -> SplitManifest:
    found = writer.finish()
    if (found.documents, found.tokens) != (sum(i.documents for i in infos), sum(i.tokens for i in infos)):
        raise ValueError(f"the groups of the parts do not add up to their {writer.split} splits; prepare them again")
    return found


def _groups(directory: Path, part: Part | None) -> np.ndarray:
    """The documents of each group in the two splits: int64 [groups, 2]."""
    assert part is not None
    path = directory / part.groups.file
    if not path.is_file() or files.sha256(path) != part.groups.sha256:
        raise ValueError(f"{path} is missing or has changed; prepare the part again")
    return np.fromfile(path, dtype=INDEX_DTYPE).reshape(-1, 2)


def _check_alike(directories: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    for directory, manifest in zip(directories[1:], manifests[1:], strict=True):
        if manifest.tokenizer_hash != manifests[0].tokenizer_hash:
            raise ValueError(f"{directories[0]} and {directory} were not made by the same tokenizer")
        for name in ("adds_bos", "adds_eos"):
            if getattr(manifest, name) != getattr(manifests[0], name):
                raise ValueError(f"{directories[0]} and {directory} differ in {name}; prepare one of them again")


def _check_parts(directories: Sequence[Path], manifests: Sequence[Manifest]) -> list[int]:
    """The places of the parts in the order of their numbers; ValueError where they are not all parts of one corpus."""
    numbers: dict[int, int] = {}
    first = manifests[0]
    for place, (directory, manifest) in enumerate(zip(directories, manifests, strict=True)):
        if manifest.part is None or first.part is None:
            whole = directory if manifest.part is None else directories[0]
            raise ValueError(f"{whole} is not a part of a corpus, and others are; merge parts and whole ones apart")
        if _corpus(manifest) != _corpus(first):
            raise ValueError(f"{directories[0]} and {directory} are not parts of the same text, split in the same way")
        if manifest.part.number in numbers:
            raise ValueError(f"{directories[numbers[manifest.part.number]]} and {directory} are the same part")
        numbers[manifest.part.number] = place
    assert first.part is not None
    if missing := sorted(set(range(1, first.part.of + 1)) - numbers.keys()):
        raise ValueError(f"part {missing[0]}/{first.part.of} is missing; give all {first.part.of} parts")
    order = [numbers[number] for number in sorted(numbers)]
    counts = [manifests[place].part.groups.bytes for place in order]  # type: ignore[union-attr]
    if sorted(counts, reverse=True) != counts or counts[0] - counts[-1] > GROUP_BYTES:
        raise ValueError("the parts have not read the same text: some have more groups of documents than they can")
    return order


def _corpus(manifest: Manifest) -> tuple[Any, ...]:
    """What all parts of a corpus have in common."""
    part = manifest.part
    assert part is not None
    return manifest.source, manifest.empty_documents, part.of, part.group_characters, part.group_documents


def _joined(manifests: Sequence[Manifest]) -> dict[str, Any]:
    """The options of a preparation of all files at once or, where there is none, those of each directory."""
    sources = [manifest.source for manifest in manifests]
    rest = [{name: value for name, value in source.items() if name not in JOINED} for source in sources]
    at_once = rest[0].get("source") in ("text", "wikitext", "jsonl") and rest[0].get("split") != "tail"
    if at_once and rest[0].get("documents") is None and all(other == rest[0] for other in rest):
        return {**sources[0], **{name: [path for source in sources for path in source[name]] for name in JOINED}}
    return {"merged": sources}
