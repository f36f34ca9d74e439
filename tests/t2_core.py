"""The model's rules one by one: what a fault maps, counts and costs, in which era."""

from __future__ import annotations

import dataclasses
import doctest
import errno
import importlib
import pkgutil
from collections.abc import Callable

import pytest

import xipfs.mm
from xipfs.memory.frames import PhysicalMemory
from xipfs.mm import (
    ERAS,
    VM_EXEC,
    VM_FAULT_NOPAGE,
    VM_FAULT_SIGBUS,
    VM_MIXEDMAP,
    VM_PFNMAP,
    VM_READ,
    VM_SHARED,
    VM_WRITE,
    InvariantError,
    KernelBug,
    Machine,
    MappedFile,
    MmStruct,
    Rules,
    Vma,
    Vmf,
    VmOperations,
    access,
    check,
    do_mmap,
    do_munmap,
    dup_mmap,
    exit_mmap,
    get_user_pages,
    get_user_pages_fast,
    madvise,
    mlock,
    move_mapping,
    mprotect,
    mremap,
    msync,
    put_user_pages,
    remap_pfn_range,
    unmap_mapping_range,
    vm_insert_page,
    vm_insert_pfn,
    vmf_insert_mixed,
    vmf_insert_pfn,
)
from xipfs.mm.audit import counters
from xipfs.mm.gup import LIVELOCK, fast_pages
from xipfs.mm.mremap import MREMAP_DONTUNMAP, MREMAP_MAYMOVE
from xipfs.mm.pte import PTE_SPECIAL, PTE_WRITE

PAGE = 4096
RW = VM_READ | VM_WRITE


class Bench:
    """One machine with a file of 4 pages: 0 and 1 XIP, 2 and 3 cached."""

    def __init__(self, rules: Rules, *, mkwrite: bool = False) -> None:
        self.memory = PhysicalMemory(ram_pages=16, nvram_pages=16, anon_pages=32)
        self.machine = Machine(self.memory, rules)
        self.xip = [self.memory.nvram_pfn(8), self.memory.nvram_pfn(3)]
        self.cache = [self.memory.alloc_ram(), self.memory.alloc_ram()]
        self.mkwrites = 0
        ops = VmOperations(fault=self.fault)
        if mkwrite:
            ops.page_mkwrite = ops.pfn_mkwrite = self.mkwrite
        self.file = MappedFile("file", ops)
        self.mm = MmStruct(self.machine, "A")

    def fault(self, vmf: Vmf) -> int:
        if vmf.pgoff < 2:
            if self.machine.rules.kernel.insert_mixed:
                return vmf_insert_mixed(vmf.vma, vmf.address, self.xip[vmf.pgoff])
            return vmf_insert_pfn(vmf.vma, vmf.address, self.xip[vmf.pgoff])
        if vmf.pgoff > 3:
            return VM_FAULT_SIGBUS
        vmf.page = self.cache[vmf.pgoff - 2]
        self.memory.get_page(vmf.page)
        return 0

    def mkwrite(self, _vmf: Vmf) -> int:
        self.mkwrites += 1
        return 0

    def map(self, prot: int = RW, *, shared: bool = False, flags: int = VM_MIXEDMAP) -> int:
        address = do_mmap(self.mm, self.file, 6, prot, shared=shared, extra_flags=flags)
        assert address > 0
        return address

    def counts(self) -> tuple[int, int, int]:
        """Raw PTEs, file rss, anonymous rss."""
        return self.mm.raw_ptes, self.mm.file_rss, self.mm.anon_rss

    def check(self) -> None:
        holders = {int(pfn): 1 for pfn in [*self.cache, self.machine.zero_pfn]}
        check(self.machine, holders=holders)


NOW = Rules("6.1")
OLD = Rules("2.6.32")


@pytest.fixture
def bench() -> Bench:
    return Bench(NOW)


