"""What the bulk path shares with the slow path: page tables in a pool, free lists that are lent."""

from __future__ import annotations

import pytest

from xipfs.memory.frames import FreeList
from xipfs.mm.pte import PageTables
from xipfs.mm.table_pool import TablePool

MIB, GIB = 1 << 20, 1 << 30


def test_an_entry_is_found_where_it_was_set_and_nowhere_else() -> None:
    tables = PageTables()
    places = [
        0,
        4096,
        2 * MIB - 4096,
        2 * MIB,
        GIB - 4096,
        GIB,
        5 * GIB + 3 * MIB,
        (1 << 47) - 4096,
    ]
    for number, address in enumerate(places):
        tables.set(address, number + 1)
    assert [tables.get(address) for address in places] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert tables.get(8192) == tables.get(4 * MIB) == tables.get(3 * GIB) == 0
    # Leaves at 0, 2 MiB, 1 GiB - 2 MiB, 1 GiB, 5 GiB + 2 MiB and the top; 4 middle tables.
    assert tables.table_pages() == 6
    assert tables.pool.used_bytes() == (6 + 4) * 4096


def test_populated_yields_in_address_order_within_the_range() -> None:
    tables = PageTables()
    for address in (GIB, 2 * MIB - 4096, 0, 2 * MIB, 3 * GIB):
        tables.set(address, address | 1)
    assert list(tables.populated(4096, GIB + 4096)) == [
        (2 * MIB - 4096, (2 * MIB - 4096) | 1),
        (2 * MIB, 2 * MIB | 1),
        (GIB, GIB | 1),
    ]
    assert list(tables.populated(0, 2 * MIB - 4096)) == [(0, 1)]
    assert list(tables.populated(4 * GIB, 1 << 47)) == []


def test_changes_made_while_iterating_are_seen_though_the_pool_grows() -> None:
    tables = PageTables()
    other = PageTables(tables.pool)
    tables.set(0, 1)
    tables.set(4096, 2)
    seen = []
    for address, pte in tables.populated(0, 2 * MIB):
        seen.append((address, pte))
        if address == 0:
            before = tables.pool.array
            for leaf in range(40):
                other.set(leaf * 2 * MIB, 9)
            assert tables.pool.array is not before
            tables.set(4096, 3)
    assert seen == [(0, 1), (4096, 3)]
    assert tables.get(4096) == 3


def test_freeing_gives_back_leaves_wholly_inside_and_middles_left_empty() -> None:
    tables = PageTables()
    for address in (0, 2 * MIB, 4 * MIB, GIB):
        tables.set(address, 1)
        tables.set(address, 0)
    tables.free(4096, 6 * MIB)  # the first leaf begins below
    assert tables.table_pages() == 2
    assert tables.pool.used_bytes() == (2 + 2) * 4096
    tables.free(0, 2 * GIB)
    assert (tables.table_pages(), tables.pool.used_bytes(), tables.middles) == (0, 0, {})


def test_a_table_that_is_not_empty_is_not_freed() -> None:
    tables = PageTables()
    tables.set(5 * 4096, 1)
    with pytest.raises(AssertionError, match="not empty"):
        tables.free(0, 2 * MIB)


def test_the_pool_never_hands_out_page_0_and_keeps_what_it_holds_when_it_grows() -> None:
    pool = TablePool()
    taken = [pool.take() for _ in range(40)]
    assert taken == [512 * page for page in range(1, 41)]
    pool.entries[taken[0] + 511] = 77
    for _ in range(40):
        pool.take()
    assert pool.entries[taken[0] + 511] == 77
    assert pool.array[taken[0] + 511] == 77
    pool.give_back(taken[3])
    assert pool.take() == taken[3]


def test_a_free_list_is_lent_and_settled() -> None:
    free = FreeList(10, 5)
    assert [free.pop() for _ in range(3)] == [10, 11, 12]
    free.push(11)
    free.push(10)
    stack, first, end = free.lend()
    assert (stack.tolist(), first, end) == ([11, 10], 13, 15)
    del stack
    free.settle(1, 13)  # 10 was taken
    assert [free.pop(), free.pop(), free.pop(), free.pop()] == [11, 13, 14, None]


@pytest.mark.parametrize(("depth", "number"), [(2, 13), (1, 14), (0, 16), (0, 12), (-1, 13)])
def test_a_settlement_that_cannot_be_is_refused(depth: int, number: int) -> None:
    free = FreeList(10, 5)
    for _ in range(3):
        free.pop()
    free.push(11)
    with pytest.raises(AssertionError):
        free.settle(depth, number)
