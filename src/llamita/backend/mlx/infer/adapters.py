"""Several adapters over one model in one batch: each row goes through its own, or through none.

The base's product is taken for all rows at once; then the rows of each adapter are changed, and no other row is
touched. Knows nothing of requests: it is told the adapter of each row.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import mlx.core as mx

from llamita.backend.mlx.model import lora
from llamita.backend.mlx.model.llama import Llama
from llamita.backend.mlx.model.weights import array_from_host
from llamita.model.lora import Adapter


class Serving:
    """Adapters by name, on every model that they were attached to; `rows` says who goes through which."""

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        self.adapters = dict(adapters)
        self.groups: list[tuple[str, mx.array | None]] = []
        """The rows of each adapter in use; None: all of them."""

    def attach(self, model: Llama) -> None:
        """Put all adapters on a model, in its type."""
        dtype = model.model.norm.weight.dtype
        found: dict[str, dict[str, lora.Change]] = {}
        for name, adapter in self.adapters.items():
            values = {key: array_from_host(array) for key, array in adapter.arrays.items()}
            for matrix, change in lora.changes_of(model, adapter.factors, values, dtype).items():
                found.setdefault(matrix, {})[name] = change
        for matrix, changes in found.items():
            lora.linear_of(model, matrix).change = _Routed(self, changes)

    @contextlib.contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Meanwhile the model is given so many rows, each of the adapter of this name, or of none; where all have the
        same, it may be given any number."""
        places: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            if name is not None:
                places.setdefault(name, []).append(row)
        self.groups = [
            (name, None if len(rows) == len(names) else mx.array(rows, mx.int32)) for name, rows in places.items()
        ]
        try:
            yield
        finally:
            self.groups = []


class _Routed:
    """The adapters of one packed matrix."""

    def __init__(self, serving: Serving, changes: Mapping[str, lora.Change]) -> None:
        self.serving, self.changes = serving, changes

    def __call__(self, x: mx.array, y: mx.array) -> mx.array:
        """The output with the rows of each adapter changed."""
        rows_x_RD, rows_y_RC = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        for name, rows_M in self.serving.groups:
            change = self.changes.get(name)
            if change is None:
                continue
            if rows_M is None:
                rows_y_RC = change(rows_x_RD, rows_y_RC)
            else:
                rows_y_RC[rows_M] = change(rows_x_RD[rows_M], rows_y_RC[rows_M])
        return rows_y_RC.reshape(y.shape)
