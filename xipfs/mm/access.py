"""A program's load or store: as many faults as the rules need, then the access itself."""

from __future__ import annotations

from typing import Final, NamedTuple

from xipfs.memory.frames import PG_ANON
from xipfs.mm import rules
from xipfs.mm.bug import InvariantError
from xipfs.mm.fault import handle_mm_fault
from xipfs.mm.flags import (
    FAULT_FLAG_WRITE,
    VM_FAULT_ERROR,
    VM_FAULT_MAJOR,
    VM_FAULT_OOM,
)
from xipfs.mm.mm_struct import MmStruct
from xipfs.mm.pte import PTE_PRESENT, pte_after_access, pte_permits
from xipfs.units import PAGE_MASK

SEGV_MAPERR: Final = 1
SEGV_ACCERR: Final = 2
BUS_ADRERR: Final = 2

#: What a present PTE maps.
MAPS_NONE: Final = 0
MAPS_XIP: Final = 1
MAPS_PAGECACHE: Final = 2
MAPS_ANON: Final = 3

#: More faults than this for one access means that the rules never let it pass.
MAX_FAULTS: Final = 8


class Access(NamedTuple):
    """What one access did.

    ``signal`` is "" or the signal's name with its ``si_code``; ``faults`` how many faults it
    took, ``major`` how many of them were major, ``pte`` what maps the page now (0: nothing).
    """

    signal: str
    si_code: int
    faults: int
    major: int
    pte: int


def access(mm: MmStruct, address: int, *, write: bool) -> Access:
    """Load from or store to ``address``, faulting until it passes (rules F1, F11, K16).

    >>> from xipfs.memory.frames import PhysicalMemory
    >>> from xipfs.mm import VM_READ, VM_WRITE, Machine, MmStruct, do_mmap
    >>> mm = MmStruct(Machine(PhysicalMemory(ram_pages=8, nvram_pages=8)))
    >>> address = do_mmap(mm, None, 1, VM_READ | VM_WRITE)
    >>> access(mm, address, write=False).faults, access(mm, address, write=True).faults
    (1, 1)
    >>> mm.anon_rss, access(mm, 0, write=False).signal
    (1, 'SIGSEGV')
    """
    page_address = address & PAGE_MASK
    faults = major = 0
    while True:
        vma = mm.find_vma(address)
        if vma is None:
            return Access("SIGSEGV", SEGV_MAPERR, faults, major, 0)
        if not rules.vma_permits(vma.flags, write):
            return Access("SIGSEGV", SEGV_ACCERR, faults, major, mm.tables.get(page_address))
        pte = mm.tables.get(page_address)
        if pte_permits(pte, write):
            used = pte_after_access(pte, write)
            if used != pte:
                mm.tables.set(page_address, used)
            return Access("", 0, faults, major, used)
        if faults == MAX_FAULTS:
            raise InvariantError(f"access to {address:#x} still faults after {faults} faults")
        result = handle_mm_fault(mm, address, FAULT_FLAG_WRITE if write else 0)
        if result & VM_FAULT_ERROR:
            signal = "SIGKILL" if result & VM_FAULT_OOM else "SIGBUS"
            code = 0 if result & VM_FAULT_OOM else BUS_ADRERR
            return Access(signal, code, faults, major, mm.tables.get(page_address))
        faults += 1
        major += bool(result & VM_FAULT_MAJOR)


def maps_what(mm: MmStruct, address: int) -> int:
    """Return what the PTE at ``address`` maps now: one of the MAPS_ constants."""
    pte = mm.tables.get(address & PAGE_MASK)
    if not pte & PTE_PRESENT:
        return MAPS_NONE
    vma = mm.find_vma(address)
    assert vma is not None, hex(address)
    page = mm.machine.vm_normal_page(vma, address & PAGE_MASK, pte)
    if page < 0:
        return MAPS_XIP
    return MAPS_ANON if mm.machine.memory.flags[page] & PG_ANON else MAPS_PAGECACHE
