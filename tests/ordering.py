"""The order of the tests where several processes share them: files with long tests first, divided among the processes.

pytest-xdist's `worksteal` gives each process an unbroken stretch of the collected tests, all stretches of one length,
and a process that is done takes over the last half of what the longest queue still holds. So each stretch begins with
its share of the files that hold a long test, and ends with short ones: those are what is taken over, and a long test is
not left to run alone at the end. A file's tests stay together, since they share fixtures.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def long_first(
    items: Sequence[Item], processes: int, file_of: Callable[[Item], Hashable], is_long: Callable[[Item], bool]
) -> list[Item]:
    """Returns the items in the order described above; a function of its arguments alone, as every process needs it."""
    files: dict[Hashable, list[Item]] = {}
    for item in items:
        files.setdefault(file_of(item), []).append(item)
    long_items = {file: sum(map(is_long, its_items)) for file, its_items in files.items()}
    heads: list[list[Item]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for file in sorted((file for file in files if long_items[file]), key=lambda file: -long_items[file]):
        process = loads.index(min(loads))
        heads[process] += files[file]
        loads[process] += long_items[file]
    short = [item for file, its_items in files.items() if not long_items[file] for item in its_items]
    ordered: list[Item] = []
    for process, head in enumerate(heads):
        length = (len(items) - len(ordered)) // (processes - process)  # as the scheduler cuts them
        share = max(0, length - len(head))
        ordered += [*head, *short[:share]]
        short = short[share:]
    return [*ordered, *short]
