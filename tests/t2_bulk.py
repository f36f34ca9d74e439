"""The bulk path against the slow path: the same operations on twins, then everything compared.

A random test is named by its rule set and seed, and its failure says which operation parted the
twins; ``pytest tests/t2_bulk.py -k 'RULES-SEED-'`` runs it again.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from xipfs.memory.frames import PG_ANON, PG_ANON_EXCLUSIVE, PG_DIRTY, PG_LRU, FreeList
from xipfs.memory.frames import PhysicalMemory as Memory
from xipfs.mm import bulk, bulk_learn, bulk_loop
from xipfs.mm.access import Access, access
from xipfs.mm.bug import KernelBug
from xipfs.mm.bulk import BulkStatistics, bulk_access, numba_is_installed
from xipfs.mm.flags import VM_MIXEDMAP, VM_READ, VM_WRITE
from xipfs.mm.fork import dup_mmap
from xipfs.mm.insert import vmf_insert_mixed, vmf_insert_pfn
from xipfs.mm.machine import Machine
from xipfs.mm.mm_struct import MmStruct
from xipfs.mm.mmap import do_mmap, do_munmap, mprotect
from xipfs.mm.placed import ABSENT, Placement
from xipfs.mm.pte import PTE_WRITE, describe_pte, mk_pte
from xipfs.mm.rules import Rules, rule_set_names
from xipfs.mm.vma import MappedFile, Vma, Vmf, VmOperations
from xipfs.mm.zap import exit_mmap
from xipfs.units import PAGE_SHIFT

FILE_PAGES = 80
#: A gibibyte and a leaf are crossed by the VMAs that are mapped here.
EDGE = (5 << 30) - (8 << PAGE_SHIFT)

Trace = tuple[list[int], list[int], list[bool]]


class Twin:
    """A machine with two placed files and one with handlers of its own, and its processes."""

    def __init__(self, rules: Rules, *, ram_pages: int = 64, anon_pages: int = 400) -> None:
        memory = Memory(ram_pages=ram_pages, nvram_pages=200, anon_pages=anon_pages)
        self.machine = Machine(memory, rules)
        self.placement = Placement(self.machine)
        self.files: list[MappedFile] = []
        for number, shmem in enumerate((False, True)):
            frames = [
                ABSENT if page % 3 else memory.nvram_pfn(number * FILE_PAGES + page)
                for page in range(FILE_PAGES)
            ]
            self.files.append(self.placement.add(number, np.array(frames), shmem=shmem))
        handlers = VmOperations(
            fault=lambda vmf: vmf_insert_pfn(vmf.vma, vmf.address, memory.nvram_pfn(199))
        )
        self.files.append(MappedFile("driver", handlers, mmap=self._mixed))
        self.mms = [MmStruct(self.machine, 0)]
        self.held: list[int] = []

    @staticmethod
    def _mixed(vma: Vma) -> int:
        vma.flags |= VM_MIXEDMAP
        return 0


def slowly(twin: Twin, trace: Trace) -> BulkStatistics:
    """What ``bulk_access`` must do and count, by the slow path; a KernelBug passes through."""
    faults = major = hits = 0
    signals: Counter[str] = Counter()
    for process, page, write in zip(*trace, strict=True):
        taken = access(twin.mms[process], page << PAGE_SHIFT, write=write)
        faults += taken.faults
        major += taken.major
        hits += not taken.faults and not taken.signal
        signals[taken.signal] += bool(taken.signal)
    signals = +signals
    return BulkStatistics(len(trace[0]), hits, faults, major, 0, 0, dict(signals))


def in_bulk(twin: Twin, trace: Trace, *, compiled: bool) -> BulkStatistics:
    process, page, write = trace
    return bulk_access(
        twin.machine,
        twin.mms,
        np.array(process, np.int32),
        np.array(page, np.int64),
        np.array(write, np.bool_),
        compiled=compiled,
    )


def next_frames(free: FreeList) -> list[int]:
    """Every number that ``free`` would hand out, in order."""
    stack, first, end = free.lend()
    return [*stack[::-1].tolist(), *range(first, end)]


def non_zero(values: np.ndarray[Any, Any]) -> dict[int, int]:
    places = np.flatnonzero(values)
    return dict(zip(places.tolist(), values[places].tolist(), strict=True))


def everything(twin: Twin) -> dict[str, Any]:
    """All that the rules let an observer see of the machine."""
    machine, memory = twin.machine, twin.machine.memory
    seen: dict[str, Any] = {
        "machine": (machine.statistics(), machine._anon_vma_serial),
        "refcount": non_zero(memory.refcount),
        "mapcount": non_zero(memory.mapcount),
        "page flags": non_zero(memory.page_flags),
        "free frames": [next_frames(free) for free in (memory.ram_free, memory.anon_free)],
        "frames": twin.placement.frames.tolist(),
        "table bytes": machine.table_pool.used_bytes(),
    }
    for number, mm in enumerate(twin.mms):
        seen[f"mm {number}"] = (mm.rss, mm.raw_ptes, mm.min_flt, mm.maj_flt, mm.swapents)
        seen[f"tables {number}"] = mm.tables.table_pages()
        seen[f"vmas {number}"] = [
            (vma.start, vma.end, vma.flags, vma.pgoff, vma.page_prot, vma.anon_vma, vma.chain)
            for vma in mm
        ]
        seen[f"ptes {number}"] = [
            entry for vma in mm for entry in mm.tables.populated(vma.start, vma.end)
        ]
    return seen


def compare(slow: Twin, fast: Twin, what: str) -> None:
    first, second = everything(slow), everything(fast)
    for name, value in first.items():
        assert second[name] == value, f"{name} differ after {what}"
    assert first.keys() == second.keys(), what


def random_trace(dice: random.Random, twin: Twin) -> Trace:
    """Accesses to a few pages over and over, most of them mapped."""
    ranges = [
        (number, vma.start >> PAGE_SHIFT, vma.end >> PAGE_SHIFT)
        for number, mm in enumerate(twin.mms)
        for vma in mm
    ]
    trace: Trace = ([], [], [])
    for _ in range(dice.choice((1, 30, 400)) if ranges else 0):
        process, start, end = dice.choice(ranges)
        margin = dice.random() < 0.004
        trace[0].append(process)
        trace[1].append(dice.randrange(max(start - margin, 0), end + margin))
        trace[2].append(dice.random() < 0.4)
    return trace


def random_step(dice: random.Random, shape: Twin) -> tuple[str, Callable[[Twin], object]]:
    """Draw one change of mappings or placement that ``shape`` allows: its text and its doing."""
    if not shape.mms:
        return "new process", lambda twin: twin.mms.append(MmStruct(twin.machine, "new"))
    who = dice.randrange(len(shape.mms))
    vmas = list(shape.mms[who])
    kind = dice.choice(("map", "map", "fork", "unmap", "protect", "evict", "evict", "exit", "hold"))
    if kind == "fork" and len(shape.mms) < 4:
        return f"fork {who}", lambda twin: twin.mms.append(fork(twin.mms[who]))
    if kind == "exit" and len(shape.mms) > 2:
        return f"exit {who}", lambda twin: exit_mmap(twin.mms.pop(who))
    if kind in ("unmap", "protect") and vmas:
        vma = dice.choice(vmas)
        start = dice.randrange(vma.start >> PAGE_SHIFT, vma.end >> PAGE_SHIFT) << PAGE_SHIFT
        end = dice.randrange(start >> PAGE_SHIFT, vma.end >> PAGE_SHIFT) + 1 << PAGE_SHIFT
        if kind == "unmap":
            return f"unmap {start:#x}", lambda twin: do_munmap(twin.mms[who], start, end)
        prot = dice.choice((VM_READ, 0) + (VM_READ | VM_WRITE,) * 5)
        return f"protect {prot}", lambda twin: mprotect(twin.mms[who], start, end, prot)
    if kind == "hold":
        number = dice.randrange(1 << 16)
        return "hold or release", lambda twin: hold_or_release(twin, who, number)
    if kind == "evict":
        index, name = dice.randrange(FILE_PAGES), dice.randrange(2)
        return f"evict {index} of {name}", lambda twin: evict(twin, name, index)
    which = dice.choice((None, 0, 0, 1, 1, 2))
    pages, pgoff = dice.choice((3, 40, 70)), dice.randrange(0, 15)
    prot = dice.choice((VM_READ,) + (VM_READ | VM_WRITE,) * 4)
    shared = which is not None and dice.random() < 0.5
    address = dice.choice((None, None, EDGE, EDGE - (600 << PAGE_SHIFT)))
    return f"map {pages} pages of {which}", lambda twin: do_mmap(
        twin.mms[who],
        None if which is None else twin.files[which],
        pages,
        prot,
        pgoff=pgoff,
        shared=shared,
        address=address,
    )


def fork(parent: MmStruct) -> MmStruct:
    child = dup_mmap(parent, "child")
    assert isinstance(child, MmStruct)
    return child


def evict(twin: Twin, name: int, index: int) -> None:
    file = twin.files[name]
    pfn = twin.placement.frames[name * FILE_PAGES + index]
    if pfn != ABSENT and twin.machine.memory.pfn_valid(pfn):
        file.evict(index)  # type: ignore[attr-defined]


def hold_or_release(twin: Twin, who: int, number: int) -> None:
    """Take a reference to one of the frames that a process maps, or give all of them back."""
    machine = twin.machine
    if number % 3 == 0:
        for pfn in twin.held:
            machine.release(pfn)
        twin.held.clear()
        return
    mm = twin.mms[who]
    ptes = [pte for vma in mm for _, pte in mm.tables.populated(vma.start, vma.end)]
    pfns = [pte >> 12 for pte in ptes if machine.memory.pfn_valid(pte >> 12)]
    for pfn in pfns[number % 7 :: 7]:
        machine.hold(pfn)
        twin.held.append(pfn)


def or_bug(do: Callable[[], BulkStatistics]) -> tuple[BulkStatistics | None, str]:
    """What ``do`` returns, or the text of the KernelBug it ends in."""
    try:
        return do(), ""
    except KernelBug as bug:
        return None, str(bug)


def run_twins(rules: str, seed: int, *, steps: int, compiled: bool) -> Counter[str]:
    """Drive two machines alike; compare after each step. Returns what the bulk path did."""
    dice = random.Random(f"{rules} {seed}")
    sizes = {"ram_pages": dice.choice((30, 110)), "anon_pages": dice.choice((100, 1500))}
    slow, fast = (Twin(Rules.parse(rules), **sizes) for _ in range(2))
    done: Counter[str] = Counter()
    for number in range(steps):
        what, step = random_step(dice, slow)
        where = f"step {number}, {what} (rules {rules}, seed {seed})"
        step(slow)
        step(fast)
        compare(slow, fast, where)
        trace = random_trace(dice, slow)
        expected, bug = or_bug(lambda: slowly(slow, trace))  # noqa: B023
        got, same_bug = or_bug(lambda: in_bulk(fast, trace, compiled=compiled))  # noqa: B023
        assert same_bug == bug, where
        compare(slow, fast, f"the accesses after {where}")
        if expected is None or got is None:
            done["bugs"] += 1
            return done
        for name in ("accesses", "hits", "faults", "major_faults", "signals"):
            assert getattr(got, name) == getattr(expected, name), (name, where)
        done.update(repeated=got.repeated, slow=got.slow, hits=got.hits, **got.signals)
    return done


def run_seeds(seeds: int) -> Counter[str]:
    done: Counter[str] = Counter()
    for seed in range(seeds):
        done += run_twins("6.1", seed, steps=60, compiled=False)
    return done


needs_numba = pytest.mark.skipif(not numba_is_installed(), reason="numba is not installed")


@needs_numba
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rules", rule_set_names())
def test_compiled_bulk_equals_slow_path(rules: str, seed: int) -> None:
    run_twins(rules, seed, steps=60, compiled=True)


@pytest.mark.parametrize("rules", rule_set_names())
def test_uncompiled_bulk_equals_slow_path(rules: str) -> None:
    run_twins(rules, 100, steps=40, compiled=False)


def test_the_random_lists_reach_what_they_are_for() -> None:
    done = run_seeds(6)
    assert min(done[what] for what in ("repeated", "slow", "hits")) > 300, done
    assert min(done[signal] for signal in ("SIGBUS", "SIGSEGV", "SIGKILL")) > 3, done


@pytest.mark.parametrize(
    "column", ["NEW_BITS", "REF_ADDED", "MAP_ADDED", "FLAGS_AFTER", "COPY_REF", "FILL_MAP"]
)
def test_a_wrong_outcome_is_noticed(column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bulk_learn.Situation.outcome

    def wrong(self: bulk_learn.Situation) -> Any:
        row = right(self)
        if row is not None:
            row[getattr(bulk_loop, column)] ^= 8
        return row

    monkeypatch.setattr(bulk_learn.Situation, "outcome", wrong)
    with pytest.raises(AssertionError, match="differ after the accesses"):
        run_seeds(20)


def test_a_lost_counter_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "add_to_counters", lambda *_: None)
    with pytest.raises(AssertionError, match=r"(machine|mm \d) differ after the accesses"):
        run_twins("6.1", 0, steps=60, compiled=False)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_numba)])
def test_counts_of_both_kinds(compiled: bool) -> None:
    twin = Twin(Rules.parse("6.1"))
    twin.mms.append(MmStruct(twin.machine, 1))
    first = [
        do_mmap(mm, twin.files[0], 4, VM_READ | VM_WRITE, shared=True) >> PAGE_SHIFT
        for mm in twin.mms
    ]
    # Pages 0 and 3 of the file are XIP, 1 and 2 pagecache. Each is read by both, twice.
    process = [0, 0, 0, 0, 1, 1, 1, 1] * 2
    page = [first[who] + index for who, index in zip(process, [0, 1, 2, 3] * 4, strict=True)]
    done = in_bulk(twin, (process, page, [False] * 16), compiled=compiled)
    # Each process takes one fault a page. In each VMA pages 0 and 1 are learned from and 2 and 3
    # repeat them: for the first process page 1 was absent, for the second it is resident.
    assert (done.accesses, done.hits, done.faults, done.major_faults) == (16, 8, 8, 2)
    assert (done.repeated, done.slow, done.signals) == (4, 4, {})
    statistics = twin.machine.statistics()
    assert (statistics.pgfault, statistics.pgmajfault) == (8, 2)
    assert (statistics.nr_special_ptes, statistics.nr_normal_ptes) == (4, 4)
    assert [mm.rss for mm in twin.mms] == [[2, 0, 0], [2, 0, 0]]
    assert [(mm.min_flt, mm.maj_flt) for mm in twin.mms] == [(2, 2), (4, 0)]
    frames = twin.placement.frames[[1, 2]].tolist()
    memory = twin.machine.memory
    assert [memory.ref[pfn] for pfn in frames] == [3, 3]  # the cache and two PTEs
    assert [memory.map[pfn] for pfn in frames] == [2, 2]
    assert [memory.flags[pfn] for pfn in frames] == [0, 0]
    # Struct pages exist for RAM and anonymous frames; the 200 frames of the region have none.
    assert len(memory.refcount) == len(memory.mapcount) == len(memory.page_flags) == 64 + 400


def test_a_copy_of_an_xip_page_and_of_a_cached_page() -> None:
    twin = Twin(Rules.parse("6.1"))
    first = do_mmap(twin.mms[0], twin.files[0], 12, VM_READ | VM_WRITE) >> PAGE_SHIFT
    # Pages 0, 3, 6 are XIP, 1, 4, 7 pagecache: store to each, the second and third of each kind
    # in the loop. The store to an untouched XIP page takes two faults (rule F11), the others one.
    pages = [first + index for index in (0, 1, 3, 4, 6, 7)]
    done = in_bulk(twin, ([0] * 6, pages, [True] * 6), compiled=False)
    assert (done.faults, done.major_faults, done.repeated, done.slow) == (9, 3, 4, 2)
    memory = twin.machine.memory
    for page in pages:
        pte = twin.mms[0].tables.get(page << PAGE_SHIFT)
        assert describe_pte(pte).endswith(" pwydn")
        pfn = pte >> 12
        assert (memory.ref[pfn], memory.map[pfn]) == (1, 1)
        assert memory.flags[pfn] == PG_ANON | PG_LRU | PG_ANON_EXCLUSIVE
    assert twin.mms[0].rss == [0, 6, 0]
    assert twin.machine.nr_anon_pages == 6
    assert [memory.ref[pfn] for pfn in twin.placement.frames[[1, 4, 7]].tolist()] == [1, 1, 1]


def test_a_shared_store_dirties_the_cached_page() -> None:
    twin = Twin(Rules.parse("6.1"))
    first = do_mmap(twin.mms[0], twin.files[0], 6, VM_READ | VM_WRITE, shared=True) >> PAGE_SHIFT
    done = in_bulk(twin, ([0] * 4, [first + i for i in (1, 2, 4, 5)], [True] * 4), compiled=False)
    assert (done.faults, done.repeated) == (4, 3)
    flags = twin.machine.memory.flags
    assert [flags[pfn] for pfn in twin.placement.frames[[1, 2, 4, 5]].tolist()] == [PG_DIRTY] * 4


def test_each_situation_is_learned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[int] = []
    learn = bulk_learn.Outcomes.learn

    def count(self: bulk_learn.Outcomes, situation: bulk_learn.Situation, taken: Access) -> None:
        learned.append(situation.address)
        learn(self, situation, taken)

    monkeypatch.setattr(bulk_learn.Outcomes, "learn", count)
    twin = Twin(Rules.parse("6.1"))
    gibibyte = 1 << 30 - PAGE_SHIFT
    first = do_mmap(twin.mms[0], None, 40 * gibibyte, VM_READ | VM_WRITE) >> PAGE_SHIFT
    pages = [first + number * gibibyte for number in range(40)] + [first + 1]
    done = in_bulk(twin, ([0] * 41, pages, [True] * 41), compiled=False)
    # The slow path makes 40 middle tables, and is learned from at the first of them.
    assert (done.faults, done.slow, done.repeated) == (41, 40, 1)
    assert learned == [first << PAGE_SHIFT]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_numba)])
def test_a_kernel_bug_ends_the_call_with_all_before_it_accounted(compiled: bool) -> None:
    twin = Twin(Rules.parse("6.1"))
    memory = twin.machine.memory
    # The driver inserts a frame that has a struct page into a MIXED VMA: rule I5.
    handlers = VmOperations(fault=lambda vmf: vmf_insert_pfn(vmf.vma, vmf.address, 0))
    broken = MappedFile("broken", handlers, mmap=Twin._mixed)
    first = do_mmap(twin.mms[0], twin.files[0], 10, VM_READ) >> PAGE_SHIFT
    bad = do_mmap(twin.mms[0], broken, 1, VM_READ) >> PAGE_SHIFT
    pages = [first + 1, first + 2, first + 4, bad, first + 5]
    with pytest.raises(KernelBug, match="pfn_valid"):
        in_bulk(twin, ([0] * 5, pages, [False] * 5), compiled=compiled)
    assert (twin.machine.pgfault, twin.machine.pgmajfault) == (4, 3)
    assert (twin.mms[0].maj_flt, twin.mms[0].rss) == (3, [3, 0, 0])
    assert memory.statistics().ram_free_pages == 61


def test_the_loop_and_not_the_slow_path_does_the_work() -> None:
    twin = Twin(Rules.parse("6.1"), anon_pages=5000)
    first = do_mmap(twin.mms[0], None, 2000, VM_READ | VM_WRITE) >> PAGE_SHIFT
    trace: Trace = ([0] * 4000, [first + i % 2000 for i in range(4000)], [True] * 4000)
    done = in_bulk(twin, trace, compiled=False)
    # One store is learned from. The VMA begins at a leaf; its middle table comes with that store.
    assert (done.hits, done.faults, done.repeated, done.slow) == (2000, 2000, 1999, 1)
    assert twin.mms[0].tables.table_pages() == 4
    exit_mmap(twin.mms.pop())
    assert twin.machine.table_pool.used_bytes() == 0
    assert twin.machine.memory.statistics().anon_used_pages == 1  # the zero page


def test_handlers_of_other_files_are_called_each_time() -> None:
    twin = Twin(Rules.parse("6.1"))
    memory = twin.machine.memory
    called: list[int] = []

    def notice(vmf: Vmf) -> int:
        called.append(vmf.pgoff)
        return 0

    handlers = VmOperations(
        fault=lambda vmf: vmf_insert_mixed(vmf.vma, vmf.address, memory.nvram_pfn(vmf.pgoff)),
        pfn_mkwrite=notice,
    )
    file = MappedFile("notified", handlers, mmap=Twin._mixed)
    first = do_mmap(twin.mms[0], file, 5, VM_READ | VM_WRITE, shared=True) >> PAGE_SHIFT
    pages = [first + index for index in range(5)]
    assert in_bulk(twin, ([0] * 5, pages, [False] * 5), compiled=False).slow == 5
    assert in_bulk(twin, ([0] * 5, pages, [True] * 5), compiled=False).faults == 5
    assert called == [0, 1, 2, 3, 4]


def read_only_anonymous(twin: Twin, pages: int) -> list[int]:
    """Map anonymous pages, written once, then made read-only and nobody's own; virtual pages."""
    mm = twin.mms[0]
    first = do_mmap(mm, None, pages, VM_READ | VM_WRITE) >> PAGE_SHIFT
    virtual = [first + index for index in range(pages)]
    slowly(twin, ([0] * pages, virtual, [True] * pages))
    for page in virtual:
        pte = mm.tables.get(page << PAGE_SHIFT)
        mm.tables.set(page << PAGE_SHIFT, pte & ~PTE_WRITE)
        twin.machine.memory.flags[pte >> 12] &= ~PG_ANON_EXCLUSIVE
    return virtual