#: The outcome table of section 4: page, shared, write-notified, era, access; then faults, counts.
OUTCOMES = [
    ("read X private", 0, False, False, NOW, False, 1, (1, 0, 0)),
    ("read X shared", 0, True, False, NOW, False, 1, (1, 0, 0)),
    ("read C private", 2, False, False, NOW, False, 1, (0, 1, 0)),
    ("write X private", 0, False, False, NOW, True, 2, (0, 0, 1)),
    ("write C private", 2, False, False, NOW, True, 1, (0, 0, 1)),
    ("write X shared", 0, True, False, OLD, True, 1, (1, 0, 0)),
    ("write X shared, notified", 0, True, True, OLD, True, 2, (1, 0, 0)),
    ("write C shared", 2, True, False, NOW, True, 1, (0, 1, 0)),
    ("write X shared, notified, seed", 0, True, True, Rules("seed"), True, 2, (0, 0, 1)),
]


@pytest.mark.parametrize(
    ("page", "shared", "notified", "rules", "write", "faults", "counts"),
    [row[1:] for row in OUTCOMES],
    ids=[row[0] for row in OUTCOMES],
)
def test_first_touch(
    page: int,
    shared: bool,
    notified: bool,
    rules: Rules,
    write: bool,
    faults: int,
    counts: tuple[int, int, int],
) -> None:
    bench = Bench(rules, mkwrite=notified)
    at = bench.map(shared=shared) + page * PAGE
    taken = access(bench.mm, at, write=write)
    assert (taken.signal, taken.faults, taken.major) == ("", faults, 0)
    assert bench.counts() == counts
    bench.check()


def test_f11_a_handler_that_copies_takes_one_fault() -> None:
    for copies, faults in ((True, 1), (False, 2)):
        kernel = dataclasses.replace(ERAS["6.1"], handler_copies=copies)
        bench = Bench(Rules(kernel=kernel))

        def fault(vmf: Vmf, bench: Bench = bench) -> int:
            if vmf.cow_page >= 0:
                return 1 << 5  # VM_FAULT_DONE_COW
            return vmf_insert_mixed(vmf.vma, vmf.address, bench.xip[0])

        bench.file.vm_ops.fault = fault
        assert access(bench.mm, bench.map(), write=True).faults == faults
        assert bench.counts() == (0, 0, 1)


def test_k16_beyond_the_end_is_sigbus_and_changes_nothing(bench: Bench) -> None:
    at = bench.map() + 4 * PAGE
    before = counters(bench.machine)
    taken = access(bench.mm, at, write=True)
    assert (taken.signal, taken.si_code, taken.faults) == ("SIGBUS", 2, 0)
    assert counters(bench.machine) == before
    assert (bench.machine.pgfault, bench.mm.min_flt) == (1, 0)


def test_access_rights_are_sigsegv_before_any_fault(bench: Bench) -> None:
    at = bench.map(VM_READ)
    assert access(bench.mm, at, write=True)[:3] == ("SIGSEGV", 2, 0)
    assert access(bench.mm, at - PAGE, write=False)[:3] == ("SIGSEGV", 1, 0)
    assert bench.machine.pgfault == 0


@pytest.mark.parametrize(
    ("special", "references", "mapcount", "raw"), [(True, 1, 0, 1), (False, 2, 1, 0)]
)
def test_n12_vm_insert_mixed_of_a_valid_pfn_is_the_big_difference(
    special: bool, references: int, mapcount: int, raw: int
) -> None:
    bench = Bench(Rules(pte_special=special))
    pfn = bench.cache[0]
    at = bench.map()
    vma = bench.mm.find_vma(at)
    assert vma is not None
    assert vmf_insert_mixed(vma, at, pfn) == VM_FAULT_NOPAGE
    assert (bench.memory.ref[pfn], bench.memory.map[pfn]) == (references, mapcount)
    assert bench.mm.raw_ptes == raw
    bench.check()


