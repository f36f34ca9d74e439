"""RAM frames and their struct pages, in one pfn space with NVRAM (rules P1, P2, P4, P5, P7).

The pfn space, lowest pfn first:

    [0, ram_pages)                  page-cache RAM: what ``-o ram=`` bounds; a memmap covers it
    [ram_pages, + anon_pages)       the machine's other RAM, where anonymous (COW) pages come from
    ... up to a section boundary    a hole
    [nvram_base_pfn, + nvram_pages) the region: no struct page, pfn_valid() is false (rule P2)

A struct page here is one element of three parallel arrays, ``refcount``, ``mapcount`` and
``page_flags``, indexed by pfn. They end where RAM ends, so an XIP frame cannot have one: it costs
no memory by construction. mapcount is kept as the number of normal PTEs (the kernel stores it
minus one). ``ref``, ``map`` and ``flags`` are memoryviews of the same arrays: one element of a
memoryview is read and written several times faster than one of a numpy array, and the model
touches single elements only; array-wide work and compiled code use the arrays.
"""

from __future__ import annotations

import functools
from array import array
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from xipfs.errors import OutOfFramesError, UsageError
from xipfs.units import PAGE_SIZE, PAGES_PER_SECTION, Pfn

#: sizeof(struct page) that rule P4 derives: 2.6 on 32 bits, 2.6/6.12 on 64 bits, 6.12 with memcg.
STRUCT_PAGE_SIZES: Final = (32, 56, 64)

#: Frames for the programs' own pages, unless told otherwise: 4 GiB.
ANON_PAGES: Final = 1 << 20

# page_flags: the kernel's page flags that the model's rules ask for.
PG_ANON: Final = 1 << 0
PG_ANON_EXCLUSIVE: Final = 1 << 1
PG_DIRTY: Final = 1 << 2
PG_LRU: Final = 1 << 3
#: A page of a shared-memory file: its rss is counted apart (rule F3).
PG_SWAPBACKED: Final = 1 << 4
PG_SWAPCACHE: Final = 1 << 5
PG_RESERVED: Final = 1 << 6
PG_REFERENCED: Final = 1 << 7


@dataclass(frozen=True)
class FrameStatistics:
    """A snapshot of the pfn space; sizes in bytes, counts in 4 KiB pages."""

    ram_pages: int
    ram_free_pages: int
    anon_used_pages: int
    nvram_pages: int
    struct_page_bytes: int

    @property
    def memmap_bytes(self) -> int:
        """Struct pages of the page-cache RAM."""
        return self.ram_pages * self.struct_page_bytes

    @property
    def memmap_saved_bytes(self) -> int:
        """Struct pages the region would need if it had any."""
        return self.nvram_pages * self.struct_page_bytes


