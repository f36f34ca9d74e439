"""Frames in runs: what the free list and the frame table give is what single calls would."""

from __future__ import annotations

import random
from collections import OrderedDict

import numpy as np
import pytest

from xipfs.fs.frame_table import DIRTY, FrameTable
from xipfs.memory.frames import FreeList, PhysicalMemory

SEEDS = range(5)


def test_a_free_list_gives_a_run_of_what_came_back_and_then_fresh_numbers() -> None:
    free = FreeList(10, 6)
    assert free.take(3).tolist() == [10, 11, 12]
    free.give(np.array([12, 10]))
    assert len(free) == 5
    assert free.take(3).tolist() == [10, 12, 13]
    free.push(11)
    assert free.take(9).tolist() == [11, 14, 15], "all that is left"
    assert free.take(1).tolist() == []
    assert free.pop() is None
    free.give(np.array([14, 15]))
    assert (free.pop(), free.pop(), free.pop()) == (15, 14, None)


def test_frames_taken_as_a_run_are_counted_and_go_with_their_last_reference() -> None:
    memory = PhysicalMemory(ram_pages=4, nvram_pages=8)
    pfns = memory.alloc_ram_run(3)
    assert pfns.tolist() == [0, 1, 2]
    assert memory.refcount[:4].tolist() == [1, 1, 1, 0]
    memory.get_page(1)
    memory.flags[2] = 5
    memory.put_ram_run(pfns)
    assert memory.refcount[:4].tolist() == [0, 1, 0, 0]
    assert (memory.flags[2], len(memory.ram_free)) == (0, 3)
    memory.put_page(1)
    assert memory.alloc_ram_run(9).tolist() == [0, 1, 2, 3]
    with pytest.raises(AssertionError):
        memory.put_ram_run(np.array([0, 5]))  # frame 5 is nobody's


@pytest.mark.parametrize("seed", SEEDS)
def test_the_coldest_is_the_one_used_longest_ago(seed: int) -> None:
    """Against one dictionary that remembers order; replay: the seed in the test's name."""
    chance = random.Random(seed)
    frames = 1500  # more than one queue of the coldest holds
    table = FrameTable(frames)
    order: OrderedDict[int, tuple[int, int]] = OrderedDict()
    free = list(range(frames))
    for _ in range(3000):
        action = chance.random()
        if free and action < 0.4:
            count = chance.randint(1, min(40, len(free)))
            pfns = sorted(free.pop(chance.randrange(len(free))) for _ in range(count))
            ino = chance.randint(2, 4)
            first = 1 + max((index for _, index in order.values()), default=0)
            pages = list(range(first, first + count))
            if count == 1:
                table.add(pfns[0], ino, first, first + 7000)
            else:
                table.add_run(np.array(pfns), ino, np.array(pages), np.array(pages) + 7000)
            order |= dict(zip(pfns, [(ino, page) for page in pages], strict=True))
        elif order and action < 0.8:
            pfn = chance.choice(list(order))
            table.touch(pfn)
            order.move_to_end(pfn)
        elif order:
            gone = [next(iter(order)) if chance.random() < 0.5 else chance.choice(list(order))]
            assert action > 0.9 or table.coldest() == next(iter(order))
            table.remove_run(np.array(gone))
            free += gone
            for pfn in gone:
                del order[pfn]
        assert len(table) == len(order)
    while order:
        pfn = table.coldest()
        (expected, (ino, index)) = next(iter(order.items()))
        assert pfn == expected
        assert table.find(ino, index) == pfn
        table.remove_run(np.array([pfn]))
        del order[pfn]
        assert table.find(ino, index) is None
    assert table.files() == []


def test_pages_are_found_by_file_and_by_flag() -> None:
    table = FrameTable(8)
    table.add_run(np.array([3, 4, 6]), 2, np.array([10, 11, 30]), np.array([70, 71, 50]))
    table.add(5, 7, 10, 60)
    assert table.find_run(2, np.array([9, 10, 30])).tolist() == [-1, 3, 6]
    assert table.find_run(8, np.array([10])).tolist() == [-1]
    assert sorted(table.of_file(2).tolist()) == [3, 4, 6]
    assert sorted(table.pages_of(2)) == [10, 11, 30]
    table.flags[4] |= DIRTY
    assert table.with_flag(table.all(), DIRTY).tolist() == [4]
    pfns, homes = table.by_home(table.all())
    assert (pfns.tolist(), homes.tolist()) == ([6, 5, 3, 4], [50, 60, 70, 71])
    table.remove_run(np.array([5, 6]))
    assert table.files() == [2]
    table.add(6, 9, 1, 2)
    assert table.with_flag(np.array([6]), DIRTY).size == 0
