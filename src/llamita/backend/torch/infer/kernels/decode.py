"""A step of several sequences, a token of each or a piece of a prompt, in one call and one parallel region.

Nothing is left to PyTorch but the embedding, and sampling at a temperature. The residual stream is float32 whatever the
type of weights and cache. Attention reads keys and values where they lie in the blocks of the cache. Families with
other operations than Llama's, Qwen's and Mistral's go the way of the modules.

Letters beyond the usual: R rows of a step, each of them one token.
"""

import itertools
import sys
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from torch import Tensor

from llamita.backend.interface import ScheduledChunk
from llamita.backend.torch.infer.kernels.blocked import BlockedWeight
from llamita.backend.torch.infer.kernels.compiled import COMPILED, INSIDE, Kernel
from llamita.backend.torch.infer.kernels.products import (
    EIGHT,
    FOUR,
    ONE,
    multiply,
    prepare,
    prepare_together,
    room_for,
    share_of_groups,
)
from llamita.backend.torch.infer.kernels.simd import LANES, Static, target
from llamita.backend.torch.infer.kernels.threads import meet, parallel, share
from llamita.backend.torch.infer.kernels.vectors import (
    exponentials,
    gate,
    largest,
    mix,
    mix_rows,
    round_numbers,
    save,
    score,
    sum_of_squares,
)
from llamita.backend.torch.infer.kv_cache import PagedKVCache
from llamita.backend.torch.model.attention import factor
from llamita.backend.torch.model.llama import Block, Linear, Llama
from llamita.backend.torch.model.quantized import QuantizedLinear
from llamita.backend.torch.model.reordered import held_in_blocks

TOGETHER = 8
"""Rows of a sequence that are attended to together."""
TYPES = {torch.float32: Static("float32"), torch.bfloat16: Static("bfloat16"), torch.float16: Static("float16")}
WEIGHT = [("numbers", "i8"), ("scales", "i8"), ("minimums", "i8"), ("width", "i8")]
NORMS = [(name, "i8") for name in ("attention_norm", "feed_norm", "q_norm", "k_norm", "bias")]
LAYER = np.dtype(
    [*NORMS, *((name, WEIGHT) for name in ("qkv", "output", "gate_up", "down")), ("group", "i8"), ("rotation", "i8")]
)
"""The addresses of a layer's arrays, 0 for none; the group of its cache, and its rotation."""
ROTATION = np.dtype([("cos", "i8"), ("sin", "i8"), ("size", "i8")])


@intrinsic
def pointer(typing_context: Any, address: Any) -> Any:
    """Makes a pointer of an address."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@njit(**INSIDE)
def floats_at(address, size):
    """Returns the float32 array of so many numbers at an address; an empty one at 0."""
    return carray(pointer(address), (size if address else 0,), np.float32)


def memory_at(kind: Static, address: int) -> np.ndarray:
    """Returns a cache's memory of some type; its size is not known here."""
    raise NotImplementedError("for compiled code")


@overload(memory_at)
def _memory_at(kind, address):
    items = np.float32 if kind.value == "float32" else np.uint16
    return lambda kind, address: carray(pointer(address), (0,), items)


def weight_at(form: Static, record: np.record) -> tuple[Any, ...]:
    """Returns a weight as `products.linear` takes it; the sizes of its arrays are not known here."""
    raise NotImplementedError("for compiled code")


@overload(weight_at)
def _weight_at(form, record):
    numbers, scales, minimums = form.value.stored_as

    def found(form, record):
        arrays = (
            carray(pointer(record.numbers), (0,), numbers),
            carray(pointer(record.scales), (0,), scales),
            carray(pointer(record.minimums), (0,), minimums),
        )
        return form, arrays, record.width

    return found


@njit(**INSIDE)
def norm(code, x, at, weight, eps, y):
    """Puts the numbers of x from `at` on, divided by their root mean square and scaled, into their places in y."""
    size = weight.size
    mean = sum_of_squares(code, x, at, size) / np.float32(size)
    factor = np.float32(1.0) / np.sqrt(mean + eps)
    for i in range(size):
        y[at + i] = x[at + i] * factor * weight[i]


