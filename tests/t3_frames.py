"""Frames in runs: what the free list and the frame table give is what single calls would."""

from __future__ import annotations

import random
from collections import OrderedDict

import numpy as np
import pytest

from xipfs.fs.dirty_frames import DirtyFrames
from xipfs.fs.frame_table import FILLED_BY_READ, FrameTable
from xipfs.fs.frames_by_page import FramesByPage
from xipfs.memory.frames import FreeList, PhysicalMemory
from xipfs.units import Pfn

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
    assert memory.ram_frames.shape == (4, 4096)
    assert memory.ram_bytes_of(3).ctypes.data % 4096 == 0  # a page of the host's
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


def test_pages_are_found_by_file_and_by_home() -> None:
    table = FrameTable(8)
    table.add_run(np.array([3, 4, 6]), 2, np.array([10, 11, 30]), np.array([70, 71, 50]))
    table.add(5, 7, 10, 60)
    assert table.find_run(2, np.array([9, 10, 30])).tolist() == [-1, 3, 6]
    assert table.find_run(8, np.array([10])).tolist() == [-1]
    assert sorted(table.of_file(2).tolist()) == [3, 4, 6]
    assert sorted(table.pages_of(2)) == [10, 11, 30]
    table.flags[6] |= FILLED_BY_READ
    pfns, homes = table.by_home(table.all())
    assert (pfns.tolist(), homes.tolist()) == ([6, 5, 3, 4], [50, 60, 70, 71])
    table.remove_run(np.array([5, 6]))
    assert table.files() == [2]
    table.add(6, 9, 1, 2)
    assert table.flags[6] == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_pages_of_many_stretches_are_found_in_one_frame_each(seed: int) -> None:
    chance = random.Random(seed)
    found, plain = FramesByPage(), dict[tuple[int, int], int]()
    free = list(range(20_000))
    for _ in range(200):
        ino, first = chance.choice([2, 3, 1 << 40]), chance.choice([0, 60, 5_000, 1 << 36])
        step = chance.choice([1, 1, 3, 70])
        pages = [first + step * at for at in range(chance.randrange(1, 300))]
        lacking = [page for page in pages if (ino, page) not in plain]
        if chance.random() < 0.5 and lacking:
            pfns = [free.pop() for _ in lacking]
            if len(lacking) == 1:
                found.put(ino, lacking[0], pfns[0])
            else:
                found.put_run(ino, np.array(lacking), np.array(pfns))
            plain |= {(ino, page): pfn for page, pfn in zip(lacking, pfns, strict=True)}
        elif held := [page for page in pages if (ino, page) in plain]:
            if chance.random() < 0.2:
                held = held[:1]
                found.take_out(ino, held[0])
            else:
                found.take_out_run(ino, np.array(held))
            free += [plain.pop((ino, page)) for page in held]
        assert found.find_run(ino, np.array(pages)).tolist() == [
            plain.get((ino, page), -1) for page in pages
        ], seed
        assert found.find(ino, pages[-1]) == plain.get((ino, pages[-1])), seed
        of_file = sorted(pfn for (owner, _), pfn in plain.items() if owner == ino)
        assert sorted(found.of_file(ino).tolist()) == of_file, seed
        assert set(found.files()) == {owner for owner, _ in plain}, seed


@pytest.mark.parametrize("seed", SEEDS)
def test_frames_are_clean_and_dirty_in_the_order_of_a_plain_dictionary(seed: int) -> None:
    chance = random.Random(seed)
    dirty, plain = DirtyFrames(2_000), dict[int, int]()
    for now_ns in range(600):
        for _ in range(chance.randrange(12)):
            pfn = Pfn(chance.randrange(2_000))
            dirty.add(pfn, now_ns)
            plain.setdefault(pfn, now_ns)
        if chance.random() < 0.3:
            limit, latest_ns = chance.choice([1, 40, 5_000]), now_ns - chance.choice([0, 5, 200])
            due = [pfn for pfn, since_ns in plain.items() if since_ns <= latest_ns][:limit]
            assert dirty.oldest(limit, latest_ns).tolist() == due, seed
            dirty.clear(np.array(due, np.int64))
            plain = {pfn: since for pfn, since in plain.items() if pfn not in due}
        asked = chance.sample(range(2_000), 50)
        among = dirty.among(np.array(asked))
        assert among.tolist() == [pfn for pfn in asked if pfn in plain], seed
        if chance.random() < 0.2:
            dirty.clear(among)
            plain = {pfn: since for pfn, since in plain.items() if pfn not in among}
        assert len(dirty) == len(plain), seed
        assert (asked[0] in dirty) == (asked[0] in plain), seed


def test_what_became_clean_leaves_no_lasting_trace_in_the_order() -> None:
    dirty = DirtyFrames(4)
    for now_ns in range(10_000):
        dirty.add(Pfn(0), 1)  # dirty all the time
        dirty.add(Pfn(1), now_ns + 1)
        dirty.clear(np.array([1]))
    assert dirty.oldest(4, 20_000).tolist() == [0]
    assert dirty._queue.size <= 512


def test_asking_for_the_oldest_changes_nothing() -> None:
    dirty = DirtyFrames(600)
    for pfn in range(600):
        dirty.add(Pfn(pfn), pfn)
    dirty.clear(np.arange(1, 599))
    assert dirty.oldest(2, 600).tolist() == [0, 599]
    assert dirty.oldest(2, 600).tolist() == [0, 599]
