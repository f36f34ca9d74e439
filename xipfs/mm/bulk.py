"""Millions of accesses at once, with the accounting that each of them would have got alone.

``bulk_access`` gives the same PTEs, counts and counters as calling ``access`` for one access after
the other, on the same Machine; the two may be mixed freely. It works where everything lies already:
page tables, struct pages, free lists and file placements are arrays. Hits, and misses in a
situation seen before, run in ``bulk_loop`` (compiled if numba is installed); the rest goes
through ``access``: errors, swap, handlers other than those of ``placed.PlacedFile``, and the first
miss of each situation, from which the loop learns what to repeat (``bulk_learn``).

A machine that follows the bytes of its pages (``track_data``) or has device pages gets every miss
from the slow path.

The compiled code is made anew in every process, a matter of seconds: numba's cache on disk would
not notice a change in the rule functions that the loop calls.
"""

from __future__ import annotations

import functools
import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from xipfs.mm import bulk_loop as loop
from xipfs.mm import pte as pte_functions
from xipfs.mm import rules
from xipfs.mm.access import access
from xipfs.mm.bulk_learn import Outcomes, Situation, add_to_counters
from xipfs.mm.machine import Machine
from xipfs.mm.mm_struct import MmStruct
from xipfs.mm.placed import PlacedFile, Placement
from xipfs.mm.pte import MIDDLE_SHIFT
from xipfs.mm.vma import Vma
from xipfs.units import PAGE_SHIFT

_REGION_SHIFT = MIDDLE_SHIFT - PAGE_SHIFT
Trace = tuple[npt.NDArray[np.int32], loop.Ints, npt.NDArray[np.bool_]]
"""Process, page and write of each access."""
NO_INTS: Final = np.zeros(0, np.int64)


@dataclass(frozen=True)
class BulkStatistics:
    """What a bulk call did. ``hits`` took no fault; ``repeated`` misses ran in the loop, ``slow``
    accesses through ``access``; ``signals`` counts the accesses that ended in one, by name.
    """

    accesses: int
    hits: int
    faults: int
    major_faults: int
    repeated: int
    slow: int
    signals: dict[str, int]


def numba_is_installed() -> bool:
    """Whether the loop can be compiled."""
    return importlib.util.find_spec("numba") is not None


@functools.cache
def make_callable() -> None:
    """Let compiled code call what the loop is made of."""
    from numba.extending import register_jitable

    for function in (
        pte_functions.pte_permits,
        pte_functions.pte_after_access,
        rules.vma_permits,
        rules.is_cow_mapping,
        rules.pte_kind_special,
        rules.pte_kind_nospecial,
        loop.take,
        loop.available,
        loop.find_row,
        loop.placed_frame,
        loop.pte_kind,
        loop.classify,
        loop.find_outcome,
        loop.apply,
    ):
        register_jitable(forceinline=True)(function)


@functools.cache
def compiled_run() -> Callable[[loop.World], int]:
    """Return ``bulk_loop.run`` compiled; the first call in a process takes seconds."""
    import numba

    make_callable()
    # The loop allocates nothing. Without _nrt=False numba would count references to every array
    # that a helper is handed, atomically, at each miss, which takes longer than the miss itself.
    options: dict[str, Any] = {"nogil": True, "_nrt": False}
    compiled: Callable[[loop.World], int] = numba.njit(**options)(loop.run)
    return compiled


