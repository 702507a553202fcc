"""A decoding step of several sequences, a token or a few of each, in one call a layer.

Between the calls nothing is left to PyTorch but the embedding, the output head and sampling. The residual stream is
float32 whatever the type of weights and cache. Attention reads keys and values where they lie in the blocks of the
cache. Families with other operations than Llama's, Qwen's and Mistral's go the way of the modules.

Letters beyond the usual: R rows of a step, each of them one token.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from numba import njit
from torch import Tensor

from llamita.backend.interface import ScheduledChunk
from llamita.backend.step_layout import BlockSpan
from llamita.backend.torch.infer.kernels.blocked import BlockedWeight
from llamita.backend.torch.infer.kernels.products import COMPILED, compiled_for, linear, tiles_of
from llamita.backend.torch.infer.kernels.simd import LANES, Static, target
from llamita.backend.torch.infer.kernels.threads import parallel
from llamita.backend.torch.infer.kernels.tiles import Form
from llamita.backend.torch.infer.kernels.vectors import exponentials, gate, mix, save, score
from llamita.backend.torch.infer.kv_cache import PagedKVCache
from llamita.backend.torch.model.attention import factor
from llamita.backend.torch.model.llama import Block, Linear, Llama
from llamita.backend.torch.model.quantized import QuantizedLinear

EMPTY = np.empty(0, np.float32)
ROWS_ALONE = 2
"""So few rows the calling thread rotates and gates by itself."""


@njit(**COMPILED)
def norm(x, at, weight, eps, y):
    """Puts the numbers of x from `at` on, divided by their root mean square and scaled, into their places in y."""
    size, total = weight.size, np.float32(0.0)
    for i in range(at, at + size):
        total += x[i] * x[i]
    factor = np.float32(1.0) / np.sqrt(total / np.float32(size) + eps)
    for i in range(size):
        y[at + i] = x[at + i] * factor * weight[i]


@njit(**COMPILED)
def normed(x, weight, eps, rows):
    """Returns rows (R, D) through a norm; flat."""
    y = np.empty(x.size, np.float32)
    for row in range(rows):
        norm(x, row * weight.size, weight, eps, y)
    return y


@njit(**COMPILED)
def rotate(x, at, cos, sin, turn, E):
    """Turns the pairs (i, i + E) of one head in place."""
    for i in range(E):
        first, second = x[at + i], x[at + E + i]
        c, s = cos[turn * E + i], sin[turn * E + i]
        x[at + i] = first * c - second * s
        x[at + E + i] = second * c + first * s


@njit(**COMPILED)
def place_heads(first, last, code, kind, heads, bias, q_norm, k_norm, eps, cos, sin, sizes, keys, values, slots):
    """Adds biases to the heads of rows `first` to `last` - 1, norms and rotates queries and keys, and puts keys and
    values into the cache."""
    N, K, H = sizes
    G, E = N + 2 * K, cos.size // slots.size
    for row in range(first, last):
        begin = row * G * H
        if bias.size:
            for i in range(G * H):
                heads[begin + i] += bias[i]
        for head in range(N + K):
            at = begin + head * H
            if q_norm.size:
                norm(heads, at, q_norm if head < N else k_norm, eps, heads)
            if E:
                rotate(heads, at, cos, sin, row, E)
        save(code, kind, keys, slots[row] * K * H, heads, begin + N * H, K * H)
        save(code, kind, values, slots[row] * K * H, heads, begin + (N + K) * H, K * H)


@njit(**COMPILED)
def attend(first, last, code, kind, one, four, heads, sizes, scale, keys, values, table, mixed):
    """Mixes the values that a query sees, for queries `first` to `last` - 1 of all rows' heads.

    `table` has the blocks of all sequences; for each row where those of its sequence begin among them, the position
    that they begin at, the first that the row sees, and the end; then the size of a block.
    """
    N, K, H = sizes
    blocks, begins, held, seen, stops, size = table
    longest = 0
    for row in range(stops.size):
        longest = max(longest, stops[row] - seen[row])
    scores = np.empty(longest + LANES, np.float32)
    for query in range(first, last):
        row, head = query // N, query % N
        at, out = (row * (N + 2 * K) + head) * H, query * H
        kept = head // (N // K) * H
        largest, count = np.float32(-np.inf), stops[row] - seen[row]
        position = seen[row]
        while position < stops[row]:
            end, slot = run(blocks, begins[row], held[row], position, stops[row], size)
            while position + 4 <= end:
                place = position - seen[row]
                found = score(code, kind, four, heads, at, keys, slot * K * H + kept, K * H, H, scale, scores, place)
                largest = max(largest, found)
                position, slot = position + 4, slot + 4
            while position < end:
                place = position - seen[row]
                found = score(code, kind, one, heads, at, keys, slot * K * H + kept, K * H, H, scale, scores, place)
                largest = max(largest, found)
                position, slot = position + 1, slot + 1
        padded = (count + LANES - 1) // LANES * LANES
        for place in range(count, padded):
            scores[place] = -np.inf
        share = np.float32(1.0) / exponentials(code, scores, largest, padded)
        for i in range(out, out + H):
            mixed[i] = 0.0
        position = seen[row]
        while position < stops[row]:
            end, slot = run(blocks, begins[row], held[row], position, stops[row], size)
            while position + 4 <= end:
                place = position - seen[row]
                mix(code, kind, four, mixed, out, values, slot * K * H + kept, K * H, H, share, scores, place)
                position, slot = position + 4, slot + 4
            while position < end:
                place = position - seen[row]
                mix(code, kind, one, mixed, out, values, slot * K * H + kept, K * H, H, share, scores, place)
                position, slot = position + 1, slot + 1


@njit(**COMPILED)
def run(blocks, begin, held, position, stop, size):
    """Returns the end of the positions that lie side by side from one on, and the slot of that one."""
    back = position - held
    return min(stop, position - back % size + size), blocks[begin + back // size] * size + back % size


@njit(**COMPILED)
def gate_rows(first, last, code, gate_up, C, gated):
    """Gates vectors `first` to `last` - 1 of all rows."""
    in_row = C // LANES
    for vector in range(first, last):
        row, place = vector // in_row, vector % in_row * LANES
        gate(code, gate_up, row * 2 * C + place, gate_up, row * 2 * C + C + place, gated, row * C + place)


@njit(**COMPILED)
def decode_layer(threads, code, tiles, x, rows, layer, cache, positions):
    """Runs one layer over rows (R, D) of the residual stream, which it changes; flat."""
    sizes, eps, scale, attention_norm, qkv, bias, q_norm, k_norm, output, feed_norm, gate_up, down, kind = layer
    keys, values = cache
    slots, cos, sin, table = positions
    N, _, H = sizes
    one, _, four, _, _, _ = tiles
    few = rows <= ROWS_ALONE

    heads = linear(threads, code, tiles, normed(x, attention_norm, eps, rows), rows, qkv)
    of_heads = (code, kind, heads, bias, q_norm, k_norm, eps, cos, sin, sizes, keys, values, slots)
    parallel(place_heads, 1 if few else threads, rows, of_heads)
    mixed = np.empty(rows * N * H, np.float32)
    parallel(attend, threads, rows * N, (code, kind, one, four, heads, sizes, scale, keys, values, table, mixed))
    x += linear(threads, code, tiles, mixed, rows, output)

    both = linear(threads, code, tiles, normed(x, feed_norm, eps, rows), rows, gate_up)
    C = both.size // rows // 2
    gated = np.empty(rows * C, np.float32)
    parallel(gate_rows, 1 if few else threads, rows * (C // LANES), (code, both, C, gated))
    x += linear(threads, code, tiles, gated, rows, down)


Arrays = tuple[Any, ...]


class Decoder:
    """Runs decoding steps of a model whose weights lie in blocks."""

    def __init__(self, model: Llama) -> None:
        self.model, self.config = model, model.config
        blocks = _blocks_of(model)
        instructions = _held(blocks[0].self_attn.qkv_proj).instructions
        self.code, self.tiles = target(instructions), tiles_of(instructions)
        self.kind = Static(str(model.model.norm.weight.dtype).removeprefix("torch."))
        self.eps = np.float32(self.config.rms_norm_eps)
        forms = [tuple(_held(module).form for module in _maps(block)) for block in blocks]
        self.layers = list(zip(forms, map(self._layer, blocks), strict=True))
        self.norm = _floats(model.model.norm.weight)
        self.compiled: dict[tuple[Form, ...], Callable[..., None]] = {}
        """`decode_layer` by the forms of a layer's weights: arguments of other types are not looked at."""

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
        return all(_held_or_none(module) is not None for block in _blocks_of(model) for module in _maps(block))

    def _layer(self, block: Block) -> Arrays:
        """Returns `decode_layer`'s arrays and numbers of a layer."""
        config, attention = self.config, block.self_attn
        sizes = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        scale = np.float32(factor(config.head_dim, attention.spec))
        maps = [_held(module).of_kernel for module in _maps(block)]
        norms = [EMPTY if norm is None else _floats(norm.weight) for norm in (attention.q_norm, attention.k_norm)]
        bias = EMPTY if attention.qkv_proj.bias is None else _floats(attention.qkv_proj.bias)
        names = (block.norms.before_attention, block.norms.before_feed_forward)
        before, between = (_floats(block.get_submodule(name).get_parameter("weight")) for name in names)
        return sizes, self.eps, scale, before, maps[0], bias, *norms, maps[1], between, *maps[2:], self.kind

    def warm_up(self, cache: PagedKVCache) -> None:
        """Compiles what a step needs, or reads it from disk; what the first slot of a cache holds is lost."""
        tables = tuple(np.zeros(1, dtype=np.int64) for _ in cache.specs)
        self.hidden([0], [ScheduledChunk(0, (0,), 0, tables)], cache)

    def hidden(self, tokens: list[int], chunks: Sequence[ScheduledChunk], cache: PagedKVCache) -> Tensor:
        """Returns the states (R, D) after the final norm of the chunks' tokens; keys and values go into the cache."""
        rows, threads = len(tokens), torch.get_num_threads()
        x_RD = self.model.embedded(torch.tensor([tokens]))[0]
        x = x_RD.to(torch.float32, copy=True).numpy().reshape(-1)
        cache.begin(chunks)
        positions_1R = torch.tensor([[position for chunk in chunks for position in range(chunk.start, chunk.end)]])
        turns = [rope.at(positions_1R, max(chunk.end for chunk in chunks)) for rope in self.model.ropes]
        rotations = [tuple(table.float().numpy().reshape(-1) for table in turn) for turn in turns]
        tables = [_table(chunks, group, cache) for group in range(len(cache.specs))]
        for number, (forms, layer) in enumerate(self.layers):
            slots, table = tables[cache.group_of_layer[number]]
            rotation = self.config.rotation(number)
            cos, sin = (EMPTY, EMPTY) if rotation is None else rotations[rotation]
            positions = (slots, cos, sin, table)
            arguments = (threads, self.code, self.tiles, x, rows, layer, cache.flat[number], positions)
            if forms not in self.compiled:
                self.compiled[forms] = compiled_for(decode_layer, arguments)
            self.compiled[forms](*arguments)
        y = normed(x, self.norm, self.eps, rows)
        return torch.from_numpy(y).view(rows, -1).to(x_RD.dtype)


