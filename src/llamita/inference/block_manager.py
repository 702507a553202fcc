"""Shares out the blocks of the key/value memory: reference counts, the prefix cache, sliding windows.

Memory is cut into blocks of equally many positions. A block is held by the sequences whose tables name it. Full blocks
that nobody holds any more can still be found by the tokens of their whole prefix, until their memory is needed for
something else. Knows blocks by number only; their content is the runner's.

    Prefix        identifies a cached block: its own tokens after those of all blocks before it
    BlockPool     the blocks of one group of layers, and the prefixes that they hold
    BlockTable    the blocks of one sequence in one group
    BlockManager  the tables of all sequences over all groups
"""

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from llamita.backend.interface import BlockCopy, CacheLayout

MISSING = -1
"""Stands in a table for a block that has been given back, or was never needed, behind a sliding window."""


def chained_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Returns the SHA-256 over a block's tokens and the key of all blocks before it."""
    return hashlib.sha256(parent + np.asarray(tokens, dtype=np.int32).tobytes()).digest()


class Prefix:
    """The tokens of a full block after those of all blocks before it; the same tokens give the same object."""

    __slots__ = ("__weakref__", "key", "parent", "tokens")

    def __init__(self, key: bytes, parent: "Prefix | None", tokens: tuple[int, ...]) -> None:
        self.key, self.parent, self.tokens = key, parent, tokens


class Prefixes:
    """Finds prefixes by their key. A key that stands for other tokens gives no wrong prefix, only a new one."""

    def __init__(self, key: Callable[[bytes, Sequence[int]], bytes] = chained_key) -> None:
        self._key = key
        self._roots: dict[str, Prefix] = {}
        self._known: weakref.WeakValueDictionary[bytes, Prefix] = weakref.WeakValueDictionary()

    def known(self, parent: Prefix | None, tokens: Sequence[int]) -> Prefix | None:
        """Returns the prefix of one block more than `parent`; None unless a block or a longer prefix keeps it alive."""
        found = self._known.get(self._key(b"" if parent is None else parent.key, tokens))
        return found if found is not None and found.parent is parent and found.tokens == tuple(tokens) else None

    def extend(self, parent: Prefix | None, tokens: Sequence[int]) -> Prefix:
        """Returns the prefix of one block more than `parent`, new where it is not known."""
        found = self.known(parent, tokens)
        if found is None:
            found = Prefix(self._key(b"" if parent is None else parent.key, tokens), parent, tuple(tokens))
            self._known.setdefault(found.key, found)
        return found

    def root(self, adapter: str | None) -> Prefix | None:
        """Returns the prefix before all texts of an adapter, which sets them apart from others; None without one."""
        if adapter is None:
            return None
        key = hashlib.sha256(b"adapter " + adapter.encode()).digest()
        return self._roots.setdefault(adapter, Prefix(key, None, ()))


