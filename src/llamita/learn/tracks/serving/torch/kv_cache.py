"""The cache of one layer and one text: keys and values that need not be computed again.

Letters: N rows of the batch, H heads of keys and values, L new positions, S all positions, E size of a head.
"""

import torch
from torch import Tensor


class KvCache:
    """The keys and values of one layer."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        """(N, H, S, E), None before the first."""
        self.value: Tensor | None = None
        self.offset = 0
        """S: how many positions it holds, and so the position that comes next."""

    def update_and_fetch(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, str]:
        """Takes the keys and values of the next L positions, (N, H, L, E), and returns all, (N, H, S, E).

        The third result is the mask for them, "causal". `offset` counts the new positions from then on.
        """
        # to do: keep the new ones behind those that there are.
        self.key = key if self.key is None else torch.cat((self.key, key), dim=2)
        self.value = value if self.value is None else torch.cat((self.value, value), dim=2)
        self.offset += key.shape[2]
        return self.key, self.value, "causal"
        # done

    def rewind(self, n: int) -> None:
        """Forgets the last n positions, as if they had never been given. n is at most `offset`, and may be 0.

        It is called after `update_and_fetch` only. Where nothing is left, the arrays may have S = 0 or be None.
        """
        # to do: three lines; mind n = 0.
        self.offset -= n
        if self.key is not None and self.value is not None:
            self.key, self.value = self.key[:, :, : self.offset], self.value[:, :, : self.offset]
        # done