def vma_of(bench: Bench, flags: int, *, shared: bool = False) -> Vma:
    vma = bench.mm.find_vma(bench.map(shared=shared, flags=flags))
    assert vma is not None
    return vma


BUGS: list[tuple[str, int, bool, str, str]] = [
    ("I5", 0, False, "xip", "!(vma->vm_flags & (VM_PFNMAP|VM_MIXEDMAP))"),
    ("I5", VM_PFNMAP | VM_MIXEDMAP, False, "xip", "== both"),
    ("I5", VM_PFNMAP, False, "xip", "is_cow_mapping"),
    ("I5", VM_MIXEDMAP, False, "ram", "pfn_valid(pfn)"),
]


@pytest.mark.parametrize(("rule", "flags", "shared", "frame", "condition"), BUGS)
@pytest.mark.parametrize("era", list(ERAS))
def test_i5_vm_insert_pfn_bugs(
    era: str, rule: str, flags: int, shared: bool, frame: str, condition: str
) -> None:
    bench = Bench(Rules(era))
    vma = vma_of(bench, flags, shared=shared)
    before = counters(bench.machine)
    pfn = bench.xip[0] if frame == "xip" else bench.cache[0]
    with pytest.raises(KernelBug) as caught:
        vm_insert_pfn(vma, vma.start, pfn)
    assert condition in caught.value.condition, rule
    assert counters(bench.machine) == before


def test_i6_the_seed_does_not_check_the_range() -> None:
    for era, answer in (("seed", 0), ("2.6.26", -errno.EFAULT), ("6.1", -errno.EFAULT)):
        bench = Bench(Rules(era))
        vma = vma_of(bench, VM_PFNMAP, shared=True)
        assert vm_insert_pfn(vma, vma.end + (1 << 30), bench.xip[0]) == answer


def test_i8_vm_insert_page(bench: Bench) -> None:
    vma = vma_of(bench, VM_MIXEDMAP)
    pfn = bench.cache[0]
    assert vm_insert_page(vma, vma.end, pfn) == -errno.EFAULT
    assert vm_insert_page(vma, vma.start, bench.xip[0]) == -errno.EINVAL
    assert vm_insert_page(vma, vma.start, pfn) == 0
    assert vm_insert_page(vma, vma.start, pfn) == -errno.EBUSY
    assert (bench.memory.ref[pfn], bench.memory.map[pfn], bench.mm.file_rss) == (2, 1, 1)
    bench.check()


def test_i9_vm_insert_page_in_a_fault_without_the_flag_is_a_bug(bench: Bench) -> None:
    vma = vma_of(bench, 0)
    with pytest.raises(KernelBug, match="mmap_read_trylock"):
        vm_insert_page(vma, vma.start, bench.cache[0])


def test_i2_a_private_remap_must_cover_the_vma(bench: Bench) -> None:
    vma = vma_of(bench, 0)
    before = counters(bench.machine)
    assert remap_pfn_range(vma, vma.start, bench.xip[0], 5) == -errno.EINVAL
    assert (counters(bench.machine), vma.flags & VM_PFNMAP, vma.pgoff) == (before, 0, 0)
    bench.file.mmap = lambda vma: remap_pfn_range(vma, vma.start, bench.xip[1], vma.pages)
    vma = vma_of(bench, 0)
    assert (vma.pgoff, bench.mm.raw_ptes, bench.mm.file_rss) == (bench.xip[1], 6, 0)
    bench.check()


def test_i3_a_shared_remap_sets_pgoff_in_one_era_only() -> None:
    for era, moved in (("seed", False), ("2.6.32", True), ("6.1", False)):
        bench = Bench(Rules(era))
        vma = vma_of(bench, 0, shared=True)
        assert remap_pfn_range(vma, vma.start, bench.xip[1], 6) == 0
        assert (vma.pgoff == bench.xip[1]) is moved, era


