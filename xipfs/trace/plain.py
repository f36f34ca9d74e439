"""Runs of plain faults through compiled code, everything else through the grammar, in order.

``PlainFaults.feed`` takes the place of ``Grammar.feed``. Records of other kinds cut the stream; a
long enough stretch between two of them goes to ``plain_loop.run``, which works on copies of the
threads' open faults and of their mappings. They are copied in when a thread first appears in a
stretch, and back before the grammar sees anything, so the grammar never knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from xipfs.trace import events, records
from xipfs.trace import plain_loop as loop
from xipfs.trace.fault_batch import CELL_COLUMNS
from xipfs.trace.grammar import Grammar
from xipfs.trace.processes import Processes
from xipfs.trace.ring import Rows
from xipfs.trace.threads import Thread
from xipfs.trace.vmas import Vma

#: Shorter stretches cost more to hand over than they save.
MIN_STRETCH_ROWS: Final = 16
#: Records handed over at once: bounds memory, whatever the backlog.
_STRETCH_ROWS_MAX: Final = 1 << 16
#: Records that the grammar takes after a stop that came too soon, at first and at most.
_BACKOFF_ROWS: Final = 1
_BACKOFF_ROWS_MAX: Final = 256
_PROT_ALL: Final = 7

Run = Callable[[loop.Plain], int]


class PlainFaults:
    """Feeds one grammar; until ``use`` is called with a compiled loop, row by row only."""

    def __init__(
        self, processes: Processes, grammar: Grammar, fault_around_pages: int = 16
    ) -> None:
        self._processes = processes
        self._grammar = grammar
        self._around_pages = fault_around_pages
        self._run: Run | None = None
        self._cells = np.zeros((0, CELL_COLUMNS), np.int64)
        self._forget()

    def use(self, run: Run) -> None:
        """Take stretches of plain faults through ``run`` from now on."""
        self._run = run

    def feed(self, rows: Rows, min_stretch_rows: int = MIN_STRETCH_ROWS) -> None:
        """Process rows (see ``records``) in time order."""
        fed = 0
        if self._run is not None:
            others = np.flatnonzero(rows[:, 1] & np.uint64(0xFFFFFFFF) > records.MAP_PAGES)
            edges = np.concatenate([[-1], others, [len(rows)]])
            for gap in np.flatnonzero(np.diff(edges) > min_stretch_rows).tolist():
                start, stop = int(edges[gap]) + 1, int(edges[gap + 1])
                self._feed_slowly(rows[fed:start])
                for at in range(start, stop, _STRETCH_ROWS_MAX):
                    self._stretch(self._run, rows[at : min(at + _STRETCH_ROWS_MAX, stop)])
                fed = stop
        self._feed_slowly(rows[fed:])

    def _feed_slowly(self, rows: Rows) -> None:
        for start in range(0, len(rows), _STRETCH_ROWS_MAX):
            self._grammar.feed(rows[start : start + _STRETCH_ROWS_MAX].tolist())

    def _stretch(self, run: Run, rows: Rows) -> None:
        """Take records of faults only; what the loop stops at goes to the grammar."""
        if len(self._cells) < len(rows):
            self._cells = np.zeros((len(rows), CELL_COLUMNS), np.int64)
        signed = rows.view(np.int64)
        tally = np.zeros(loop.TALLY, np.int64)
        stopped = 0
        backoff = _BACKOFF_ROWS
        while True:
            reason = run(self._world(signed, tally))
            at = int(tally[loop.AT])
            if reason == loop.FINISHED:
                break
            if reason == loop.NEEDS_THREAD and self._hand_over(int(signed[at, 1]) >> 32):
                continue
            self._take_back(tally)
            soon = at - stopped < MIN_STRETCH_ROWS
            backoff = min(backoff * 2, _BACKOFF_ROWS_MAX) if soon else _BACKOFF_ROWS
            stopped = min(at + backoff, len(rows))
            self._grammar.feed(rows[at:stopped].tolist())
            tally[loop.AT] = stopped
        self._take_back(tally)

    def _world(self, signed: loop.Ints, tally: loop.Ints) -> loop.Plain:
        return loop.Plain(
            signed,
            self._places,
            self._table,
            self._vma_table,
            self._cells,
            tally,
            self._around_pages,
        )

    # -- the copies --------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._threads: list[Thread] = []
        self._spaces: dict[int, tuple[int, int]] = {}
        self._vmas: list[Vma] = []
        self._places = np.full(16, -1, np.int64)
        self._table = np.zeros((8, loop.THREAD_COLUMNS), np.int64)
        self._vma_table = np.zeros((0, loop.VMA_COLUMNS), np.int64)

    def _hand_over(self, tid: int) -> bool:
        """Copy a thread's state and mappings; False where it is not known, or not in the plain."""
        thread = self._processes.threads.get(tid)
        if thread is None or not _is_plain(thread):
            return False
        first, end = self._rows_of(thread)
        number = len(self._threads)
        if number == len(self._table):
            self._table = np.concatenate([self._table, np.zeros_like(self._table)])
        self._threads.append(thread)
        around = thread.pf_arounds[0] if thread.pf_arounds else (1, 0)
        self._table[number] = (
            tid, thread.pid, thread.space.id, first, end,
            thread.pf_open, thread.pf_time_ns, thread.pf_last_ns,
            thread.pf_address, thread.pf_error, thread.pf_kernel,
            thread.pf_ino, thread.pf_index, thread.pf_faults, thread.pf_retries,
            thread.pf_added, thread.pf_mapped_last, *around, -2, 0,
        )  # fmt: skip
        if 2 * len(self._threads) > len(self._places):
            self._places = np.full(2 * len(self._places), -1, np.int64)
            for place in range(number):
                self._enter(int(self._table[place, loop.TID]), place)
        self._enter(tid, number)
        return True

    def _enter(self, tid: int, place: int) -> None:
        mask = len(self._places) - 1
        slot = tid & mask
        while self._places[slot] >= 0:
            slot = slot + 1 & mask
        self._places[slot] = place

    def _rows_of(self, thread: Thread) -> tuple[int, int]:
        """Return which rows the mappings of the thread's address space are; copy them once."""
        rows = self._spaces.get(thread.space.id)
        if rows is None:
            first = len(self._vmas)
            self._vmas += thread.space.vmas
            copied = [_vma_row(vma) for vma in thread.space.vmas]
            fresh = np.array(copied, np.int64).reshape(-1, loop.VMA_COLUMNS)
            self._vma_table = np.concatenate([self._vma_table, fresh])
            rows = self._spaces[thread.space.id] = first, len(self._vmas)
        return rows

    def _take_back(self, tally: loop.Ints) -> None:
        """Give the threads what became of them, and the faults to the output; forget the copies."""
        for thread, row in zip(self._threads, self._table.tolist(), strict=False):
            _update(thread, row, self._vmas)
        count, major = int(tally[loop.CELLS]), int(tally[loop.MAJOR])
        if count:
            faults = self._grammar.faults
            faults.total += count
            faults.major += major
            faults.minor += count - major
            self._processes.output.emit_batch(self._cells[:count].copy())
        tally[loop.CELLS] = tally[loop.MAJOR] = 0
        self._forget()


