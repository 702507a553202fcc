"""Several adapters over one model in one batch: each row goes through its own, or through none.

The base's product is taken for all rows at once; then the rows of each adapter are changed, and no other row is
touched. Knows nothing of requests: it is told the adapter of each row.

Letters beyond the usual: R rows of a forward pass (in A and B: the rank), M rows of one adapter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamita.backend.step_layout import rows_of_adapters
from llamita.backend.torch.infer import exact
from llamita.backend.torch.infer.kv_cache import EXACT_ROWS
from llamita.backend.torch.model import lora
from llamita.backend.torch.model.layers import Adapters


@dataclass(frozen=True)
class AdapterRows:
    """The rows of one forward pass, all positions counted, that go through each adapter; the others through none.

    An adapter is given a `multiple` of rows, zeros added.
    """

    groups: Sequence[tuple[lora.ModelAdapter, Tensor]]
    multiple: int = 1

    def changed(self, matrix: str, x: Tensor, y: Tensor) -> Tensor:
        """Returns the output with the rows of each adapter changed; written into the product's own memory."""
        rows_x_RD, rows_y_RC = x.flatten(0, -2), y.flatten(0, -2)
        for adapter, rows_M in self.groups:
            if matrix in adapter.changes:
                padding = (0, 0, 0, -len(rows_M) % self.multiple)
                x_MD, y_MC = F.pad(rows_x_RD[rows_M], padding), F.pad(rows_y_RC[rows_M], padding)
                rows_y_RC.index_copy_(0, rows_M, adapter.changed(matrix, x_MD, y_MC)[: len(rows_M)])
        return rows_y_RC.view(y.shape)


def adapters_of_rows(
    adapters: Mapping[str, lora.ModelAdapter], names: Sequence[str | None], device: torch.device, multiple: int = 1
) -> Adapters | None:
    """Returns the adapters of a forward pass over so many rows, each row going through that of its name, or none."""
    found = rows_of_adapters(names)
    if not found:
        return None
    if len(set(names)) == 1:
        return adapters[next(iter(found))]
    groups = [(adapters[name], torch.tensor(rows, device=device)) for name, rows in found.items()]
    return AdapterRows(groups, multiple)


def exact_adapter(adapter: lora.ModelAdapter) -> lora.ModelAdapter:
    """Returns the same adapter with ranks of a multiple of 16, zeros added, and the exact mode's product: a row's
    result depends on that row alone."""
    return lora.ModelAdapter({matrix: _exact_change(change) for matrix, change in adapter.changes.items()})


def _exact_change(change: lora.Change) -> lora.Change:
    parts = []
    for part in change.parts:
        lacking = -part.down_RD.shape[0] % EXACT_ROWS
        down_RD, up_CR = F.pad(part.down_RD, (0, 0, 0, lacking)), F.pad(part.up_CR, (0, lacking))
        parts.append(replace(part, down_RD=nn.Parameter(down_RD), up_CR=nn.Parameter(up_CR)))
    return lora.Change(parts, change.sizes, exact.linear)