def test_a_page_with_another_holder_is_copied_and_one_without_reused() -> None:
    slow, fast = (Twin(Rules.parse("6.1")) for _ in range(2))
    for twin in (slow, fast):
        virtual = read_only_anonymous(twin, 4)
        before = [twin.mms[0].tables.get(page << PAGE_SHIFT) >> 12 for page in virtual]
        for pfn in before[1::2]:
            twin.machine.hold(pfn)
    trace: Trace = ([0] * 4, virtual, [True] * 4)
    slowly(slow, trace)
    done = in_bulk(fast, trace, compiled=False)
    assert (done.faults, done.repeated, done.slow) == (4, 2, 2)
    after = [fast.mms[0].tables.get(page << PAGE_SHIFT) >> 12 for page in virtual]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False] * 2
    compare(slow, fast, "stores to held pages")


def test_pages_in_the_swap_cache_are_left_to_the_slow_path() -> None:
    slow, fast = (Twin(Rules.parse("6.1")) for _ in range(2))
    for twin in (slow, fast):
        virtual = read_only_anonymous(twin, 4)
        swap, memory = twin.machine.swap, twin.machine.memory
        for page in virtual:
            pfn = twin.mms[0].tables.get(page << PAGE_SHIFT) >> 12
            memory.get_page(pfn)
            swap.add_to_cache(memory, swap.allocate(0), pfn)
    trace: Trace = ([0] * 4, virtual, [True] * 4)
    slowly(slow, trace)
    assert in_bulk(fast, trace, compiled=False).slow == 4
    assert (slow.machine.swap.cache, fast.machine.swap.cache) == ({}, {})
    compare(slow, fast, "stores to pages of the swap cache")