def _is_plain(thread: Thread) -> bool:
    """Tell whether the thread's open fault, if it has one, is all in the fields that are copied."""
    if thread.stores or thread.pf_copied or thread.pf_ambiguous:
        return False
    if thread.pf_crossed_ns == thread.pf_last_ns:
        return not thread.pf_open
    if not thread.pf_open:
        return True
    if thread.pf_origin != events.TRAP or thread.pf_signal or thread.pf_reported:
        return False
    if len(thread.pf_arounds) > 1 or thread.pf_address >> 63:
        return False
    vma = thread.pf_vma
    if vma is None or thread.pf_ino < 0:
        return True
    needed = 1 | (2 if thread.pf_error & 2 else 0) | (4 if thread.pf_error & 16 else 0)
    return vma.prot_known or not needed & ~vma.prot


def _vma_row(vma: Vma) -> tuple[int, ...]:
    ino = -1 if vma.ino is None or vma.pgoff is None else vma.ino
    prot = _PROT_ALL if vma.prot_known else vma.prot
    return vma.start, vma.end, ino, vma.pgoff or 0, vma.told, prot


def _update(thread: Thread, row: list[int], vmas: list[Vma]) -> None:
    thread.pf_open = bool(row[loop.OPEN])
    thread.pf_time_ns, thread.pf_last_ns = row[loop.TIME], row[loop.LAST]
    thread.pf_address, thread.pf_error = row[loop.ADDRESS], row[loop.ERROR]
    thread.pf_kernel = bool(row[loop.KERNEL])
    thread.pf_ino, thread.pf_index = row[loop.INO], row[loop.INDEX]
    thread.pf_faults, thread.pf_retries = row[loop.FAULTS], row[loop.RETRIES]
    thread.pf_added = bool(row[loop.ADDED])
    thread.pf_mapped_last = bool(row[loop.MAPPED_LAST])
    first, last = row[loop.AROUND_FIRST], row[loop.AROUND_LAST]
    thread.pf_arounds = [(first, last)] if first <= last else []
    if row[loop.VMA] != -2:
        thread.pf_vma = vmas[row[loop.VMA]] if row[loop.VMA] >= 0 else None
    if row[loop.TRAPPED]:
        thread.traced = True
        thread.pf_origin = events.TRAP
        thread.pf_signal = 0
        thread.pf_reported = False
