"""A paged cache: keys and values lie in pages of equally many positions, anywhere in one memory.

Source: Kwon et al. 2023, PagedAttention (https://arxiv.org/abs/2309.06180), section 4.
Letters: P pages of the memory, p positions of a page, M pages of a text, N texts, H heads of keys and values,
G * H query heads, L new positions, S all positions of a text, E size of a head.
"""

from collections.abc import Sequence

import mlx.core as mx
from attention import scaled_dot_product_attention_grouped


class PagePool:
    """The memory of all layers, in pages. A page has one number in all layers, and one count of those who hold it."""

    def __init__(self, num_layers: int, num_pages: int, page_size: int, num_heads: int, head_dim: int) -> None:
        self.page_size = page_size
        shape = (num_pages, num_heads, page_size, head_dim)
        self.keys = [mx.zeros(shape) for _ in range(num_layers)]
        """(P, H, p, E) for each layer."""
        self.values = [mx.zeros(shape) for _ in range(num_layers)]
        self.holders = [0] * num_pages
        self.free = list(range(num_pages))

    def allocate(self) -> int:
        """Returns the number of a free page, which the caller holds from then on; ValueError where none is free."""
        if not self.free:
            raise ValueError(f"all {len(self.holders)} pages are in use; make a pool of more pages")
        page = self.free.pop(0)
        self.holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """Counts one more holder of a page."""
        self.holders[page] += 1

    def release(self, page: int) -> None:
        """Counts one holder less; a page that nobody holds is free."""
        self.holders[page] -= 1
        if self.holders[page] == 0:
            self.free.append(page)


class BlockTable:
    """The pages of one text, in the order of its positions; all layers share it."""

    def __init__(self, pool: PagePool, pages: Sequence[int] = ()) -> None:
        """pages: those that hold the beginning of the text already, all of them full."""
        self.pool = pool
        self.pages = list(pages)

    def reserve(self, length: int) -> None:
        """Makes room for positions 0 to length - 1: allocates the pages that are missing, one after the other.

        Pages that are there already stay. Position s lies in page `self.pages[s // page_size]`, at place s % page_size.
        """
        # to do: a loop of two lines; no page more than it takes.
        while len(self.pages) * self.pool.page_size < length:
            self.pages.append(self.pool.allocate())
        # done

    def release(self) -> None:
        """Gives all pages back."""
        while self.pages:
            self.pool.release(self.pages.pop())


class PagedKvCache:
    """The cache of one layer of one text, in pages; takes the place of a `KvCache`."""

    def __init__(self, table: BlockTable, layer: int, offset: int = 0) -> None:
        """offset: how many positions the pages of the table hold already."""
        self.table, self.layer, self.offset = table, layer, offset

    def update_and_fetch(self, key: mx.array, value: mx.array) -> tuple[mx.array, mx.array, str]:
        """Writes L new positions, (1, H, L, E), into their pages and returns all as (1, H, S, E), and "causal".

        `offset` counts the new positions from then on. The pages are `self.table.pages`; their memory is
        `self.table.pool.keys[self.layer]` and `.values[self.layer]`, which is changed in its place.
        """
        # to do: `reserve`; each new position into its place; then `self.fetched` of both memories.
        table, size = self.table, self.table.pool.page_size
        keys, values = table.pool.keys[self.layer], table.pool.values[self.layer]
        L = key.shape[2]
        table.reserve(self.offset + L)
        for i in range(L):
            page, place = table.pages[(self.offset + i) // size], (self.offset + i) % size
            keys[page, :, place] = key[0, :, i]
            values[page, :, place] = value[0, :, i]
        self.offset += L
        return self.fetched(keys), self.fetched(values), "causal"
        # done

    def fetched(self, memory: mx.array) -> mx.array:
        """Returns the positions of this text out of a layer's memory (P, H, p, E), as (1, H, S, E)."""
        # to do: the text's pages next to each other along the positions, cut to `self.offset`.
        pages = memory[mx.array(self.table.pages)]
        return pages.swapaxes(0, 1).flatten(1, 2)[None, :, : self.offset]
        # done

    def rewind(self, n: int) -> None:
        """Forgets the last n positions; their pages stay the text's."""
        self.offset -= n


def paged_attention(
    query: mx.array,
    key_pages: mx.array,
    value_pages: mx.array,
    block_table: mx.array,
    context_lens: mx.array,
    page_size: int,
    scale: float | None = None,
) -> mx.array:
    """Returns attention of several texts at once, straight over their pages.

    query: (N, G * H, L, E), the last L positions of each text. key_pages, value_pages: (P, H, p, E); the keys of the
    new positions are in them already. block_table: (N, M), integers: the pages of each text, in order; -1 where a text
    has fewer than M. context_lens: (N), integers: how many positions each text has, the new ones included.
    page_size: p. scale: as in `scaled_dot_product_attention_simple`. The result: (N, G * H, L, E).

    A position sees itself and those before it in its own text, and nothing else.
    """
    # to do: the pages of each text as (N, H, M * p, E); a mask (N, 1, L, M * p) from the lengths, of the query's dtype;
    #        `scaled_dot_product_attention_grouped`.
    N, M = block_table.shape
    L, H, E = query.shape[2], key_pages.shape[1], query.shape[3]
    pages = mx.maximum(block_table, 0)
    keys = key_pages[pages].swapaxes(1, 2).reshape(N, H, M * page_size, E)
    values = value_pages[pages].swapaxes(1, 2).reshape(N, H, M * page_size, E)
    positions = context_lens[:, None] - L + mx.arange(L)
    seen = mx.arange(M * page_size) <= positions[:, None, :, None]
    mask = mx.where(seen, 0.0, -mx.inf).astype(query.dtype)
    return scaled_dot_product_attention_grouped(query, keys, values, scale, mask)
    # done


def new_paged_caches(pool: PagePool, pages: Sequence[int] = ()) -> list[PagedKvCache]:
    """Returns the caches of a new text, one for each layer; `pages`, if there are any, hold its beginning."""
    table = BlockTable(pool, pages)
    return [PagedKvCache(table, layer, len(pages) * pool.page_size) for layer in range(len(pool.keys))]
