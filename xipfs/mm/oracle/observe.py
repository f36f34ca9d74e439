"""What can be seen of the model after a step, in the words of a recording."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from xipfs.memory.frames import PG_ANON, PG_ANON_EXCLUSIVE
from xipfs.mm.flags import (
    VM_LOCKED,
    VM_MAYSHARE,
    VM_PFNMAP,
    VM_READ,
    VM_SHARED,
    VM_WRITE,
    VMFLAG_LETTERS,
)
from xipfs.mm.mm_struct import MmStruct
from xipfs.mm.oracle.bench import Bench, Mapping, Process
from xipfs.mm.oracle.pagecache import TmpfsFile
from xipfs.mm.pte import (
    PTE_DEVMAP,
    PTE_DIRTY,
    PTE_PRESENT,
    PTE_SPECIAL,
    PTE_SWAP,
    PTE_WRITE,
    PTE_YOUNG,
    pte_pfn,
)
from xipfs.mm.vma import Vma
from xipfs.units import PAGE_SHIFT, PAGE_SIZE

Json = dict[str, Any]

#: The VmFlags that recordings list.
SHOWN_FLAGS: Final = frozenset(
    ["rd", "wr", "sh", "mr", "mw", "ms", "pf", "mm", "io", "de", "dd", "lo", "dc", "rr", "hg", "nh"]
)
#: smaps counts shares of a page in units of 1/4096 byte (PSS_SHIFT).
_PSS_SHIFT: Final = 12


def counters(mm: MmStruct) -> Json:
    """Return the address space's own counters."""
    return {
        "rss_file_pages": mm.file_rss,
        "rss_anon_pages": mm.anon_rss,
        "locked_pages": mm.locked_vm,
    }


def vm_ops_calls(bench: Bench) -> Json:
    """Return how often the device's vm_ops were called."""
    return dataclasses.asdict(bench.calls)


def device_pages(bench: Bench, names: list[str]) -> list[list[int]]:
    """Return [page_count, page_mapcount] of each named frame."""
    memory = bench.machine.memory
    pfns = [bench.frames.pfn(name) for name in names]
    return [[memory.ref[pfn], memory.map[pfn]] for pfn in pfns]


def vmas(bench: Bench, process: Process, mapping: Mapping) -> list[Json]:
    """Return the smaps of the VMAs of a mapping, in address order."""
    found = process.mm.overlapping(mapping.start, mapping.end)
    return [_smaps(bench, vma, mapping) for vma in found]


def _smaps(bench: Bench, vma: Vma, mapping: Mapping) -> Json:
    letters = [text for flag, text in VMFLAG_LETTERS.items() if vma.flags & flag]
    sums = _sums(vma)
    shown: Json = {
        "page": vma.start - mapping.start >> PAGE_SHIFT,
        "pages": vma.pages,
        "prot": ("r" if vma.flags & VM_READ else "-")
        + ("w" if vma.flags & VM_WRITE else "-")
        + ("x" if "ex" in letters else "-"),
        "shared": bool(vma.flags & VM_MAYSHARE),
        "flags": [text for text in letters if text in SHOWN_FLAGS],
        "pgoff": _pgoff(bench, vma),
        "rss": sums["rss"],
        "anon": sums["anon"],
        "swap": sums["swap"],
        "pss_kb": sums["pss"] >> 10 + _PSS_SHIFT,
    }
    locked_kb = shown["pss_kb"] if vma.flags & VM_LOCKED else 0
    shown["locked"] = (locked_kb << 10) // PAGE_SIZE
    return shown


def _pgoff(bench: Bench, vma: Vma) -> int | str:
    """The offset in pages, or the name of the frame whose pfn it is."""
    if vma.file is None:
        return 0
    name = bench.frames.name(vma.pgoff) if vma.flags & VM_PFNMAP else None
    return vma.pgoff if name is None else name


