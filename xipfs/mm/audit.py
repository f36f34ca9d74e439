"""The invariants T1 to T9, by recounting everything from the page tables.

The counters of the model are kept up to date one PTE at a time. Here they are found again from
nothing but the PTEs and compared. The cost is that of all mapped pages, so this is for tests, for
the end of a run and for whoever doubts a number; it changes nothing.

T10 (a store survives any migration) needs bytes and a medium and is tested with those. T11 (failed
calls change no counter) is about two moments: take ``counters`` before and after and compare.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from xipfs.memory.frames import PG_ANON, PG_ANON_EXCLUSIVE, PG_SWAPCACHE
from xipfs.mm import rules
from xipfs.mm.bug import InvariantError
from xipfs.mm.flags import VM_MIXEDMAP, VM_PFNMAP, VM_SHARED
from xipfs.mm.machine import Machine
from xipfs.mm.mm_struct import MmStruct
from xipfs.mm.pte import PTE_PRESENT, PTE_SPECIAL, PTE_WRITE, describe_pte, pte_pfn
from xipfs.mm.rmap import mm_counter
from xipfs.mm.vma import Vma

#: The known defects of old kernels that leave PTEs which break an invariant.
NOPFN_WRITE: Final = "I19"
SHARED_COW: Final = "F13, F14"
NO_HANDLER: Final = "I22"


@dataclass(frozen=True)
class Defect:
    """A PTE that breaks T7 or T8 in an era of which that is known: ``rules`` tell why."""

    rules: str
    mm: MmStruct
    address: int


class _Recount:
    """What the page tables of one machine add up to."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.mapped: Counter[int] = Counter()
        self.swap_users: Counter[int] = Counter()
        self.normal = self.raw = 0
        self.defects: list[Defect] = []

    def fail(self, rule: str, what: str, **figures: object) -> None:
        """Raise, naming the invariant, with the figures and the machine's counters."""
        details = ", ".join(f"{name} {value}" for name, value in figures.items())
        raise InvariantError(f"{rule}: {what} ({details}); {self.machine.statistics()}")

    def add(self, mm: MmStruct) -> None:
        """Recount one address space and compare its counters (T3)."""
        rss, raw, swapped = [0, 0, 0], 0, 0
        seen = 0
        end = 0
        for vma in mm:
            if vma.start < end or vma.start >= vma.end:
                self.fail("VMAs", "overlapping or out of order", mm=mm, vma=vma)
            end = vma.end
            self.check_vma(vma)
            for address, pte in mm.tables.populated(vma.start, vma.end):
                seen += 1
                if not pte & PTE_PRESENT:
                    self.swap_users[pte_pfn(pte)] += 1
                    swapped += 1
                    continue
                page = self.machine.vm_normal_page(vma, address, pte)
                if page < 0:
                    raw += 1
                    self.check_raw(vma, address, pte)
                else:
                    self.mapped[page] += 1
                    rss[mm_counter(self.machine.memory.flags[page])] += 1
                    self.check_normal(vma, address, pte, page)
        everywhere = sum(1 for _ in mm.tables.populated(0, 1 << 62))
        if everywhere != seen:
            self.fail("K6", "PTEs outside all VMAs", mm=mm, total=everywhere, inside=seen)
        if (rss, raw, swapped) != (mm.rss, mm.raw_ptes, mm.swapents):
            kept = (mm.rss, mm.raw_ptes, mm.swapents)
            self.fail("T3", "rss, raw, swap", mm=mm, recounted=(rss, raw, swapped), kept=kept)
        self.normal += sum(rss)
        self.raw += raw

    def check_vma(self, vma: Vma) -> None:
        """T6, and that a mapped file knows its VMA (rule R1)."""
        if vma.flags & VM_PFNMAP and vma.flags & VM_MIXEDMAP:
            self.fail("T6", "PFNMAP and MIXEDMAP together", vma=vma)
        if vma.file is not None:
            found = vma.file.i_mmap.overlapping(vma.pgoff, vma.pgoff + vma.pages)
            if vma not in found:
                self.fail("R1", "VMA not in its file's index", vma=vma)

    def check_raw(self, vma: Vma, address: int, pte: int) -> None:
        """T5 and T7; what ->nopfn made writable without a COW test is a known defect (I19)."""
        machine = self.machine
        figures = {"vma": vma, "address": hex(address), "pte": describe_pte(pte)}
        if not vma.flags & VM_SHARED and pte & PTE_WRITE:
            has_nopfn = vma.vm_ops is not None and vma.vm_ops.nopfn is not None
            if not (has_nopfn and vma.flags & VM_MIXEDMAP and machine.rules.kernel.nopfn):
                self.fail("T7", "writable raw PTE in a private VMA", **figures)
            self.defects.append(Defect(NOPFN_WRITE, vma.mm, address))
        linear = pte_pfn(pte) == vma.pgoff_of(address) or pte_pfn(pte) == machine.zero_pfn
        if vma.flags & VM_PFNMAP and rules.is_cow_mapping(vma.flags) and not linear:
            self.fail("T5", "raw PTE off the line of a private PFNMAP", **figures)
        valid = machine.memory.pfn_valid(pte_pfn(pte))
        zero = pte_pfn(pte) == machine.zero_pfn and machine.rules.kernel.mixed_zero_is_raw
        if vma.flags & VM_MIXEDMAP and not machine.pte_special and valid and not zero:
            self.fail("T4", "valid pfn not counted in a MIXED VMA", **figures)

    def check_normal(self, vma: Vma, address: int, pte: int, page: int) -> None:
        """T4, T7 and T8; anonymous pages in shared VMAs are known defects (F13, F14, I22)."""
        machine = self.machine
        kernel = machine.rules.kernel
        figures = {"vma": vma, "address": hex(address), "pte": describe_pte(pte)}
        if pte & PTE_SPECIAL or not machine.memory.pfn_valid(page):
            self.fail("T4", "special or invalid PTE taken as counted", **figures)
        anon = bool(machine.memory.flags[page] & PG_ANON)
        if vma.flags & VM_SHARED and anon:
            ops = vma.vm_ops
            handled = ops is None or ops.fault is not None or ops.nopfn is not None
            if not handled and kernel.no_handler == "anonymous":
                self.defects.append(Defect(NO_HANDLER, vma.mm, address))
            elif kernel.raw_shared_write == "cow" or kernel.gup_forced_shared == "cow":
                self.defects.append(Defect(SHARED_COW, vma.mm, address))
            else:
                self.fail("T8", "anonymous page in a shared VMA", **figures)
        if not vma.flags & VM_SHARED and pte & PTE_WRITE and not anon:
            self.fail("T7", "writable file page in a private VMA", **figures)

    def check_frames(self, holders: Mapping[int, int] | None) -> None:
        """T1, T2 and T9: every frame's refcount and mapcount."""
        machine = self.machine
        memory, swap = machine.memory, machine.swap
        expected_map = np.zeros_like(memory.mapcount)
        expected_ref = np.zeros_like(memory.refcount)
        for page, count in self.mapped.items():
            expected_map[page] = expected_ref[page] = count
        wrong = np.flatnonzero(expected_map != memory.mapcount)
        for page in wrong[:1].tolist():
            counts = {"recounted": self.mapped[page], "kept": memory.map[page]}
            self.fail("T2", f"mapcount of pfn {page}", **counts, pfns_wrong=len(wrong))
        for source in (machine.pins, dict.fromkeys(swap.cache.values(), 1), holders or {}):
            for page, count in source.items():
                expected_ref[page] += count
        if holders is None:
            # Who else holds file pages is not known here; anonymous pages have no other users.
            anon = (memory.page_flags & PG_ANON) != 0
            differs = np.where(
                anon, expected_ref != memory.refcount, expected_ref > memory.refcount
            )
        else:
            differs = expected_ref != memory.refcount
        for page in np.flatnonzero(differs)[:1].tolist():
            counts = {"ptes": self.mapped[page], "pins": machine.pins.get(page, 0)}
            counts |= {"holders": (holders or {}).get(page, 0), "kept": memory.ref[page]}
            self.fail("T1", f"refcount of pfn {page}", **counts, flags=memory.flags[page])

    def check_counters(self) -> None:
        """The machine's own statistics, the swap map, and exclusive pages."""
        machine = self.machine
        anon = sum(1 for page in self.mapped if machine.memory.flags[page] & PG_ANON)
        recounted = (self.normal, self.raw, anon)
        kept = (machine.nr_normal_ptes, machine.nr_special_ptes, machine.nr_anon_pages)
        if recounted != kept:
            self.fail("T3", "normal PTEs, raw PTEs, anonymous pages", recounted=recounted)
        users = {entry: count for entry, count in machine.swap.counts.items() if count}
        if users != dict(self.swap_users):
            self.fail("T3", "users of swap entries", recounted=self.swap_users, kept=users)
        for page, count in self.mapped.items():
            flags = machine.memory.flags[page]
            if flags & PG_ANON_EXCLUSIVE and (count != 1 or not flags & PG_ANON):
                self.fail("F20", f"exclusive pfn {page} is shared", mapcount=count, flags=flags)
        for entry, page in machine.swap.cache.items():
            if not machine.memory.flags[page] & PG_SWAPCACHE:
                self.fail("swap cache", f"pfn {page} is not marked", entry=entry)


