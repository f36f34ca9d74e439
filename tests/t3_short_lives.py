"""Programs that live for a moment, by the thousand: when they are gone nothing of them is kept.

What has to go lies in many places (threads, address spaces, names, page tables, causes, the graves
of the exited), so memory is measured as a whole. A life's worth of any one of them shows: an entry
in a dict of numbers is a hundred bytes.
"""

from __future__ import annotations

import gc
import itertools
import tracemalloc
from collections.abc import Iterator

import pytest
from t0_trace_grammar import BASE, DEV, FILE, PID, READ, USER, WRITE, Script
from t3_accounting import PAGE, Scene, fs

from xipfs.accounting import charges
from xipfs.trace import events as ev
from xipfs.trace import records
from xipfs.trace.processes import GRAVE_NS

__all__ = ["fs"]  # a fixture

PRESENT = 1
CLONE_VM, CLONE_VFORK, CLONE_THREAD = 0x100, 0x4000, 0x10000
LIVES = 1000
#: Of a life: less than the smallest thing that could be forgotten.
KEPT_BYTES_MAX = 20


class Lives:
    """Writes the records of one life after another, and has them charged."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.script = Script()
        self.tids = itertools.count(1000)
        while scene.ino != FILE:
            scene.file("XPXPXPXP")
        self.count = 0

    def live(self, lives: int) -> None:
        """Let so many programs be born and die; their faults must be charged."""
        for _ in range(lives):
            self._one()
            self.count += 1
        self.script.grammar.feed(self.script.rows)
        self.script.rows = []
        self.script.grammar.settle(self.script.now)
        self.script.grammar.bury(self.script.now)
        self.script.now += 2 * GRAVE_NS
        self.script.grammar.bury(self.script.now)
        told = self.script.output.take()
        assert sum(isinstance(event, ev.Exit) for event in told) >= lives
        assert len(self.scene.books.consume(told)) >= 3 * lives

    def _one(self) -> None:
        """A shell's child: vfork or fork, exec of a file of the mount, faults, an end."""
        script, tid = self.script, next(self.tids)
        script.newtask(tid, CLONE_VM | CLONE_VFORK if self.count % 2 else 0)
        script.row(records.PREPARE_EXEC, tid, tid)
        script.row(records.MA_WRITE, tid, BASE, BASE + 8 * PAGE - 1, 1)
        script.row(records.RENAME, tid, tid, 0x65757274, 0)
        script.row(records.EXEC, tid, tid, tid)
        script.pf(BASE + PAGE, READ | USER, tid)
        script.fault(1, tid)
        script.add(1, tid)
        script.map(0, 7, tid)
        script.pf(BASE + 2 * PAGE, WRITE | USER, tid)
        script.fault(2, tid)
        script.pf(BASE + PAGE, WRITE | USER | PRESENT, tid)
        script.call("mmap", 0, 4 * PAGE, 2, 4 * PAGE, 3, result=BASE + 16 * PAGE, tid=tid)
        self._and(tid, self.count % 5)
        script.row(records.CACHE_DELETE, tid, DEV, FILE, 1, 0)

    def _and(self, tid: int, kind: int) -> None:
        """What not every one of them does; each dies of something else."""
        script = self.script
        if kind == 0:
            other = next(self.tids)
            script.newtask(other, CLONE_VM | CLONE_THREAD, tid)
            script.pf(BASE + 16 * PAGE, tid=other)
            script.fault(4, other)
            script.exit(other)
        elif kind == 1:
            child = next(self.tids)
            script.newtask(child, 0, tid)
            script.pf(BASE + 2 * PAGE, WRITE | USER | PRESENT, child)
            script.exit(child)
        elif kind == 2:
            script.enter("madvise", BASE, PAGE, 4, tid=tid)
        elif kind == 3:
            script.row(records.FOREIGN_ENTER, 9, tid)
            script.pf(BASE + 3 * PAGE, tid=tid)
        script.exit(tid)
        if kind == 3:
            script.row(records.FOREIGN_EXIT, 9, 0)


@pytest.fixture
def measured() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def in_use() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.usefixtures("measured")
def test_nothing_is_kept_of_the_dead(fs: object, monkeypatch: pytest.MonkeyPatch) -> None:
    # Their lines in the statistics are: as many as this.
    monkeypatch.setattr(charges, "KEEP_EXITED", 50)
    scene = Scene(fs)  # type: ignore[arg-type]
    lives = Lives(scene)
    lives.live(200)
    lives.live(200)
    before_bytes = in_use()
    for _ in range(LIVES // 100):
        lives.live(100)
    kept = in_use() - before_bytes
    assert kept < LIVES * KEPT_BYTES_MAX, f"{kept} bytes of {LIVES} lives"
    kernel, books = scene.books.kernel, scene.books
    assert (kernel.pids, dict(kernel.changes), kernel.doubtful, kernel.clouds) == ({}, {}, {}, {})
    assert (books.mms, books.ledger.live) == ({}, {})
    assert lives.script.processes.threads.keys() == {PID}
    assert scene.ptes() == (0, 0, 0)
    assert books.check() == ""