def test_i4_remapping_over_a_populated_pte_is_a_bug(bench: Bench) -> None:
    vma = vma_of(bench, 0, shared=True)
    assert remap_pfn_range(vma, vma.start, bench.xip[0], 1) == 0
    with pytest.raises(KernelBug, match="pte_none"):
        remap_pfn_range(vma, vma.start, bench.xip[0], 1)


def test_i14_a_lost_race_crashed_the_first_xip_handler() -> None:
    for era, crashes in (("2.6.26", True), ("2.6.32", False), ("6.1", False)):
        bench = Bench(Rules(era))
        vma = vma_of(bench, VM_MIXEDMAP)
        assert vmf_insert_mixed(vma, vma.start, bench.xip[0]) == VM_FAULT_NOPAGE
        if crashes:
            with pytest.raises(KernelBug, match="EBUSY"):
                vmf_insert_mixed(vma, vma.start, bench.xip[0])
        else:
            assert vmf_insert_mixed(vma, vma.start, bench.xip[0]) == VM_FAULT_NOPAGE


def test_i19_nopfn_of_the_seed_writes_to_the_medium() -> None:
    bench = Bench(Rules("seed"))
    bench.file.vm_ops.fault = None
    bench.file.vm_ops.nopfn = lambda vmf: bench.xip[vmf.pgoff]
    at = bench.map()
    pte = access(bench.mm, at, write=True).pte
    assert (pte >> 12, bool(pte & PTE_WRITE)) == (bench.xip[0], True)
    assert bench.counts() == (1, 0, 0)


def test_i22_a_page_without_handler() -> None:
    for era, anonymous in (("seed", True), ("2.6.32", True), ("6.1", False)):
        bench = Bench(Rules(era))
        bench.file.vm_ops.fault = None
        taken = access(bench.mm, bench.map(), write=True)
        assert (taken.signal == "", bench.mm.anon_rss) == (anonymous, int(anonymous)), era


def test_g2_a_raw_page_by_era() -> None:
    for era, answer in (
        ("seed", LIVELOCK),
        ("2.6.26", -errno.EFAULT),
        ("2.6.32", -errno.EFAULT),
        ("6.1", -errno.EEXIST),
        ("new", -errno.EEXIST),
    ):
        bench = Bench(Rules(era))
        at = bench.map(VM_READ)
        assert get_user_pages(bench.mm, at)[0] == answer, era
        bench.check()


def test_g2_writing_a_private_raw_page_pins_a_copy(bench: Bench) -> None:
    at = bench.map()
    done, held = get_user_pages(bench.mm, at, write=True)
    assert done == 1
    assert bench.memory.ref[held[0]] == 2
    assert bench.counts() == (0, 0, 1)
    put_user_pages(bench.mm, held)
    bench.check()


def test_g8_the_lockless_walk_stops_at_a_special_pte() -> None:
    for special, reached in ((True, 2), (False, 0)):
        bench = Bench(Rules(pte_special=special))
        at = bench.map(VM_READ)
        for page in (0, 2, 3):
            access(bench.mm, at + page * PAGE, write=False)
        assert fast_pages(bench.mm, at + 2 * PAGE, 2, write=False) == reached
        assert fast_pages(bench.mm, at, 1, write=False) == 0
        done, held = get_user_pages_fast(bench.mm, at + 2 * PAGE, pages=2)
        assert done == 2
        put_user_pages(bench.mm, held)
        bench.check()


def test_k1_fork_of_a_mixed_vma_by_era() -> None:
    for era, copied in (("seed", 0), ("2.6.32", 0), ("3.7", 2), ("6.1", 2)):
        bench = Bench(Rules(era))
        at = bench.map(VM_READ)
        access(bench.mm, at, write=False)
        access(bench.mm, at + 2 * PAGE, write=False)
        child = dup_mmap(bench.mm, "B")
        assert isinstance(child, MmStruct)
        assert child.raw_ptes + child.file_rss == copied, era
        bench.check()


