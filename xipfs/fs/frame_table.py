"""What each page-cache frame holds, where a file's pages lie, and which was used longest ago.

By frame there are arrays, indexed by pfn: a run of pages costs a few array operations, a single
page a few elements. By file there is one dictionary from page number to frame.

The order of touches is kept exactly (least recently used goes first), because "the coldest" is a
claim the statistics make. Each touch stamps the frame with the next of ever growing numbers. To
find the coldest, the oldest stamps are sorted out into a queue, a sixteenth of all frames at a
time: whatever is not in the queue is younger than all of it, and whatever was touched since has
another stamp than the queue says. So the search costs a constant a page, spread over the queue.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from xipfs.units import Ino, Pfn

Pfns = npt.NDArray[np.int64]

#: The frame holds what its home does not.
DIRTY: Final = 1
#: A read filled the frame, and the fault that caused the read was not charged yet.
FILLED_BY_READ: Final = 2

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
        self._by_file: dict[int, dict[int, int]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def find(self, ino: int, index: int) -> Pfn | None:
        """Return the frame that holds the page."""
        pages = self._by_file.get(ino)
        pfn = pages.get(index) if pages else None
        return None if pfn is None else Pfn(pfn)

    def find_run(self, ino: int, pages: list[int]) -> Pfns:
        """Return the frame of each of ``pages``, -1 where none holds it."""
        held = self._by_file.get(ino)
        if not held:
            return np.full(len(pages), -1, np.int64)
        return np.fromiter((held.get(index, -1) for index in pages), np.int64, len(pages))

    def of_file(self, ino: int) -> Pfns:
        """Return the frames of a file, in no particular order."""
        held = self._by_file.get(ino, {})
        return np.fromiter(held.values(), np.int64, len(held))

    def pages_of(self, ino: int) -> list[int]:
        """Return the page numbers of a file that have frames, in no particular order."""
        return list(self._by_file.get(ino, ()))

    def files(self) -> list[Ino]:
        """Return the files that have frames."""
        return [Ino(ino) for ino in self._by_file]

    def all(self) -> Pfns:
        """Return every frame that holds a page."""
        return np.flatnonzero(self._stamp)

    def by_age(self) -> Pfns:
        """Return every frame that holds a page, the coldest first."""
        pfns = self.all()
        ordered: Pfns = pfns[np.argsort(self._stamp[pfns])]
        return ordered

    def with_flag(self, pfns: Pfns, flag: int) -> Pfns:
        """Return those of ``pfns`` that have ``flag``."""
        flagged: Pfns = pfns[self._flags[pfns] & flag != 0]
        return flagged

    def by_home(self, pfns: Pfns) -> tuple[Pfns, npt.NDArray[np.int64]]:
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
        self._by_file.setdefault(ino, {})[index] = pfn
        self._count += 1

    def add_run(self, pfns: Pfns, ino: int, pages: list[int], homes: npt.NDArray[np.int64]) -> None:
        """``add`` for many pages of one file, in their order."""
        count = len(pages)
        if not count:
            return
        assert not self._stamp[pfns].any(), pfns
        self._ino[pfns], self._index[pfns], self._home[pfns] = ino, pages, homes
        self._flags[pfns] = 0
        self._stamp[pfns] = np.arange(self._next_stamp, self._next_stamp + count)
        self._next_stamp += count
        held = self._by_file.setdefault(ino, {})
        before = len(held)
        held.update(zip(pages, pfns.tolist(), strict=True))
        assert len(held) == before + count, (ino, pages)
        self._count += count

    def remove_run(self, pfns: Pfns) -> None:
        """Note that the frames hold no page any more."""
        owners = self._ino[pfns]
        for ino in np.unique(owners).tolist() if owners.size > 1 else owners.tolist():
            held = self._by_file[ino]
            for index in self._index[pfns[owners == ino]].tolist():
                del held[index]
            if not held:
                del self._by_file[ino]
        self._stamp[pfns] = 0
        self._flags[pfns] = 0
        self._count -= pfns.size

    def remove(self, pfn: int) -> None:
        """``remove_run`` of one frame."""
        held = self._by_file[self.ino[pfn]]
        del held[self.index[pfn]]
        if not held:
            del self._by_file[self.ino[pfn]]
        self._stamps[pfn] = 0
        self.flags[pfn] = 0
        self._count -= 1

    def clear_flag(self, pfns: Pfns, flag: int) -> None:
        """Take ``flag`` from the frames."""
        self._flags[pfns] &= np.uint8(0xFF ^ flag)

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
