"""Outcomes: what the slow path did in one situation, noted so that the loop can repeat it.

A fault's effect is a function of its situation: the VMA, load or store, the PTE's bits, whether it
maps a counted page and that page's flags (for an anonymous page its counts too), and if nothing is
mapped what the file has there. Within one bulk call nothing else that a fault looks at can change:
VMAs are as they were (a handler runs with the address space's lock held for reading), eras and
operations are constant, and what does vary - swap, foreign handlers, the last free frame, a page
about to be freed - is never repeated (``bulk_loop.classify``). So the first miss in each situation
is taken by the slow path, with everything it touches compared before and after; the difference
is the outcome. No rule is written down a second time, and a rule that changes changes both paths.

Counters need no list here either: every public integer of the Machine and of the MmStruct is
one, and an outcome repeated n times adds its difference n times.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from xipfs.mm import bulk_loop as loop
from xipfs.mm.access import Access
from xipfs.mm.machine import Machine
from xipfs.mm.mm_struct import MmStruct
from xipfs.mm.placed import PlacedFile
from xipfs.mm.pte import PTE_PFN_SHIFT, pte_pfn
from xipfs.mm.vma import Vma
from xipfs.units import PAGE_SHIFT

#: More situations than this for one key are left to the slow path: they will not repeat.
MAX_OUTCOMES_PER_KEY: Final = 16

_BITS_MASK: Final = (1 << PTE_PFN_SHIFT) - 1

#: A counter: its attribute, and its place in it if the attribute is a list of counters.
_Counter = tuple[str, int]


def counters(thing: Machine | MmStruct) -> dict[_Counter, int]:
    """Return every counter of ``thing``: its public integers and lists of integers."""
    found: dict[_Counter, int] = {}
    for name, value in vars(thing).items():
        if name.startswith("_"):
            continue
        if type(value) is int:
            found[name, -1] = value
        elif type(value) is list and value and all(type(item) is int for item in value):
            found.update({(name, place): item for place, item in enumerate(value)})
    return found


def difference(before: dict[_Counter, int], after: dict[_Counter, int]) -> dict[_Counter, int]:
    """Return by how much each counter moved, leaving out those that did not."""
    return {key: value - before[key] for key, value in after.items() if value != before[key]}


def add_to_counters(thing: Machine | MmStruct, amounts: dict[_Counter, int], times: int) -> None:
    """Add ``times`` the ``amounts`` to the counters of ``thing``."""
    for (name, place), amount in amounts.items():
        if place < 0:
            setattr(thing, name, getattr(thing, name) + amount * times)
        else:
            getattr(thing, name)[place] += amount * times


class Situation:
    """A miss about to be taken by the slow path, and all that it may change.

    ``frame`` is the pfn of the file's page where the file is not a placed one.
    """

    def __init__(self, vma: Vma, page: int, wanted: loop.Ints, frame: int = -1) -> None:
        self.vma = vma
        self.address = page << PAGE_SHIFT
        self.wanted = wanted.copy()
        self.counted = int(wanted[loop.PAGE])
        mm = vma.mm
        self.pte = mm.tables.get(self.address)
        self.machine_counters = counters(mm.machine)
        self.mm_counters = counters(mm)
        self.vma_state = (vma.flags, vma.page_prot)
        memory = mm.machine.memory
        self.free = (len(memory.ram_free), len(memory.anon_free))
        self.frame = frame if frame >= 0 else self._files_frame()
        self.page_counts = self._counts(self.counted)
        self.zero_counts = self._counts(mm.machine.zero_pfn)

    def _files_frame(self) -> int:
        file = self.vma.file
        if not isinstance(file, PlacedFile):
            return -1
        index = self.vma.pgoff_of(self.address)
        return int(file.placement.frames[file.first + index]) if index < file.pages else -1

    def _counts(self, pfn: int) -> tuple[int, int, int]:
        memory = self.vma.mm.machine.memory
        return (memory.ref[pfn], memory.map[pfn], memory.flags[pfn]) if pfn >= 0 else (0, 0, 0)

    def outcome(self) -> loop.Ints | None:
        """Return what the miss did as a row of the outcome table; None if it cannot be repeated."""
        memory = self.vma.mm.machine.memory
        zero_pfn = self.vma.mm.machine.zero_pfn
        assert self.vma_state == (self.vma.flags, self.vma.page_prot), self.vma
        assert self.counted == zero_pfn or self._counts(zero_pfn) == self.zero_counts, self.vma
        fills = self.free[0] - len(memory.ram_free)
        copies = self.free[1] - len(memory.anon_free)
        if not 0 <= fills <= 1 or not 0 <= copies <= 1:
            return None
        pte = self.vma.mm.tables.get(self.address)
        filled = self._files_frame() if fills else -1
        source = self._source(pte_pfn(pte), filled, copies)
        if source is None:
            return None
        row = np.zeros(loop.OUTCOME_COLUMNS, np.int64)
        row[loop.NEXT] = -1
        for column in (loop.BITS, loop.PAGE_FLAGS, loop.PAGE_REF, loop.PAGE_MAP):
            row[column] = self.wanted[loop.SITUATION + column]
        row[loop.NEW_BITS] = pte & _BITS_MASK
        row[loop.SOURCE] = source
        if self.counted >= 0:
            ref, mapped, flags = self._counts(self.counted)
            row[loop.REF_ADDED] = ref - self.page_counts[0]
            row[loop.MAP_ADDED] = mapped - self.page_counts[1]
            row[loop.FLAGS_AFTER] = flags
        if copies:
            row[loop.COPIES] = 1
            row[loop.COPY_REF : loop.COPY_FLAGS + 1] = self._counts(pte_pfn(pte))
        if fills:
            row[loop.FILLS] = 1
            row[loop.FILL_REF : loop.FILL_FLAGS + 1] = self._counts(filled)
        return row

    def _source(self, pfn: int, filled: int, copies: int) -> int | None:
        """Tell where the new PTE's pfn comes from; None if from nothing that can be repeated."""
        machine = self.vma.mm.machine
        if copies:
            # The frame that was taken must be the one that is mapped, here and nowhere else.
            is_copy = pfn >= machine.memory.ram_pages and machine.memory.pfn_valid(pfn)
            return loop.COPIED if is_copy and machine.memory.map[pfn] == 1 else None
        if self.pte:
            return loop.SAME if pfn == pte_pfn(self.pte) else None
        if filled >= 0:
            return loop.FILLED if pfn == filled else None
        if pfn == machine.zero_pfn:
            return loop.ZERO_PAGE
        return loop.FILES_FRAME if pfn == self.frame else None