def test_k3_fork_write_protects_both_sides_and_the_last_one_reuses(bench: Bench) -> None:
    at = bench.map()
    access(bench.mm, at + 2 * PAGE, write=True)
    child = dup_mmap(bench.mm, "B")
    assert isinstance(child, MmStruct)
    assert not (bench.mm.tables.get(at + 2 * PAGE) | child.tables.get(at + 2 * PAGE)) & PTE_WRITE
    page = bench.mm.tables.get(at + 2 * PAGE) >> 12
    assert (bench.memory.ref[page], bench.memory.map[page]) == (2, 2)
    assert access(child, at + 2 * PAGE, write=True).pte >> 12 != page
    assert access(bench.mm, at + 2 * PAGE, write=True).pte >> 12 == page
    bench.check()
    exit_mmap(child)
    exit_mmap(bench.mm)
    bench.check()
    assert (bench.machine.nr_anon_pages, bench.machine.nr_special_ptes) == (0, 0)


def test_k4_a_pinned_page_stays_the_parents(bench: Bench) -> None:
    at = bench.map() + 2 * PAGE
    done, held = get_user_pages_fast(bench.mm, at, write=True, pin=True)
    assert (done, bench.memory.ref[held[0]]) == (1, 1025)
    child = dup_mmap(bench.mm, "B")
    assert isinstance(child, MmStruct)
    assert child.tables.get(at) >> 12 != held[0]
    put_user_pages(bench.mm, held, pin=True)
    bench.check()


def test_f16_copying_an_old_raw_page_takes_two_faults(bench: Bench) -> None:
    at = bench.map()
    access(bench.mm, at, write=False)
    access(bench.mm, at + 2 * PAGE, write=False)
    child = dup_mmap(bench.mm, "B")
    assert isinstance(child, MmStruct)
    assert access(child, at, write=True).faults == 2
    assert access(child, at + 2 * PAGE, write=True).faults == 1
    assert access(bench.mm, at, write=True).faults == 1


def test_k7_even_cows_0_spares_copies_and_nothing_else(bench: Bench) -> None:
    at = bench.map()
    access(bench.mm, at, write=False)
    access(bench.mm, at + PAGE, write=True)
    access(bench.mm, at + 2 * PAGE, write=False)
    assert unmap_mapping_range(bench.file, 0, 4, even_cows=False) == 2
    assert bench.counts() == (0, 0, 1)
    assert unmap_mapping_range(bench.file, 1, 1, even_cows=True) == 1
    assert bench.counts() == (0, 0, 0)
    bench.check()


def test_n8_splitting_a_private_pfnmap_keeps_the_linear_rule() -> None:
    bench = Bench(Rules(pte_special=False))
    vma = vma_of(bench, 0)
    assert remap_pfn_range(vma, vma.start, bench.xip[1], 6) == 0
    start = vma.start
    assert mprotect(bench.mm, start + 2 * PAGE, start + 3 * PAGE, VM_READ) == 0
    assert [piece.pgoff - bench.xip[1] for piece in bench.mm] == [0, 2, 3]
    assert access(bench.mm, start, write=True).faults == 1
    assert bench.counts() == (5, 0, 1)
    bench.check()


def test_n7_a_copy_that_looks_linear_leaks_without_the_special_bit() -> None:
    """The frame the copy lands in is the very one that the linear rule expects there."""
    bench = Bench(Rules(pte_special=False))
    vma = vma_of(bench, 0)
    next_frame = bench.memory.alloc_anon()
    bench.memory.put_page(next_frame)
    assert remap_pfn_range(vma, vma.start, next_frame - 1, 6) == 0
    start = vma.start
    bench.mm.tables.set(
        start + PAGE, bench.xip[0] << 12 | bench.mm.tables.get(start + PAGE) & 0xFFF
    )
    access(bench.mm, start + PAGE, write=True)
    with pytest.raises(InvariantError):
        bench.check()
    exit_mmap(bench.mm)
    assert bench.machine.bad_rss == 1


