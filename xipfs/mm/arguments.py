"""The seed's three arguments for VM_MIXEDMAP, as tables that anyone can compute again.

``memmap``: what struct pages for an image cost when several guests map it (rules P5, P6).
``mappings``: what each kind of mapping can hold, count and copy, found by doing it in the model.
``gup``: what the lockless get_user_pages saves (rule G11), and how XIP pages take that away.
Each function returns rows, one frozen dataclass each, for a command or a notebook to show.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from xipfs.memory.frames import STRUCT_PAGE_SIZES, PhysicalMemory
from xipfs.mm.access import access
from xipfs.mm.bug import KernelBug
from xipfs.mm.flags import VM_FAULT_SIGBUS, VM_MIXEDMAP, VM_PFNMAP, VM_READ, VM_WRITE
from xipfs.mm.gup import fast_pages, get_user_pages_fast, put_user_pages
from xipfs.mm.insert import remap_pfn_range, vm_insert_mixed, vm_insert_page, vm_insert_pfn
from xipfs.mm.machine import Machine
from xipfs.mm.mm_struct import MmStruct
from xipfs.mm.mmap import do_mmap
from xipfs.mm.rules import Rules
from xipfs.mm.vma import MappedFile, Vma, Vmf, VmOperations
from xipfs.units import PAGE_SHIFT, PAGE_SIZE


@dataclass(frozen=True)
class MemmapRow:
    """Struct pages of one image in ``guests`` guests."""

    struct_page_bytes: int
    guests: int
    memmap_bytes: int
    percent_of_image: float
    outweighs_image: bool
    """The cover letter's claim, made for 100 guests."""
    outweighs_from_guests: int
    """The least number of guests for which it holds."""


def memmap(image_bytes: int, guests: Iterable[int]) -> list[MemmapRow]:
    """Return the cost for each size of struct page and number of guests (rules P5, P6).

    >>> [(r.struct_page_bytes, r.outweighs_image) for r in memmap(1 << 30, [100])]
    [(32, False), (56, True), (64, True)]
    """
    pages = image_bytes >> PAGE_SHIFT
    counts = list(guests)
    return [
        MemmapRow(
            struct_page_bytes=size,
            guests=count,
            memmap_bytes=count * pages * size,
            percent_of_image=round(100 * count * size / PAGE_SIZE, 3),
            outweighs_image=count * size > PAGE_SIZE,
            outweighs_from_guests=PAGE_SIZE // size + 1,
        )
        for size in STRUCT_PAGE_SIZES
        for count in counts
    ]


@dataclass(frozen=True)
class MappingRow:
    """What came of putting one page into one mapping, and of writing to it there."""

    mapping: str
    page: str
    insert: str
    result: str
    """"ok", an errno, or the BUG_ON that fired."""
    refcount_change: int | None
    """None: the page has no struct page, or is not there."""
    mapcount_change: int | None
    rss_change: int
    write: str
    """Of a private mapping: "copied", or what came instead; "-" where nothing is mapped."""


_PAGES: Final = 4
#: Puts the frame (or, for ranges, the run of frames that starts with it) into the mapping.
_Insert = Callable[[Vma, int], int]