@dataclass
class Repeated:
    """What one outcome adds each time it is repeated."""

    mm: MmStruct
    machine_counters: dict[_Counter, int]
    mm_counters: dict[_Counter, int]
    faults: int
    major: int


@dataclass
class Outcomes:
    """The outcomes of one bulk call: the loop's tables, and what each adds to the counters."""

    keys: int
    heads: loop.Ints = field(init=False)
    table: loop.Ints = field(init=False)
    uses: loop.Ints = field(init=False)
    repeated: list[Repeated] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.heads = np.full(self.keys, -1, np.int64)
        self.table = np.zeros((16, loop.OUTCOME_COLUMNS), np.int64)
        self.uses = np.zeros(16, np.int64)

    def learn(self, situation: Situation, taken: Access) -> None:
        """Note what the slow path did, if it can be repeated."""
        key = int(situation.wanted[loop.KEY])
        known, chained = int(self.heads[key]), 0
        while known >= 0:
            known, chained = int(self.table[known, loop.NEXT]), chained + 1
        row = situation.outcome()
        if taken.signal or row is None or chained >= MAX_OUTCOMES_PER_KEY:
            return
        number = len(self.repeated)
        if number == len(self.uses):
            self.table = np.concatenate([self.table, np.zeros_like(self.table)])
            self.uses = np.concatenate([self.uses, np.zeros_like(self.uses)])
        row[loop.NEXT] = self.heads[key]
        self.table[number] = row
        self.heads[key] = number
        mm = situation.vma.mm
        self.repeated.append(
            Repeated(
                mm,
                difference(situation.machine_counters, counters(mm.machine)),
                difference(situation.mm_counters, counters(mm)),
                taken.faults,
                taken.major,
            )
        )