def test_k9_mprotect_keeps_kinds_and_counts(bench: Bench) -> None:
    at = bench.map()
    access(bench.mm, at, write=False)
    access(bench.mm, at + PAGE, write=True)
    before = bench.counts()
    assert mprotect(bench.mm, at, at + 6 * PAGE, VM_READ) == 0
    assert mprotect(bench.mm, at, at + 6 * PAGE, RW | VM_EXEC) == 0
    assert bench.counts() == before
    assert access(bench.mm, at + PAGE, write=True).faults == 0
    assert access(bench.mm, at, write=True).faults == 1


def test_k10_mprotect_refuses_what_the_file_forbids(bench: Bench) -> None:
    at = do_mmap(bench.mm, bench.file, 2, VM_READ, shared=True, file_writable=False)
    assert mprotect(bench.mm, at, at + PAGE, RW) == -errno.EACCES
    assert do_mmap(bench.mm, bench.file, 2, RW, shared=True, file_writable=False) == -errno.EACCES


def test_k11_mremap(bench: Bench) -> None:
    at = bench.map()
    for page in (0, 2):
        access(bench.mm, at + page * PAGE, write=False)
    access(bench.mm, at + 3 * PAGE, write=True)
    before = bench.counts()
    new = mremap(bench.mm, at, 6, 8, MREMAP_MAYMOVE, in_place=False)
    assert new not in (at, -errno.ENOMEM)
    assert bench.mm.find_vma(at) is None
    moved = bench.mm.find_vma(new)
    assert moved is not None
    assert (moved.pages, bench.counts()) == (8, before)
    assert bench.mm.tables.get(new) & PTE_SPECIAL
    assert mremap(bench.mm, new, 8, 2) == new
    assert bench.counts() == (1, 0, 0)
    kept = mremap(bench.mm, new, 2, 2, MREMAP_MAYMOVE | MREMAP_DONTUNMAP)
    assert bench.mm.find_vma(new) is not None
    assert (bench.mm.tables.get(new), bench.mm.tables.get(kept) >> 12) == (0, bench.xip[0])
    assert mremap(bench.mm, kept, 0, 2, MREMAP_MAYMOVE) == -errno.EINVAL
    assert mremap(bench.mm, kept, 3, 4, MREMAP_MAYMOVE) == -errno.EFAULT
    assert mremap(bench.mm, kept, 2, 0) == -errno.EINVAL
    bench.check()


def test_k11_pfnmap_may_move_but_not_grow(bench: Bench) -> None:
    vma = vma_of(bench, 0, shared=True)
    start = vma.start
    assert remap_pfn_range(vma, start, bench.xip[0], 6) == 0
    assert mremap(bench.mm, start, 6, 7, MREMAP_MAYMOVE) == -errno.EFAULT
    both = MREMAP_MAYMOVE | MREMAP_DONTUNMAP
    assert mremap(bench.mm, start, 6, 6, both) == -errno.EINVAL
    assert bench.mm.raw_ptes == 6


def test_following_a_real_mremap_moves_every_piece(bench: Bench) -> None:
    at = bench.map()
    for page in range(4):
        access(bench.mm, at + page * PAGE, write=page % 2 == 1)
    assert mprotect(bench.mm, at + PAGE, at + 2 * PAGE, VM_READ) == 0
    before = bench.counts()
    new = at + (1 << 30)
    move_mapping(bench.mm, at, at + 3 * PAGE, new, new + 5 * PAGE, keep_old=False)
    assert [(vma.start - new, vma.pages) for vma in bench.mm if vma.start >= new] == [
        (0, 1),
        (PAGE, 1),
        (2 * PAGE, 3),
    ]
    assert bench.counts() == before
    move_mapping(bench.mm, new, new + 5 * PAGE, new, new + 6 * PAGE, keep_old=False)
    last = bench.mm.find_vma(new + 5 * PAGE)
    assert last is not None
    assert last.pages == 4
    kept = new + (1 << 30)
    move_mapping(bench.mm, new, new + PAGE, kept, kept + PAGE, keep_old=True)
    assert bench.mm.find_vma(new) is not None
    assert bench.mm.tables.get(new) == 0
    assert bench.counts() == before
    bench.check()


