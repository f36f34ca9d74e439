"""The page cache: which pagecache pages have a RAM frame now, and which goes when RAM is full.

A page is resident from its first touch until it is evicted, demoted or its file shrinks
(fs/frame_table.py keeps which are). A dirty page is written home before its frame is dropped; its
home was allocated with the first write, so the image has the room (the host may not, whose disk is
full, if the image file was made sparse again since).

A page is pinned if anybody but the cache and the model's PTEs refers to it: its refcount then
exceeds 1 + mapcount (rule R8). The model's PTEs of a victim are zapped through ``on_unmap``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from xipfs.clock import Clock
from xipfs.errors import FsError, OutOfFramesError
from xipfs.fs.dirty_frames import DirtyFrames
from xipfs.fs.frame_runs import rows, runs, write_runs
from xipfs.fs.frame_table import FILLED_BY_READ, FrameTable
from xipfs.fs.frames_by_page import Numbers, Pfns
from xipfs.image.layout import BLOCK_SHIFT
from xipfs.memory.frames import PhysicalMemory
from xipfs.memory.region import Medium
from xipfs.units import PAGE_SIZE, Ino, PageIndex, Pfn

PageHook = Callable[[Ino, PageIndex], None]
"""Called with the page concerned; must not call the filesystem back."""
RunHook = Callable[[Ino, PageIndex, int], None]
"""Called with the first of a run of pages and their count; must not call the filesystem back."""


Chooser = Callable[[int], Sequence[tuple[int, int]]]
"""Returns up to so many (inode, page) that shall go first; must not call the filesystem back."""


def nobody(_count: int) -> Sequence[tuple[int, int]]:
    """Have no opinion on which pages shall go."""
    return ()


def nothing(_ino: Ino, _index: PageIndex) -> None:
    """Do nothing: the hook until somebody needs one."""


def nothing_of_run(_ino: Ino, _index: PageIndex, _count: int) -> None:
    """Do nothing: the hook for runs until somebody needs one."""


#: How many evicted fills are remembered. They matter until the fault that caused the read is
#: charged, some milliseconds; far more reads than this do not happen in that time.
_EVICTED_FILLS_MAX: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """Pages evicted for want of RAM, filled from their homes, written to them; RAM over time."""

    evictions: int
    evictions_chosen: int
    """Those of them that the policy named; the others were the least recently used."""
    filled: int
    written_home: int
    ram_frame_ns: int
    """Nanoseconds for which frames were in use, summed over the frames."""


class PageCache:
    """All resident pages of all files; a page is named by its frame.

    ``on_unmap`` must zap every PTE of a run of pages; ``on_evict`` tells that a page's frame is
    gone, ``on_cut`` that a file lost its pages from an index on. ``choose_victims`` is asked which
    pages shall go before others when RAM is full.
    """

    def __init__(self, memory: PhysicalMemory, medium: Medium, clock: Clock) -> None:
        self._memory = memory
        self._medium = medium
        self._clock = clock
        self._frame_ns = 0
        self._counted_ns = clock.monotonic_ns()
        self._frames = FrameTable(memory.ram_pages)
        self._dirty = DirtyFrames(memory.ram_pages)
        self.on_unmap: RunHook = nothing_of_run
        self.on_evict: PageHook = nothing
        self.on_cut: PageHook = nothing
        self.choose_victims: Chooser = nobody
        self.evictions = self.evictions_chosen = 0
        self.filled = 0
        self.written_home = 0
        self._evicted_fills: OrderedDict[tuple[int, int], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._frames)

    def statistics(self) -> CacheStatistics:
        """Return the counts since the mount."""
        self._count_frames()
        return CacheStatistics(
            self.evictions, self.evictions_chosen, self.filled, self.written_home, self._frame_ns
        )

    def _count_frames(self) -> None:
        """Add what the resident pages have used since the last call; comes before each change."""
        now_ns = self._clock.monotonic_ns()
        self._frame_ns += len(self._frames) * (now_ns - self._counted_ns)
        self._counted_ns = now_ns

    def get(self, ino: int, index: int) -> Pfn | None:
        """Return the page's frame if it is resident; this is no touch."""
        return self._frames.find(ino, index)

    def get_run(self, ino: int, pages: Numbers) -> Pfns:
        """Return the frame of each of ``pages``, -1 where it is not resident."""
        return self._frames.find_run(ino, pages)

    def pages_of(self, ino: int) -> list[int]:
        """Return the numbers of the file's resident pages, in no particular order."""
        return self._frames.pages_of(ino)

    def files(self) -> list[Ino]:
        """Return the files that have resident pages."""
        return self._frames.files()

    def by_age(self) -> list[tuple[int, int, bool]]:
        """Return (inode, page, dirty) of all resident pages, the coldest first."""
        table = self._frames
        return [
            (table.ino[pfn], table.index[pfn], pfn in self._dirty)
            for pfn in table.by_age().tolist()
        ]

    def frames(self) -> list[Pfn]:
        """Return the frames of all resident pages."""
        return [Pfn(pfn) for pfn in self._frames.all().tolist()]

    def touch(self, pfn: Pfn) -> None:
        """Make the page the hottest."""
        self._frames.touch(pfn)

    def touch_run(self, pfns: Pfns) -> None:
        """Touch the pages in these frames in their order."""
        self._frames.touch_run(pfns)

    def admit(self, ino: int, index: int, home: int, *, load: bool) -> Pfn:
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
        self._frames.add(pfn, ino, index, home)
        return pfn

    def admit_run(self, ino: int, pages: Numbers, homes: Numbers) -> Pfns:
        """Give ``pages`` frames filled from ``homes``; return those of the first that got one.

        Fewer than asked for if the other frames are all pinned. No page of this call evicts
        another one of it, so there must not be more than there are frames.
        """
        assert pages.size <= self._memory.ram_pages, (pages.size, self._memory.ram_pages)
        if (short := pages.size - len(self._memory.ram_free)) > 0:
            self._evict(short)
        pfns = self._memory.alloc_ram_run(pages.size)
        homes = homes[: pfns.size]
        for start, stop in runs(homes):
            offset = int(homes[start]) << BLOCK_SHIFT
            source = np.frombuffer(
                self._medium.load(offset, (stop - start) * PAGE_SIZE), np.uint8
            ).reshape(-1, PAGE_SIZE)
            for part, which in rows(pfns[start:stop]):
                self._memory.ram_frames[which] = source[part]
        self._count_frames()
        self._frames.add_run(pfns, ino, pages[: pfns.size], homes)
        self.filled += pfns.size
        return pfns

    def bytes_of(self, pfn: Pfn) -> memoryview:
        """Return the frame's bytes, writable."""
        return self._memory.ram_bytes_of(pfn).data

    @property
    def nr_dirty(self) -> int:
        """How many resident pages differ from their homes, or may."""
        return len(self._dirty)

    def is_dirty(self, pfn: Pfn) -> bool:
        """Return whether the frame holds what its home may not."""
        return pfn in self._dirty

    def mark_dirty(self, pfn: Pfn) -> None:
        """Note that the frame holds what its home does not."""
        self._dirty.add(pfn, self._clock.monotonic_ns())

    def mark_filled(self, pfn: Pfn) -> None:
        """Note that a read filled the frame."""
        self._frames.flags[pfn] |= FILLED_BY_READ

    def take_fill_mark(self, pfn: Pfn) -> bool:
        """Return whether a read filled the frame and nobody asked since."""
        marked = self._frames.flags[pfn] & FILLED_BY_READ
        self._frames.flags[pfn] &= ~FILLED_BY_READ
        return bool(marked)

    def has_fill_mark(self, ino: int, index: int) -> bool:
        """Return whether a read filled the page, evicted since or not, and nobody asked."""
        pfn = self._frames.find(ino, index)
        filled = pfn is not None and bool(self._frames.flags[pfn] & FILLED_BY_READ)
        return filled or (ino, index) in self._evicted_fills

    def write_back(self, limit: int, *, older_ns: int = 0) -> int:
        """Write up to ``limit`` pages home, the longest dirty first; return how many.

        With ``older_ns`` only those that have been dirty for that long. They are flushed, and
        durable from the next fence on: whoever promises that, an fsync, makes one.
        """
        latest_ns = self._clock.monotonic_ns() - older_ns
        due = self._dirty.oldest(limit, latest_ns)
        self.write_home(due)
        return due.size

    def write_home(self, pfns: Pfns) -> None:
        """Store and flush the dirty ones of ``pfns``, run by run; durable with the next fence.

        Pages for which the medium has no room stay dirty; raise the first's FsError in the end.
        """
        if not self._dirty:
            return
        dirty, homes = self._frames.by_home(self._dirty.among(pfns))
        stored, failed = write_runs(self._medium, self._memory.ram_frames, dirty, homes)
        clean = dirty[stored]
        self._dirty.clear(clean)
        self.written_home += clean.size
        if failed is not None:
            raise failed

    def sync_file(self, ino: int) -> None:
        """Write the file's dirty pages home, durably, with all that was flushed before."""
        self.write_home(self._frames.of_file(ino))
        self._medium.fence()

    def sync_all(self) -> None:
        """Write all dirty pages home, durably, with all that was flushed before.

        A file that cannot keeps no other from it; raise the first one's FsError in the end.
        """
        failed: FsError | None = None
        for ino in self.files():
            try:
                self.write_home(self._frames.of_file(ino))
            except FsError as error:
                failed = failed or error
        self._medium.fence()
        if failed is not None:
            raise failed

    def take_evicted_fill(self, ino: int, index: int) -> bool:
        """Return whether a read filled the page, it was evicted, and nobody asked since."""
        if (ino, index) not in self._evicted_fills:
            return False
        del self._evicted_fills[ino, index]
        return True

    def unmap(self, ino: int, pages: Numbers) -> None:
        """Have the PTEs of ``pages``, which ascend, zapped."""
        for start, stop in runs(pages):
            self.on_unmap(Ino(ino), PageIndex(int(pages[start])), stop - start)

    def pinned(self, pfns: Pfns) -> np.typing.NDArray[np.bool_]:
        """Tell which of ``pfns``, unmapped before, somebody but the cache refers to."""
        held: np.typing.NDArray[np.bool_] = self._memory.refcount[pfns] != 1
        return held

    def is_pinned(self, pfn: Pfn) -> bool:
        """``pinned`` of one frame."""
        return self._memory.ref[pfn] != 1

    def drop_one(self, pfn: Pfn) -> None:
        """``drop`` of one page."""
        self._count_frames()
        if pfn in self._dirty:
            self._dirty.clear(np.array([pfn]))
        self._frames.remove(pfn)
        self._memory.put_page(pfn)

    def drop(self, pfns: Pfns) -> None:
        """Forget pages without writing them; a pinned frame lives on until it is unpinned."""
        if not pfns.size:
            return
        self._count_frames()
        self._dirty.clear(self._dirty.among(pfns))
        self._frames.remove_run(pfns)
        self._memory.put_ram_run(pfns)

    def cut_off(self, ino: int, first: int) -> Pfns:
        """Tell that the file loses its pages from ``first`` on; return their frames, to ``drop``.

        They are dropped when that is final: until then they may hold the only new bytes.
        """
        self.on_cut(Ino(ino), PageIndex(first))
        pages = np.array(sorted(index for index in self.pages_of(ino) if index >= first), np.int64)
        self.unmap(ino, pages)
        return self.get_run(ino, pages)

    def _evict(self, count: int) -> int:
        """Drop ``count`` pages that are not pinned; return how many.

        First those that ``choose_victims`` names, then the least recently used. Dirty ones are
        written home first. Pages met on the way become the hottest, pinned ones too, so the next
        search does not meet them again at once.
        """
        frames = self._frames
        victims: dict[Pfn, None] = {}
        for ino, index in self.choose_victims(count):
            pfn = frames.find(ino, index)
            if pfn is not None and pfn not in victims and len(victims) < count:
                frames.touch(pfn)
                if self._can_go(pfn):
                    victims[pfn] = None
        self.evictions_chosen += len(victims)
        for _ in range(len(frames)):
            if len(victims) == count:
                break
            pfn = frames.coldest()
            frames.touch(pfn)
            if pfn not in victims and self._can_go(pfn):
                victims[pfn] = None
        self._drop_victims(list(victims))
        return len(victims)

    def _can_go(self, pfn: Pfn) -> bool:
        """Return whether nobody but the cache refers to the frame, its PTEs zapped for that."""
        memory = self._memory
        if memory.ref[pfn] != 1 + memory.map[pfn]:
            return False
        self.on_unmap(Ino(self._frames.ino[pfn]), PageIndex(self._frames.index[pfn]), 1)
        return memory.ref[pfn] == 1

    def _drop_victims(self, victims: list[Pfn]) -> None:
        frames = self._frames
        gone = np.array(victims, np.int64)
        self.write_home(gone)
        pages = [
            (Ino(frames.ino[pfn]), PageIndex(frames.index[pfn]), frames.flags[pfn] & FILLED_BY_READ)
            for pfn in victims
        ]
        self.drop(gone)
        self.evictions += len(pages)
        for ino, index, filled_by_read in pages:
            if filled_by_read:
                self._evicted_fills[ino, index] = None
                if len(self._evicted_fills) > _EVICTED_FILLS_MAX:
                    self._evicted_fills.popitem(last=False)
            self.on_evict(ino, index)