def lend(
    machine: Machine,
    outcomes: Outcomes,
    run: Callable[[loop.World], int],
    *,
    trace: Trace,
    first_row: loop.Ints,
    rows: loop.Ints,
    middles: loop.Ints,
    frames: loop.Ints,
    leaves_made: loop.Ints,
    wanted: loop.Ints,
    tally: loop.Ints,
) -> int:
    """Lend the machine's arrays to ``run`` once, and settle what it took from free lists."""
    memory = machine.memory
    free_lists = (memory.ram_free, memory.anon_free, machine.table_pool.free)
    lent = [free_list.lend() for free_list in free_lists]
    free = np.array([(len(stack), first, end) for stack, first, end in lent], np.int64)
    world = loop.World(
        *trace,
        first_row=first_row,
        rows=rows,
        middles=middles,
        entries=machine.table_pool.array,
        refcount=memory.refcount,
        mapcount=memory.mapcount,
        page_flags=memory.page_flags,
        frames=frames,
        ram_returned=lent[loop.RAM][0],
        anon_returned=lent[loop.ANON][0],
        tables_returned=lent[loop.TABLES][0],
        free=free,
        outcomes=outcomes.table,
        heads=outcomes.heads,
        uses=outcomes.uses,
        leaves_made=leaves_made,
        wanted=wanted,
        tally=tally,
        zero_pfn=machine.zero_pfn,
        pte_special=machine.pte_special,
        mixed_zero_is_raw=machine.rules.kernel.mixed_zero_is_raw,
    )
    reason = run(world)
    del world, lent
    for free_list, left in zip(free_lists, free.tolist(), strict=True):
        free_list.settle(left[loop.DEPTH], left[loop.NEXT_NUMBER])
    return reason


def bulk_access(
    machine: Machine,
    mms: Sequence[MmStruct],
    process: npt.NDArray[np.integer],
    page: npt.NDArray[np.integer],
    write: npt.NDArray[np.bool_],
    *,
    compiled: bool | None = None,
) -> BulkStatistics:
    """Access virtual page ``page[i]`` of ``mms[process[i]]``, storing where ``write[i]``.

    The three arrays have one length; nothing is copied if they are int32, int64 and bool.
    ``compiled=None`` compiles where numba is installed; False runs the same functions in Python.
    A KernelBug ends the call at the access that raised it, with all before it accounted for.

    >>> from xipfs.memory.frames import PhysicalMemory
    >>> from xipfs.mm.flags import VM_READ, VM_WRITE
    >>> from xipfs.mm.mmap import do_mmap
    >>> machine = Machine(PhysicalMemory(ram_pages=8, nvram_pages=8))
    >>> mm = MmStruct(machine)
    >>> first = do_mmap(mm, None, 3, VM_READ | VM_WRITE) >> PAGE_SHIFT
    >>> page = np.array([first, first + 1, first, first + 2])
    >>> process, write = np.zeros(4, np.int32), np.array([True, True, False, True])
    >>> done = bulk_access(machine, [mm], process, page, write, compiled=False)
    >>> done.hits, done.faults, mm.anon_rss
    (1, 3, 3)
    """
    if not len(process) == len(page) == len(write):
        raise ValueError(f"{len(process)} processes, {len(page)} pages, {len(write)} writes")
    if len(process) and not 0 <= process.min() <= process.max() < len(mms):
        raise ValueError(f"process {process.min()}..{process.max()}, expected 0..{len(mms) - 1}")
    if len(set(map(id, mms))) != len(mms) or any(mm.machine is not machine for mm in mms):
        raise ValueError("expected different address spaces of this machine")
    if compiled is None:
        compiled = numba_is_installed()
    call = _BulkCall(
        machine,
        mms,
        np.ascontiguousarray(process, np.int32),
        np.ascontiguousarray(page, np.int64),
        np.ascontiguousarray(write, np.bool_),
    )
    return call.carry_out(compiled_run() if compiled else loop.run)