def check(machine: Machine, *, holders: Mapping[int, int] | None = None) -> list[Defect]:
    """Recount ``machine`` and raise InvariantError, with the figures, if anything differs.

    Returns the PTEs that break an invariant as the era's kernel is known to break it; in eras
    without such a defect there are none.

    ``holders`` maps each pfn to the references that neither a PTE, a pin nor the swap cache
    holds: the page cache, a driver, the machine's own zero page. With it the refcount of every
    frame is checked exactly (T1, T9); without it only anonymous pages' are.
    """
    bad_ptes = machine.bad_ptes
    recount = _Recount(machine)
    try:
        for mm in machine.mms:
            recount.add(mm)
        recount.check_frames(holders)
        recount.check_counters()
    finally:
        machine.bad_ptes = bad_ptes
    return recount.defects


def counters(machine: Machine) -> dict[str, object]:
    """Return every counter that a failed call must leave alone (T11); fault events are not in it.

    By name, so that a difference can be shown and, where the kernel has a reason, left out. The
    struct pages in use enter as the bytes of their arrays.
    """
    memory = machine.memory
    found: dict[str, object] = {}
    for number, mm in enumerate(machine.mms):
        found |= {
            f"{number}.file": (mm.file_rss, mm.shmem_rss),
            f"{number}.anon": mm.anon_rss,
            f"{number}.raw": mm.raw_ptes,
            f"{number}.swap": mm.swapents,
            f"{number}.locked": mm.locked_vm,
        }
    in_use = np.flatnonzero(memory.refcount)
    found["pages"] = in_use.tobytes()
    found["refcount"] = memory.refcount[in_use].tobytes()
    found["mapcount"] = memory.mapcount[in_use].tobytes()
    found["pins"] = tuple(sorted(machine.pins.items()))
    return found
