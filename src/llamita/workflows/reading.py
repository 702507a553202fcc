"""The sources that tuning learns from: the options that files, datasets and Meadow share, and the sources they name.

Knows nothing of what a record holds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamita.data.conversations import MEADOW, ConversationSource, for_validation
from llamita.workflows.finetune import FinetuneConfig


@dataclass(frozen=True, kw_only=True)
class ReadingConfig(FinetuneConfig):
    """The options of a kind of tuning that reads records."""

    data: tuple[str, ...] = ()
    """Files of JSON lines; or the word meadow."""
    dataset: str = ""
    """Instead of files: a dataset on the Hugging Face hub, or a local directory of one, with rows of that form."""
    dataset_config: str | None = None
    """The dataset's configuration, where it has several."""
    dataset_split: str = "train"
    """The dataset's split to read."""
    validation_share: float = 0.05
    """The share to validate on, by a hash; 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share={self.validation_share} must be at least 0 and below 1")
        if MEADOW in self.data and len(self.data) > 1:
            raise ValueError("--data meadow stands alone; give either that word or files")
        if self.data and self.dataset:
            raise ValueError("--data and --dataset are both given; choose one")
        if MEADOW in self.data and (unread := [name for name in self.unread_on_meadow if getattr(self, name)]):
            flag = unread[0].replace("_", "-")
            raise ValueError(f"--data meadow writes its own, so that --{flag} would not be read; leave it out")

    @property
    def unread_on_meadow(self) -> tuple[str, ...]:
        """Options that Meadow has no use for."""
        return ()

    @property
    def on_meadow(self) -> bool:
        return self.data == (MEADOW,)

    def require_data(self, what: str) -> None:
        if not self.data and not self.dataset:
            raise ValueError(f"--data is missing: give files of {what}, or the word meadow")

    def source(self, limit: int | None) -> ConversationSource:
        """The files or the dataset to read, at most so many records of them."""
        return ConversationSource(
            files=tuple(map(Path, self.data)),
            dataset=self.dataset,
            dataset_config=self.dataset_config,
            dataset_split=self.dataset_split,
            limit=limit,
        )

    def arguments(self) -> dict[str, Any]:
        """Files by their absolute names, so that the run can be resumed from any directory."""
        return super().arguments() | {"data": absolute(self.data), "dataset": local(self.dataset)}


@dataclass(frozen=True, kw_only=True)
class ValidatedConfig(ReadingConfig):
    """The same with records of their own to validate on, gone through so many times, and questions to answer."""

    validation_data: tuple[str, ...] = ()
    """Files to validate on, instead of a share of the others."""
    validation_dataset_split: str | None = None
    """The dataset's split to validate on, instead of a share of the other."""
    sequence_length: int = 0
    """Tokens in a row; 0: as many as are needed."""
    epochs: float = 0.0
    """Passes over all of it, instead of --steps; 0: as --steps says."""
    answers: int | None = None
    """Held-out questions to answer at each evaluation, greedily."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sequence_length", "epochs", "answers"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not math.isfinite(self.epochs):
            raise ValueError(f"epochs={self.epochs} must be a number; how often to go through the data")
        if self.validation_data and self.validation_dataset_split is not None:
            raise ValueError("--validation-data and --validation-dataset-split are both given; choose one")

    @property
    def unread_on_meadow(self) -> tuple[str, ...]:
        return ("validation_data", "validation_dataset_split")

    def sources(
        self, limit: int | None, meadow: ConversationSource, what: str
    ) -> tuple[ConversationSource, ConversationSource | None]:
        """Returns the source to train on, at most `limit` records or those of `meadow`, and the one to validate on.

        The latter is None where it is a share of the former.
        """
        self.require_data(what)
        if self.on_meadow:
            return meadow, for_validation(meadow, self.validation_share) if self.validation_share else None
        source = self.source(limit)
        source.check()
        if self.validation_data:
            validation = ConversationSource(files=tuple(map(Path, self.validation_data)))
            validation.check()
            return source, validation
        if self.validation_dataset_split is None:
            return source, None
        if not self.dataset:
            raise ValueError("--validation-dataset-split is a split of the dataset that --dataset names; give that too")
        return source, replace(source, dataset_split=self.validation_dataset_split, limit=None)

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"validation_data": absolute(self.validation_data)}


def local(dataset: str) -> str:
    """The name of a dataset of the hub, or from anywhere that of a directory with one."""
    return str(Path(dataset).resolve()) if dataset and Path(dataset).exists() else dataset


def absolute(files: Sequence[str]) -> list[str]:
    """The names of files as they are from anywhere."""
    return [name if name == MEADOW else str(Path(name).resolve()) for name in files]