def test_k12_dontneed_loses_copies_and_refuses_pfnmap(bench: Bench) -> None:
    at = bench.map()
    access(bench.mm, at, write=True)
    assert madvise(bench.mm, at, at + 6 * PAGE, "MADV_DONTNEED") == 0
    assert bench.counts() == (0, 0, 0)
    vma = vma_of(bench, 0, shared=True)
    assert remap_pfn_range(vma, vma.start, bench.xip[0], 6) == 0
    assert madvise(bench.mm, vma.start, vma.end, "MADV_DONTNEED") == -errno.EINVAL
    assert madvise(bench.mm, vma.start, vma.end, "MADV_NONSENSE") == -errno.EINVAL
    bench.check()


def test_k13_msync(bench: Bench) -> None:
    at = bench.map(shared=True)
    end = at + 6 * PAGE
    assert msync(bench.mm, at, end, sync=True) == -errno.EINVAL  # the file cannot be fsynced
    assert msync(bench.mm, at, end, asynchronous=True) == 0
    assert msync(bench.mm, at, end, sync=True, asynchronous=True) == -errno.EINVAL
    bench.file.has_fsync = True
    assert msync(bench.mm, at, end, sync=True) == 0
    assert msync(bench.mm, at, end + PAGE, sync=True) == -errno.ENOMEM


def test_k19_k20_mlock_by_era() -> None:
    for era, prot, answer, counts in (
        ("2.6.32", VM_READ, -errno.ENOMEM, (1, 0, 0)),
        ("2.6.32", RW, 0, (0, 0, 2)),
        ("6.1", VM_READ, 0, (2, 0, 0)),
        ("6.1", RW, 0, (0, 0, 2)),
    ):
        bench = Bench(Rules(era))
        at = bench.map(prot)
        assert mlock(bench.mm, at, at + 2 * PAGE) == answer, (era, prot)
        assert bench.counts() == counts, (era, prot)
        assert bench.mm.locked_vm == (2 if era == "2.6.32" else 0)
        bench.check()


def test_p8_the_zero_page_by_era() -> None:
    for era, raw, anon in (("seed", 0, 1), ("2.6.26", 0, 1), ("2.6.32", 1, 0), ("6.1", 1, 0)):
        bench = Bench(Rules(era))
        at = do_mmap(bench.mm, None, 1, RW)
        access(bench.mm, at, write=False)
        assert (bench.mm.raw_ptes, bench.mm.anon_rss) == (raw, anon), era
        access(bench.mm, at, write=True)
        assert (bench.mm.raw_ptes, bench.mm.anon_rss) == (0, 1)


def test_f13_a_shared_write_asks_pfn_mkwrite() -> None:
    bench = Bench(NOW, mkwrite=True)
    at = bench.map(shared=True)
    assert access(bench.mm, at, write=True).faults == 2
    assert access(bench.mm, at + 2 * PAGE, write=True).faults == 1
    assert bench.mkwrites == 2


FAILING: list[tuple[str, Callable[[Bench, int], int]]] = [
    ("munmap", lambda bench, at: do_munmap(bench.mm, at, at)),
    ("mremap", lambda bench, at: mremap(bench.mm, at, 6, 0)),
    ("madvise", lambda bench, at: madvise(bench.mm, at + 1, at + PAGE, "MADV_DONTNEED")),
    ("gup", lambda bench, at: get_user_pages(bench.mm, at + 4 * PAGE)[0]),
    ("gup raw", lambda bench, at: get_user_pages(bench.mm, at)[0]),
]