class _BulkCall:
    """One call of ``bulk_access``: the VMAs as rows, the outcomes learned, the tallies."""

    def __init__(
        self,
        machine: Machine,
        mms: Sequence[MmStruct],
        process: npt.NDArray[np.int32],
        page: loop.Ints,
        write: npt.NDArray[np.bool_],
    ) -> None:
        self.machine = machine
        self.mms = mms
        self.trace = (process, page, write)
        self.placement: Placement | None = None
        self.learns = machine.data is None and not machine.devmap_pfns
        self.row_of = {vma: row for row, vma in enumerate(vma for mm in mms for vma in mm)}
        self.first_row = np.cumsum([0, *(len(mm) for mm in mms)], dtype=np.int64)
        self.rows = np.zeros((len(self.row_of), loop.ROW_COLUMNS), np.int64)
        middles: list[int] = []
        for vma, row in self.row_of.items():
            self._fill_row(row, vma)
            self.rows[row, loop.MIDDLE] = len(middles)
            first, last = (vma.start >> MIDDLE_SHIFT), (vma.end - 1 >> MIDDLE_SHIFT)
            known = vma.mm.tables.middles
            middles += [known.get(region, 0) for region in range(first, last + 1)]
        self.middles = np.array(middles, np.int64)
        self.outcomes = Outcomes(len(self.row_of) * loop.STATES * 2)
        self.leaves_made = np.zeros(len(mms), np.int64)
        self.wanted = np.zeros(loop.WANTED, np.int64)
        self.tally = np.zeros(loop.TALLY, np.int64)
        self.slow = self.slow_hits = self.faults = self.major = 0
        self.signals: Counter[str] = Counter()

    def _fill_row(self, row: int, vma: Vma) -> None:
        frames, pages = loop.FOREIGN, 0
        if not self.learns:
            pass
        elif vma.vm_ops is None:
            frames = loop.ANONYMOUS
        elif isinstance(vma.file, PlacedFile):
            placement = self.placement = self.placement or vma.file.placement
            if vma.file.placement is placement:
                frames, pages = vma.file.first, vma.file.pages
        self.rows[row, : loop.MIDDLE] = (
            vma.start >> PAGE_SHIFT,
            vma.end >> PAGE_SHIFT,
            vma.flags,
            vma.pgoff,
            frames,
            pages,
        )

    def carry_out(self, run: Callable[[loop.World], int]) -> BulkStatistics:
        """Run the loop, and for what it stops at the slow path, until the trace is done."""
        try:
            while (reason := self._run(run)) != loop.FINISHED:
                if reason == loop.NEEDS_TABLES:
                    self.machine.table_pool.grow()
                else:
                    self._slow_access()
                    self.tally[loop.AT] += 1
        finally:
            self._settle_counters()
        uses = self.outcomes.uses[: len(self.outcomes.repeated)]
        return BulkStatistics(
            accesses=len(self.trace[0]),
            hits=int(self.tally[loop.HITS]) + self.slow_hits,
            faults=self.faults,
            major_faults=self.major,
            repeated=int(uses.sum()),
            slow=self.slow,
            signals=dict(self.signals),
        )

    def _run(self, run: Callable[[loop.World], int]) -> int:
        return lend(
            self.machine,
            self.outcomes,
            run,
            trace=self.trace,
            first_row=self.first_row,
            rows=self.rows,
            middles=self.middles,
            frames=NO_INTS if self.placement is None else self.placement.frames,
            leaves_made=self.leaves_made,
            wanted=self.wanted,
            tally=self.tally,
        )

    def _slow_access(self) -> None:
        """Carry out the access that the loop stopped at, and learn from it."""
        at = int(self.tally[loop.AT])
        process, page, write = (int(column[at]) for column in self.trace)
        mm = self.mms[process]
        learnable = self.wanted[loop.KEY] >= 0
        vma = mm.find_vma(page << PAGE_SHIFT)
        situation = Situation(vma, page, self.wanted) if learnable and vma is not None else None
        taken = access(mm, page << PAGE_SHIFT, write=bool(write))
        if situation is not None:
            self.outcomes.learn(situation, taken)
        self.slow += 1
        self.slow_hits += not taken.faults and not taken.signal
        self.faults += taken.faults
        self.major += taken.major
        if taken.signal:
            self.signals[taken.signal] += 1
        if vma is not None:
            # The fault may have made the middle table; the VMA itself a fault cannot change.
            region = page >> _REGION_SHIFT
            place = self.rows[self.row_of[vma], loop.MIDDLE] + region - (vma.start >> MIDDLE_SHIFT)
            self.middles[place] = mm.tables.middles.get(region, 0)

    def _settle_counters(self) -> None:
        """Add up what the loop did, in the counters of the machine and the address spaces."""
        uses = self.outcomes.uses.tolist()
        for times, repeated in zip(uses, self.outcomes.repeated, strict=False):
            add_to_counters(self.machine, repeated.machine_counters, times)
            add_to_counters(repeated.mm, repeated.mm_counters, times)
            self.faults += repeated.faults * times
            self.major += repeated.major * times
        for mm, leaves in zip(self.mms, self.leaves_made.tolist(), strict=True):
            mm.tables.leaf_count += leaves
