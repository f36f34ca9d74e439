"""Plain faults through the loop: exactly the events, threads, counts that the grammar gives alone.

Random records of three threads in two address spaces: faults of every form in every order, broken
ones among them, between system calls, page-cache events and signals.
"""

from __future__ import annotations

import copy
import os
import random
import secrets
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from t0_trace_grammar import BASE, FILE, PAGE, PID, PRIVATE, SHARED, Script

from xipfs.trace import plain_loop, records
from xipfs.trace.fault_batch import Cells, expanded
from xipfs.trace.plain import PlainFaults, Run
from xipfs.trace.proc import Identity, MapsLine
from xipfs.trace.threads import Thread

#: To replay a failure: XIPFS_TEST_SEED=N pytest tests/t0_trace_plain.py
SEED = int(os.environ.get("XIPFS_TEST_SEED") or secrets.randbelow(1 << 32))
OTHER_PID, SECOND_TID = 300, 101
TIDS = (PID, SECOND_TID, OTHER_PID)
OTHER_FILE, PAGES = 9, 64
EXECUTED = BASE + 4096 * PAGE
#: start, end, prot, shared, pgoff, ino as /proc shows them.
MAPPINGS = [
    MapsLine(BASE, BASE + PAGES * PAGE, 3, False, 5, FILE),
    MapsLine(BASE + 100 * PAGE, BASE + 140 * PAGE, 1, True, 0, OTHER_FILE),
]


def scene() -> Script:
    script = Script()
    script.people |= {
        SECOND_TID: Identity(PID, 1, "prog"),
        OTHER_PID: Identity(OTHER_PID, 1, "other"),
    }
    script.maps |= {PID: MAPPINGS, OTHER_PID: MAPPINGS}
    for tid in TIDS:
        script.pf(0x1000, tid=tid)
    # An exec's mappings are known by their first faults only.
    script.row(records.PREPARE_EXEC, OTHER_PID, OTHER_PID)
    script.row(records.MA_WRITE, OTHER_PID, EXECUTED, EXECUTED + 32 * PAGE - 1, 1)
    script.row(records.EXEC, OTHER_PID, OTHER_PID, OTHER_PID)
    return script


class Records:
    """Random records: each thread follows a form of its own, and the threads take turns."""

    def __init__(self, choose: random.Random, script: Script, odd: float) -> None:
        #: How often something else than a plain fault comes.
        self.odd = odd
        self.choose = choose
        self.script = script
        self.forms: dict[int, Iterator[None]] = {}

    def add(self, count: int) -> None:
        for _ in range(count):
            tid = self.choose.choice(TIDS)
            form = self.forms.get(tid)
            if form is None or next(form, "over") == "over":
                self.forms[tid] = (
                    self.call(tid) if self.choose.random() < self.odd / 4 else self.fault(tid)
                )
                next(self.forms[tid])

    def fault(self, tid: int) -> Iterator[None]:
        """One fault, whole or not; a yield is a record that another thread's may follow."""
        choose, script = self.choose, self.script
        executed = tid == OTHER_PID
        page = choose.randrange(32 if executed else PAGES)
        start, first, ino = (EXECUTED, 2, FILE) if executed else (BASE, 5, FILE)
        if not executed and choose.random() < 0.3:
            start, first, ino, page = BASE + 100 * PAGE, 0, OTHER_FILE, page % 40
        odd = choose.random() < self.odd
        if odd and choose.random() < 0.2:
            start = BASE + 1000 * PAGE
        index, error = first + page, choose.choice([4, 4, 4, 6, 7, 20, 0])
        script.pf(start + page * PAGE + choose.randrange(PAGE), error, tid, choose.random() < 0.1)
        yield
        form = choose.choice(["map", "map", "fault", "map fault", "nothing"])
        if choose.random() < 0.1:
            script.pf(start + page * PAGE, choose.choice([4, 4, 7]), tid)
            yield
        if odd:
            form = choose.choice(["cold", "retry", "twice", "wrong", "signal", "map"])
        low = max(first, index - choose.randrange(16))
        high = min(first + (31 if executed else 39), low + 15)
        if odd:
            high = max(low + choose.randrange(-1, 18), 0)
        if form in ("map", "map fault", "cold", "twice"):
            script.map(low, high, tid, ino)
            yield
        if form in ("fault", "map fault", "cold", "retry"):
            script.fault(index, tid, ino)
            yield
        if form == "cold":
            script.add(index, tid, 0, ino)
            yield
        if form in ("cold", "twice"):
            script.map(low, high, tid, ino)
            yield
        if form == "retry":
            for _ in range(choose.randint(1, 3)):
                script.fault(index, tid, ino)
                yield
        if form == "wrong":
            script.fault(choose.randrange(200), tid, choose.choice([FILE, OTHER_FILE, 77]))
            yield
        if form == "signal":
            script.row(records.SIGNAL, tid, 7, tid)
            yield

    def call(self, tid: int) -> Iterator[None]:
        choose, script = self.choose, self.script
        start = BASE + choose.randrange(PAGES) * PAGE
        length = choose.randint(1, 8) * PAGE
        name = choose.choice(["madvise", "munmap", "mprotect", "mmap", "mlock"])
        if name == "mmap":
            flags = choose.choice([PRIVATE, SHARED])
            script.enter(name, start, length, flags, choose.randrange(64) * PAGE, 3, tid=tid)
        elif name == "madvise":
            script.enter(name, start, length, choose.choice([4, 22, 10, 14]), tid=tid)
        else:
            script.enter(name, start, length, choose.choice([1, 3, 5]), tid=tid)
        yield
        if choose.random() < 0.2:
            script.row(records.CACHE_DELETE, tid, 42, FILE, choose.randrange(64), 0)
        script.leave(name, start if name == "mmap" else choose.choice([0, 0, 0, -22]), tid=tid)
        yield