def test_a_page_about_to_be_freed_is_left_to_the_slow_path() -> None:
    slow, fast = (Twin(Rules.parse("6.1")) for _ in range(2))
    for twin in (slow, fast):
        first = do_mmap(twin.mms[0], twin.files[0], 6, VM_READ | VM_WRITE) >> PAGE_SHIFT
        virtual = [first + index for index in (1, 2, 4, 5)]
        slowly(twin, ([0] * 4, virtual, [False] * 4))
        # Page 4 leaves the cache while it is mapped, as a truncated page may: one reference left.
        twin.machine.memory.put_page(int(twin.placement.frames[4]))
        twin.placement.frames[4] = ABSENT
    trace: Trace = ([0] * 4, virtual, [True] * 4)
    slowly(slow, trace)
    done = in_bulk(fast, trace, compiled=False)
    assert (done.repeated, done.slow) == (2, 2)
    compare(slow, fast, "copies of cached pages")
    assert fast.machine.memory.statistics().ram_free_pages == 61


def test_ptes_that_no_rule_explains_are_left_to_the_slow_path() -> None:
    slow, fast = (Twin(Rules.parse("6.1")) for _ in range(2))
    for twin in (slow, fast):
        mm = twin.mms[0]
        first = do_mmap(mm, None, 4, VM_READ | VM_WRITE) >> PAGE_SHIFT
        virtual = [first + index for index in range(4)]
        slowly(twin, ([0] * 4, virtual, [False] * 4))
        # Pages 1 and 3 now map a frame of the region specially, in a VMA that has no such pages.
        for page in virtual[1::2]:
            zero_bits = mm.tables.get(page << PAGE_SHIFT) & 0xFFF
            mm.tables.set(page << PAGE_SHIFT, mk_pte(twin.machine.memory.nvram_pfn(9), zero_bits))
    trace: Trace = ([0] * 4, virtual, [True] * 4)
    slowly(slow, trace)
    done = in_bulk(fast, trace, compiled=False)
    assert (done.repeated, done.slow) == (1, 3)
    assert fast.machine.bad_ptes == 2
    compare(slow, fast, "stores to the zero page and to bad PTEs")


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_numba)])
def test_the_pool_of_page_tables_grows_in_the_loop(compiled: bool) -> None:
    twin = Twin(Rules.parse("6.1"))
    first = do_mmap(twin.mms[0], None, 100 * 512, VM_READ | VM_WRITE) >> PAGE_SHIFT
    pages = [first + leaf * 512 for leaf in range(100)]
    done = in_bulk(twin, ([0] * 100, pages, [True] * 100), compiled=compiled)
    assert (done.faults, done.repeated, done.slow) == (100, 99, 1)
    assert twin.mms[0].tables.table_pages() == 100
    assert twin.machine.table_pool.used_bytes() == 101 * 4096  # and the middle table
    do_munmap(twin.mms[0], first << PAGE_SHIFT, first + 51200 << PAGE_SHIFT)
    assert twin.machine.table_pool.used_bytes() == 0
    assert not any(twin.machine.table_pool.array)


