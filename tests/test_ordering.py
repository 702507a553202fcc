"""The order of tests among processes: none lost, files whole, each stretch beginning with its share of long files."""

import random

import pytest

from tests.ordering import long_first


def made(files: dict[str, int], long: dict[str, int]) -> list[tuple[str, int, bool]]:
    """Items (file, number, whether long); the last ones of a file are long."""
    return [(file, i, i >= count - long.get(file, 0)) for file, count in files.items() for i in range(count)]


def ordered(items, processes):
    return long_first(items, processes, lambda item: item[0], lambda item: item[2])


def stretches(items, processes):
    """As pytest-xdist's `worksteal` cuts them."""
    found = []
    for process in range(processes):
        length = len(items) // (processes - process)
        found.append(items[:length])
        items = items[length:]
    return found


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_each_stretch_begins_with_its_share_of_the_long_files(processes):
    names = [f"{number:02}" for number in range(40)]
    items = made({name: 20 + int(name) for name in names}, {name: 1 + int(name) % 3 for name in names[::5]})
    order = ordered(items, processes)
    assert sorted(order) == sorted(items)
    counts = []
    for stretch in stretches(order, processes):
        has_long = [item[0] in names[::5] for item in stretch]
        assert has_long == sorted(has_long, reverse=True)
        counts.append(sum(item[2] for item in stretch))
    assert sum(counts) == sum(item[2] for item in items)
    assert max(counts) - min(counts) <= 3


def test_a_file_s_tests_stay_together_in_their_order():
    items = made({"a": 5, "b": 9, "c": 4, "d": 6}, {"b": 1, "d": 2})
    order = ordered(items, 2)
    assert [item[0] for item in order[:6]] == ["d"] * 6, "the file with most long tests first"
    for file in ("b", "d"):
        assert [item[1] for item in order if item[0] == file] == sorted(item[1] for item in items if item[0] == file)


def test_few_tests_in_many_processes_are_all_there():
    items = made({"a": 3, "b": 1}, {"a": 3})
    for processes in (1, 2, 4, 8):
        assert sorted(ordered(items, processes)) == sorted(items)
    assert ordered([], 3) == []


def test_the_order_is_a_function_of_the_collection():
    items = made({str(n): random.Random(n).randrange(1, 30) for n in range(30)}, {"4": 1, "9": 3, "17": 1})
    assert ordered(items, 4) == ordered(list(items), 4)
