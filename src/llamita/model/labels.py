"""The names of a classifier's labels, as Hugging Face configs have them. Knows nothing of texts or models."""

from collections.abc import Mapping
from typing import Any


def default_labels(count: int) -> tuple[str, ...]:
    """What Hugging Face calls labels that were given no names."""
    return tuple(f"LABEL_{i}" for i in range(count))


def read_id2label(id2label: Mapping[str, Any]) -> tuple[str, ...]:
    """The names in an `id2label`; none where they say nothing, or are not a name each for 0, 1, ...."""
    names = tuple(id2label.get(str(i)) for i in range(len(id2label)))
    given = tuple(name for name in names if isinstance(name, str))
    if given != names or len(set(names)) < len(names) or names == default_labels(len(names)):
        return ()
    return given