class BlockPool:
    """The blocks of one group of layers. Free ones are reused in the order in which they were given back."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.references = [0] * blocks
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))  # the next to be reused first
        self.prefix_of: list[Prefix | None] = [None] * blocks
        self.block_of: dict[Prefix, int] = {}

    def take(self, after: int = MISSING) -> int:
        """Takes and returns a free block: the one next to block `after` where that is free and holds no prefix."""
        block = after + 1
        if block not in self.free or self.prefix_of[block] is not None:
            block = next(iter(self.free))
        del self.free[block]
        self._forget(block)
        self.references[block] = 1
        return block

    def share(self, block: int) -> None:
        """Counts one more holder of a block."""
        self.free.pop(block, None)
        self.references[block] += 1

    def give_back(self, block: int) -> None:
        """Counts one holder of a block less. A free block without a prefix is reused before those with one."""
        assert self.references[block] > 0, f"block {block} is given back, but nobody holds it"
        self.references[block] -= 1
        if self.references[block] == 0:
            self.free[block] = None
            if self.prefix_of[block] is None:
                self.free.move_to_end(block, last=False)

    def remember(self, block: int, prefix: Prefix) -> None:
        """Makes a full block findable, unless another block with the same content is."""
        if prefix not in self.block_of and self.prefix_of[block] is None:
            self.block_of[prefix] = block
            self.prefix_of[block] = prefix

    def forget_unused(self) -> None:
        """Empties the prefix cache of all blocks that nobody holds."""
        for block in self.free:
            self._forget(block)

    def _forget(self, block: int) -> None:
        prefix = self.prefix_of[block]
        if prefix is not None:
            self.prefix_of[block] = None
            del self.block_of[prefix]


class BlockTable:
    """The blocks of one sequence in one group, in the order of its positions."""

    def __init__(self) -> None:
        self._blocks = np.full(8, MISSING, dtype=np.int32)
        self.length = 0
        self.released = 0
        """The number of first blocks that have been given back, or were never taken."""

    @property
    def blocks(self) -> np.ndarray:
        """The table as a view, which is out of date after the next `append`."""
        return self._blocks[: self.length]

    def append(self, block: int) -> None:
        if self.length == len(self._blocks):
            self._blocks = np.concatenate([self._blocks, np.full_like(self._blocks, MISSING)])
        self._blocks[self.length] = block
        self.length += 1

    def copy(self) -> "BlockTable":
        other = BlockTable()
        other._blocks, other.length, other.released = self._blocks.copy(), self.length, self.released
        return other


Tables = tuple[BlockTable, ...]


class BlockManager:
    """The tables of sequences over all groups. A request that does not fit is refused and changes nothing."""

    def __init__(self, layout: CacheLayout, prefix_caching: bool = True) -> None:
        self.layout = layout
        self.block_size = layout.block_size
        self.pools = tuple(BlockPool(layout.blocks) for _ in layout.windows)
        self.prefixes = Prefixes()
        self._caching = prefix_caching
        self._copies: list[BlockCopy] = []

    def fits(self, positions: int) -> bool:
        """Returns whether so many positions of one sequence fit the memory, were it alone."""
        most = max(
            min(positions, window - 1 + self.block_size) if window else positions for window in self.layout.windows
        )
        return -(-most // self.block_size) <= self.layout.blocks

    @property
    def available(self) -> int:
        """The number of blocks that can be had in every group."""
        return min(len(pool.free) for pool in self.pools)

    def find(self, tokens: Sequence[int], adapter: str | None = None) -> tuple[list[Prefix], int]:
        """Returns the cached prefixes of a text and the number of blocks to share, which never hold its last token."""
        found: list[Prefix] = []
        if not self._caching:
            return found, 0
        root = self.prefixes.root(adapter)
        for start in range(0, len(tokens) - self.block_size, self.block_size):
            prefix = self.prefixes.known(found[-1] if found else root, tokens[start : start + self.block_size])
            if prefix is None:  # else it may have lost its own block, but a window sees only later ones
                break
            found.append(prefix)
        count = len(found)
        for group in range(len(self.pools)):  # full attention first: whatever is left of its hit is a hit
            count = self._hit(group, found, count)
        return found[:count], count

    def _hit(self, group: int, prefixes: Sequence[Prefix], most: int) -> int:
        """Returns the longest hit of at most `most` blocks: full attention needs all, a window those that it sees."""
        held = self.pools[group].block_of
        if self.layout.windows[group] == 0:
            return next((number for number in range(most) if prefixes[number] not in held), most)
        for count in range(most, 0, -1):
            if all(prefix in held for prefix in prefixes[self._first_seen(group, count * self.block_size) : count]):
                return count
        return 0

    def _first_seen(self, group: int, position: int) -> int:
        """Returns the first block that a query at this position, or a later one, sees."""
        window = self.layout.windows[group]
        return max(0, position - window + 1) // self.block_size if window else 0

    def open(self, prefixes: Sequence[Prefix]) -> Tables:
        """Returns tables that share the blocks of these prefixes."""
        tables = tuple(BlockTable() for _ in self.pools)
        for group, (pool, table) in enumerate(zip(self.pools, tables, strict=True)):
            first = self._first_seen(group, len(prefixes) * self.block_size)
            for number, prefix in enumerate(prefixes):
                if number >= first:
                    pool.share(pool.block_of[prefix])
                table.append(pool.block_of[prefix] if number >= first else MISSING)
            table.released = first
        return tables

    def blocks_to_grow(self, tables: Tables, computed: int, end: int) -> int:
        """Returns the number of blocks that `grow` would take, in the group that needs most."""
        blocks, most = -(-end // self.block_size), 0
        for pool, table in zip(self.pools, tables, strict=True):
            most = max(most, max(0, blocks - table.length) + self._is_shared(pool, table, computed))
        return most

    def blocks_to_read(self, tables: Tables, end: int, chunk: int) -> int:
        """Returns the most blocks that a sequence holds beyond its table while it is read up to `end` in chunks.

        The number is that of the group that needs most; a window gives back the blocks that it leaves.
        """
        within = [
            -(-(min(end, window + chunk) if window else end) // self.block_size) + (window > 0)
            for window in self.layout.windows
        ]
        return max(
            max(0, min(-(-end // self.block_size) - table.length, most))
            for most, table in zip(within, tables, strict=True)
        )

    def room(self, tables: Tables, computed: int) -> int:
        """Returns the number of positions from `computed` on for which `grow` would find memory."""
        blocks = min(
            table.length + self.available - self._is_shared(pool, table, computed)
            for pool, table in zip(self.pools, tables, strict=True)
        )
        return max(0, blocks * self.block_size - computed)

    def grow(self, tables: Tables, computed: int, end: int) -> bool:
        """Makes room for positions `computed` to end - 1; False, with nothing changed, where the memory lacks blocks.

        A block that is written next and that others hold too is replaced by a copy (copy on write).
        """
        needed = self.blocks_to_grow(tables, computed, end)
        if needed == 0:
            return True
        if needed > self.available:
            return False
        for group, (pool, table) in enumerate(zip(self.pools, tables, strict=True)):
            if self._is_shared(pool, table, computed):
                number = computed // self.block_size
                source = int(table.blocks[number])
                target = pool.take()
                pool.give_back(source)
                table.blocks[number] = target
                self._copies.append(BlockCopy(group, source, target))
            while table.length * self.block_size < end:
                table.append(pool.take(int(table.blocks[-1]) if table.length else MISSING))
        return True

    def _is_shared(self, pool: BlockPool, table: BlockTable, computed: int) -> bool:
        """Returns whether the block of position `computed` exists and is not this sequence's alone."""
        number = computed // self.block_size
        return number < table.length and pool.references[table.blocks[number]] > 1

    def copies(self) -> tuple[BlockCopy, ...]:
        """Returns the copies that `grow` asked for since the last call."""
        copies, self._copies = tuple(self._copies), []
        return copies

    def advance(
        self, tables: Tables, prefixes: list[Prefix], tokens: Sequence[int], computed: int, adapter: str | None = None
    ) -> None:
        """Records that positions before `computed` are filled: full blocks become findable, those out of sight free."""
        if self._caching:
            while (len(prefixes) + 1) * self.block_size <= computed:
                start = len(prefixes) * self.block_size
                parent = prefixes[-1] if prefixes else self.prefixes.root(adapter)
                prefix = self.prefixes.extend(parent, tokens[start : start + self.block_size])
                for pool, table in zip(self.pools, tables, strict=True):
                    if len(prefixes) >= table.released:
                        pool.remember(int(table.blocks[len(prefixes)]), prefix)
                prefixes.append(prefix)
        for group, table in enumerate(tables):
            for number in range(table.released, min(self._first_seen(group, computed), table.length)):
                self.pools[group].give_back(int(table.blocks[number]))
                table.blocks[number] = MISSING
                table.released = number + 1

    def fork(self, tables: Tables) -> Tables:
        """Returns the tables of a second sequence that shares all blocks with the first."""
        for pool, table in zip(self.pools, tables, strict=True):
            for block in table.blocks[table.released :].tolist():
                pool.share(block)
        return tuple(table.copy() for table in tables)

    def close(self, tables: Tables) -> None:
        """Gives every block back, the last one first, so that the beginning of a prefix is reused last."""
        for pool, table in zip(self.pools, tables, strict=True):
            for block in table.blocks[table.released :].tolist()[::-1]:
                pool.give_back(block)

    def forget_unused(self) -> None:
        """Empties the prefix cache."""
        for pool in self.pools:
            pool.forget_unused()
