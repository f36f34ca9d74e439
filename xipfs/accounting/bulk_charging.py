"""Plain faults charged many at a time: the books end as if each had been charged alone.

``charge_loop`` does what it has seen done before and stops at the rest, which the accountant takes
and the loop learns from (``mm.bulk_learn``); what it learned holds for the batches after it too,
for as long as these are of the same address spaces and no VMA of theirs changes. Pages that xipfs
took from the kernel itself (a hint, a move) are among the rest. Small batches are not worth it and
left to the accountant whole.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from xipfs.accounting import charge_loop as loop
from xipfs.accounting.charge_rows import ChargeRows
from xipfs.accounting.charges import KINDS, Charge, ChargeBatch, FaultCounters, Ints, PteKind
from xipfs.accounting.fault_around import BLIND_WINDOWS
from xipfs.accounting.kernel_states import LOST, NONE
from xipfs.mm import bulk_loop as bulk
from xipfs.mm import bulk_zap
from xipfs.mm.access import MAPS_ANON, MAPS_PAGECACHE, MAPS_XIP, Access
from xipfs.mm.bulk import NO_INTS, lend, numba_is_installed
from xipfs.mm.bulk_learn import Outcomes, Situation, add_to_counters
from xipfs.mm.machine import MM_FILEPAGES
from xipfs.mm.mm_struct import MmStruct
from xipfs.mm.vma import Vma
from xipfs.mm.zap import zap_page_range
from xipfs.trace import fault_batch as cells_of
from xipfs.trace.fault_batch import FaultBatch, around_of, fault_of
from xipfs.units import PAGE_MASK, PAGE_SHIFT

if TYPE_CHECKING:
    from xipfs.accounting.accountant import Accountant

log = logging.getLogger(__name__)

#: Fewer faults are charged one by one.
MIN_FAULTS: Final = 8
Run = Callable[[loop.Charging], int]
_CODES: Final = {kind: code for code, kind in KINDS.items()}
_HITS: Final = {
    loop.HIT_COW: MAPS_ANON,
    loop.HIT_PAGECACHE: MAPS_PAGECACHE,
    loop.HIT_XIP: MAPS_XIP,
}
#: The kinds of what is no outcome: its negative codes count from the end of all kinds.
_NO_OUTCOME: Final = (*_HITS.values(), -1)
assert (*_HITS, loop.BY_HAND) == (-4, -3, -2, -1)


class BulkCharger:
    """Charges batches into one accountant's books, by compiled code once that is there."""

    def __init__(self, books: Accountant) -> None:
        self._books = books
        self._run: Run | None = None
        self._zap: bulk_zap.Run | None = None
        self._compiling: threading.Thread | None = None
        #: Of the last batch.
        self._learned: _Learned | None = None

    def use(self, run: Run, zap: bulk_zap.Run) -> None:
        """Charge through ``run``, and zap through ``zap``, from now on."""
        self._run, self._zap = run, zap

    def zap(self, vma: Vma, start: int, end: int) -> None:
        """Clear the PTEs of [start, end), which lies within ``vma``."""
        if self._zap is None or not bulk_zap.zap_plain(vma, start, end, self._zap):
            zap_page_range(vma, start, end)

    def charge(self, batch: FaultBatch) -> ChargeBatch | None:
        """Charge the batch; None where that has to be done fault by fault."""
        if len(batch) < MIN_FAULTS:
            return None
        if self._run is None:
            self.start_compiling()
            return None
        numbers, process = _numbered(batch.cells[:, cells_of.MM])
        learned = self._learned_of([self._books.mm(number) for number in numbers])
        call = _Call(self._books, batch.cells, numbers, process, learned)
        charges = call.carry_out(self._run)
        if self._books.on_charges is not None:
            self._books.on_charges(batch, charges)
        return charges

    def _learned_of(self, mms: list[MmStruct]) -> _Learned:
        """Return what holds for faults of ``mms``: of the last batch, or nothing yet."""
        learned = self._learned
        if learned is None or not learned.rows.still_hold(mms):
            learned = self._learned = _Learned(mms, ChargeRows(self._books, mms))
        else:
            learned.rows.refresh_all()
            learned.outcomes.uses[:] = 0
        return learned

    def wait_until_compiled(self) -> None:
        """Return when batches are charged by compiled code, or never will be."""
        self.start_compiling()
        if self._compiling is not None:
            self._compiling.join()

    def start_compiling(self) -> None:
        """Load the compiled loops in a thread of its own, if that has not begun."""
        if self._compiling is None and numba_is_installed():
            self._compiling = threading.Thread(target=self._compile, daemon=True)
            self._compiling.start()

    def _compile(self) -> None:
        try:
            from xipfs.accounting import charge_code
        except Exception:
            log.exception("faults are charged without compiled code")
        else:
            self.use(charge_code.run, charge_code.zap)


