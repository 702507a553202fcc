"""The keys and values that a layer has computed, kept so that they need not be computed again."""

import numpy as np


class KeyValueCache:
    """The keys and values of one layer, for the positions that have been read so far.

    keys and values: (batch, K, capacity, H), of which the first `length` positions are filled; the rest means nothing.
    """

    def __init__(self, batch: int, heads: int, capacity: int, head_size: int) -> None:
        self.keys = np.zeros((batch, heads, capacity, head_size), np.float32)
        self.values = np.zeros((batch, heads, capacity, head_size), np.float32)
        self.length = 0

    def extend(self, key: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Keeps the keys and values of the next T positions, and returns those of all positions so far, keys first.

        key and value: (batch, K, T, H). The two results: (batch, K, length, H), `length` counting the new ones too.
        The caller sees to it that they fit into the capacity.
        """
        # to do: write behind the filled positions, count them, and return the filled part alone.
        end = self.length + key.shape[2]
        self.keys[:, :, self.length : end] = key
        self.values[:, :, self.length : end] = value
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]
        # done
