"""The page cache: which pagecache pages have a RAM frame now, and which goes when RAM is full.

A page is resident from its first touch until it is evicted, demoted or its file shrinks. The order
of touches is kept exactly (least recently used goes first), because "the coldest" is a claim the
statistics make; one dictionary that remembers order gives it in constant time. A dirty page is
written home before its frame is dropped; its home was allocated with the first write, so that can
not fail for want of space.

A page is pinned if anybody but the cache and the model's PTEs refers to it: its refcount then
exceeds 1 + mapcount (rule P7). The model's PTEs of a victim are zapped through ``on_unmap``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np

from xipfs.clock import Clock
from xipfs.errors import OutOfFramesError
from xipfs.image.layout import BLOCK_SHIFT
from xipfs.memory.frames import PhysicalMemory
from xipfs.memory.region import Medium
from xipfs.units import PAGE_SIZE, Ino, PageIndex, Pfn

PageHook = Callable[[Ino, PageIndex], None]
"""Called with the page concerned; must not call the filesystem back."""


def nothing(_ino: Ino, _index: PageIndex) -> None:
    """Do nothing: the hook until somebody needs one."""


#: How many evicted fills are remembered. They matter until the fault that caused the read is
#: charged, some milliseconds; far more reads than this do not happen in that time.
_EVICTED_FILLS_MAX: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """Pages evicted for want of RAM, filled from their homes, written to them; RAM over time."""

    evictions: int
    filled: int
    written_home: int
    ram_frame_ns: int
    """Nanoseconds for which frames were in use, summed over the frames."""


@dataclass(slots=True, eq=False)
class CachedPage:
    """A resident page; ``home`` is its block in the region and stays the same."""

    ino: Ino
    index: PageIndex
    pfn: Pfn
    home: int
    dirty: bool = False
    filled_by_read: bool = False


class PageCache:
    """All resident pages of all files.

    ``on_unmap`` must zap every PTE of the page; ``on_evict`` tells that its frame is gone,
    ``on_cut`` that a file lost its pages from an index on.
    """

    def __init__(self, memory: PhysicalMemory, medium: Medium, clock: Clock) -> None:
        self._memory = memory
        self._medium = medium
        self._clock = clock
        self._frame_ns = 0
        self._counted_ns = clock.monotonic_ns()
        self._by_age: OrderedDict[Pfn, CachedPage] = OrderedDict()
        self._by_file: dict[Ino, dict[PageIndex, CachedPage]] = {}
        #: When each dirty page became so, oldest first.
        self._dirty: dict[Pfn, int] = {}
        self.on_unmap: PageHook = nothing
        self.on_evict: PageHook = nothing
        self.on_cut: PageHook = nothing
        self.evictions = 0
        self.filled = 0
        self.written_home = 0
        self._evicted_fills: OrderedDict[tuple[int, int], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_age)

    def statistics(self) -> CacheStatistics:
        """Return the counts since the mount."""
        self._count_frames()
        return CacheStatistics(self.evictions, self.filled, self.written_home, self._frame_ns)

    def _count_frames(self) -> None:
        """Add what the resident pages have used since the last call; comes before each change."""
        now_ns = self._clock.monotonic_ns()
        self._frame_ns += len(self._by_age) * (now_ns - self._counted_ns)
        self._counted_ns = now_ns

    def get(self, ino: int, index: int) -> CachedPage | None:
        """Return the page if it is resident; this is no touch."""
        pages = self._by_file.get(Ino(ino))
        return pages.get(PageIndex(index)) if pages else None

    def pages_of(self, ino: int) -> list[CachedPage]:
        """Return the file's resident pages in the order they became so."""
        return list(self._by_file.get(Ino(ino), {}).values())

    def files(self) -> list[Ino]:
        """Return the files that have resident pages."""
        return list(self._by_file)

    def frames(self) -> list[Pfn]:
        """Return the frames of all resident pages."""
        return list(self._by_age)

    def touch(self, page: CachedPage) -> None:
        """Make ``page`` the hottest."""
        self._by_age.move_to_end(page.pfn)

    def admit(self, ino: int, index: int, home: int, *, load: bool) -> CachedPage:
        """Give a page that is not resident a frame, evicting the coldest if RAM is full.

        With ``load`` the frame is filled from ``home``; without, the caller fills it whole.
        Raise OutOfFramesError if every frame is pinned.
        """
        assert self.get(ino, index) is None, (ino, index)
        if not self._memory.ram_free and not self._evict(1):
            raise OutOfFramesError(f"all {self._memory.ram_pages} page-cache frames are pinned")
        pfn = self._memory.alloc_ram()
        if load:
            frame = self._memory.ram_bytes_of(pfn).data
            frame[:] = self._medium.load(home << BLOCK_SHIFT, PAGE_SIZE)
            self.filled += 1
        self._count_frames()
        page = CachedPage(Ino(ino), PageIndex(index), pfn, home)
        self._by_age[pfn] = page
        self._by_file.setdefault(page.ino, {})[page.index] = page
        return page

    def admit_many(self, ino: int, pages: list[int], homes: list[int]) -> list[CachedPage]:
        """Give ``pages`` frames filled from ``homes``; return those that got one, in order.

        Fewer than asked for if the other frames are all pinned. No page of this call evicts
        another one of it, so there must not be more than there are frames.
        """
        assert len(pages) <= self._memory.ram_pages, (len(pages), self._memory.ram_pages)
        if (short := len(pages) - len(self._memory.ram_free)) > 0:
            self._evict(short)
        count = min(len(pages), len(self._memory.ram_free))
        pfns = sorted(self._memory.alloc_ram() for _ in range(count))
        frames = self._memory.ram_frames
        for start, stop in _runs(homes[:count]):
            size = (stop - start) * PAGE_SIZE
            source = np.frombuffer(self._medium.load(homes[start] << BLOCK_SHIFT, size), np.uint8)
            frames[_rows(pfns[start:stop])] = source.reshape(-1, PAGE_SIZE)
        self._count_frames()
        of_file = self._by_file.setdefault(Ino(ino), {}) if count else {}
        admitted = [
            CachedPage(Ino(ino), PageIndex(index), pfn, home)
            for index, pfn, home in zip(pages, pfns, homes, strict=False)
        ]
        for page in admitted:
            assert page.index not in of_file, (ino, page.index)
            self._by_age[page.pfn] = of_file[page.index] = page
        self.filled += count
        return admitted

    def bytes_of(self, page: CachedPage) -> memoryview:
        """Return the frame's bytes, writable."""
        return self._memory.ram_bytes_of(page.pfn).data

    @property
    def nr_dirty(self) -> int:
        """How many resident pages differ from their homes, or may."""
        return len(self._dirty)

    def mark_dirty(self, page: CachedPage) -> None:
        """Note that the frame holds what its home does not."""
        page.dirty = True
        self._dirty.setdefault(page.pfn, self._clock.monotonic_ns())

    def write_back(self, limit: int, *, older_ns: int = 0) -> int:
        """Write up to ``limit`` pages home, the longest dirty first, durably; return how many.

        With ``older_ns`` only those that have been dirty for that long.
        """
        latest_ns = self._clock.monotonic_ns() - older_ns
        due = [
            self._by_age[pfn]
            for pfn, since in islice(self._dirty.items(), limit)
            if since <= latest_ns
        ]
        if self.write_home_many(due):
            self._medium.fence()
        return len(due)

    def write_home_many(self, pages: Iterable[CachedPage]) -> int:
        """Store and flush the dirty ones of ``pages``, run by run; the caller fences.

        Return how many there were.
        """
        dirty = sorted((page for page in pages if page.dirty), key=lambda page: page.home)
        frames = self._memory.ram_frames
        for start, stop in _runs([page.home for page in dirty]):
            run = dirty[start:stop]
            offset = run[0].home << BLOCK_SHIFT
            self._medium.store(offset, frames[[page.pfn for page in run]].reshape(-1).data)
            self._medium.flush(offset, len(run) * PAGE_SIZE)
        for page in dirty:
            page.dirty = False
            del self._dirty[page.pfn]
        self.written_home += len(dirty)
        return len(dirty)

    def sync_file(self, ino: int) -> None:
        """Write the file's dirty pages home, durably."""
        self.write_home_many(self._by_file.get(Ino(ino), {}).values())
        self._medium.fence()

    def take_evicted_fill(self, ino: int, index: int) -> bool:
        """Return whether a read filled the page, it was evicted, and nobody asked since."""
        if (ino, index) not in self._evicted_fills:
            return False
        del self._evicted_fills[ino, index]
        return True

    def unmap(self, page: CachedPage) -> bool:
        """Have the PTEs of ``page`` zapped; return whether only the cache refers to it now."""
        self.on_unmap(page.ino, page.index)
        return int(self._memory.refcount[page.pfn]) == 1

    def drop(self, page: CachedPage) -> None:
        """Forget ``page`` without writing it; a pinned frame lives on until it is unpinned."""
        self._count_frames()
        self._dirty.pop(page.pfn, None)
        del self._by_age[page.pfn]
        pages = self._by_file[page.ino]
        del pages[page.index]
        if not pages:
            del self._by_file[page.ino]
        self._memory.put_page(page.pfn)

    def drop_from(self, ino: int, first: int) -> None:
        """Forget the file's pages from ``first`` on: they are being cut off."""
        self.on_cut(Ino(ino), PageIndex(first))
        for page in self.pages_of(ino):
            if page.index >= first:
                self.unmap(page)
                self.drop(page)

    def _evict(self, count: int) -> int:
        """Drop the ``count`` least recently used pages that are not pinned; return how many.

        Dirty ones are written home first, durably. Pinned pages met on the way become the
        hottest, so the next search does not meet them again at once.
        """
        memory = self._memory
        victims: list[CachedPage] = []
        for _ in range(len(self._by_age)):
            page = next(iter(self._by_age.values()))
            self.touch(page)
            pinned = memory.refcount[page.pfn] != 1 + memory.mapcount[page.pfn]
            if not pinned and self.unmap(page):
                victims.append(page)
                if len(victims) == count:
                    break
        if self.write_home_many(victims):
            self._medium.fence()
        for page in victims:
            self.drop(page)
            if page.filled_by_read:
                self._evicted_fills[page.ino, page.index] = None
                if len(self._evicted_fills) > _EVICTED_FILLS_MAX:
                    self._evicted_fills.popitem(last=False)
            self.evictions += 1
            self.on_evict(page.ino, page.index)
        return len(victims)


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the slices of ``numbers`` that count up by one.

    >>> list(_runs([7, 8, 9, 4, 5]))
    [(0, 3), (3, 5)]
    """
    start = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield start, place
            start = place


def _rows(pfns: list[Pfn]) -> slice | list[Pfn]:
    """Return ``pfns``, which are sorted, as an index of frames: a slice where they lie together."""
    if pfns[-1] - pfns[0] == len(pfns) - 1:
        return slice(pfns[0], pfns[-1] + 1)
    return pfns
