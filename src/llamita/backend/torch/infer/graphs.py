"""Steps in which every sequence decodes one token, recorded once as CUDA graphs and replayed.

A small model's step is hundreds of kernels of a few microseconds each, which the host cannot start as fast as a GPU
does them; a graph starts them all at once. It reads its numbers from memory that stays where it is: `TableStep` is such
a step, of a fixed count of rows, and `DecodeGraphs` has one of each size. Knows nothing of requests or sampling.

Letters beyond the usual: R rows of a step, G groups of layers, M blocks of a table.
"""

import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llamita.backend.interface import ScheduledChunk
from llamita.backend.torch.infer.kv_cache import PagedKVCache
from llamita.backend.torch.infer.paged_attention import TableAttention

MOST_ROWS = 256
"""The largest step that is recorded; larger ones keep a GPU busy without."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""The largest difference between a replay and the step itself, as a share of the largest value."""

ONE_AT_A_TIME = threading.Lock()  # a process can record one graph at once

Compute = Callable[[Tensor, "TableStep"], Tensor]
"""Tokens (1, R) and the step to what is wanted of it, one row for each token."""
Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""A function to one that does the same again on what then lies in the same memory."""


class TableStep:
    """A step of so many rows, one token each, whose tokens, positions and tables lie in one piece of memory.

    `fill` changes what is in it. Rows that are left over read and write a block that no sequence has.
    """

    def __init__(self, cache: PagedKVCache, rows: int) -> None:
        self._cache, self.rows, self.longest = cache, rows, cache.positions
        assert cache.kernel is not None
        layout, device = cache.layout, cache.keys[0].device
        width, windows = -(-cache.positions // layout.block_size), len(layout.windows)
        if 0 in layout.windows:  # a table of windows alone grows past the blocks that it holds
            width = min(width, layout.blocks)
        # One transfer a step: tokens, positions, and for each window the slots of the new keys and a table a row, whose
        # first blocks come first: what lies beyond the longest in use stays behind.
        self._columns = 2 + windows
        length = (self._columns + windows * width) * rows
        self._host = torch.zeros(length, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = self._host.to(device)
        self._sent = torch.cuda.Event() if device.type == "cuda" else None
        self._written, numbers = _Numbers(self._host.numpy(), rows, windows), _Numbers(self._device, rows, windows)
        self.tokens_1T, self.positions_1T, self._slots_GR = (
            numbers.tokens_R[None], numbers.positions_R[None], numbers.slots_GR
        )  # fmt: skip
        self._lengths_R = torch.ones(rows, dtype=torch.int32, device=device)
        self._parts = [
            TableAttention(cache.kernel, numbers.tables_GRM[group], self._lengths_R, layout.block_size, spec)
            for group, spec in enumerate(cache.specs)
        ]
        self.fill(())

    def fill(self, chunks: Sequence[ScheduledChunk]) -> None:
        """Sets the next computation to these tokens, in this order."""
        assert len(chunks) <= self.rows
        if self._sent is not None:
            self._sent.synchronize()  # what was written last has left the host's memory
        size, spare = self._cache.layout.block_size, self._cache.spare_block
        written = self._written
        written.tokens_R[len(chunks) :] = 0
        written.positions_R[len(chunks) :] = 0
        written.slots_GR[:, len(chunks) :] = spare * size
        written.tables_GRM[:, len(chunks) :, 0] = spare
        for row, chunk in enumerate(chunks):
            assert len(chunk.tokens) == 1
            written.tokens_R[row], written.positions_R[row] = chunk.tokens[0], chunk.start
            for group, table in enumerate(chunk.tables):
                block = chunk.start // size
                written.slots_GR[group, row] = int(table[block]) * size + chunk.start % size
                written.tables_GRM[group, row, : block + 1] = table[: block + 1]
        blocks = max((chunk.start // size + 1 for chunk in chunks), default=1)
        used = (self._columns + len(written.slots_GR) * blocks) * self.rows
        self._device[:used].copy_(self._host[:used], non_blocking=True)
        if self._sent is not None:
            self._sent.record(torch.cuda.current_stream(self._device.device))

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Stores new keys and values, then returns the mix of values that each query sees: (T, N, H)."""
        group = self._cache.group_of_layer[layer]
        if layer == 0:  # part of what is recorded: computed anew at each replay
            torch.add(self.positions_1T[0], 1, out=self._lengths_R)
        keys, values, slots_T = self._cache.keys[layer], self._cache.values[layer], self._slots_GR[group].long()
        keys.index_copy_(0, slots_T, k_TKH)
        values.index_copy_(0, slots_T, v_TKH)
        return self._parts[group].attend(q_TNH, keys, values)


