"""Arrays on the host: a dtype by its safetensors name, a shape, and bytes, since numpy has no bfloat16."""

import mmap
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
NUMPY_TYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
}
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
FLOATING = ("F32", "BF16", "F16", "F64")
"""The types that weights may have."""


@dataclass(frozen=True)
class PackedRows:
    """The rows of a matrix in blocks of some numbers with a scale, as a file has them."""

    kind: str
    """GGUF's name for the blocks."""
    read: Callable[[], np.ndarray]
    """Returns the bytes of all rows, uint8 (rows, bytes of a row)."""


@dataclass(frozen=True)
class HostArray:
    """An array in host memory or in a mapped file: little-endian, row-major bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview
    mapping: mmap.mmap | None = field(default=None, repr=False)
    """The file that the bytes are mapped from, and where in it they begin."""
    offset: int = 0

    @classmethod
    def from_numpy(cls, array: np.ndarray) -> "HostArray":
        names = {np.dtype(code): name for name, code in NUMPY_TYPES.items()}
        return cls(names[array.dtype], array.shape, _bytes_of(array))

    @classmethod
    def from_bf16_bits(cls, bits: np.ndarray) -> "HostArray":
        """An array of bfloat16 given as uint16 bit patterns."""
        return cls("BF16", bits.shape, _bytes_of(bits))

    def raw(self) -> np.ndarray:
        """A numpy array over the bytes; bfloat16 as the bit patterns that numpy has no type for."""
        code = "<u2" if self.dtype == "BF16" else NUMPY_TYPES[self.dtype]
        return np.frombuffer(self.data, dtype=code).reshape(self.shape)

    def to_numpy(self) -> np.ndarray:
        """As `raw`, but for bfloat16, which is widened to float32."""
        return (self.raw().astype(np.uint32) << 16).view(np.float32) if self.dtype == "BF16" else self.raw()

    def with_numbers(self, numbers: np.ndarray) -> "HostArray":
        """An array of the same type with other numbers, as `raw` gives them."""
        return HostArray(self.dtype, numbers.shape, _bytes_of(numbers))

    def rows(self, wanted: slice | np.ndarray) -> "HostArray":
        """Some of the rows along the first dimension: a slice without a step, or whole numbers of any order."""
        return self.with_numbers(self.raw()[wanted])

    @property
    def stays_readable(self) -> bool:
        """Whether rows can be read at any time at no cost in memory: a file has the numbers."""
        return self.mapping is not None

    @property
    def packed(self) -> "PackedRows | None":
        """The rows as their file has them, where that is no number type of ours."""
        return None

    def forget(self, start: int, stop: int) -> None:
        """Give the memory of bytes that were read back to the system, where a file can give them again."""
        if self.mapping is not None:
            forget_mapped(self.mapping, self.offset + start, self.offset + stop)


class ComputedArray(HostArray):
    """An array whose bytes are computed when they are read, and again after `forget`: of many, few are in memory."""

    _compute: Callable[[slice | np.ndarray], np.ndarray]
    _bytes: memoryview | None
    _packed: PackedRows | None

    def __init__(
        self,
        dtype: str,
        shape: tuple[int, ...],
        compute: Callable[[slice | np.ndarray], np.ndarray],
        packed: PackedRows | None = None,
    ) -> None:
        """`compute` returns the rows it is asked for, as `rows` is; uint16 bit patterns where `dtype` is BF16."""
        values = {"dtype": dtype, "shape": shape, "mapping": None, "offset": 0, "_compute": compute, "_bytes": None}
        for name, value in {**values, "_packed": packed}.items():
            object.__setattr__(self, name, value)

    @property
    def packed(self) -> PackedRows | None:
        return self._packed

    @property
    def data(self) -> memoryview:
        if self._bytes is None:
            object.__setattr__(self, "_bytes", _bytes_of(self._compute(slice(None))))
        assert self._bytes is not None
        return self._bytes

    def rows(self, wanted: slice | np.ndarray) -> HostArray:
        return self.with_numbers(self._compute(wanted))

    @property
    def stays_readable(self) -> bool:
        return True

    def forget(self, start: int, stop: int) -> None:
        object.__setattr__(self, "_bytes", None)


def forget_mapped(mapping: mmap.mmap, start: int, stop: int) -> None:
    """Give the memory of the whole pages of a mapped file between two bytes back to the system."""
    page = mmap.PAGESIZE
    first, last = -(-start // page) * page, stop // page * page
    if first < last:
        mapping.madvise(mmap.MADV_DONTNEED, first, last - first)


def _bytes_of(array: np.ndarray) -> memoryview:
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint8).data
