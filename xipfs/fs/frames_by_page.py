"""Which frame holds a page of a file, found by file and page number.

By file there are stretches of 64 pages, some of which have frames. All stretches lie in one array,
so that a run of pages is found, entered and taken out by a few array operations, however many
stretches it spans (an array for each would cost a call for each).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from xipfs.units import Ino, Pfn

Numbers = npt.NDArray[np.int64]
Pfns = Numbers

#: Pages of a stretch, as a power of two.
_SHIFT: Final = 6
_MASK: Final = (1 << _SHIFT) - 1
_INSIDE: Final = np.arange(1 << _SHIFT)
#: The slot that stands for every stretch that is not there: none of its pages has a frame.
_NONE: Final = 0
_SLOTS_MIN: Final = 64


class FramesByPage:
    """The pfn of each page that has a frame: 256 bytes for a stretch, at most twice that."""

    def __init__(self) -> None:
        #: By file, and number of the stretch: the stretch's slot, its row of ``_table``.
        self._slots: dict[int, dict[int, int]] = {}
        self._free: list[int] = []
        #: The pfns, 1 added; 0: the page has no frame.
        self._table = np.zeros((0, 1 << _SHIFT), np.int32)
        self._grow()
        self._free.remove(_NONE)

    def _grow(self) -> None:
        old = len(self._table)
        more = np.zeros((max(old, _SLOTS_MIN), 1 << _SHIFT), np.int32)
        self._table = np.concatenate([self._table, more])
        self._cells = self._table.reshape(-1)
        # One element of a memoryview is several times faster than one of an array.
        self._fast = self._cells.data
        self._free = list(range(len(self._table) - 1, old - 1, -1))

    def find(self, ino: int, index: int) -> Pfn | None:
        """Return the frame that holds the page."""
        stretches = self._slots.get(ino)
        if stretches is None:
            return None
        slot = stretches.get(index >> _SHIFT, _NONE)
        pfn = self._fast[slot << _SHIFT | index & _MASK]
        return Pfn(pfn - 1) if pfn else None

    def find_run(self, ino: int, pages: Numbers) -> Pfns:
        """Return the frame of each of ``pages``, which ascend, -1 where none holds it."""
        stretches = self._slots.get(ino)
        if stretches is None or not pages.size:
            return np.full(pages.size, -1, np.int64)
        cells = _cells_of(pages, lambda number: stretches.get(number, _NONE))
        return self._cells[cells].astype(np.int64) - 1

    def of_file(self, ino: int) -> Pfns:
        """Return the frames of a file, in no particular order."""
        slots = list(self._slots.get(ino, {}).values())
        pfns = self._table[slots]
        held: Pfns = pfns[pfns != 0].astype(np.int64) - 1
        return held

    def files(self) -> list[Ino]:
        """Return the files that have frames."""
        return [Ino(ino) for ino in self._slots]

    def put(self, ino: int, index: int, pfn: int) -> None:
        """Note that the frame holds the page."""
        slot = self._slot(self._slots.setdefault(ino, {}), index >> _SHIFT)
        self._fast[slot << _SHIFT | index & _MASK] = pfn + 1

    def put_run(self, ino: int, pages: Numbers, pfns: Pfns) -> None:
        """``put`` for ``pages``, at least one, which ascend and have no frames."""
        stretches = self._slots.setdefault(ino, {})
        cells = _cells_of(pages, lambda number: self._slot(stretches, number))
        assert not self._cells[cells].any(), ino
        self._cells[cells] = pfns + 1

    def _slot(self, stretches: dict[int, int], number: int) -> int:
        """Return the slot of a stretch, which is made if it is not there."""
        slot = stretches.get(number)
        if slot is None:
            if not self._free:
                self._grow()
            slot = stretches[number] = self._free.pop()
        return slot

    def take_out(self, ino: int, index: int) -> None:
        """Note that the page has no frame any more."""
        slot = self._slots[ino][index >> _SHIFT]
        self._fast[slot << _SHIFT | index & _MASK] = 0
        if not self._table[slot].any():
            self._give_back(ino, index >> _SHIFT)

    def take_out_run(self, ino: int, pages: Numbers) -> None:
        """``take_out`` for ``pages``, at least one, which ascend."""
        stretches = self._slots[ino]
        self._cells[_cells_of(pages, stretches.__getitem__)] = 0
        self._free_empty(ino, _stretches_of(pages))

    def _free_empty(self, ino: int, numbers: Sequence[int]) -> None:
        """Give back those of a file's stretches ``numbers`` none of whose pages has a frame."""
        stretches = self._slots[ino]
        held = np.any(self._table[[stretches[number] for number in numbers]], axis=1)
        for number, some in zip(numbers, held.tolist(), strict=True):
            if not some:
                self._give_back(ino, number)

    def _give_back(self, ino: int, number: int) -> None:
        """Give back an empty stretch."""
        stretches = self._slots[ino]
        self._free.append(stretches.pop(number))
        if not stretches:
            del self._slots[ino]


def _stretches_of(pages: Numbers) -> Sequence[int]:
    """Return the numbers of the stretches that ``pages``, which ascend, lie in; each once."""
    first, last = int(pages[0]), int(pages[-1])
    if last - first == pages.size - 1:
        return range(first >> _SHIFT, (last >> _SHIFT) + 1)
    numbers: list[int] = np.unique(pages >> _SHIFT).tolist()
    return numbers


def _cells_of(pages: Numbers, slot_of: Callable[[int], int]) -> Numbers:
    """Return where in the table the pfn of each of ``pages``, which ascend, stands."""
    numbers = _stretches_of(pages)
    bases = np.array([slot_of(number) << _SHIFT for number in numbers], np.int64)
    if isinstance(numbers, range):
        start = int(pages[0]) & _MASK
        return (bases[:, None] + _INSIDE).reshape(-1)[start : start + pages.size]
    which = np.searchsorted(np.fromiter(numbers, np.int64, bases.size), pages >> _SHIFT)
    cells: Numbers = bases[which] + (pages & _MASK)
    return cells
