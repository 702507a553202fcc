"""The sources that tuning learns from: the options that files, datasets and Meadow share, and the sources they name.

Knows nothing of what a record holds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from llamita.data.conversations import MEADOW, ConversationSource, for_validation
from llamita.training.config import TrainingConfig


def absolute(files: Sequence[str]) -> list[str]:
    """Returns the names of files as they are from anywhere."""
    return [name if name == MEADOW else str(Path(name).resolve()) for name in files]


def local(dataset: str) -> str:
    """Returns the name of a dataset of the hub, or from anywhere that of a directory with one."""
    return str(Path(dataset).resolve()) if dataset and Path(dataset).exists() else dataset


@dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """The records to learn from."""

    data: tuple[str, ...] = field(default=(), metadata={"saved": absolute})
    """Files of JSON lines, or of an array of such records, which may be compressed (gzip, zstd); or the word meadow."""
    dataset: str = field(default="", metadata={"saved": local})
    """Instead of files: a dataset on the Hugging Face hub, or a local directory of one, with rows of that form."""
    dataset_config: str | None = None
    """The dataset's configuration, where it has several."""
    dataset_split: str = "train"
    """The dataset's split to read."""
    skip_bad: bool = False
    """Go on without records that cannot be read or laid out as text, and count them, instead of ending at the first."""
    validation_share: float = 0.05
    """The share to validate on, by a hash of what is said; 0 for none."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share={self.validation_share} must be at least 0 and below 1")
        if MEADOW in self.data and len(self.data) > 1:
            raise ValueError("--data meadow stands alone; give either that word or files")
        if self.data and self.dataset:
            raise ValueError("--data and --dataset are both given; choose one")

    @property
    def on_meadow(self) -> bool:
        return self.data == (MEADOW,)

    def refuse_on_meadow(self, **unread: object) -> None:
        """ValueError where Meadow is read and an option is given that it has no use for."""
        given = [name for name, value in unread.items() if value]
        if self.on_meadow and given:
            flag = given[0].replace("_", "-")
            raise ValueError(f"--data meadow writes its own, so that --{flag} would not be read; leave it out")

    def require_data(self, what: str) -> None:
        if not self.data and not self.dataset:
            raise ValueError(f"--data is missing: give files of {what}, or the word meadow")

    def source(self, limit: int | None) -> ConversationSource:
        """Returns the files or the dataset to read, at most so many records of them."""
        return ConversationSource(
            files=tuple(map(Path, self.data)),
            dataset=self.dataset,
            dataset_config=self.dataset_config,
            dataset_split=self.dataset_split,
            limit=limit,
        )


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """Records of their own to validate on, instead of a share of the others; and the passes over the others."""

    validation_data: tuple[str, ...] = field(default=(), metadata={"saved": absolute})
    """Files to validate on, instead of a share of the others."""
    validation_dataset_split: str | None = None
    """The dataset's split to validate on, instead of a share of the other."""
    epochs: float = 0.0
    """Passes over the records to learn from, instead of --steps; 0: as --steps says."""

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ValueError(f"epochs={self.epochs} must not be negative")
        if not math.isfinite(self.epochs):
            raise ValueError(f"epochs={self.epochs} must be a number; how often to go through the data")
        if self.validation_data and self.validation_dataset_split is not None:
            raise ValueError("--validation-data and --validation-dataset-split are both given; choose one")

    def sources(
        self, reading: ReadingConfig, limit: int | None, meadow: ConversationSource, what: str
    ) -> tuple[ConversationSource, ConversationSource | None]:
        """Returns the source to train on, at most `limit` records or those of `meadow`, and the one to validate on.

        The latter is None where it is a share of the former.
        """
        reading.require_data(what)
        reading.refuse_on_meadow(
            validation_data=self.validation_data, validation_dataset_split=self.validation_dataset_split
        )
        if reading.on_meadow:
            return meadow, for_validation(meadow, reading.validation_share) if reading.validation_share else None
        source = reading.source(limit)
        source.check()
        if self.validation_data:
            validation = ConversationSource(files=tuple(map(Path, self.validation_data)))
            validation.check()
            return source, validation
        if self.validation_dataset_split is None:
            return source, None
        if not reading.dataset:
            raise ValueError("--validation-dataset-split is a split of the dataset that --dataset names; give that too")
        return source, replace(source, dataset_split=self.validation_dataset_split, limit=None)

    def updates(self, training: TrainingConfig, rows: int) -> TrainingConfig:
        """Returns the training with as many updates as the passes over so many rows take."""
        return replace(training, steps=math.ceil(self.epochs * rows / training.batch_size)) if self.epochs else training