def _table(chunks: Sequence[ScheduledChunk], group: int, cache: PagedKVCache) -> tuple[np.ndarray, Arrays]:
    """Returns the slot of each row's token, and `attend`'s table."""
    size, window = cache.layout.block_size, cache.specs[group].window
    blocks: list[np.ndarray] = []
    rows, begin = [], 0
    for chunk in chunks:
        table = chunk.tables[group]
        span = BlockSpan.of(chunk, table, size, window)
        blocks.append(span.blocks)
        for position in range(chunk.start, chunk.end):
            seen = max(0, position - window + 1) if window else 0
            slot = table[position // size] * size + position % size
            rows.append((slot, begin, span.first, seen, position + 1))
        begin += len(span.blocks)
    slots, *of_rows = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    return slots, (np.concatenate(blocks).astype(np.int64), *of_rows, size)


def _blocks_of(model: Llama) -> list[Block]:
    return cast(list[Block], list(model.model.layers))


def _maps(block: Block) -> list[Linear | QuantizedLinear]:
    return [block.self_attn.qkv_proj, block.self_attn.o_proj, block.mlp.gate_up_proj, block.mlp.down_proj]


def _held_or_none(module: Linear | QuantizedLinear) -> BlockedWeight | None:
    return module.blocks if isinstance(module, QuantizedLinear) else cast(BlockedWeight | None, module.kernel)


def _held(module: Linear | QuantizedLinear) -> BlockedWeight:
    held = _held_or_none(module)
    assert held is not None
    return held


def _floats(x: Tensor) -> np.ndarray:
    return x.detach().float().numpy().reshape(-1)