class _Trial:
    """One machine, one driver page with struct page, one mapping that is populated by hand."""

    def __init__(self, rules: Rules) -> None:
        self.machine = Machine(PhysicalMemory(ram_pages=64, nvram_pages=64, anon_pages=64), rules)
        self.mm = MmStruct(self.machine, "trial")
        # Page frames in a row, so that a linear range of them exists; not from pfn 0 on, which a
        # private PFNMAP of file page 0 would take for raw (rule N7).
        for _ in range(_PAGES):
            self.machine.memory.alloc_ram()
        self.ram = [self.machine.memory.alloc_ram() for _ in range(_PAGES)]
        self.nvram = self.machine.memory.nvram_base_pfn

    def pfn_of(self, page: str) -> int:
        return self.ram[0] if page == "struct page" else self.nvram

    def run(
        self, mapping: str, page: str, name: str, insert: _Insert, *, shared: bool, flags: int
    ) -> MappingRow:
        memory = self.machine.memory
        pfn = self.pfn_of(page)
        valid = memory.pfn_valid(pfn)
        before = (memory.ref[pfn], memory.map[pfn]) if valid else (0, 0)
        operations = VmOperations(fault=lambda _vmf: VM_FAULT_SIGBUS, page_mkwrite=lambda _vmf: 0)
        file = MappedFile("trial", operations, mmap=lambda vma: _set_flags(vma, flags))
        address = do_mmap(self.mm, file, _PAGES, VM_READ | VM_WRITE, shared=shared)
        vma = self.mm.find_vma(address)
        assert vma is not None
        self.mm.mmap_write_locked = True
        try:
            error = insert(vma, pfn)
            result = "ok" if error == 0 else errno.errorcode[-error]
        except KernelBug as bug:
            result = f"BUG_ON({bug.condition})"
        self.mm.mmap_write_locked = False
        there = bool(self.mm.tables.get(address)) and result == "ok"
        after = (memory.ref[pfn], memory.map[pfn]) if valid else (0, 0)
        rss = sum(self.mm.rss)
        write = self._write(address) if there and not shared else "-"
        counted = there and valid
        return MappingRow(
            mapping, page, name, result,
            after[0] - before[0] if counted else None,
            after[1] - before[1] if counted else None,
            rss, write,
        )  # fmt: skip

    def _write(self, address: int) -> str:
        try:
            taken = access(self.mm, address, write=True)
        except KernelBug as bug:
            return f"BUG_ON({bug.condition})"
        if taken.signal:
            return taken.signal
        return "copied" if self.mm.anon_rss == 1 else "written in place"


def _set_flags(vma: Vma, flags: int) -> int:
    vma.flags |= flags
    return 0


def _remap_all(vma: Vma, pfn: int) -> int:
    return remap_pfn_range(vma, vma.start, pfn, vma.pages)


def _remap_pieces(vma: Vma, pfn: int) -> int:
    """Two halves in the wrong order: a range that is not linear."""
    half = vma.pages // 2
    error = remap_pfn_range(vma, vma.start, pfn + half, half)
    return error or remap_pfn_range(vma, vma.start + half * PAGE_SIZE, pfn, half)


def _one(insert: Callable[[Vma, int, int], int]) -> _Insert:
    return lambda vma, pfn: insert(vma, vma.start, pfn)


_NORMAL: Final = ("normal", 0)
#: remap_pfn_range() itself makes the mapping a PFNMAP (rule I1).
_REMAPPED: Final = ("VM_PFNMAP", 0)
_PFNMAP: Final = ("VM_PFNMAP", VM_PFNMAP)
_MIXEDMAP: Final = ("VM_MIXEDMAP", VM_MIXEDMAP)
_KINDS: Final = ("no struct page", "struct page")
#: What is tried: kind of mapping, how a page is put there, and the name that is shown.
_TRIALS: Final[tuple[tuple[tuple[str, int], str, _Insert], ...]] = (
    (_NORMAL, "vm_insert_page", _one(vm_insert_page)),
    (_NORMAL, "vm_insert_pfn", _one(vm_insert_pfn)),
    (_REMAPPED, "remap_pfn_range", _remap_all),
    (_REMAPPED, "remap in pieces", _remap_pieces),
    (_PFNMAP, "vm_insert_pfn", _one(vm_insert_pfn)),
    (_PFNMAP, "vm_insert_page", _one(vm_insert_page)),
    (_MIXEDMAP, "vm_insert_pfn", _one(vm_insert_pfn)),
    (_MIXEDMAP, "vm_insert_page", _one(vm_insert_page)),
    (_MIXEDMAP, "vm_insert_mixed", _one(vm_insert_mixed)),
)


