"""A contiguous key/value cache: one slot per position, one row per sequence.

Attention needs one verb of a cache, `update`; knows nothing of models or requests.
"""

import torch
from torch import Tensor

from llamita.config import ModelConfig


class KVCache:
    """Keys and values of every layer, (L, B, K, capacity, H) each. A slot's index is the position it holds.

    `length` counts the positions filled alike in all rows; the next tokens go there unless positions are given. Rows
    of different length need no padding in the cache: what a shorter row holds past its end is never seen by its
    queries, and is overwritten when its next token comes.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, capacity, config.head_dim)
        self.key_LBKSH = torch.zeros(shape, dtype=dtype, device=device)
        self.value_LBKSH = torch.zeros(shape, dtype=dtype, device=device)
        self.capacity = capacity
        self.length = 0

    def update(
        self, layer: int, key_BKTH: Tensor, value_BKTH: Tensor, positions_BT: Tensor | None, stop: int
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values and return all of the first `stop` slots, (B, K, stop, H) each.

        Without positions the new ones take the slots stop - T .. stop of every row; with them, each its own.
        """
        keys, values = self.key_LBKSH[layer], self.value_LBKSH[layer]
        if positions_BT is None:
            T = key_BKTH.shape[2]
            keys[:, :, stop - T : stop] = key_BKTH
            values[:, :, stop - T : stop] = value_BKTH
        else:
            rows_B1 = torch.arange(positions_BT.shape[0], device=positions_BT.device)[:, None]
            keys[rows_B1, :, positions_BT] = key_BKTH.transpose(1, 2).to(keys.dtype)
            values[rows_B1, :, positions_BT] = value_BKTH.transpose(1, 2).to(values.dtype)
        return keys[:, :, :stop], values[:, :, :stop]

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length={length} must lie in 0..{self.length}, the positions held")
        self.length = length