class FreeList:
    """Free numbers of [start, start + count): a bump pointer, then a stack of what came back.

    The stack is an ``array``, which compiled code can read where it lies.
    """

    def __init__(self, start: int, count: int) -> None:
        self._next = start
        self._end = start + count
        self._returned: array[int] = array("q")

    def __len__(self) -> int:
        return self._end - self._next + len(self._returned)

    def pop(self) -> int | None:
        """Return a free number, or None if there is none."""
        if self._returned:
            return self._returned.pop()
        if self._next == self._end:
            return None
        self._next += 1
        return self._next - 1

    def push(self, number: int) -> None:
        """Take ``number`` back."""
        self._returned.append(number)

    def take(self, count: int) -> npt.NDArray[np.int64]:
        """Return what ``count`` calls of ``pop`` would, in ascending order; fewer at the end."""
        back = min(count, len(self._returned))
        fresh = min(count - back, self._end - self._next)
        taken = np.empty(back + fresh, np.int64)
        if back:
            taken[:back] = self._returned[-back:]
            del self._returned[-back:]
            taken[:back].sort()
        taken[back:] = np.arange(self._next, self._next + fresh)
        self._next += fresh
        # Never taken numbers lie above all that came back.
        return taken

    def give(self, numbers: npt.NDArray[np.int64]) -> None:
        """Take all of ``numbers`` back; the last of them will be the next to go."""
        self._returned.frombytes(numbers.tobytes())

    def extend(self, count: int) -> None:
        """Add ``count`` numbers after the last one."""
        self._end += count

    def lend(self) -> tuple[npt.NDArray[np.int64], int, int]:
        """Return what ``pop`` would: the stack (its end first), then from ``next`` up to ``end``.

        The array is a view: nothing may be popped or pushed here while it lives. ``settle`` tells
        afterwards how much was taken.
        """
        stack: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        if self._returned:
            stack = np.frombuffer(self._returned, np.int64)
        return stack, self._next, self._end

    def settle(self, depth: int, next_number: int) -> None:
        """Make what was lent and taken final: ``depth`` is what is left of the stack."""
        assert 0 <= depth <= len(self._returned), (depth, len(self._returned))
        assert self._next <= next_number <= self._end, (self._next, next_number, self._end)
        assert depth == 0 or next_number == self._next, "the stack is used up first"
        del self._returned[depth:]
        self._next = next_number


