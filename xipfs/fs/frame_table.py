"""What each page-cache frame holds, and which was used longest ago.

By frame there are arrays, indexed by pfn: a run of pages costs a few array operations, a single
page a few elements. Where a file's pages lie is kept in fs/frames_by_page.py.

The order of touches is kept exactly (least recently used goes first), because "the coldest" is a
claim the statistics make. Each touch stamps the frame with the next of ever growing numbers. To
find the coldest, the oldest stamps are sorted out into a queue, a sixteenth of all frames at a
time: whatever is not in the queue is younger than all of it, and whatever was touched since has
another stamp than the queue says. So the search costs a constant a page, spread over the queue.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from xipfs.fs.frames_by_page import FramesByPage, Numbers, Pfns
from xipfs.units import Ino, Pfn

#: A read filled the frame, and the fault that caused the read was not charged yet.
FILLED_BY_READ: Final = 1

_COLD_MIN: Final = 256
_COLD_SHARE: Final = 16


class FrameTable:
    """The frames of one page cache. ``flags`` may be changed by whoever holds the table."""

    def __init__(self, ram_pages: int) -> None:
        # np.zeros maps zero pages lazily: frames never used cost the host nothing.
        self._ino = np.zeros(ram_pages, np.int64)
        self._index = np.zeros(ram_pages, np.int64)
        self._home = np.zeros(ram_pages, np.int64)
        self._stamp = np.zeros(ram_pages, np.int64)  # 0: the frame holds no page
        self._flags = np.zeros(ram_pages, np.uint8)
        # One element of a memoryview is several times faster than one of an array.
        self.ino, self.index, self.home = self._ino.data, self._index.data, self._home.data
        self.flags = self._flags.data
        self._stamps = self._stamp.data
        self._next_stamp = 1
        self._cold: list[tuple[int, int]] = []
        self._by_page = FramesByPage()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def find(self, ino: int, index: int) -> Pfn | None:
        """Return the frame that holds the page."""
        return self._by_page.find(ino, index)

    def find_run(self, ino: int, pages: Numbers) -> Pfns:
        """Return the frame of each of ``pages``, which ascend, -1 where none holds it."""
        return self._by_page.find_run(ino, pages)

    def of_file(self, ino: int) -> Pfns:
        """Return the frames of a file, in no particular order."""
        return self._by_page.of_file(ino)

    def pages_of(self, ino: int) -> list[int]:
        """Return the page numbers of a file that have frames, in no particular order."""
        pages: list[int] = self._index[self.of_file(ino)].tolist()
        return pages

    def files(self) -> list[Ino]:
        """Return the files that have frames."""
        return self._by_page.files()

    def all(self) -> Pfns:
        """Return every frame that holds a page."""
        return np.flatnonzero(self._stamp)

    def by_age(self) -> Pfns:
        """Return every frame that holds a page, the coldest first."""
        pfns = self.all()
        ordered: Pfns = pfns[np.argsort(self._stamp[pfns])]
        return ordered

    def by_home(self, pfns: Pfns) -> tuple[Pfns, Numbers]:
        """Return ``pfns`` in the order of their homes, and the homes."""
        homes = self._home[pfns]
        if homes.size > 1 and not (np.diff(homes) > 0).all():
            order = np.argsort(homes)
            pfns, homes = pfns[order], homes[order]
        return pfns, homes

    def touch(self, pfn: int) -> None:
        """Make the frame's page the hottest."""
        assert self._stamps[pfn], pfn
        self._stamps[pfn] = self._next_stamp
        self._next_stamp += 1

    def touch_run(self, pfns: Pfns) -> None:
        """``touch`` for each of ``pfns``, in their order; a frame may come more than once."""
        # Of several stamps for one frame numpy keeps the last.
        self._stamp[pfns] = np.arange(self._next_stamp, self._next_stamp + pfns.size)
        self._next_stamp += pfns.size

    def add(self, pfn: int, ino: int, index: int, home: int) -> None:
        """Note that the frame holds the page from now on, the hottest of all."""
        assert self._stamps[pfn] == 0, pfn
        self.ino[pfn], self.index[pfn], self.home[pfn] = ino, index, home
        self.flags[pfn] = 0
        self._stamps[pfn] = self._next_stamp
        self._next_stamp += 1
        self._by_page.put(ino, index, pfn)
        self._count += 1

    def add_run(self, pfns: Pfns, ino: int, pages: Numbers, homes: Numbers) -> None:
        """``add`` for many pages of one file, in their order."""
        count = pages.size
        if not count:
            return
        assert not self._stamp[pfns].any(), pfns
        self._ino[pfns], self._index[pfns], self._home[pfns] = ino, pages, homes
        self._flags[pfns] = 0
        self._stamp[pfns] = np.arange(self._next_stamp, self._next_stamp + count)
        self._next_stamp += count
        self._by_page.put_run(ino, pages, pfns)
        self._count += count

    def remove_run(self, pfns: Pfns) -> None:
        """Note that the frames hold no page any more."""
        owners = self._ino[pfns]
        one_file = bool(pfns.size) and bool((owners == owners[0]).all())
        for ino in [int(owners[0])] if one_file else sorted(set(owners.tolist())):
            pages = np.sort(self._index[pfns if one_file else pfns[owners == ino]])
            self._by_page.take_out_run(ino, pages)
        self._stamp[pfns] = 0
        self._flags[pfns] = 0
        self._count -= pfns.size

    def remove(self, pfn: int) -> None:
        """``remove_run`` of one frame."""
        self._by_page.take_out(self.ino[pfn], self.index[pfn])
        self._stamps[pfn] = 0
        self.flags[pfn] = 0
        self._count -= 1

    def coldest(self) -> Pfn:
        """Return the frame whose page was used longest ago; there must be one.

        The caller touches or removes it before the next call.
        """
        while True:
            if not self._cold:
                self._cold = self._sort_out()
            stamp, pfn = self._cold[-1]
            if self._stamps[pfn] == stamp:
                return Pfn(pfn)
            self._cold.pop()

    def _sort_out(self) -> list[tuple[int, int]]:
        """Return (stamp, pfn) of the oldest, the very oldest last."""
        used = self.all()
        assert used.size, "no frame holds a page"
        count = max(_COLD_MIN, used.size // _COLD_SHARE)
        stamps = self._stamp[used]
        if count < used.size:
            oldest = np.argpartition(stamps, count)[:count]
            used, stamps = used[oldest], stamps[oldest]
        order = np.argsort(stamps)[::-1]
        return list(zip(stamps[order].tolist(), used[order].tolist(), strict=True))
