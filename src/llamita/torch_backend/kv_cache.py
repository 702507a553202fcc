"""A contiguous key/value cache: one slot per position, one row per sequence; rings of slots for sliding windows.

Attention needs one verb of a cache, `update`; knows nothing of models or requests.
"""

import torch
from torch import Tensor

from llamita.config import ModelConfig
from llamita.plan import LONGEST_CHUNK


class KVCache:
    """Keys and values of every layer, (B, K, slots, H) each.

    A layer that sees everything has `capacity` slots, the position being the slot. One with a sliding window has a ring
    of `window_slots`, no more than the window and one chunk of new tokens need; position p is in slot p modulo their
    number. `length` counts the positions filled alike in all rows; the next tokens go there unless positions are given.
    Rows of different length need no padding in the cache: what a shorter row holds past its end is never seen by its
    queries, and is overwritten when its next token comes.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        longest_chunk: int = LONGEST_CHUNK,
    ) -> None:
        self.capacity = capacity
        self.window = config.sliding_window
        self.window_slots = min(capacity, self.window + longest_chunk - 1) if self.window else capacity
        slots = [self.window_slots if config.window(layer) else capacity for layer in range(config.num_hidden_layers)]
        shapes = [(batch_size, config.num_key_value_heads, count, config.head_dim) for count in slots]
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.length = 0
        self._written = 0  # positions once filled, those included that were forgotten

    def check_room(self, new: int, stop: int) -> None:
        """Raise ValueError where `new` tokens that end before position `stop` cannot go in."""
        if stop > self.capacity:
            raise ValueError(f"{stop} positions do not fit a cache of {self.capacity}; make it larger")
        if self.window_slots < min(self.capacity, self.window + new - 1):
            most = self.window_slots - self.window + 1
            raise ValueError(f"{new} tokens at once are too many for this sliding window; give at most {most}")

    def update(
        self, layer: int, key_BKTH: Tensor, value_BKTH: Tensor, positions_BT: Tensor | None, stop: int
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values and return all slots filled, (B, K, stop or fewer, H) each.

        Without positions the new ones are stop - T .. stop of every row; with them, each its own.
        """
        keys, values = self.keys[layer], self.values[layer]
        slots, T = keys.shape[2], key_BKTH.shape[2]
        self._written = max(self._written, stop)
        if positions_BT is not None:
            rows_B1 = torch.arange(positions_BT.shape[0], device=positions_BT.device)[:, None]
            keys[rows_B1, :, positions_BT % slots] = key_BKTH.transpose(1, 2).to(keys.dtype)
            values[rows_B1, :, positions_BT % slots] = value_BKTH.transpose(1, 2).to(values.dtype)
        elif stop <= slots:
            keys[:, :, stop - T : stop] = key_BKTH
            values[:, :, stop - T : stop] = value_BKTH
        else:
            slots_T = torch.arange(stop - T, stop, device=keys.device) % slots
            keys.index_copy_(2, slots_T, key_BKTH.to(keys.dtype))
            values.index_copy_(2, slots_T, value_BKTH.to(values.dtype))
        return keys[:, :, :stop], values[:, :, :stop]

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on; ValueError where a window before them has been overwritten."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length={length} must lie in 0..{self.length}, the positions held")
        if length and self.window and max(0, length - self.window + 1) + self.window_slots < self._written:
            raise ValueError(f"the positions before {length} have left the sliding window's cache; begin at 0")
        self.length = length
        if length == 0:
            self._written = 0