def described(thread: Thread) -> dict[str, object]:
    """All fields of a thread, its mapping by its place."""
    fields = {name: getattr(thread, name) for name in Thread.__slots__}
    fields["space"] = thread.space.id
    vma = thread.pf_vma
    fields["pf_vma"] = None if vma is None else (vma.start, vma.end, vma.ino, vma.told)
    if not thread.pf_open:
        # Left over from the last fault: the next one sets them all.
        fields = {name: value for name, value in fields.items() if not name.startswith("pf_")}
    return fields


def compare(seed: int, run: Run, count: int) -> int:
    """Feed both; return how many faults the loop took."""
    choose = random.Random(seed)
    alone, both = scene(), scene()
    # In turn, not drawn: seeds in a row have runs of plain faults for sure.
    made = Records(choose, alone, (0.002, 0.02, 0.3)[seed % 3])
    plain = PlainFaults(both.processes, both.grammar)
    plain.use(run)
    batched: list[int] = []
    emit_batch = both.output.emit_batch

    def emit(cells: Cells) -> None:
        batched.append(len(cells) if len(cells) > 1 else 0)  # the grammar's come one by one
        emit_batch(cells)

    both.output.emit_batch = emit  # type: ignore[method-assign]
    while count > 0:
        made.add(step := choose.randint(1, 400))
        count -= step
        rows, alone.rows = alone.rows, []
        alone.grammar.feed(copy.deepcopy(rows))
        plain.feed(np.array(rows, np.uint64), choose.choice([0, 1, 8, 64]))
        if choose.random() < 0.3:
            for script in (alone, both):
                script.grammar.look(lambda t: t.tid == PID, lambda: alone.now)
                script.grammar.settle(alone.now)
        expected, got = alone.output.take(), both.output.take()
        assert list(expanded(got)) == list(expanded(expected))
        assert both.unfollowed == alone.unfollowed
        for tid, thread in alone.processes.threads.items():
            assert described(both.processes.threads[tid]) == described(thread)
        totals = [
            (g.faults.total, g.faults.major, g.faults.minor) for g in (alone.grammar, both.grammar)
        ]
        assert totals[0] == totals[1]
    return sum(batched)


def test_random_records_in_python() -> None:
    print(f"XIPFS_TEST_SEED={SEED}")
    assert sum(compare(SEED + number, plain_loop.run, 3000) for number in range(12)) > 500


def test_random_records_compiled() -> None:
    pytest.importorskip("numba")
    from xipfs.trace import plain_code

    print(f"XIPFS_TEST_SEED={SEED}")
    code: Any = plain_code.run
    batched = sum(compare(SEED + number, code, 3000) for number in range(12))
    assert batched > 500
    # A call with other types than at the import would be compiled while records wait.
    assert len(code.signatures) == 1
