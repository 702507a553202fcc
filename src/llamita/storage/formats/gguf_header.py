"""The header of a GGUF file, walked through once so that no count or length in it is believed.

The library that reads the files afterwards trusts them, and would loop or allocate without end.
"""

import math
import struct
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType as Kind

MAX_COUNT = 10_000_000
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9


def check_lengths(path: Path) -> None:
    """Walk through the header: every count and length must lie within the file, before anything trusts it."""
    size = path.stat().st_size
    with open(path, "rb") as file:

        def take(form: str) -> int:
            content = file.read(struct.calcsize(form))
            if len(content) < struct.calcsize(form):
                raise ValueError(f"{path} is truncated: it ends inside its header, at byte {file.tell()}")
            return int(struct.unpack(form, content)[0]) if form != "<8x" else 0

        def skip(count: int) -> None:
            if count < 0 or count > size - file.tell():
                raise ValueError(
                    f"{path} is truncated or damaged: {count} bytes from byte {file.tell()} on are missing"
                )
            file.seek(count, 1)

        def skip_value(kind: int, depth: int = 0) -> None:
            if kind in SCALAR_BYTES:
                skip(SCALAR_BYTES[kind])
            elif kind == STRING:
                skip(take("<Q"))
            elif kind == ARRAY and depth == 0:
                inner, count = take("<I"), take("<Q")
                if inner in SCALAR_BYTES:
                    if count > MAX_COUNT:
                        raise ValueError(f"{path} is damaged: a list of {count} values")
                    skip(SCALAR_BYTES[inner] * count)
                else:
                    for _ in range(min(count, size)):
                        skip_value(inner, depth + 1)
            else:
                raise ValueError(f"{path} is damaged: a value of unknown type {kind}")

        if file.read(4) != b"GGUF" or (version := take("<I")) not in (2, 3):
            raise ValueError(f"{path} is no GGUF file of version 2 or 3")
        tensors, pairs = take("<Q"), take("<Q")
        if tensors > MAX_COUNT or pairs > MAX_COUNT:
            raise ValueError(f"{path} is damaged: {tensors} tensors and {pairs} settings (version {version})")
        for _ in range(pairs):
            skip(take("<Q"))
            skip_value(take("<I"))
        furthest = 0
        for _ in range(tensors):
            skip(take("<Q"))
            dimensions = take("<I")
            if dimensions > 4:
                raise ValueError(f"{path} is damaged: a tensor of {dimensions} dimensions")
            shape = [take("<Q") for _ in range(dimensions)]
            kind, offset = take("<I"), take("<Q")
            if kind not in list(Kind):
                raise ValueError(f"{path} is damaged, or newer than Llamita: numbers of type {kind}")
            block, block_bytes = gguf.GGML_QUANT_SIZES[Kind(kind)]
            furthest = max(furthest, offset + math.prod(shape) // block * block_bytes)
        if furthest > size - file.tell():
            raise ValueError(
                f"{path} is truncated: its tensors need {furthest} bytes, and {size - file.tell()} are left"
            )
