"""A prefix cache: texts that begin alike share the pages of their beginning, which is computed once.

Source: Kwon et al. 2023, PagedAttention (https://arxiv.org/abs/2309.06180), section 4.4; least recently used pages go
first: Zheng et al. 2023, SGLang (https://arxiv.org/abs/2312.07104), section 3.
"""

from collections.abc import Sequence
from typing import Protocol


class Pool(Protocol):
    """What this file needs of a `PagePool`."""

    page_size: int
    holders: list[int]
    """How many hold each page; the prefix cache counts as one of them."""

    def hold(self, page: int) -> None: ...

    def release(self, page: int) -> None: ...


class PrefixCache:
    """Full pages, found again by all tokens from the beginning of a text to the page's end."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.pages: dict[tuple[int, ...], int] = {}
        """A page by the tokens up to its end, a tuple; the least recently used first. (A dict keeps the order of
        insertion: a key that is deleted and set again is the last.)"""

    def match(self, tokens: Sequence[int]) -> list[int]:
        """Returns the pages that hold the longest known beginning of `tokens`, in order.

        All are full pages, and one token at least is left over: the model must run it to have logits. The caller holds
        each of the pages (`self.pool.hold`), and each becomes the most recently used: the last page first, the first
        page last, so that the end of a text goes before its beginning.
        """
        # to do: page after page while the tokens up to its end are known; then hold and renew them.
        size, found = self.pool.page_size, []
        while (len(found) + 1) * size < len(tokens):
            page = self.pages.get(tuple(tokens[: (len(found) + 1) * size]))
            if page is None:
                break
            found.append(page)
        for number in reversed(range(len(found))):
            key = tuple(tokens[: (number + 1) * size])
            self.pages[key] = self.pages.pop(key)
            self.pool.hold(found[number])
        return found
        # done

    def insert(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Remembers the full pages of a text that has been computed. pages: those of all its tokens, in order.

        A page that the tokens do not fill is not kept. Where the tokens up to a page's end are known already, the page
        that was there first stays, and keeps its place in the order of use. The prefix cache holds each page that it
        takes (`self.pool.hold`). Pages that it takes become the most recently used, the last page first, the first page
        last.
        """
        # to do: a loop over the full pages, from the last to the first.
        size = self.pool.page_size
        for number in reversed(range(len(tokens) // size)):
            key = tuple(tokens[: (number + 1) * size])
            if key not in self.pages:
                self.pages[key] = pages[number]
                self.pool.hold(pages[number])
        # done

    def evict(self, count: int) -> int:
        """Forgets up to `count` pages that nobody else holds, the least recently used first; returns how many it was.

        A page is released (`self.pool.release`) and is not found any more. One that others hold is passed over.
        """
        # to do: a loop over the pages in their order; over a copy, since a dict must not change during a loop over it.
        evicted = 0
        for key, page in list(self.pages.items()):
            if evicted < count and self.pool.holders[page] == 1:
                del self.pages[key]
                self.pool.release(page)
                evicted += 1
        return evicted
        # done