def _numbered(values: Ints) -> tuple[list[int], Ints]:
    """Return the different ``values``, ascending, and for each value its place among them."""
    if (values == values[0]).all():
        return [int(values[0])], np.zeros(len(values), np.int64)
    different, places = np.unique(values, return_inverse=True)
    return different.tolist(), places


def _marked(books: Accountant, cells: cells_of.Cells, numbers: list[int], process: Ints) -> Ints:
    """Return where a fault (bit 0) or its window (bit 1) meets pages that xipfs took away."""
    marked = np.zeros(len(cells), np.int64)
    for place, number in enumerate(numbers):
        pages = books.hints.marked_pages(number) | books.causes.marked_pages(number)
        if not pages:
            continue
        taken = np.array(sorted(pages), np.int64)
        own = process == place
        page = cells[own, cells_of.ADDRESS] >> PAGE_SHIFT
        first = page + cells[own, cells_of.AROUND_FIRST] - cells[own, cells_of.INDEX]
        end = page + cells[own, cells_of.AROUND_LAST] - cells[own, cells_of.INDEX] + 1
        window = np.searchsorted(taken, first) < np.searchsorted(taken, end)
        marked[own] = np.isin(page, taken) | window << 1
    return marked


class _Learned:
    """The VMAs of some address spaces as rows, and the outcomes of faults in them."""

    def __init__(self, mms: list[MmStruct], rows: ChargeRows) -> None:
        self.mms = mms
        self.rows = rows
        self.outcomes = Outcomes(len(rows.vmas) * bulk.STATES * 2)
        #: What each outcome maps.
        self.kinds: list[int] = []
        self._charges = np.zeros((3, 0), np.int64)

    def charges(self) -> Ints:
        """Return kind, major and extra, a row each, by what is in loop.OUTCOME."""
        repeated = self.outcomes.repeated
        if self._charges.shape[1] != len(repeated) + len(_NO_OUTCOME):
            none = [0] * len(_NO_OUTCOME)
            self._charges = np.array(
                [
                    [*self.kinds, *_NO_OUTCOME],
                    [*(each.major for each in repeated), *none],
                    [*(max(each.faults - 1, 0) for each in repeated), *none],
                ],
                np.int64,
            )
        return self._charges