@njit(**INSIDE)
def norm_rows(team, code, form, x, weight, eps, y, room):
    """Puts this thread's share of rows (R, D) through a norm, and into the room of the product that follows."""
    D = weight.size
    first, last = share(team, x.size // D)
    for row in range(first, last):
        norm(code, x, row * D, weight, eps, y)
        prepare(code, form, y, room, row * D, (row + 1) * D)
    meet(team)


@njit(**INSIDE)
def rotate(x, at, cos, sin, turn, E):
    """Turns the pairs (i, i + E) of one head in place."""
    for i in range(E):
        first, second = x[at + i], x[at + E + i]
        c, s = cos[turn * E + i], sin[turn * E + i]
        x[at + i] = first * c - second * s
        x[at + E + i] = second * c + first * s


@njit(**INSIDE)
def place_heads(team, code, kind, heads, bias, turned, sizes, keys, values, slots):
    """Adds biases to this thread's share of all rows' heads, norms and rotates queries and keys, and puts keys and
    values into the cache."""
    q_norm, k_norm, eps, cos, sin, E, places = turned
    N, K, H = sizes
    G = N + 2 * K
    first, last = share(team, slots.size * G)
    for number in range(first, last):
        row, head, at = number // G, number % G, number * H
        if bias.size:
            for i in range(H):
                heads[at + i] += bias[head * H + i]
        if head < N + K:
            if q_norm.size:
                norm(code, heads, at, q_norm if head < N else k_norm, eps, heads)
            if E:
                rotate(heads, at, cos, sin, places[row], E)
            if head >= N:
                save(code, kind, keys, (slots[row] * K + head - N) * H, heads, at, H)
        else:
            save(code, kind, values, (slots[row] * K + head - N - K) * H, heads, at, H)
    meet(team)


@njit(**INSIDE)
def attend(team, code, kind, heads, sizes, scale, keys, values, table, groups, mixed):
    """Mixes the values that a query sees, for this thread's share of the queries of all rows' heads.

    `groups` are the rows that are attended to one by one, and the first of each eight that follow one another.

    `table` has the blocks of all sequences; for each row where those of its sequence begin among them, the first
    position that it sees, and the end; then the size of a block.
    """
    N = sizes[0]
    alone, together = groups
    query, last = share(team, alone.size * N)
    while query < last:
        row, head = alone[query // N], query % N
        end = min(N, head + last - query)
        attend_row(row, head, end, code, kind, heads, sizes, scale, keys, values, table, mixed)
        query += end - head
    for number in range(team[0], together.size * N, team[1]):  # later rows see more: threads take turns
        head, row = number // together.size, together[number % together.size]
        attend_together(row, head, code, kind, heads, sizes, scale, keys, values, table, mixed)
    meet(team)


@njit(**INSIDE)
def attend_row(row, first, last, code, kind, heads, sizes, scale, keys, values, table, mixed):
    """Mixes the values that query heads `first` to `last` - 1 of a row see.

    They go over the positions together, four at a time, so that keys and values are read in the order in which they
    lie in memory.
    """
    N, K, H = sizes
    blocks, begins, seen, stops, size = table
    begin, start, stop = begins[row], seen[row], stops[row]
    width = (stop - start + LANES - 1) // LANES * LANES
    scores = np.empty((last - first) * width, np.float32)
    own = np.empty(last - first, np.int64)  # where the key head of a query head begins among the numbers of a slot
    for head in range(last - first):
        own[head] = (first + head) // (N // K) * H
    query, out = (row * (N + 2 * K) + first) * H, (row * N + first) * H
    for number in range(start // size, (stop + size - 1) // size):
        position, end, slot = within(blocks[begin + number], number, start, stop, size)
        while position + 4 <= end:
            for head in range(last - first):
                at, place = slot * K * H + own[head], head * width + position - start
                score(code, kind, ONE, FOUR, heads, query + head * H, 0, keys, at, K * H, H, scale, scores, place, 0)
            position, slot = position + 4, slot + 4
        while position < end:
            for head in range(last - first):
                at, place = slot * K * H + own[head], head * width + position - start
                score(code, kind, ONE, ONE, heads, query + head * H, 0, keys, at, K * H, H, scale, scores, place, 0)
            position, slot = position + 1, slot + 1
    for head in range(last - first):
        soften(code, scores, head * width, 0, stop - start, width)
    for place in range(out, out + (last - first) * H):
        mixed[place] = 0.0
    for number in range(start // size, (stop + size - 1) // size):
        position, end, slot = within(blocks[begin + number], number, start, stop, size)
        while position + 4 <= end:
            for head in range(last - first):
                at, place, to = slot * K * H + own[head], head * width + position - start, out + head * H
                mix(code, kind, FOUR, mixed, to, values, at, K * H, H, scores, place)
            position, slot = position + 4, slot + 4
        while position < end:
            for head in range(last - first):
                at, place, to = slot * K * H + own[head], head * width + position - start, out + head * H
                mix(code, kind, ONE, mixed, to, values, at, K * H, H, scores, place)
            position, slot = position + 1, slot + 1


@njit(**INSIDE)
def soften(code, scores, at, first, last, width):
    """Puts the softmax of scores `first` to `last` - 1 of a row into their place, and zeros into that of all others."""
    for place in range(at, at + first):
        scores[place] = -np.inf
    for place in range(at + last, at + width):
        scores[place] = -np.inf
    share = np.float32(1.0) / exponentials(code, scores, at, largest(code, scores, at, width), width)
    for place in range(at, at + width):
        scores[place] *= share


@njit(**INSIDE)
def attend_together(row, head, code, kind, heads, sizes, scale, keys, values, table, mixed):
    """Mixes the values that a query head sees, for eight rows that follow one another in a sequence: each key and each
    value is brought near once for all."""
    N, K, H = sizes
    blocks, begins, seen, stops, size = table
    begin, start, stop = begins[row], seen[row], stops[row + TOGETHER - 1]
    width = (stop - start + LANES - 1) // LANES * LANES
    scores, step = np.empty(TOGETHER * width, np.float32), (N + 2 * K) * H
    first, own = row * step + head * H, head // (N // K) * H
    for number in range(start // size, (stop + size - 1) // size):
        position, end, slot = within(blocks[begin + number], number, start, stop, size)
        while position < end:
            at, place = slot * K * H + own, position - start
            if position + 4 <= end:
                for query in range(0, TOGETHER, 4):
                    q, to = first + query * step, query * width + place
                    score(code, kind, FOUR, FOUR, heads, q, step, keys, at, K * H, H, scale, scores, to, width)
                position, slot = position + 4, slot + 4
            else:
                for query in range(0, TOGETHER, 4):
                    q, to = first + query * step, query * width + place
                    score(code, kind, FOUR, ONE, heads, q, step, keys, at, K * H, H, scale, scores, to, width)
                position, slot = position + 1, slot + 1
    out = (row * N + head) * H
    for query in range(TOGETHER):
        at, later = query * width, row + query
        soften(code, scores, at, seen[later] - start, stops[later] - start, width)
        for place in range(out + query * N * H, out + query * N * H + H):
            mixed[place] = 0.0
    for number in range(start // size, (stop + size - 1) // size):
        position, end, slot = within(blocks[begin + number], number, start, stop, size)
        at, place, count = slot * K * H + own, position - start, end - position
        mix_rows(code, kind, EIGHT, mixed, out, N * H, values, at, K * H, count, H, scores, place, width)


@njit(**INSIDE)
def within(block, number, start, stop, size):
    """Returns the first of the positions `start` to `stop` - 1 that lie in a sequence's block of some number, the one
    after their last, and the slot of the first."""
    first = number * size
    position = max(start, first)
    return position, min(stop, first + size), block * size + position - first


@njit(**INSIDE)
def row_places(chunks, blocks, windows, size, rows):
    """Returns the position of each row; for each group of layers and row its slot, where the blocks of its sequence
    begin, and the first position that it sees (G, 3, R); and the groups of rows that `attend` takes."""
    places, of_groups = np.empty(rows, np.int64), np.empty((windows.size, 3, rows), np.int64)
    alone, together = np.empty(rows, np.int64), np.empty(rows // TOGETHER, np.int64)
    row, singles, eights = 0, 0, 0
    for chunk in range(chunks.shape[1]):
        whole = row + (chunks[1, chunk] - chunks[0, chunk]) // TOGETHER * TOGETHER
        for position in range(chunks[0, chunk], chunks[1, chunk]):
            if row >= whole:
                alone[singles] = row
                singles += 1
            elif (whole - row) % TOGETHER == 0:
                together[eights] = row
                eights += 1
            places[row] = position
            for group in range(windows.size):
                begin = chunks[2 + group, chunk]
                of_groups[group, 0, row] = blocks[begin + position // size] * size + position % size
                of_groups[group, 1, row] = begin
                of_groups[group, 2, row] = max(0, position - windows[group] + 1) if windows[group] else 0
            row += 1
    return places, of_groups, (alone[:singles], together[:eights])


@njit(**INSIDE)
def empty_begun(team, chunks, blocks, group, size, items, keys, values):
    """Puts zeros into the blocks of a layer that this thread's share of the chunks begin and do not fill; a position
    has so many numbers.

    A later step reads the rest of them as well, to no effect unless an earlier sequence left NaN.
    """
    begun, after = share(team, chunks.shape[1])
    for chunk in range(begun, after):
        start, end = chunks[0, chunk], chunks[1, chunk]
        if end % size and start <= end // size * size:
            first = blocks[chunks[2 + group, chunk] + end // size] * size * items
            for place in range(first, first + size * items):
                keys[place] = 0
                values[place] = 0


@njit(**INSIDE)
def gate_rows(team, code, form, gate_up, rows, gated, room):
    """Gates this thread's share of all rows, and puts it into the room of the product that follows."""
    C = gated.size // rows
    first, last = share_of_groups(team, gated.size)
    for place in range(first, last, LANES):
        at = place // C * 2 * C + place % C
        gate(code, gate_up, at, gate_up, at + C, gated, place)
    prepare(code, form, gated, room, first, last)
    meet(team)


@njit(**INSIDE)
def add_product(team, code, weight, x, room, rows, n_in, y, stream):
    """Adds the product of prepared rows (R, I) with a weight to the residual stream (R, D), flat."""
    multiply(team, code, weight, x, room, rows, n_in, y)
    D = y.size // rows
    first, last = share(team, D // LANES)
    for row in range(rows):
        for place in range(row * D + first * LANES, row * D + last * LANES):
            stream[place] += y[place]
    meet(team)


@njit(**INSIDE)
def run_layers(
    team, code, dtypes, forms, x, rows, layers, caches, first, last, last_norm, sizes, eps, scale, step, rotations,
    places, arrays, rooms
):  # fmt: skip
    """Does as `decode_layers`, on each thread of a team."""
    chunks, blocks, _, size = step
    positions, stops, rows_of_groups, groups = places
    y, heads, mixed, both, gated = arrays
    dtype, kind = dtypes
    N, K, H = sizes
    D, C = x.size // rows, gated.size // rows
    for number in range(first, last):
        layer = layers[number]
        keys, values = memory_at(kind, caches[number, 0]), memory_at(kind, caches[number, 1])
        slots, begins, seen = rows_of_groups[layer.group]
        turn, bias = rotations[layer.rotation], floats_at(layer.bias, (N + 2 * K) * H)
        q_norm, k_norm = floats_at(layer.q_norm, H), floats_at(layer.k_norm, H)
        cos, sin = floats_at(turn.cos, 1), floats_at(turn.sin, 1)

        empty_begun(team, chunks, blocks, layer.group, size, K * H, keys, values)
        norm_rows(team, code, forms[0], x, floats_at(layer.attention_norm, D), eps, y, rooms[0])
        multiply(team, code, weight_at(forms[0], layer.qkv), y, rooms[0], rows, D, heads)
        meet(team)
        turned = (q_norm, k_norm, eps, cos, sin, turn.size, positions)
        place_heads(team, code, kind, heads, bias, turned, sizes, keys, values, slots)
        table = (blocks, begins, seen, stops, size)
        attend(team, code, kind, heads, sizes, scale, keys, values, table, groups, mixed)
        prepare_together(team, code, forms[1], mixed, rooms[1])
        add_product(team, code, weight_at(forms[1], layer.output), mixed, rooms[1], rows, N * H, y, x)

        norm_rows(team, code, forms[2], x, floats_at(layer.feed_norm, D), eps, y, rooms[2])
        multiply(team, code, weight_at(forms[2], layer.gate_up), y, rooms[2], rows, D, both)
        meet(team)
        gate_rows(team, code, forms[3], both, rows, gated, rooms[3])
        add_product(team, code, weight_at(forms[3], layer.down), gated, rooms[3], rows, C, y, x)
    if last == layers.size:
        first, last = share(team, rows)
        for row in range(first, last):
            norm(code, x, row * D, last_norm, eps, x)
            round_numbers(code, dtype, x, row * D, D)


@njit(**COMPILED)
def decode_layers(
    threads, code, dtypes, forms, x, rows, layers, caches, first, last, last_norm, sizes, eps, scale, step, rotations
):
    """Runs layers `first` to `last` - 1 over rows (R, D) of the residual stream, flat, in place; the last layer is
    followed by `last_norm`. What enters the first layer and what leaves the last norm is rounded to the type of the
    model.

    `forms` are those of the four weights of each of these layers, `dtypes` the types of the model and of the cache.
    `step` has of each chunk its first position, its end, and where the blocks of its sequence begin in each group of
    layers (2 + G, X); those blocks; the window of each group, 0 for none; and the size of a block.
    """
    chunks, blocks, windows, size = step
    N, K, H = sizes
    C = layers[first].gate_up.width // 2
    positions, rows_of_groups, groups = row_places(chunks, blocks, windows, size, rows)
    if first == 0:
        round_numbers(code, dtypes[0], x, 0, x.size)
    y, heads = np.empty_like(x), np.empty(rows * (N + 2 * K) * H, np.float32)
    mixed, gated = np.empty(rows * N * H, np.float32), np.empty(rows * C, np.float32)
    both = np.empty(rows * 2 * C, np.float32)
    arrays = (y, heads, mixed, both, gated)
    rooms = (
        room_for(code, forms[0], x.size),
        room_for(code, forms[1], mixed.size),
        room_for(code, forms[2], x.size),
        room_for(code, forms[3], gated.size),
    )
    of_model = (layers, caches, first, last, last_norm, sizes, eps, scale)
    places = (positions, positions + 1, rows_of_groups, groups)
    parallel(run_layers, threads, (code, dtypes, forms, x, rows, *of_model, step, rotations, places, arrays, rooms))


class Decoder:
    """Runs decoding steps of a model whose weights lie in blocks."""

    def __init__(self, model: Llama) -> None:
        self.model, self.config = model, model.config
        blocks = _blocks_of(model)
        instructions = _held(blocks[0].self_attn.qkv_proj).instructions
        self.code = target(instructions)
        self.dtype = TYPES[model.model.norm.weight.dtype]
        self.sizes = (self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim)
        self.eps = np.float32(self.config.rms_norm_eps)
        self.scale = np.float32(factor(self.config.head_dim, blocks[0].self_attn.spec))
        self.norm = _floats(model.model.norm.weight)
        self.windows = np.array(self.config.attention_windows, dtype=np.int64)
        self.embedding = held_in_blocks(model.model.embed_tokens) if self.config.embedding_multiplier == 1.0 else None
        self._turns: tuple[int, list[tuple[Tensor, Tensor]], np.ndarray] = (0, [], np.empty(0, ROTATION))
        self._arrays: list[np.ndarray] = []  # what `layers` has the addresses of
        self.layers = np.array([self._layer(number, block) for number, block in enumerate(blocks)], LAYER)
        forms = [tuple(Static(_held(module).form) for module in _maps(block)) for block in blocks]
        ends = [number for number in range(1, len(blocks)) if forms[number] != forms[number - 1]]
        begins = [0, *ends]
        kernels = [Kernel(decode_layers) for _ in begins]
        self.runs = list(zip(kernels, [forms[begin] for begin in begins], begins, [*ends, len(blocks)], strict=True))
        """Layers that follow one another and have weights of the same forms: what runs them, the forms, the first, the
        end."""

    @property
    def reads_float16(self) -> bool:
        """Returns whether every processor with these instructions converts float16 by itself."""
        return self.code.value.instructions != "portable"

    @staticmethod
    def fits(model: Llama) -> bool:
        """Returns whether a model has only what is computed here, in sizes that fill vectors."""
        config = model.config
        changed = (
            (config.norm_placement, config.hidden_act) != ("before", "silu")
            or config.unit_offset_norm
            or config.norm_all_heads
            or config.attn_logit_softcapping
            or config.residual_multiplier != 1.0
            or config.attention_bias
            or config.mlp_bias
        )
        sizes = (config.hidden_size, config.head_dim, config.intermediate_size)
        if changed or any(size % LANES for size in sizes):
            return False
        return all(held_in_blocks(module) is not None for block in _blocks_of(model) for module in _maps(block))

    def _layer(self, number: int, block: Block) -> tuple[Any, ...]:
        """Returns the record of a layer."""
        attention = block.self_attn
        names = (block.norms.before_attention, block.norms.before_feed_forward)
        before, between = (block.get_submodule(name).get_parameter("weight") for name in names)
        norms = [None if norm is None else norm.weight for norm in (attention.q_norm, attention.k_norm)]
        numbers = [self._address_of(x) for x in (before, between, *norms, attention.qkv_proj.bias)]
        rotation = self.config.rotation(number)
        group = self.config.attention_windows.index(self.config.window(number))
        weights = [_record(_held(module)) for module in _maps(block)]
        return (*numbers, *weights, group, len(self.model.ropes) if rotation is None else rotation)

    def _address_of(self, x: Tensor | None) -> int:
        """Returns where the numbers of a parameter lie as float32; 0 for none."""
        if x is None:
            return 0
        self._arrays.append(_floats(x))
        return self._arrays[-1].ctypes.data

    def warm_up(self, cache: PagedKVCache) -> None:
        """Compiles what a step needs, or reads it from disk; what the first slot of a cache holds is lost."""
        tables = tuple(np.zeros(1, dtype=np.int32) for _ in cache.specs)
        self.hidden([0], [ScheduledChunk(0, (0,), 0, tables)], cache)

    def hidden(self, tokens: list[int], chunks: Sequence[ScheduledChunk], cache: PagedKVCache) -> Tensor:
        """Returns the states (R, D) after the final norm of the chunks' tokens; keys and values go into the cache.

        They are float32, holding numbers of the model's type.
        """
        rows, threads = len(tokens), torch.get_num_threads()
        x = self._embedded(tokens)
        tables = [chunk.tables[group] for group in range(len(self.windows)) for chunk in chunks]
        begins = [0, *itertools.accumulate(map(len, tables))]
        of_chunks = [[chunk.start for chunk in chunks], [chunk.end for chunk in chunks]]
        of_chunks += [begins[first : first + len(chunks)] for first in range(0, len(tables), len(chunks))]
        blocks = np.concatenate(tables, dtype=np.int64)
        step = (np.array(of_chunks, np.int64), blocks, self.windows, cache.layout.block_size)
        turns, rotations = self._rotations(max(of_chunks[1]))
        dtypes = (self.dtype, TYPES[cache.dtype])
        for kernel, forms, first, last in self.runs:
            of_model = (self.layers, cache.addresses, first, last, self.norm, self.sizes, self.eps, self.scale)
            kernel(threads, self.code, dtypes, forms, x, rows, *of_model, step, rotations)
        del turns  # of which the kernels had the addresses
        return torch.from_numpy(x).view(rows, -1)

    def _embedded(self, tokens: list[int]) -> np.ndarray:
        """Returns what enters the first layer once it is rounded to the model's type, float32 (R, D), flat."""
        if self.embedding is not None:
            return self.embedding.look_up(np.array(tokens, dtype=np.int64))
        return self.model.embedded(torch.tensor([tokens])).to(torch.float32, copy=True).numpy().reshape(-1)

    def _rotations(self, longest: int) -> tuple[list[tuple[Tensor, Tensor]], np.ndarray]:
        """Returns cosines and sines (S, E) of each rotation for all positions below `longest`; and their addresses,
        then those of no rotation."""
        held, turns, records = self._turns
        if not len(records) or held < longest:
            turns = [rope.up_to(longest) for rope in self.model.ropes]
            rows = [(cos_SE.data_ptr(), sin_SE.data_ptr(), cos_SE.shape[1]) for cos_SE, sin_SE in turns]
            records = np.array([*rows, (0, 0, 0)], ROTATION)
            self._turns = (min((len(cos_SE) for cos_SE, _ in turns), default=sys.maxsize), turns, records)
        return turns, records


def _blocks_of(model: Llama) -> list[Block]:
    return cast(list[Block], list(model.model.layers))


def _maps(block: Block) -> list[Linear | QuantizedLinear]:
    return [block.self_attn.qkv_proj, block.self_attn.o_proj, block.mlp.gate_up_proj, block.mlp.down_proj]


def _held(module: Linear | QuantizedLinear) -> BlockedWeight:
    held = held_in_blocks(module)
    assert held is not None
    return held


def _record(weight: BlockedWeight) -> tuple[int, ...]:
    """Returns the addresses of a weight's arrays, and its outputs."""
    _, arrays, width = weight.of_kernel
    return (*(array.ctypes.data for array in arrays), width)


def _floats(x: Tensor) -> np.ndarray:
    return x.detach().float().numpy().reshape(-1)
