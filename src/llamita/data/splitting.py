"""The split into training and validation documents: a share by hash, the tail of the text, or a source of their own.

Knows nothing about tokens or files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Literal

from llamita.data import sources
from llamita.data.sources import Source

TRAIN, VALIDATION = "train", "validation"

HowToSplit = Literal["document", "tail"]


class SplitText:
    """The (split, document) pairs of a corpus, in order; documents without text are left out and counted.

    With a `validation` source, each source is a split. Otherwise `share` of `train` validates: by `document`, each
    goes to one side by a hash of its text and the seed, so equal documents never lie on both; or `tail`, the last share
    of all characters, cutting even inside a document, as nanoGPT does (the source is read twice, once to count).
    """

    def __init__(self, train: Source, validation: Source | None, share: float, how: HowToSplit, seed: int) -> None:
        if how not in ("document", "tail"):
            raise ValueError(f"split={how!r} is not a way to split; use document or tail")
        self.train = train
        self.validation = validation
        self.share = share
        self.how = how
        self.seed = seed
        self.empty_documents = 0

    def check(self) -> None:
        """Raise for sources that can be known to fail before anything is read."""
        for source in self._sources:
            source.check()

    @property
    def wants_validation(self) -> bool:
        return self.validation is not None or self.share > 0

    @property
    def total_bytes(self) -> int | None:
        """About the bytes of all documents, where it is known."""
        sizes = [source.total_bytes for source in self._sources]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        self.empty_documents = 0
        for split, text in self._all():
            if text and not text.isspace():
                yield split, text
            else:
                self.empty_documents += 1

    @property
    def _sources(self) -> list[Source]:
        return [source for source in (self.train, self.validation) if source is not None]

    def _all(self) -> Iterator[tuple[str, str]]:
        if self.validation is not None or self.share == 0:
            for split, source in zip((TRAIN, VALIDATION), self._sources, strict=False):
                for text in sources.documents(source):
                    yield split, text
        elif self.how == "tail":
            yield from self._with_tail()
        else:
            for text in sources.documents(self.train):
                yield self._split_of(text), text

    def _split_of(self, text: str) -> str:
        digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(self.seed).encode()).digest()
        return VALIDATION if int.from_bytes(digest, "little") < self.share * 2**64 else TRAIN

    def _with_tail(self) -> Iterator[tuple[str, str]]:
        remaining = int(sum(len(text) for text in sources.documents(self.train)) * (1 - self.share))
        for text in sources.documents(self.train):
            if remaining >= len(text):
                yield TRAIN, text
            elif remaining > 0:
                yield TRAIN, text[:remaining]
                yield VALIDATION, text[remaining:]
            else:
                yield VALIDATION, text
            remaining = max(0, remaining - len(text))
