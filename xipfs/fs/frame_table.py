"""What each page-cache frame holds, where a file's pages lie, and which was used longest ago.

By frame there are arrays, indexed by pfn: a run of pages costs a few array operations, a single
page a few elements. By file there are arrays too, one for each stretch of 64 pages some of which
have frames (256 bytes).

The order of touches is kept exactly (least recently used goes first), because "the coldest" is a
claim the statistics make. Each touch stamps the frame with the next of ever growing numbers. To
find the coldest, the oldest stamps are sorted out into a queue, a sixteenth of all frames at a
time: whatever is not in the queue is younger than all of it, and whatever was touched since has
another stamp than the queue says. So the search costs a constant a page, spread over the queue.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from xipfs.units import Ino, Pfn

Numbers = npt.NDArray[np.int64]
Pfns = Numbers

#: The frame holds what its home does not.
DIRTY: Final = 1
#: A read filled the frame, and the fault that caused the read was not charged yet.
FILLED_BY_READ: Final = 2

#: Pages of a stretch, as a power of two.
_SHIFT: Final = 6
_MASK: Final = (1 << _SHIFT) - 1
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
        #: By file and number of the stretch: the pfn of each page, 1 added; 0 where it has none.
        self._by_file: dict[int, dict[int, npt.NDArray[np.int32]]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def find(self, ino: int, index: int) -> Pfn | None:
        """Return the frame that holds the page."""
        stretches = self._by_file.get(ino)
        stretch = None if stretches is None else stretches.get(index >> _SHIFT)
        pfn = 0 if stretch is None else int(stretch[index & _MASK])
        return Pfn(pfn - 1) if pfn else None

    def find_run(self, ino: int, pages: Numbers) -> Pfns:
        """Return the frame of each of ``pages``, -1 where none holds it."""
        pfns = np.full(pages.size, -1, np.int64)
        stretches = self._by_file.get(ino, {})
        for number, at, where in _stretches(pages):
            stretch = stretches.get(number)
            if stretch is not None:
                pfns[at] = stretch[where] - 1
        return pfns

    def of_file(self, ino: int) -> Pfns:
        """Return the frames of a file, in no particular order."""
        stretches = self._by_file.get(ino)
        if not stretches:
            return np.zeros(0, np.int64)
        pfns = np.concatenate(list(stretches.values()))
        held: Pfns = pfns[pfns != 0].astype(np.int64) - 1
        return held

    def pages_of(self, ino: int) -> list[int]:
        """Return the page numbers of a file that have frames, in no particular order."""
        pages: list[int] = self._index[self.of_file(ino)].tolist()
        return pages

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
        self._stretch(ino, index >> _SHIFT)[index & _MASK] = pfn + 1
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
        for number, at, where in _stretches(pages):
            stretch = self._stretch(ino, number)
            assert not stretch[where].any(), (ino, number)
            stretch[where] = pfns[at] + 1
        self._count += count

    def _stretch(self, ino: int, number: int) -> npt.NDArray[np.int32]:
        stretches = self._by_file.setdefault(ino, {})
        stretch = stretches.get(number)
        if stretch is None:
            stretch = stretches[number] = np.zeros(_MASK + 1, np.int32)
        return stretch

    def remove_run(self, pfns: Pfns) -> None:
        """Note that the frames hold no page any more."""
        owners = self._ino[pfns]
        one_file = bool(pfns.size) and bool((owners == owners[0]).all())
        for ino in [int(owners[0])] if one_file else sorted(set(owners.tolist())):
            pages = np.sort(self._index[pfns if one_file else pfns[owners == ino]])
            for number, _, where in _stretches(pages):
                self._clear(ino, number, where)
        self._stamp[pfns] = 0
        self._flags[pfns] = 0
        self._count -= pfns.size

    def remove(self, pfn: int) -> None:
        """``remove_run`` of one frame."""
        index = self.index[pfn]
        self._clear(self.ino[pfn], index >> _SHIFT, index & _MASK)
        self._stamps[pfn] = 0
        self.flags[pfn] = 0
        self._count -= 1

    def _clear(self, ino: int, number: int, where: int | slice | Numbers) -> None:
        """Take pages out of a stretch, and that out of its file when it is empty."""
        stretches = self._by_file[ino]
        stretch = stretches[number]
        stretch[where] = 0
        if not stretch.any():
            del stretches[number]
            if not stretches:
                del self._by_file[ino]

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


def _stretches(pages: Numbers) -> Iterator[tuple[int, slice, slice | Numbers]]:
    """Yield for each stretch of ``pages``, which ascend: its number, which of them, its places."""
    if not pages.size:
        return
    first, last = int(pages[0]), int(pages[-1])
    if last - first == pages.size - 1:
        for number in range(first >> _SHIFT, (last >> _SHIFT) + 1):
            low, high = max(first, number << _SHIFT), min(last, number << _SHIFT | _MASK) + 1
            where = slice(low & _MASK, (low & _MASK) + high - low)
            yield number, slice(low - first, high - first), where
        return
    numbers = pages >> _SHIFT
    cuts = (numbers[1:] != numbers[:-1]).nonzero()[0] + 1
    for start, stop in pairwise([0, *cuts.tolist(), pages.size]):
        yield int(numbers[start]), slice(start, stop), pages[start:stop] & _MASK