class PhysicalMemory:
    """The pfn space: who has a struct page, the counts, and the bytes of the page-cache RAM.

    ``ram_pages`` frames hold page-cache pages and their bytes; ``anon_pages`` frames exist for
    the model's anonymous pages and hold no bytes (a live process holds them itself).
    """

    def __init__(
        self,
        *,
        ram_pages: int,
        nvram_pages: int,
        anon_pages: int = ANON_PAGES,
        struct_page_bytes: int = 64,
    ) -> None:
        if struct_page_bytes not in STRUCT_PAGE_SIZES:
            raise UsageError(
                f"struct page of {struct_page_bytes} bytes", expected="one of 32, 56, 64"
            )
        if ram_pages < 1:
            raise UsageError(
                f"RAM of {ram_pages} pages", expected="at least one page of 4096 bytes"
            )
        self.ram_pages = ram_pages
        self.anon_pages = anon_pages
        self.nvram_pages = nvram_pages
        self.struct_page_bytes = struct_page_bytes
        with_struct_page = ram_pages + anon_pages
        sections = -(-with_struct_page // PAGES_PER_SECTION)
        self.nvram_base_pfn: Final = Pfn(sections * PAGES_PER_SECTION)
        # np.zeros maps zero pages lazily: untouched frames cost the host nothing.
        self.refcount: npt.NDArray[np.int32] = np.zeros(with_struct_page, np.int32)
        self.mapcount: npt.NDArray[np.int32] = np.zeros(with_struct_page, np.int32)
        self.page_flags: npt.NDArray[np.uint8] = np.zeros(with_struct_page, np.uint8)
        self.ref: Final[memoryview[int]] = self.refcount.data
        self.map: Final[memoryview[int]] = self.mapcount.data
        self.flags: Final[memoryview[int]] = self.page_flags.data
        self.ram_free = FreeList(0, ram_pages)
        self.anon_free = FreeList(ram_pages, anon_pages)

    @functools.cached_property
    def _bytes(self) -> npt.NDArray[np.uint8]:
        # Made when first asked for: a model alone may have more modelled RAM than the host has.
        # On page boundaries as real frames are, and as the region's pages are mapped: a copy to an
        # address that lies a little further in its page than the source does takes three times as
        # long on processors whose string copy compares addresses within a page only.
        room = np.zeros((self.ram_pages + 1) * PAGE_SIZE, np.uint8)
        start = -room.ctypes.data % PAGE_SIZE
        return room[start : start + self.ram_pages * PAGE_SIZE].reshape(-1, PAGE_SIZE)

    def pfn_valid(self, pfn: int) -> bool:
        """Return whether a struct page exists for ``pfn`` (rule P1)."""
        return 0 <= pfn < self.ram_pages + self.anon_pages

    def is_nvram(self, pfn: int) -> bool:
        """Return whether ``pfn`` is a frame of the region."""
        return self.nvram_base_pfn <= pfn < self.nvram_base_pfn + self.nvram_pages

    def nvram_pfn(self, block: int) -> Pfn:
        """Return the pfn of the region's page number ``block``."""
        assert 0 <= block < self.nvram_pages, (block, self.nvram_pages)
        return Pfn(self.nvram_base_pfn + block)

    def alloc_ram(self) -> Pfn:
        """Take a page-cache frame, refcount 1 (the cache's own); its old bytes are still in it."""
        pfn = self.ram_free.pop()
        if pfn is None:
            raise OutOfFramesError(f"all {self.ram_pages} page-cache frames are in use")
        assert self.ref[pfn] == 0, (pfn, self.ref[pfn])
        self.ref[pfn] = 1
        return Pfn(pfn)

    def alloc_ram_run(self, count: int) -> npt.NDArray[np.int64]:
        """Take ``count`` page-cache frames as ``alloc_ram`` does; return their pfns, ascending.

        Fewer if there are not so many free ones.
        """
        pfns = self.ram_free.take(count)
        assert not self.refcount[pfns].any(), pfns
        self.refcount[pfns] = 1
        return pfns

    def alloc_anon(self) -> Pfn:
        """Take a frame for an anonymous page, refcount 1."""
        pfn = self.anon_free.pop()
        if pfn is None:
            raise OutOfFramesError(f"all {self.anon_pages} anonymous frames are in use")
        assert self.ref[pfn] == 0, (pfn, self.ref[pfn])
        self.ref[pfn] = 1
        return Pfn(pfn)

    def get_page(self, pfn: int) -> None:
        """Take one more reference (rule P7)."""
        assert self.ref[pfn] > 0, (pfn, "get_page of a free frame")
        self.ref[pfn] += 1

    def put_page(self, pfn: int) -> None:
        """Drop one reference; the last one frees the frame and clears its flags (rule P7)."""
        count = self.ref[pfn] - 1
        assert count >= 0, (pfn, "put_page of a free frame")
        self.ref[pfn] = count
        if count == 0:
            assert self.map[pfn] == 0, (pfn, self.map[pfn])
            self.flags[pfn] = 0
            (self.ram_free if pfn < self.ram_pages else self.anon_free).push(pfn)

    def put_ram_run(self, pfns: npt.NDArray[np.int64]) -> None:
        """``put_page`` of page-cache frames, each once."""
        counts = self.refcount[pfns] - 1
        assert (counts >= 0).all(), (pfns, "put_ram_run of a free frame")
        self.refcount[pfns] = counts
        freed = pfns if not counts.any() else pfns[counts == 0]
        assert not self.mapcount[freed].any(), freed
        self.page_flags[freed] = 0
        self.ram_free.give(freed)

    def ram_bytes_of(self, pfn: int) -> npt.NDArray[np.uint8]:
        """Return a writable view of a page-cache frame's bytes: uint8[4096]."""
        assert 0 <= pfn < self.ram_pages, pfn
        view: npt.NDArray[np.uint8] = self._bytes[pfn]
        return view

    @property
    def ram_frames(self) -> npt.NDArray[np.uint8]:
        """All page-cache frames, writable: uint8[ram_pages, 4096]; a row's number is its pfn."""
        return self._bytes

    def statistics(self) -> FrameStatistics:
        """Return the pfn space's figures now."""
        return FrameStatistics(
            ram_pages=self.ram_pages,
            ram_free_pages=len(self.ram_free),
            anon_used_pages=self.anon_pages - len(self.anon_free),
            nvram_pages=self.nvram_pages,
            struct_page_bytes=self.struct_page_bytes,
        )
