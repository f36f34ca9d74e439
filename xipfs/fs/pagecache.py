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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

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
        try:
            pfn = self._memory.alloc_ram()
        except OutOfFramesError:
            self._evict_coldest()
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

    def bytes_of(self, page: CachedPage) -> memoryview:
        """Return the frame's bytes, writable."""
        return self._memory.ram_bytes_of(page.pfn).data

    def write_home(self, page: CachedPage) -> None:
        """Store a dirty page to its home and flush it; the caller fences."""
        if page.dirty:
            offset = page.home << BLOCK_SHIFT
            self._medium.store(offset, self.bytes_of(page))
            self._medium.flush(offset, PAGE_SIZE)
            page.dirty = False
            self.written_home += 1

    def sync_file(self, ino: int) -> None:
        """Write the file's dirty pages home, durably."""
        for page in self._by_file.get(Ino(ino), {}).values():
            self.write_home(page)
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

    def _evict_coldest(self) -> None:
        """Drop the least recently used page that is not pinned; write it home first.

        Pinned pages met on the way become the hottest, so the next search does not meet them
        again at once.
        """
        memory = self._memory
        for _ in range(len(self._by_age)):
            page = next(iter(self._by_age.values()))
            pinned = memory.refcount[page.pfn] != 1 + memory.mapcount[page.pfn]
            if pinned or not self.unmap(page):
                self.touch(page)
                continue
            self.write_home(page)
            self._medium.fence()
            self.drop(page)
            if page.filled_by_read:
                self._evicted_fills[page.ino, page.index] = None
                if len(self._evicted_fills) > _EVICTED_FILLS_MAX:
                    self._evicted_fills.popitem(last=False)
            self.evictions += 1
            self.on_evict(page.ino, page.index)
            return
        raise OutOfFramesError(f"all {memory.ram_pages} page-cache frames are pinned")