def test_numba_is_imported_only_to_compile() -> None:
    program = "import sys, xipfs.mm.bulk; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_without_numba_the_loop_runs_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "numba_is_installed", lambda: False)
    monkeypatch.setattr(bulk, "compiled_run", lambda: pytest.fail("compiled without numba"))
    twin = Twin(Rules())
    first = do_mmap(twin.mms[0], None, 1, VM_READ | VM_WRITE) >> PAGE_SHIFT
    done = bulk_access(
        twin.machine, twin.mms, np.zeros(2, int), np.array([first] * 2), np.ones(2, bool)
    )
    assert (done.faults, done.hits) == (1, 1)


@pytest.mark.parametrize(
    ("process", "page", "write", "message"),
    [
        ([0], [1, 2], [True], "1 processes, 2 pages, 1 writes"),
        ([1], [1], [True], r"process 1\.\.1, expected 0\.\.0"),
        ([-1], [1], [True], r"process -1\.\.-1, expected 0\.\.0"),
    ],
)
def test_a_trace_that_does_not_fit_is_refused(
    process: list[int], page: list[int], write: list[bool], message: str
) -> None:
    twin = Twin(Rules())
    with pytest.raises(ValueError, match=message):
        in_bulk(twin, (process, page, write), compiled=False)
    assert twin.machine.pgfault == 0
