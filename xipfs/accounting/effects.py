"""What one fault did, in full, for those who record faults: on both machines, count by count.

Looked up before and after the fault, so nothing is derived from rules a second time. Only faults
that somebody reads are looked at this closely.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from xipfs.accounting.kernel_states import NONE, UNKNOWN
from xipfs.mm.flags import VM_MAYSHARE
from xipfs.mm.machine import MM_ANONPAGES, MM_FILEPAGES
from xipfs.mm.pte import PTE_PRESENT
from xipfs.trace import events as ev
from xipfs.units import PAGE_MASK

if TYPE_CHECKING:
    from xipfs.accounting.accountant import Accountant

# What the real kernel did.
MAPPED: Final = "mapped"
COW: Final = "cow"
MKWRITE: Final = "mkwrite"
PROTECTION: Final = "protection"
SIGBUS: Final = "sigbus"

# Whose the kernel's PTE is.
OWN: Final = "own"
BEFORE: Final = "before"
NOT_KNOWN: Final = "unknown"

# What VM_MIXEDMAP's PTE is.
SPECIAL: Final = "special"
COUNTED: Final = "counted"
NO_PTE: Final = "none"


class Effect(NamedTuple):
    """Changes are those of the model; ``trace_columns.COLUMNS`` explains each field."""

    handled: str
    pte_made: str
    pte: str
    ref_change: int
    map_change: int
    rss_file_change: int
    rss_anon_change: int


class Look:
    """The state before a fault; ``effect`` compares it with the state after."""

    def __init__(self, books: Accountant, event: ev.Fault) -> None:
        self._books = books
        self._event = event
        self._mm = books.mm(event.mm)
        self._rss = tuple(self._mm.rss)
        self._state = books.kernel.state(event.mm, event.address)
        resident = books.fs.resident_pfn(event.ino, event.index)
        pages = [self._page(), -1 if resident is None else int(resident)]
        memory = books.machine.memory
        self._counts = {pfn: (memory.ref[pfn], memory.map[pfn]) for pfn in pages if pfn >= 0}

    def _page(self) -> int:
        """Return the pfn of the counted page that the model's PTE maps now, -1 if none."""
        address = self._event.address & PAGE_MASK
        pte = self._mm.tables.get(address)
        vma = self._mm.find_vma(address)
        if vma is None or not pte & PTE_PRESENT:
            return -1
        return self._books.machine.vm_normal_page(vma, address, pte)

    def effect(self) -> Effect:
        """Return what has changed."""
        memory = self._books.machine.memory
        page = self._page()
        ref = mapped = 0
        if page >= 0:
            # A page that was not looked at before was free.
            ref_before, mapped_before = self._counts.get(page, (0, 0))
            ref, mapped = memory.ref[page] - ref_before, memory.map[page] - mapped_before
        pte = self._mm.tables.get(self._event.address & PAGE_MASK)
        present = pte & PTE_PRESENT
        return Effect(
            self._handled(),
            self._made(),
            COUNTED if page >= 0 else SPECIAL if present else NO_PTE,
            ref,
            mapped,
            self._mm.rss[MM_FILEPAGES] - self._rss[MM_FILEPAGES],
            self._mm.rss[MM_ANONPAGES] - self._rss[MM_ANONPAGES],
        )

    def _made(self) -> str:
        if self._event.verdict == ev.SIGBUS:
            return NO_PTE
        return OWN if self._state == NONE else NOT_KNOWN if self._state >= UNKNOWN else BEFORE

    def _handled(self) -> str:
        event = self._event
        if event.verdict == ev.SIGBUS:
            return SIGBUS
        vma = self._mm.find_vma(event.address)
        if event.write:
            return MKWRITE if vma is not None and vma.flags & VM_MAYSHARE else COW
        return PROTECTION if event.protection else MAPPED
