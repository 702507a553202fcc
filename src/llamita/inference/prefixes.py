"""What a cached block is known by: its own tokens after those of all blocks before it. Knows nothing of memory."""

import hashlib
import weakref
from collections.abc import Callable, Sequence

import numpy as np


def chained_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """SHA-256 over a block's tokens and the key of all blocks before it."""
    return hashlib.sha256(parent + np.asarray(tokens, dtype=np.int32).tobytes()).digest()


class Prefix:
    """The tokens of a full block after those of all blocks before it; the same tokens give the same object."""

    __slots__ = ("__weakref__", "key", "parent", "tokens")

    def __init__(self, key: bytes, parent: "Prefix | None", tokens: tuple[int, ...]) -> None:
        self.key, self.parent, self.tokens = key, parent, tokens


class Prefixes:
    """Finds prefixes by their key. A key that stands for other tokens gives no wrong prefix, only a new one."""

    def __init__(self, key: Callable[[bytes, Sequence[int]], bytes] = chained_key) -> None:
        self._key = key
        self._roots: dict[str, Prefix] = {}
        self._known: weakref.WeakValueDictionary[bytes, Prefix] = weakref.WeakValueDictionary()

    def known(self, parent: Prefix | None, tokens: Sequence[int]) -> Prefix | None:
        """The prefix that has one block more than `parent`, while a block or a longer prefix keeps it alive."""
        found = self._known.get(self._key(b"" if parent is None else parent.key, tokens))
        return found if found is not None and found.parent is parent and found.tokens == tuple(tokens) else None

    def extend(self, parent: Prefix | None, tokens: Sequence[int]) -> Prefix:
        """The prefix that has one block more than `parent`."""
        found = self.known(parent, tokens)
        if found is None:
            found = Prefix(self._key(b"" if parent is None else parent.key, tokens), parent, tuple(tokens))
            self._known.setdefault(found.key, found)
        return found

    def root(self, adapter: str | None) -> Prefix | None:
        """What the prefixes of an adapter's texts begin with, so that they are never those of another's."""
        if adapter is None:
            return None
        key = hashlib.sha256(b"adapter " + adapter.encode()).digest()
        return self._roots.setdefault(adapter, Prefix(key, None, ()))
