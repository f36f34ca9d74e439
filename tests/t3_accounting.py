"""The accountant alone: events written by hand go in, what they are charged comes out.

Each test draws its file first, a letter a page as ``xipfs pages`` does: X = XIP, P = pagecache,
``.`` = hole. After each test the model is recounted from its page tables (T1 to T9).
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from xipfs.accounting.accountant import Accountant
from xipfs.accounting.charges import KEEP_EXITED, Charge, Ledger, PteKind
from xipfs.clock import SystemClock
from xipfs.fs.build import make_empty
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.pagecache import nothing
from xipfs.fs.types import PageKind
from xipfs.mm import audit
from xipfs.mm.rules import Rules
from xipfs.trace import events as ev

PAGE = 4096
BASE = 0x7F00_0000_0000
MM = 5
PID = 100

READ, RW = 1, 3


class Scene:
    """A filesystem with one file, an accountant, and short names for events."""

    def __init__(self, fs: Filesystem, rules: str = "6.1") -> None:
        self.fs = fs
        self.books = Accountant(fs, Rules.parse(rules), lambda pid: f"proc{pid}")
        fs.set_hooks(
            on_unmap=self.books.unmap_pages,
            on_evict=nothing,
            on_cut=self.books.cut,
        )
        self.ino = 0
        self.inos: list[int] = []

    def file(self, letters: str) -> None:
        """Make the file that the next events are about."""
        name = b"file%d" % len(self.inos)
        self.ino = self.fs.mknod(1, name, stat.S_IFREG | 0o644, 0, 0, 0).ino
        self.inos.append(self.ino)
        kinds = {"X": PageKind.XIP, "P": PageKind.PAGECACHE}
        for page, letter in enumerate(letters):
            if letter != ".":
                self.fs.set_default_kind(self.ino, kinds[letter])
                self.fs.write(self.ino, page * PAGE, bytes([page + 1]) * PAGE)
        self.fs.setattr(self.ino, size_bytes=len(letters) * PAGE)

    def map(
        self, pages: int, prot: int = READ, *, shared: bool = False, mm: int = MM, pgoff: int = 0
    ) -> ev.Map:
        end = BASE + pages * PAGE
        return ev.Map(0, mm, PID, BASE, end, self.ino, pgoff, prot, shared, True)

    def fault(
        self,
        page: int,
        *,
        write: bool = False,
        verdict: str = ev.MINOR,
        mm: int = MM,
        pid: int = PID,
        at: int | None = None,
    ) -> ev.Fault:
        """A fault on page ``page`` of the file, at page ``at`` of the mapping."""
        address = BASE + (page if at is None else at) * PAGE + 123
        return ev.Fault(
            0, mm, pid, pid, address, self.ino, page, write, False, True, False, verdict, ev.TRAP
        )

    def run(self, *events: ev.Event) -> list[tuple[str, bool, int]]:
        """Consume; return (kind, major, extra) of each charge."""
        charges = self.books.consume(events)
        return [(charge.kind.value, charge.major, charge.extra) for charge in charges]

    def ptes(self) -> tuple[int, int, int]:
        figures = self.books.machine.statistics()
        return figures.nr_special_ptes, figures.nr_normal_ptes, figures.nr_anon_pages

    def counts(self, page: int) -> tuple[int, int]:
        """Return refcount and mapcount of a resident page."""
        pfn = self.fs.page(self.ino, page).pfn
        assert pfn is not None
        return int(self.fs.memory.refcount[pfn]), int(self.fs.memory.mapcount[pfn])


@pytest.fixture
def fs(tmp_path: Path) -> Iterator[Filesystem]:
    clock = SystemClock()
    image = tmp_path / "image"
    make_empty(image, size_bytes=8 << 20, label="", pagecache=False, clock=clock)
    filesystem = Filesystem.open(image, ram_bytes=8 * PAGE, clock=clock)
    yield filesystem
    filesystem.close()


@pytest.fixture
def scene(fs: Filesystem) -> Iterator[Scene]:
    made = Scene(fs)
    yield made
    audit.check(made.books.machine, holders=holders(made))


def holders(scene: Scene) -> dict[int, int]:
    """Who holds pages besides PTEs: the page cache what is resident, the machine two pages."""
    fs = scene.fs
    held = {scene.books.machine.zero_pfn: 1, scene.books.sparse_pfn: 1}
    for ino in scene.inos:
        for run in fs.runs(ino):
            for index in range(run.first, run.first + run.count):
                page = fs.page(ino, index)
                if page.resident:
                    assert page.pfn is not None
                    held[page.pfn] = 1
    return held


def test_reads_of_each_kind(scene: Scene) -> None:
    scene.file("XP.X")
    assert scene.run(
        scene.map(4), scene.fault(0), scene.fault(1), scene.fault(2), scene.fault(3)
    ) == [("xip", False, 0), ("pagecache", False, 0), ("xip", False, 0), ("xip", False, 0)]
    assert scene.ptes() == (3, 1, 0)
    assert scene.counts(1) == (2, 1)


def test_private_writes_of_each_kind(scene: Scene) -> None:
    """F10: one fault on a pagecache page. F11: two on an XIP page, and on the zero page."""
    scene.file("XP.")
    writes = [scene.fault(page, write=True) for page in range(3)]
    assert scene.run(scene.map(3, RW), *writes) == [
        ("cow", False, 1),
        ("cow", False, 0),
        ("cow", False, 1),
    ]
    assert scene.ptes() == (0, 3, 3)
    assert scene.counts(1) == (1, 0)


def test_shared_writes_of_each_kind(scene: Scene) -> None:
    """F9, F12, F13: the raw PTE is made writable by a second fault; a hole gets a sparse page."""
    scene.file("XP.")
    writes = [scene.fault(page, write=True) for page in range(3)]
    assert scene.run(scene.map(3, RW, shared=True), *writes) == [
        ("xip", False, 1),
        ("pagecache", False, 0),
        ("pagecache", False, 0),
    ]
    assert scene.ptes() == (1, 2, 0)


def test_a_write_after_a_read_is_charged_as_one_more(scene: Scene) -> None:
    scene.file("XP")
    assert scene.run(
        scene.map(2, RW),
        scene.fault(0),
        scene.fault(1),
        scene.fault(0, write=True),
        scene.fault(1, write=True),
    ) == [("xip", False, 0), ("pagecache", False, 0), ("cow", False, 0), ("cow", False, 0)]
    assert scene.ptes() == (0, 2, 2)


def test_beyond_the_end_maps_nothing(scene: Scene) -> None:
    scene.file("XX")
    assert scene.run(scene.map(4), scene.fault(2, verdict=ev.SIGBUS)) == [("sigbus", False, 0)]
    assert scene.ptes() == (0, 0, 0)
    total = scene.books.ledger.total
    assert (total.pgfault, total.pgfault_sigbus, total.pgfault_xip) == (1, 1, 0)


def test_a_segmentation_fault_is_not_charged(scene: Scene) -> None:
    scene.file("X")
    assert scene.run(scene.map(1), scene.fault(0, write=True, verdict=ev.SIGSEGV)) == []
    assert scene.books.ledger.total.pgfault == 0


def test_a_fill_by_the_faults_own_read_is_major(scene: Scene) -> None:
    """The READ request came first and filled the frame; its fault is major all the same."""
    scene.file("PP")
    _evict(scene, 1)
    scene.fs.read(scene.ino, 0, 2 * PAGE)
    assert scene.run(
        scene.map(2),
        scene.fault(0, verdict=ev.MAJOR),
        scene.fault(1, verdict=ev.MINOR),
        scene.fault(1, verdict=ev.MAJOR),
    ) == [("pagecache", True, 0), ("pagecache", False, 0), ("pagecache", False, 0)]


def _evict(scene: Scene, page: int) -> None:
    """Push the page out by reading eight others into the eight frames."""
    mine = scene.ino
    scene.file("PPPPPPPP")
    scene.ino = mine
    assert not scene.fs.page(mine, page).resident


def test_a_page_that_is_gone_before_its_fault_is_charged(scene: Scene) -> None:
    scene.file("P")
    _evict(scene, 0)
    scene.fs.read(scene.ino, 0, PAGE)
    _evict(scene, 0)
    before = scene.fs.cache_statistics().evictions
    assert scene.run(scene.map(1), scene.fault(0, verdict=ev.MAJOR)) == [("pagecache", True, 0)]
    assert not scene.fs.page(scene.ino, 0).resident
    assert scene.fs.cache_statistics().evictions == before
    assert scene.ptes() == (0, 0, 0)
    # Asked once; the next fault fills the frame itself.
    assert scene.run(scene.fault(0, verdict=ev.MAJOR)) == [("pagecache", True, 0)]
    assert scene.ptes() == (0, 1, 0)


def test_eviction_takes_the_ptes(scene: Scene) -> None:
    scene.file("PPP")
    scene.run(scene.map(3), scene.fault(0), scene.fault(1), scene.fault(2))
    assert scene.ptes() == (0, 3, 0)
    _evict(scene, 2)
    assert scene.ptes() == (0, 0, 0)


def test_fork_copies_ptes_and_the_child_copies_on_write(scene: Scene) -> None:
    scene.file("XPX")
    scene.run(scene.map(3, RW), scene.fault(0), scene.fault(1), scene.fault(2, write=True))
    assert scene.ptes() == (1, 2, 1)
    scene.run(ev.Fork(0, MM, 6, PID, 101, ()))
    assert scene.ptes() == (2, 4, 1)
    assert scene.counts(1) == (3, 2)
    # Recorded on the 6.1 kernel: copying a raw page makes the child's old PTE young, so the copy
    # is thrown away once (rules F16, F19).
    assert scene.run(
        scene.fault(0, write=True, mm=6, pid=101), scene.fault(2, write=True, mm=6, pid=101)
    ) == [("cow", False, 1), ("cow", False, 0)]
    assert scene.ptes() == (1, 5, 3)
    scene.run(ev.Exit(0, MM))
    assert scene.ptes() == (0, 3, 2)
    scene.run(ev.Exit(0, 6))
    assert scene.ptes() == (0, 0, 0)
    assert scene.counts(1) == (1, 0)
    assert [
        (line.pid, line.exited, line.faults.pgfault) for line in scene.books.ledger.lines()
    ] == [
        (100, True, 3),
        (101, True, 2),
    ]


def test_dontfork_is_not_inherited(scene: Scene) -> None:
    scene.file("XX")
    scene.run(scene.map(2), scene.fault(0), scene.fault(1))
    scene.run(ev.Fork(0, MM, 6, PID, 101, ((BASE, BASE + 2 * PAGE),)))
    assert scene.ptes() == (2, 0, 0)


def test_unmap_protect_move_and_zap(scene: Scene) -> None:
    scene.file("XXXXXXXX")
    scene.run(scene.map(8), *[scene.fault(page) for page in range(8)])
    scene.run(ev.Unmap(0, MM, BASE, BASE + 2 * PAGE))
    assert scene.ptes() == (6, 0, 0)
    scene.run(ev.Zap(0, MM, BASE + 2 * PAGE, BASE + 3 * PAGE))
    assert scene.ptes() == (5, 0, 0)
    assert scene.run(ev.Protect(0, MM, BASE + 3 * PAGE, BASE + 4 * PAGE, RW)) == []
    assert scene.run(scene.fault(3, write=True)) == [("cow", False, 0)]
    assert scene.ptes() == (4, 1, 1)
    new = BASE + 100 * PAGE
    scene.run(ev.Move(0, MM, BASE + 4 * PAGE, BASE + 8 * PAGE, new, new + 6 * PAGE, keep_old=False))
    assert scene.ptes() == (4, 1, 1)
    # Page 4 is mapped where it was moved to; the old place is free.
    assert scene.run(scene.fault(4, at=100)) == [("xip", False, 0)]
    assert scene.ptes() == (4, 1, 1)
    assert scene.run(scene.fault(4)) == [("sigbus", False, 0)]
    assert scene.books.unfollowed == {"faults outside the mappings known of their process": 1}


def test_migration_unmaps_and_the_next_fault_sees_the_new_kind(scene: Scene) -> None:
    scene.file("XX")
    scene.run(scene.map(2, RW), scene.fault(0), scene.fault(1, write=True))
    assert scene.fs.promote(scene.ino, 0)
    assert scene.fs.promote(scene.ino, 1)
    assert scene.ptes() == (0, 1, 1), "the private copy stays (K7)"
    assert scene.run(scene.fault(0)) == [("pagecache", False, 0)]
    assert scene.counts(0) == (2, 1)
    assert scene.fs.demote(scene.ino, 0)
    assert scene.run(scene.fault(0)) == [("xip", False, 0)]
    assert scene.ptes() == (1, 1, 1)


def test_truncate_takes_private_copies_too(scene: Scene) -> None:
    """Rule K15."""
    scene.file("XPXP")
    scene.run(scene.map(4, RW), scene.fault(0), scene.fault(1), scene.fault(2, write=True))
    scene.run(scene.fault(3, write=True))
    assert scene.ptes() == (1, 3, 2)
    scene.fs.setattr(scene.ino, size_bytes=PAGE)
    assert scene.ptes() == (1, 0, 0)


def test_bytes_in_a_hole_unmap_what_stood_for_it(scene: Scene) -> None:
    """Rules R2, R4."""
    scene.file("..")
    scene.run(scene.map(2), scene.fault(0), scene.fault(1))
    assert scene.ptes() == (2, 0, 0)
    scene.fs.write(scene.ino, 0, b"bytes")
    assert scene.ptes() == (1, 0, 0)


def test_fault_around_maps_cached_pagecache_pages_only(scene: Scene) -> None:
    scene.file("PXPPP")
    scene.run(
        scene.map(5),
        ev.CacheAdd(0, scene.ino, 0, 4),
        scene.fault(0),
        ev.Around(0, MM, PID, BASE, scene.ino, 0, 4),
    )
    # Page 0 by its fault, 2 and 3 around it; 1 is XIP, 4 is not in the kernel's cache.
    assert scene.ptes() == (0, 3, 0)
    assert scene.books.around_pages == 2
    assert sum(scene.books.unfollowed.values()) == 1
    assert scene.books.ledger.total.pgfault == 1
    scene.run(ev.CacheDelete(0, scene.ino, 2, 1))


def test_no_special_bit_rules_count_nothing_else_than_xip_pages_raw(fs: Filesystem) -> None:
    """NVRAM has no struct page, so both ways of vm_normal_page agree (section 2's table)."""
    scene = Scene(fs, "6.1-nospecial")
    scene.file("XP")
    assert scene.run(scene.map(2), scene.fault(0), scene.fault(1)) == [
        ("xip", False, 0),
        ("pagecache", False, 0),
    ]
    assert scene.ptes() == (1, 1, 0)
    audit.check(scene.books.machine, holders=holders(scene))


def test_a_seed_kernel_copies_in_a_shared_mapping(fs: Filesystem) -> None:
    """Rule F13, the bug of that tree."""
    scene = Scene(fs, "seed")
    scene.file("X")
    assert scene.run(scene.map(1, RW, shared=True), scene.fault(0, write=True)) == [
        ("cow", False, 1)
    ]


def test_lines_add_up_to_the_total_however_many_there_are() -> None:
    ledger = Ledger()
    for mm in range(KEEP_EXITED + 10):
        charge = Charge(0, mm, 2, 0, PteKind.XIP, write=False, major=False, extra=mm % 2)
        ledger.charge(mm, "p", charge)
        ledger.exit(mm)
    lines = ledger.lines()
    assert len(lines) == KEEP_EXITED + 1
    assert sum(line.faults.pgfault for line in lines) == ledger.total.pgfault == 4106
    assert sum(line.faults.pgfault_extra for line in lines) == ledger.total.pgfault_extra == 2053
    assert lines[0].comm == "(older)"
    assert lines[0].faults.pgfault == 10


def test_a_charge_after_the_exit_goes_to_the_exited_line() -> None:
    ledger = Ledger()
    charge = Charge(0, 9, 2, 0, PteKind.COW, write=True, major=True, extra=0)
    ledger.charge(1, "late", charge)
    ledger.exit(1)
    ledger.charge(1, "", charge)
    (line,) = ledger.lines()
    assert (line.comm, line.exited, line.faults.pgfault_cow, line.faults.pgmajfault) == (
        "late",
        True,
        2,
        2,
    )