class DecodeGraphs:
    """Recorded steps of several sizes, over one memory; a step takes the smallest that holds it.

    They are recorded when this is made, and each is compared with the step that it records: RuntimeError where a replay
    gives something else.
    """

    def __init__(self, compute: Compute, cache: PagedKVCache, sequences: int, record: Record) -> None:
        self.sizes = sizes_up_to(min(sequences, MOST_ROWS))
        self._steps: list[TableStep] = []
        self._replays: list[Callable[[], Tensor]] = []
        for rows in self.sizes:
            step = TableStep(cache, rows)
            self._steps.append(step)
            self._replays.append(record(partial(compute, step.tokens_1T, step)))
            step.tokens_1T.fill_(1)  # another than was recorded
            _compare(self._replays[-1](), compute(step.tokens_1T, step))

    def fit(self, chunks: Sequence[ScheduledChunk]) -> bool:
        """Returns whether a step of these is recorded."""
        return len(chunks) <= self.sizes[-1] and all(len(chunk.tokens) == 1 for chunk in chunks)

    def run(self, chunks: Sequence[ScheduledChunk]) -> Tensor:
        """Returns the result of the computation, one row a chunk; valid until the next call."""
        place = bisect_left(self.sizes, len(chunks))
        self._steps[place].fill(chunks)
        return self._replays[place]()[: len(chunks)]


def sizes_up_to(most: int) -> list[int]:
    """Returns 1, 2, 4, 8, then multiples of 16, the last no less than `most`."""
    sizes = [1, 2, 4, 8, *range(16, most + 16, 16)]
    return [size for place, size in enumerate(sizes) if place == 0 or sizes[place - 1] < most]


def cuda_recorder(device: torch.device) -> Record:
    """Records what functions do on a GPU, all in one pool of memory, since no two are replayed at the same time."""
    with torch.cuda.device(device):
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def record(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        # The outer stream is the one to come back to if recording fails.
        with ONE_AT_A_TIME, torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream()):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # once without recording: kernels are compiled and libraries made ready
                compute()
            torch.cuda.current_stream().wait_stream(stream)
            # Else cuBLAS would record a workspace in memory that is not the pool's, and may be given back before it.
            torch._C._cuda_clearCublasWorkspaces()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                result = compute()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    return record


class _Numbers:
    """The parts of a step's one piece of memory, a tensor or a numpy array."""

    def __init__(self, memory: Any, rows: int, windows: int) -> None:
        self.tokens_R, self.positions_R = memory[: 2 * rows].reshape(2, rows)
        self.slots_GR = memory[2 * rows :][: windows * rows].reshape(windows, rows)
        tables_MGR = memory[(2 + windows) * rows :].reshape(-1, windows, rows)
        self.tables_GRM = tables_MGR.swapaxes(0, 1).swapaxes(1, 2)


def _compare(replayed: Tensor, computed: Tensor) -> None:
    """Raises RuntimeError where the two differ by more than rounding."""
    difference, largest = (replayed - computed).abs().max().item(), computed.abs().max().item()
    if not difference <= TOLERANCE[computed.dtype] * max(largest, 1e-6):
        raise RuntimeError(
            f"a replayed step is {difference:.2g} from the step itself, whose largest value {largest:.2g}"
        )