class _Call:
    """One batch being charged."""

    def __init__(
        self,
        books: Accountant,
        cells: cells_of.Cells,
        numbers: list[int],
        process: Ints,
        learned: _Learned,
    ) -> None:
        self.books = books
        self.cells = cells
        self.numbers = numbers
        self.process = process
        self.mms = learned.mms
        self.rows = learned.rows
        self.learned = learned
        self.outcomes = learned.outcomes
        self.results = np.full((len(cells), loop.RESULT_COLUMNS), loop.BY_HAND, np.int64)
        self.sums = np.zeros((len(numbers), loop.SUM_COLUMNS), np.int64)
        self.leaves_made = np.zeros(len(numbers), np.int64)
        self.wanted = np.zeros(bulk.WANTED, np.int64)
        self.tally = np.zeros(loop.TALLY, np.int64)
        self.tally[loop.UNCACHED] = NONE if books.kernel.cached.whole else LOST
        self.marked = _marked(books, cells, numbers, process)
        self.by_hand: dict[int, Charge] = {}
        self.touched = 0

    def carry_out(self, run: Run) -> ChargeBatch:
        """Charge all; enter the sums in the books."""
        try:
            while (reason := self._run(run)) != loop.FINISHED:
                if reason == loop.NEEDS_TABLES:
                    self.books.machine.table_pool.grow()
                elif reason == loop.NEEDS_SHADOW:
                    self._make_shadow()
                elif reason == loop.NEEDS_FAULT:
                    self._fault_by_hand()
                else:
                    self._around_by_hand()
        finally:
            self._touch()
            self._settle_counters()
        kind, major, extra = self.learned.charges().take(self.results[:, loop.OUTCOME], axis=1)
        charges = ChargeBatch(self.cells, kind, major, extra, self.by_hand)
        self._enter(charges)
        return charges

    def _run(self, run: Run) -> int:
        def charge(world: bulk.World) -> int:
            return run(
                loop.Charging(
                    world,
                    self.cells,
                    self.process,
                    self.marked,
                    self.rows.live,
                    self.books.kernel.pool.array,
                    self.rows.shadow_middles,
                    self.rows.cached_middles,
                    self.rows.frame_middles,
                    self.results,
                    self.sums,
                    self.tally,
                )
            )

        return lend(
            self.books.machine,
            self.outcomes,
            charge,
            trace=_NO_TRACE,
            first_row=self.rows.first_row,
            rows=self.rows.rows,
            middles=self.rows.middles,
            frames=NO_INTS,
            leaves_made=self.leaves_made,
            wanted=self.wanted,
            tally=NO_INTS,
        )

    # What the loop stops at

    def _make_shadow(self) -> None:
        """Make the leaf of the kernel's column that the fault is about to write to."""
        at = int(self.tally[loop.AT])
        address = int(self.cells[at, cells_of.ADDRESS]) & PAGE_MASK
        number = self.numbers[self.process[at]]
        self.books.kernel.tables_of(number).set(address, NONE)
        self.rows.refresh(self.mms[self.process[at]].find_vma(address))

    def _fault_by_hand(self) -> None:
        """Have the accountant take the fault that the loop stopped at, and learn from it."""
        self._touch()
        at = int(self.tally[loop.AT])
        fault = fault_of(self.cells[at].tolist())
        mm = self.mms[self.process[at]]
        vma = mm.find_vma(fault.address)
        file = self.books.file(fault.ino)
        situation = None
        if vma is not None and self.wanted[bulk.KEY] >= 0:
            frame = file.frames.get(fault.index << PAGE_SHIFT) - 1
            situation = Situation(vma, fault.address >> PAGE_SHIFT, self.wanted, frame)
        charge = self.books.take(fault)
        assert charge is not None, fault
        if situation is not None and charge.kind is not PteKind.NONE:
            taken = Access("", 0, charge.extra + 1, int(charge.major), 0)
            learned = len(self.outcomes.repeated)
            self.outcomes.learn(situation, taken)
            if len(self.outcomes.repeated) > learned:
                self.learned.kinds.append(_CODES[charge.kind])
        file.learn(fault.index)
        self.rows.refresh(vma)
        self.by_hand[at] = charge
        self.tally[loop.PART] = 1

    def _around_by_hand(self) -> None:
        """Have the accountant map the window that the loop stopped at."""
        self._touch()
        at = int(self.tally[loop.AT])
        around = around_of(self.cells[at].tolist())
        assert around is not None, at
        self.books.around(around)
        file = self.books.file(around.ino)
        for index in range(around.first, around.last + 1):
            if self.books.kernel.is_cached(around.ino, index):
                file.learn(index)
        mm = self.mms[self.process[at]]
        for vma in mm.overlapping(around.address, around.address + 1):
            self.rows.refresh(vma)
        self.tally[loop.PART] = 0
        self.tally[loop.AT] += 1

    # What comes of it

    def _touch(self) -> None:
        """Make the pages of the faults so far the hottest, in their order."""
        end = int(self.tally[loop.AT]) + int(self.tally[loop.PART])
        frames = self.results[self.touched : end, loop.FRAME]
        ram_pages = self.books.machine.memory.ram_pages
        self.books.fs.touch_frames(frames[(frames >= 0) & (frames < ram_pages)])
        self.touched = end

    def _settle_counters(self) -> None:
        """Add up what the loop did, in the counters of the machine and the address spaces."""
        machine = self.books.machine
        uses = self.outcomes.uses
        for number in np.flatnonzero(uses).tolist():
            repeated, times = self.outcomes.repeated[number], int(uses[number])
            add_to_counters(machine, repeated.machine_counters, times)
            add_to_counters(repeated.mm, repeated.mm_counters, times)
        for mm, leaves, sums in zip(self.mms, self.leaves_made, self.sums, strict=True):
            filled = int(sums[loop.AROUND_FILLED])
            mm.tables.leaf_count += int(leaves)
            mm.rss[MM_FILEPAGES] += filled
            machine.nr_normal_ptes += filled
            self.books.around_pages += filled
        if blind := int(self.tally[loop.BLIND]):
            self.books.unfollowed[BLIND_WINDOWS] += blind

    def _enter(self, charges: ChargeBatch) -> None:
        """Enter the sums of each address space in the ledger and in what is kept by it."""
        books = self.books
        for place, number in enumerate(self.numbers):
            own: slice | npt.NDArray[np.bool_] = slice(None)
            if len(self.numbers) > 1:
                own = self.process == place
            cells = self.cells[own]
            counters, sums = self._counted(place), self.sums[place].tolist()
            pid = int(cells[0, cells_of.PID])
            comm = books.comm(int(cells[-1, cells_of.PID]))
            copied: list[int] = []
            if counters.pgfault_cow:
                looped = self.results[own, loop.OUTCOME] != loop.BY_HAND
                writes = cells[:, cells_of.ERROR] & cells_of.ERROR_WRITE != 0
                made = looped & writes & (charges.kind[own] == MAPS_ANON)
                copied = cells[made, cells_of.ADDRESS].tolist()
            for at, charge in self.by_hand.items():
                if self.process[at] == place:
                    counters.add(charge)
            books.ledger.charge_many(number, pid, comm, counters)
            tids, _ = _numbered(cells[:, cells_of.TID])
            books.runs.faults(number, pid, sums[loop.FAULTS], sums[loop.MAPPED])
            perhaps = False
            for kind, shared in ((loop.AROUND_PRIVATE, False), (loop.AROUND_SHARED, True)):
                unsure = sums[kind + loop.UNSURE]
                books.runs.around(number, pid, sums[kind], shared=shared, unsure=unsure)
                perhaps = perhaps or unsure > 0
            changes = sums[loop.CHANGES]
            books.kernel.faulted(number, pid, tids, copied, changes, unsure=perhaps)

    def _counted(self, place: int) -> FaultCounters:
        """Return the counters of what the loop charged to an address space."""
        counters = FaultCounters()
        for hit, kind in _HITS.items():
            counters.add_many(KINDS[kind], int(self.sums[place, loop.HITS + hit]), 0, 0)
        uses = self.outcomes.uses
        for number in np.flatnonzero(uses).tolist():
            repeated = self.outcomes.repeated[number]
            if repeated.mm is self.mms[place]:
                kind, times = self.learned.kinds[number], int(uses[number])
                extra = max(repeated.faults - 1, 0)
                counters.add_many(KINDS[kind], times, repeated.major, extra)
        return counters


#: The faults' own arrays are in ``Charging``.
_NO_TRACE: Final = (np.zeros(0, np.int32), NO_INTS, np.zeros(0, np.bool_))
