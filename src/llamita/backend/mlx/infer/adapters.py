"""Several adapters over one model in one batch: each row goes through its own, or through none.

The base's product is taken for all rows at once; then the rows of each adapter are changed, and no other row is
touched. Knows nothing of requests: it is told the adapter of each row.

Letters beyond the usual: R rows of a forward pass, M rows of one adapter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from llamita.backend.mlx.model import lora
from llamita.backend.mlx.model.layers import Adapters
from llamita.backend.step_layout import rows_of_adapters


@dataclass(frozen=True)
class AdapterRows:
    """The rows of one forward pass, all positions counted, that go through each adapter; the others through none."""

    groups: Sequence[tuple[lora.ModelAdapter, mx.array]]

    def changed(self, matrix: str, x: mx.array, y: mx.array) -> mx.array:
        """Returns the output with the rows of each adapter changed."""
        rows_x_RD, rows_y_RC = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        for adapter, rows_M in self.groups:
            if matrix in adapter.changes:
                rows_y_RC[rows_M] = adapter.changed(matrix, rows_x_RD[rows_M], rows_y_RC[rows_M])
        return rows_y_RC.reshape(y.shape)


def adapters_of_rows(adapters: Mapping[str, lora.ModelAdapter], names: Sequence[str | None]) -> Adapters | None:
    """Returns the adapters of a forward pass over so many rows, each row going through that of its name, or none."""
    found = rows_of_adapters(names)
    if not found:
        return None
    if len(set(names)) == 1:
        return adapters[next(iter(found))]
    return AdapterRows([(adapters[name], mx.array(rows, mx.int32)) for name, rows in found.items()])
