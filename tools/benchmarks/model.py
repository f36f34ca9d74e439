"""The model's bulk path: accesses a second beside a cache simulator's, and what memory they need.

The trace is seeded: accesses (process, page, load or store), pages drawn by Zipf's law with
exponent 1 and scattered over the address spaces, one access in five a store. Four processes map
the same two files, one shared and one private; half of each file's pages are XIP, half pagecache.
So the counts of cached pages are shared, and stores to the private file copy. Every round starts
with nothing mapped: first accesses fault and fill frames, the others are hits.

The peer is libcachesim's LRU on the same sequence of pages: a whole trace in one call of C, its
binary trace file on tmpfs, room for every page (so that nothing is evicted), a hash table of
fitting size, sizes ignored. It keeps an order; the model keeps PTEs, counts and counters, and no
order. Both run on one processor, one after the other.

Then the same number of accesses over more and more pages. Nothing in the model grows with the
number of pages; what grows is the share of first accesses, and the host's cache misses.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.support.context import SEED, Context
from benchmarks.support.measure import Sample, compare
from benchmarks.support.system import BenchError
from xipfs.memory.frames import PhysicalMemory
from xipfs.mm.bulk import BulkStatistics, bulk_access, numba_is_installed
from xipfs.mm.flags import VM_READ, VM_WRITE
from xipfs.mm.machine import Machine
from xipfs.mm.mm_struct import MmStruct
from xipfs.mm.mmap import do_mmap
from xipfs.mm.placed import ABSENT, Placement
from xipfs.units import PAGE_SHIFT

NAME = "model"
HELP = "the model's accesses per second beside libcachesim's LRU; bytes per PTE"

PROCESSES = 4
STORES = 0.2
XIP = 0.5
PEER = "libcachesim LRU"
_SINGLE_CALLS = 100


@dataclass(frozen=True)
class Trace:
    """Accesses: slot numbers 0..pages-1 (a process's page each), and which are stores."""

    pages: int
    slot: npt.NDArray[np.int64]
    write: npt.NDArray[np.bool_]


@functools.lru_cache(maxsize=1)
def zipf_trace(pages: int, accesses: int, seed: int) -> Trace:
    """Draw the trace; the rank of a page says nothing about its place."""
    random = np.random.default_rng(seed)
    weights = np.cumsum(1 / np.arange(1, pages + 1))
    rank = np.searchsorted(weights, random.random(accesses) * weights[-1])
    return Trace(pages, random.permutation(pages)[rank], random.random(accesses) < STORES)


class Model:
    """A machine with ``pages`` virtual pages mapped by PROCESSES processes, none touched."""

    def __init__(self, pages: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        each = pages // PROCESSES
        sizes = (each // 2, each - each // 2)
        xip = [random.random(size) < XIP for size in sizes]
        cached = each - sum(int(kinds.sum()) for kinds in xip)
        memory = PhysicalMemory(ram_pages=max(cached, 1), nvram_pages=each, anon_pages=pages + 1)
        self.machine = Machine(memory)
        placement = Placement(self.machine)
        starts = np.zeros((PROCESSES, 2), np.int64)
        self.mms = [MmStruct(self.machine, number) for number in range(PROCESSES)]
        block = int(memory.nvram_base_pfn)
        for number, (size, kinds) in enumerate(zip(sizes, xip, strict=True)):
            frames = np.where(kinds, block + np.arange(size), ABSENT)
            block += size
            file = placement.add(number, frames)
            for process, mm in enumerate(self.mms):
                address = do_mmap(mm, file, size, VM_READ | VM_WRITE, shared=number == 0)
                starts[process, number] = address >> PAGE_SHIFT
        self._each, self._first_file, self._starts = each, sizes[0], starts

    def place(self, trace: Trace) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Return process and virtual page of each access."""
        process, offset = np.divmod(trace.slot, self._each)
        file = (offset >= self._first_file).astype(np.int64)
        page = self._starts[process, file] + offset - file * self._first_file
        return process.astype(np.int32), page

    def ptes(self) -> int:
        """Return how many PTEs are populated."""
        return sum(sum(mm.rss) + mm.raw_ptes for mm in self.mms)

    def struct_page_bytes(self) -> int:
        """Return the bytes of the struct pages of all frames in use."""
        memory = self.machine.memory
        arrays = (memory.refcount, memory.mapcount, memory.page_flags)
        return int(np.count_nonzero(memory.refcount)) * sum(array.itemsize for array in arrays)

    def xip_struct_page_bytes(self) -> int:
        """Return the bytes of struct pages beyond those of RAM and anonymous frames."""
        memory = self.machine.memory
        arrays = (memory.refcount, memory.mapcount, memory.page_flags)
        with_struct_page = memory.ram_pages + memory.anon_pages
        return sum(array[with_struct_page:].nbytes for array in arrays)


def sample_model(trace_of: tuple[int, int], seed: int) -> Sample:
    """Run the trace on a fresh machine, then again with everything mapped."""
    trace = zipf_trace(*trace_of, seed)
    model = Model(trace.pages, seed)
    process, page = model.place(trace)

    def carry_out(end: int) -> tuple[float, float, BulkStatistics]:
        started, cpu = time.perf_counter(), time.thread_time()
        done = bulk_access(model.machine, model.mms, process[:end], page[:end], trace.write[:end])
        return time.perf_counter() - started, time.thread_time() - cpu, done

    accesses = len(page)
    carry_out(0)  # compiles
    seconds, cpu_seconds, done = carry_out(accesses)
    again_seconds, _, again = carry_out(accesses)
    if again.hits != accesses or done.signals:
        raise BenchError(f"expected only hits when all is mapped: {again}, first {done}")
    single_seconds = min(carry_out(1)[0] for _ in range(_SINGLE_CALLS))
    ptes = model.ptes()
    return {
        "accesses_per_s": accesses / seconds,
        "accesses_per_cpu_s": accesses / cpu_seconds,
        "ns_per_access": seconds / accesses * 1e9,
        "ns_per_access_when_mapped": again_seconds / accesses * 1e9,
        "us_per_call_of_one_access": single_seconds * 1e6,
        "hits_percent": done.hits / accesses * 100,
        "slow_path_accesses": done.slow,
        "ptes": ptes,
        "page_table_bytes_per_pte": model.machine.table_pool.used_bytes() / ptes,
        "struct_page_bytes_per_pte": model.struct_page_bytes() / ptes,
        "struct_page_bytes_of_xip_frames": model.xip_struct_page_bytes(),
    }


def sample_peer(context: Context, trace_of: tuple[int, int], seed: int) -> Sample:
    """Run libcachesim's LRU over the same pages, from its binary trace format."""
    try:
        from libcachesim import LRU, ReaderInitParam, TraceReader, TraceType
    except ImportError as error:
        raise BenchError(f"{error}; expected the extra 'bench' to be installed") from error
    trace = zipf_trace(*trace_of, seed)
    layout = [("time", "<u4"), ("object", "<u8"), ("size", "<u4"), ("next", "<i8")]
    records = np.zeros(len(trace.slot), np.dtype(layout))
    records["object"] = trace.slot + 1
    records["size"] = 1
    records["next"] = -1
    path = context.work / "trace.oracleGeneral.bin"
    records.tofile(path)
    reader = TraceReader(
        str(path), TraceType.ORACLE_GENERAL_TRACE, ReaderInitParam(ignore_obj_size=True)
    )
    cache = LRU(trace.pages, hashpower=trace.pages.bit_length())
    started, cpu = time.perf_counter(), time.thread_time()
    miss_ratio, _ = cache.process_trace(reader)
    seconds, cpu_seconds = time.perf_counter() - started, time.thread_time() - cpu
    path.unlink()
    missed = len(np.unique(trace.slot)) / len(trace.slot)
    if abs(miss_ratio - missed) > 1e-6:
        raise BenchError(f"libcachesim missed {miss_ratio:.6f}, expected {missed:.6f}")
    return {
        "accesses_per_s": len(trace.slot) / seconds,
        "accesses_per_cpu_s": len(trace.slot) / cpu_seconds,
        "hits_percent": (1 - miss_ratio) * 100,
    }


@contextlib.contextmanager
def one_processor() -> Iterator[None]:
    """Keep this process on the last of the processors it may use."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def run(context: Context) -> dict[str, Any]:
    """Measure the model beside the peer, then the model over growing numbers of pages."""
    accesses, pages = (1_000_000, 100_000) if context.quick else (10_000_000, 1_000_000)
    series = [10_000, 100_000] if context.quick else [10_000, 100_000, 1_000_000, 10_000_000]
    context.require_space(24 * accesses)
    context.settings |= {
        "accesses": accesses,
        "pages": pages,
        "processes": PROCESSES,
        "stores": STORES,
        "xip_share_of_pages": XIP,
        "zipf_exponent": 1,
        "compiled": numba_is_installed(),
        "first_seed": SEED,
    }
    command = f"bulk_access() of {accesses} accesses; LRU({pages}).process_trace(reader)"
    with one_processor():
        beside = context.alternate(
            "bulk accounting",
            {
                PEER: functools.partial(sample_peer, context, (pages, accesses)),
                "xipfs model": functools.partial(sample_model, (pages, accesses)),
            },
        )
        growing = context.alternate(
            "growing",
            {
                f"{count} pages": functools.partial(sample_model, (count, accesses))
                for count in series
            },
        )
    context.comparisons += [
        compare(
            f"{accesses} accesses to {pages} pages, from an empty machine or cache",
            beside,
            metric="accesses_per_s",
            baseline=PEER,
            command=command,
            also=(
                "accesses_per_cpu_s",
                "hits_percent",
                "slow_path_accesses",
                "ptes",
                "page_table_bytes_per_pte",
                "struct_page_bytes_per_pte",
                "struct_page_bytes_of_xip_frames",
            ),
        ),
        compare(
            f"{accesses} accesses to more and more pages, from an empty machine",
            growing,
            metric="ns_per_access",
            baseline=f"{series[0]} pages",
            command=command,
            also=(
                "ns_per_access_when_mapped",
                "us_per_call_of_one_access",
                "hits_percent",
                "ptes",
                "page_table_bytes_per_pte",
            ),
        ),
    ]
    return context.results()
