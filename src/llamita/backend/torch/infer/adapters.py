"""Several adapters over one model in one batch: each row goes through its own, or through none.

The base's product is taken for all rows at once; then the rows of each adapter are changed, and no other row is
touched. Knows nothing of requests: it is told the adapter of each row.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamita.backend.torch.infer import exact
from llamita.backend.torch.infer.kv_cache import EXACT_ROWS
from llamita.backend.torch.model import lora
from llamita.backend.torch.model.llama import Llama
from llamita.backend.torch.model.weights import tensor_from_host
from llamita.model.lora import Adapter


class Serving:
    """Adapters by name, on every model that they were attached to; `rows` says who goes through which."""

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        self.adapters = dict(adapters)
        self.groups: list[tuple[str, Tensor | None]] = []
        """The rows of each adapter in use; None: all of them."""

    def attach(self, model: Llama, exactly: bool = False) -> None:
        """Put all adapters on a model, in its type. `exactly`: a row's result then hangs on that row alone."""
        dtype = model.model.norm.weight.dtype
        found: dict[str, dict[str, lora.Change]] = {}
        for name, adapter in self.adapters.items():
            values = {key: tensor_from_host(array) for key, array in adapter.arrays.items()}
            for matrix, change in lora.changes_of(model, adapter.factors, values, dtype).items():
                found.setdefault(matrix, {})[name] = _exact_change(change) if exactly else change
        for matrix, changes in found.items():
            lora.linear_of(model, matrix).change = _Routed(self, changes, EXACT_ROWS if exactly else 1)

    @contextlib.contextmanager
    def rows(self, names: Sequence[str | None], device: torch.device) -> Iterator[None]:
        """Meanwhile the model is given so many rows, each of the adapter of this name, or of none."""
        places: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            if name is not None:
                places.setdefault(name, []).append(row)
        self.groups = [
            (name, None if len(rows) == len(names) else torch.tensor(rows, device=device))
            for name, rows in places.items()
        ]
        try:
            yield
        finally:
            self.groups = []


class _Routed:
    """The adapters of one packed matrix."""

    def __init__(self, serving: Serving, changes: Mapping[str, lora.Change], multiple: int) -> None:
        self.serving, self.changes, self.multiple = serving, changes, multiple

    def __call__(self, x: Tensor, y: Tensor, training: bool) -> Tensor:
        """The output with the rows of each adapter changed; written into the product's own memory."""
        rows_x_RD, rows_y_RC = x.flatten(0, -2), y.flatten(0, -2)
        for name, rows_M in self.serving.groups:
            change = self.changes.get(name)
            if change is None:
                continue
            if rows_M is None:
                rows_y_RC = change(rows_x_RD, rows_y_RC, training)
                continue
            padding = (0, 0, 0, -len(rows_M) % self.multiple)
            x_MD, y_MC = F.pad(rows_x_RD[rows_M], padding), F.pad(rows_y_RC[rows_M], padding)
            rows_y_RC.index_copy_(0, rows_M, change(x_MD, y_MC, training)[: len(rows_M)])
        return rows_y_RC.view(y.shape)


def _exact_change(change: lora.Change) -> lora.Change:
    """The same with ranks of a multiple of 16, zeros added, and the exact mode's product."""
    parts = []
    for part in change.parts:
        lacking = -part.down_RD.shape[0] % EXACT_ROWS
        down_RD, up_CR = F.pad(part.down_RD, (0, 0, 0, lacking)), F.pad(part.up_CR, (0, lacking))
        parts.append(replace(part, down_RD=nn.Parameter(down_RD), up_CR=nn.Parameter(up_CR)))
    return lora.Change(parts, change.sizes, change.dropout, exact.linear)