def mappings(rules: Rules) -> list[MappingRow]:
    """Try every way into every kind of mapping, private and shared, with both kinds of page.

    >>> rows = [row for row in mappings(Rules()) if row.mapping == "VM_PFNMAP private"]
    >>> [(row.insert, row.result) for row in rows if row.insert.startswith("remap")][::2]
    [('remap_pfn_range', 'ok'), ('remap in pieces', 'EINVAL')]
    """
    rows = []
    for (name, flags), insert_name, insert in _TRIALS:
        if insert is _TRIALS[-1][2] and not rules.kernel.insert_mixed:
            continue
        for shared in (False, True):
            for page in _KINDS:
                mapping = f"{name} {'shared' if shared else 'private'}"
                trial = _Trial(rules)
                rows.append(
                    trial.run(mapping, page, insert_name, insert, shared=shared, flags=flags)
                )
    return rows


@dataclass(frozen=True)
class GupRow:
    """get_user_pages for ``pages`` pages by each of ``threads`` threads: what it locks."""

    pages: int
    threads: int
    slow_mmap_lock_atomics: int
    """Read lock and unlock of the lock that all threads share."""
    slow_pte_lock_pairs: int
    page_atomics: int
    """Reference counts taken: the same on both paths."""
    fast_locks: int
    fast_irq_pairs: int


def gup_costs(pages: Iterable[int], threads: Iterable[int]) -> list[GupRow]:
    """Return what the slow and the lockless path do for pages that are mapped (rule G11)."""
    counts = list(threads)
    return [
        GupRow(
            pages=n,
            threads=t,
            slow_mmap_lock_atomics=2 * t,
            slow_pte_lock_pairs=n * t,
            page_atomics=n * t,
            fast_locks=0,
            fast_irq_pairs=t,
        )
        for n in pages
        for t in counts
    ]


@dataclass(frozen=True)
class GupMixRow:
    """Calls over a mapping of which a part is XIP, tried in the model."""

    xip_percent: int
    pages: int
    calls: int
    slow_percent: float
    """Calls that leave the lockless path (rules G8, G9)."""
    failed_percent: float
    """Calls that do not get every page (rule G2)."""


def gup_mix(
    rules: Rules, percents: Iterable[int], pages: int, calls: int, seed: int
) -> list[GupMixRow]:
    """Take ``pages`` pages at a time, ``calls`` times at random, from a mapping with XIP pages."""
    rows = []
    for percent in percents:
        random_ = random.Random(seed)
        slow = failed = 0
        mm, address, size = _mixed_mapping(rules, percent, random_)
        for _ in range(calls):
            start = address + random_.randrange(size - pages + 1) * PAGE_SIZE
            slow += fast_pages(mm, start, pages, write=False) < pages
            taken, held = get_user_pages_fast(mm, start, pages=pages)
            failed += taken != pages
            put_user_pages(mm, held)
        rows.append(
            GupMixRow(
                percent, pages, calls, round(100 * slow / calls, 2), round(100 * failed / calls, 2)
            )
        )
    return rows


def _mixed_mapping(rules: Rules, percent: int, random_: random.Random) -> tuple[MmStruct, int, int]:
    """Return an address space with a populated MIXED mapping, its address and size in pages."""
    size = 1024
    machine = Machine(PhysicalMemory(ram_pages=size, nvram_pages=size, anon_pages=16), rules)
    memory = machine.memory
    is_xip = [random_.random() * 100 < percent for _ in range(size)]
    ram = [memory.alloc_ram() for _ in range(size)]

    def fault(vmf: Vmf) -> int:
        memory.get_page(ram[vmf.pgoff])
        vmf.page = ram[vmf.pgoff]
        return 0

    def mmap(vma: Vma) -> int:
        vma.flags |= VM_MIXEDMAP
        for index in range(size):
            if is_xip[index]:
                error = vm_insert_pfn(vma, vma.address_of(index), memory.nvram_pfn(index))
                assert error == 0, error
        return 0

    mm = MmStruct(machine, "buffer")
    file = MappedFile("buffer", VmOperations(fault=fault), mmap=mmap)
    address = do_mmap(mm, file, size, VM_READ)
    assert address > 0, address
    for index in range(size):
        access(mm, address + index * PAGE_SIZE, write=False)
    return mm, address, size