def _sums(vma: Vma) -> dict[str, int]:
    """Add up a VMA's PTEs as smaps does; the walk leaves PFNMAP VMAs out (rule F3)."""
    sums = {"rss": 0, "anon": 0, "swap": 0, "pss": 0}
    if vma.flags & VM_PFNMAP:
        return sums
    machine = vma.mm.machine
    sums["swap"] = _shmem_swapped(vma)
    for address, pte in vma.mm.tables.populated(vma.start, vma.end):
        if not pte & PTE_PRESENT:
            sums["swap"] += 1
            continue
        page = machine.vm_normal_page(vma, address, pte)
        if page < 0:
            continue
        sums["rss"] += 1
        sums["anon"] += bool(machine.memory.flags[page] & PG_ANON)
        sums["pss"] += (PAGE_SIZE << _PSS_SHIFT) // max(machine.memory.map[page], 1)
    return sums


def _shmem_swapped(vma: Vma) -> int:
    """Pages of a shared-memory file that smaps finds swapped out (smap_gather_stats).

    Where the VMA may hold private copies, only those that no PTE hides.
    """
    if not isinstance(vma.file, TmpfsFile):
        return 0
    may_copy = vma.flags & (VM_WRITE | VM_SHARED) == VM_WRITE
    tables = vma.mm.tables
    return sum(
        vma.file.is_swapped(index) and not (may_copy and tables.get(vma.address_of(index)))
        for index in range(vma.pgoff, vma.pgoff + vma.pages)
    )


def page(bench: Bench, process: Process, mapping: Mapping, index: int) -> Json:
    """Return what the PTE, /proc/self/pagemap, kpageflags and mincore show of one page."""
    address = mapping.at(index)
    mm = process.mm
    vma = mm.find_vma(address)
    pte = mm.tables.get(address)
    present = bool(pte & PTE_PRESENT)
    shown: Json = {"index": index, "present": present, "swapped": bool(pte & PTE_SWAP)}
    counted = -1
    if present and vma is not None:
        counted = bench.machine.vm_normal_page(vma, address, pte)
        shown |= _present(bench, pte)
    shown["pagemap"] = _pagemap(bench, vma, pte, counted)
    if vma is not None:
        shown["mincore"] = _mincore(vma, address, pte)
    return shown


def _present(bench: Bench, pte: int) -> Json:
    pfn = pte_pfn(pte)
    memory = bench.machine.memory
    valid = memory.pfn_valid(pfn)
    shown: Json = {
        "pte": "special" if pte & PTE_SPECIAL else "normal",
        "devmap": bool(pte & PTE_DEVMAP),
        "page": None,
        "frame": bench.page_name(pfn),
        "write": bool(pte & PTE_WRITE),
        "dirty": bool(pte & PTE_DIRTY),
        "young": bool(pte & PTE_YOUNG),
        "pfn_valid": valid,
    }
    if valid:
        flags = memory.flags[pfn]
        shown["refcount"] = memory.ref[pfn]
        shown["mapcount"] = memory.map[pfn]
        shown["anon_exclusive"] = bool(flags & PG_ANON_EXCLUSIVE)
        if memory.map[pfn]:
            shown["page"] = "anon" if flags & PG_ANON else "file"
    return shown


def _pagemap(bench: Bench, vma: Vma | None, pte: int, counted: int) -> Json:
    """The page's /proc/self/pagemap entry; PFNMAP VMAs read as empty."""
    if vma is None or vma.flags & VM_PFNMAP or not pte & PTE_PRESENT:
        return {"present": False, "file": False, "exclusive": False}
    memory = bench.machine.memory
    pfn = pte_pfn(pte)
    return {
        "present": True,
        "file": counted >= 0 and not memory.flags[counted] & PG_ANON,
        "exclusive": counted >= 0 and memory.map[counted] == 1,
        "kpagecount": memory.map[pfn] if bench.frames.is_online(pfn) else 0,
        "nopage": not bench.frames.is_online(pfn),
    }


def _mincore(vma: Vma, address: int, pte: int) -> bool:
    """mincore(2): a PTE is enough; else the swap cache, else the file's page cache.

    The PTEs of PFNMAP VMAs are not walked, so there it is the file that answers.
    """
    if not vma.flags & VM_PFNMAP:
        if pte & PTE_PRESENT:
            return True
        if pte & PTE_SWAP:
            return pte_pfn(pte) in vma.mm.machine.swap.cache
    if vma.file is None or vma.file.is_cached is None:
        return False
    return vma.file.is_cached(vma.pgoff_of(address))
