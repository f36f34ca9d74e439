"""Batches of plain faults: the same books as charging each fault alone, whatever happens between.

Two filesystems with the same files take the same random events. One accountant gets the faults
one by one, the other as batches; everything that either keeps is compared: charges, PTEs, counts,
the kernel's column, the order of the page cache, ledgers.
"""

from __future__ import annotations

import os
import random
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from t3_accounting import BASE, PAGE, Scene

from xipfs.accounting import charge_loop
from xipfs.accounting.causes import MOVE
from xipfs.accounting.charges import ChargeBatch
from xipfs.clock import SystemClock
from xipfs.fs.build import make_empty
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import PageKind
from xipfs.mm import bulk_zap
from xipfs.mm.access import maps_what
from xipfs.trace import events as ev
from xipfs.trace.fault_batch import FROM_KERNEL, FaultBatch

#: To replay a failure: XIPFS_TEST_SEED=N pytest tests/t3_bulk_charging.py
SEED = int(os.environ.get("XIPFS_TEST_SEED") or secrets.randbelow(1 << 32))
PAGES, FILES, SPACES = 48, 3, (5, 6, 9)
Code = tuple[object, object]
READ, WRITE, PRESENT, USER, FETCH = 0, 2, 1, 4, 16


class Pair:
    """Two scenes that get the same events; ``fast`` gets batches as they are."""

    def __init__(self, choose: random.Random, work: Path, ram_pages: int, code: Code) -> None:
        self.choose = choose
        self.time_ns = 10_000_000_000
        self.scenes = []
        clock = SystemClock()
        self.filesystems = []
        holes = choose.choice([0.3, 5])
        letters = ["".join(choose.choices("XP.", [5, 4, holes], k=PAGES)) for _ in range(FILES)]
        for name in ("alone", "fast"):
            image = work / f"{name}{len(list(work.iterdir()))}.img"
            make_empty(image, size_bytes=8 << 20, label="", pagecache=False, clock=clock)
            fs = Filesystem.open(image, ram_bytes=ram_pages * PAGE, clock=clock)
            scene = Scene(fs)
            for each in letters:
                scene.file(each)
            self.filesystems.append(fs)
            self.scenes.append(scene)
        self.alone, self.fast = self.scenes
        self.inos = self.alone.inos
        self.fast.books.bulk.use(*code)  # type: ignore[arg-type]
        self.mapped: dict[tuple[int, int], tuple[int, int, int, bool]] = {}
        self.offsets: dict[tuple[int, int], int] = {}
        self.by_loop = 0

    def now(self) -> int:
        self.time_ns += 1000
        return self.time_ns

    def events(self, *events: ev.Event) -> None:
        for scene in self.scenes:
            scene.books.consume(events)

    def map(self) -> None:
        """Map a part of a file at one of four places of a space."""
        choose = self.choose
        mm, place = choose.choice(SPACES), choose.randrange(4)
        start = BASE + place * 4096 * PAGE + choose.choice([0, 0, 500]) * PAGE
        if (mm, place) in self.mapped:
            old, pages, *_ = self.mapped.pop((mm, place))
            self.events(ev.Unmap(self.now(), mm, old, old + pages * PAGE))
        pages, pgoff = choose.randint(8, PAGES), choose.randint(0, 8)
        ino, shared = choose.choice(self.inos), choose.random() < 0.4
        prot = choose.choice([1, 3, 3])
        self.events(
            ev.Map(self.now(), mm, mm * 10, start, start + pages * PAGE, ino, pgoff, prot, shared,
                   True, choose.random() < 0.7)
        )  # fmt: skip
        self.mapped[mm, place] = (start, pages, ino, bool(prot & 2))
        self.offsets[mm, place] = pgoff

    def batch(self, count: int) -> FaultBatch:
        choose, rows = self.choose, []
        wide = choose.random() < 0.5
        for _ in range(count):
            (mm, place), (start, pages, ino, writable) = choose.choice(list(self.mapped.items()))
            page = choose.randrange(pages)
            index = self.offsets[mm, place] + page
            write = writable and choose.random() < 0.3
            error = USER | (WRITE if write else 0) | (PRESENT if choose.random() < 0.2 else 0)
            error |= FROM_KERNEL if choose.random() < 0.1 else 0
            first, last = 1, 0
            if not write and choose.random() < 0.7:
                first = max(self.offsets[mm, place], index - choose.randrange(16))
                last = min(first + 15, self.offsets[mm, place] + pages - 1)
                if wide and choose.random() < 0.02:
                    last += 3
            began = self.now()
            rows.append(
                (began, self.now(), mm, mm * 10, mm * 10 + choose.randrange(2),
                 start + page * PAGE + choose.randrange(PAGE), ino, index, error,
                 choose.random() < 0.1, first, last)
            )  # fmt: skip
        return FaultBatch(np.array(rows, np.int64))

    def fault(self, count: int) -> None:
        batch = self.batch(count)
        expected = self.alone.books.consume(batch.expand())
        got = self.fast.books.charge(batch)
        self.by_loop += count - len(got.by_hand) if isinstance(got, ChargeBatch) else 0
        assert list(got) == expected

    def disturb(self) -> None:
        """Something else than plain faults, on both."""
        choose = self.choose
        what = choose.choice(
            ["map", "zap", "cache", "settle", "drop", "move", "read", "write", "cut", "fork",
             "exit", "hint", "protect", "lose"]
        )  # fmt: skip
        ino, first = choose.choice(self.inos), choose.randrange(PAGES)
        pages = choose.randint(1, 16)
        (mm, place), (start, length, *_) = choose.choice(list(self.mapped.items()))
        end = start + length * PAGE
        if what == "map":
            self.map()
        elif what == "zap":
            self.events(ev.Zap(self.now(), mm, start + choose.randrange(length) * PAGE, end))
        elif what == "cache":
            self.events(ev.CacheAdd(self.now(), ino, first, pages))
        elif what == "settle":
            self.events(ev.CacheAdd(self.now(), ino, first, pages))
            self.time_ns += 2_000_000_000
            for scene in self.scenes:
                scene.books.kernel.cached.answered(ino, range(first, first + pages), self.time_ns)
        elif what == "drop":
            began_ns, dropped_ns = self.now(), self.now()
            if choose.random() < 0.5:
                for scene in self.scenes:
                    taken = scene.books.causes.begin(ino, first, pages, MOVE, began_ns)
                    taken.ended_ns = dropped_ns
            self.events(ev.CacheDelete(dropped_ns, ino, first, pages))
        elif what == "protect":
            self.events(ev.Protect(self.now(), mm, start, start + length // 2 * PAGE, 1))
            self.mapped[mm, place] = (start, length, self.mapped[mm, place][2], False)
        elif what == "fork" and mm == SPACES[0]:
            self.events(ev.Fork(self.now(), mm, 77, 50, 770, ()), ev.Exit(self.now(), 77))
        elif what == "exit" and choose.random() < 0.2:
            self.events(ev.Exit(self.now(), mm))
            self.mapped = {key: value for key, value in self.mapped.items() if key[0] != mm}
            self.map()
        elif what == "lose":
            if choose.random() < 0.2:
                self.events(ev.Lost(self.now(), 1))
        elif what == "hint":
            assert len({tuple(scene.books.mark_hints(2)) for scene in self.scenes}) == 1
        else:
            self.change_file(what, ino, first, pages)

    def change_file(self, what: str, ino: int, first: int, pages: int) -> None:
        choose = self.choose
        to = choose.choice(["xip", "pagecache"])
        for fs in self.filesystems:
            if what == "move":
                kind = PageKind.XIP if to == "xip" else PageKind.PAGECACHE
                fs.move(ino, range(first, min(first + pages, PAGES)), kind)
            elif what == "read":
                fs.read(ino, first * PAGE, pages * PAGE)
            elif what == "write":
                fs.write(ino, first * PAGE, b"new" * 500)
            elif what == "cut" and self.time_ns % 7 == 0:
                fs.setattr(ino, size_bytes=(PAGES - 3) * PAGE)

    def compare(self) -> None:
        alone, fast = (scene.books for scene in self.scenes)
        assert fast.ledger.total == alone.ledger.total
        assert fast.ledger.live == alone.ledger.live
        assert fast.unfollowed == alone.unfollowed
        assert fast.around_pages == alone.around_pages
        assert fast.hints._marked == alone.hints._marked
        assert fast.causes._marked == alone.causes._marked
        assert fast.kernel.doubtful.keys() == alone.kernel.doubtful.keys()
        assert fast.kernel.changes == alone.kernel.changes
        assert fast.kernel.pids == alone.kernel.pids
        assert fast.kernel._threads == alone.kernel._threads
        assert vars(fast.machine.statistics()) == vars(alone.machine.statistics())
        for name in ("refcount", "mapcount", "page_flags"):
            ours, theirs = (getattr(books.machine.memory, name) for books in (fast, alone))
            assert (ours == theirs).all(), name
        for number, mm in alone.mms.items():
            other = fast.mms[number]
            assert [(v.start, v.end, v.flags, v.anon_vma) for v in mm] == [
                (v.start, v.end, v.flags, v.anon_vma) for v in other
            ]
            counters = ("rss", "raw_ptes", "min_flt", "maj_flt")
            assert [getattr(mm, c) for c in counters] == [getattr(other, c) for c in counters]
            for vma in mm:
                span = vma.start, vma.end
                assert list(other.tables.populated(*span)) == list(mm.tables.populated(*span))
                assert list(fast.kernel.populated(number, *span)) == list(
                    alone.kernel.populated(number, *span)
                )
                for address, _ in mm.tables.populated(*span):
                    assert maps_what(mm, address) == maps_what(other, address)
            ours = fast.kernel._extents_of(number), alone.kernel._extents_of(number)
            assert vars(ours[0]) == vars(ours[1])
        for books, fs in zip((alone, fast), self.filesystems, strict=True):
            assert books.check() == ""
            for ino, file in books._files.items():
                for address, frame in file.frames.populated(0, 1 << 40):
                    page = fs.page(ino, address // PAGE)
                    assert (page.kind is PageKind.HOLE) == bool(frame & charge_loop.HOLE)
                    assert page.pfn in (None, (frame & charge_loop.PFN_MASK) - 1), page
        orders = [
            [pfn for _, pfn in sorted((fs._core.cache._frames._stamps[pfn], pfn)
                                      for pfn in fs.resident_frames())]
            for fs in self.filesystems
        ]  # fmt: skip
        assert orders[0] == orders[1]
        alone_cache, fast_cache = (fs._core.cache for fs in self.filesystems)
        assert fast_cache._evicted_fills == alone_cache._evicted_fills
        assert bytes(fast_cache._frames.flags) == bytes(alone_cache._frames.flags)


def check(seed: int, code: Code, work: Path, ram_pages: int, rounds: int = 25) -> int:
    choose = random.Random(seed)
    pair = Pair(choose, work, ram_pages, code)
    for _ in range(4):
        pair.map()
    for ino in pair.inos:
        if choose.random() < 0.7:
            pair.events(ev.CacheAdd(1000, ino, 0, PAGES))
    for _ in range(rounds):
        for _ in range(choose.choice([0, 1, 1, 4])):
            pair.disturb()
        pair.fault(choose.choice([20, 70, 300]))
        pair.compare()
    for fs in pair.filesystems:
        fs.close()
    return pair.by_loop


@pytest.mark.parametrize("ram_pages", [16, 200])
def test_random_batches_in_python(tmp_path: Path, ram_pages: int) -> None:
    print(f"XIPFS_TEST_SEED={SEED}")
    assert check(SEED, (charge_loop.run, bulk_zap.run), tmp_path, ram_pages) > 300


@pytest.mark.parametrize("seed", [17, 32])
def test_the_loop_leaves_marked_fills_to_the_accountant(tmp_path: Path, seed: int) -> None:
    """In these, a page that a read filled had its fault and was evicted: once the mark stayed."""
    assert check(seed, (charge_loop.run, bulk_zap.run), tmp_path, 16) > 300


@pytest.mark.parametrize("ram_pages", [16, 64, 200])
def test_random_batches_compiled(tmp_path: Path, ram_pages: int) -> None:
    pytest.importorskip("numba")
    from xipfs.accounting import charge_code

    print(f"XIPFS_TEST_SEED={SEED}")
    code: Any = charge_code.run, charge_code.zap
    for number in range(2):
        assert check(SEED + number, code, tmp_path, ram_pages) > 300
    # A call with other types than at the import would be compiled while faults wait.
    assert [len(each.signatures) for each in code] == [1, 1]