@pytest.mark.parametrize(("name", "call"), FAILING, ids=[row[0] for row in FAILING])
def test_t11_failed_calls_change_no_counter(
    name: str, call: Callable[[Bench, int], int], bench: Bench
) -> None:
    at = bench.map()
    for page in range(4):
        access(bench.mm, at + page * PAGE, write=page == 3)
    before = counters(bench.machine)
    assert call(bench, at) < 0, name
    assert counters(bench.machine) == before


def corrupt_refcount(bench: Bench, at: int) -> None:
    bench.memory.ref[bench.mm.tables.get(at + 3 * PAGE) >> 12] += 1


def corrupt_mapcount(bench: Bench, at: int) -> None:
    bench.memory.map[bench.cache[0]] += 1


def corrupt_rss(bench: Bench, at: int) -> None:
    bench.mm.rss[0] += 1


def corrupt_raw(bench: Bench, at: int) -> None:
    bench.machine.nr_special_ptes -= 1


def corrupt_write(bench: Bench, at: int) -> None:
    bench.mm.tables.set(at, bench.mm.tables.get(at) | PTE_WRITE)


def corrupt_place(bench: Bench, at: int) -> None:
    bench.mm.tables.set(at + (1 << 30), bench.mm.tables.get(at))


def corrupt_flags(bench: Bench, at: int) -> None:
    vma = bench.mm.find_vma(at)
    assert vma is not None
    vma.flags |= VM_PFNMAP


def corrupt_sharing(bench: Bench, at: int) -> None:
    vma = bench.mm.find_vma(at)
    assert vma is not None
    vma.flags |= VM_SHARED


CORRUPTIONS = [
    ("T1", corrupt_refcount),
    ("T2", corrupt_mapcount),
    ("T3", corrupt_rss),
    ("T3", corrupt_raw),
    ("T7", corrupt_write),
    ("K6", corrupt_place),
    ("T6", corrupt_flags),
    ("T8", corrupt_sharing),
]


@pytest.mark.parametrize(
    ("rule", "corrupt"), CORRUPTIONS, ids=[row[1].__name__ for row in CORRUPTIONS]
)
def test_the_audit_notices(rule: str, corrupt: Callable[[Bench, int], None], bench: Bench) -> None:
    at = bench.map()
    for page in range(4):
        access(bench.mm, at + page * PAGE, write=page == 3)
    bench.check()
    corrupt(bench, at)
    with pytest.raises(InvariantError, match=f"^{rule}: "):
        bench.check()


def test_n3_n4_an_invalid_pfn_in_an_ordinary_vma() -> None:
    for era, debug, bad in (
        ("seed", True, True),
        ("seed", False, False),
        ("2.6.26", True, False),
        ("2.6.32", False, True),
        ("6.1", False, True),
    ):
        bench = Bench(Rules(era, debug_vm=debug))
        vma = vma_of(bench, 0)
        pte = bench.xip[0] << 12 | 1
        if bad:
            assert bench.machine.vm_normal_page(vma, vma.start, pte) == -1
            assert bench.machine.bad_ptes == 1
        else:
            with pytest.raises(KernelBug, match="pfn_valid"):
                bench.machine.vm_normal_page(vma, vma.start, pte)


def test_rule_sets_have_names() -> None:
    assert Rules.parse("6.12").name == "6.12"
    assert Rules.parse("3.7-nospecial").pte_special is False
    for wrong in ("2.4", "6.1-special", ""):
        with pytest.raises(Exception, match="no rule set"):
            Rules.parse(wrong)
    with pytest.raises(Exception, match="no special PTE bit"):
        Rules("seed", pte_special=True)


def modules() -> list[str]:
    found = pkgutil.walk_packages(xipfs.mm.__path__, "xipfs.mm.")
    return ["xipfs.mm", *sorted(module.name for module in found)]


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0
