"""Who owns the blocks that were met so far: a block met under a second inode is refused.

An entry's check tells a pointer that went astray, not one that was made to fit: the bitmap has no
check at all, and an image can come from anybody. So each block that is reached through an inode is
noted as that inode's, and one that was freed as nobody's until it is taken again. Whatever is
damaged, bytes are never served under two names in one mount, and no new bytes land in a block that
a file was seen to own. What was not met yet is not known: finding that is fsck's work.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from xipfs.errors import ImageError
from xipfs.image import layout

#: In place of an owner: the block was freed, so no inode may lead to it.
_NOBODY: Final = (1 << 32) - 1
#: Blocks of a stretch, whose 256 KiB of memory are taken when one of it is first met.
_SHIFT: Final = 16
_INSIDE: Final = (1 << _SHIFT) - 1


class Owners:
    """By block its owner as ``_mark`` has it, 0 = not met, or _NOBODY."""

    def __init__(self) -> None:
        self._stretches: dict[int, npt.NDArray[np.uint32]] = {}
        # One element of a memoryview is several times faster than one of an array.
        self._fast: dict[int, memoryview[int]] = {}

    def meet(self, ino: int, block: int) -> None:
        """Note that ``ino`` owns ``block``; raise ImageError if another inode or nobody does."""
        fast = self._fast.get(block >> _SHIFT)
        if fast is None:
            self._stretch(block >> _SHIFT)
            fast = self._fast[block >> _SHIFT]
        mine, at = _mark(ino), block & _INSIDE
        if fast[at] != mine:
            if fast[at]:
                raise _shared(ino, fast[at], block)
            fast[at] = mine

    def meet_many(self, ino: int, blocks: npt.NDArray[np.uint64]) -> None:
        """``meet`` for many blocks at once."""
        if not blocks.size:
            return
        low, high = int(blocks.min()) >> _SHIFT, int(blocks.max()) >> _SHIFT
        if low != high:
            parts = blocks >> np.uint64(_SHIFT)
            for number in set(parts.tolist()):
                self.meet_many(ino, blocks[parts == number])
            return
        mine, stretch = _mark(ino), self._stretch(low)
        at = blocks.astype(np.int64) & _INSIDE
        known = stretch[at]
        if (known == mine).all():
            return
        wrong = (known != mine) & (known != 0)
        if wrong.any():
            first = int(np.argmax(wrong))
            raise _shared(ino, int(known[first]), int(blocks[first]))
        stretch[at] = mine

    def first_met(self, first: int, count: int) -> int | None:
        """Return the first of these blocks that somebody owns, or None."""
        for number, start, stop in _pieces(first, count):
            stretch = self._stretches.get(number)
            if stretch is None:
                continue
            marks = stretch[start:stop]
            met = np.flatnonzero((marks != 0) & (marks != _NOBODY))
            if met.size:
                return (number << _SHIFT) + start + int(met[0])
        return None

    def take(self, first: int, count: int) -> None:
        """Whoever is met first owns each of these blocks."""
        for number, start, stop in _pieces(first, count):
            if number in self._stretches:
                self._stretches[number][start:stop] = 0

    def free(self, blocks: npt.NDArray[np.int64]) -> None:
        """Nobody owns these blocks any more."""
        numbers = blocks >> _SHIFT
        for number in np.unique(numbers).tolist():
            self._stretch(number)[blocks[numbers == number] & _INSIDE] = _NOBODY

    def _stretch(self, number: int) -> npt.NDArray[np.uint32]:
        stretch = self._stretches.get(number)
        if stretch is None:
            stretch = self._stretches[number] = np.zeros(1 << _SHIFT, np.uint32)
            self._fast[number] = stretch.data
        return stretch


def _pieces(first: int, count: int) -> list[tuple[int, int, int]]:
    """Return (stretch, start, stop) of each part of a run of blocks.

    >>> _pieces(65535, 2)
    [(0, 65535, 65536), (1, 0, 1)]
    """
    pieces = []
    while count:
        number, start = first >> _SHIFT, first & _INSIDE
        stop = min(start + count, 1 << _SHIFT)
        pieces.append((number, start, stop))
        first, count = first + stop - start, count - (stop - start)
    return pieces


def _mark(ino: int) -> int:
    return ino % (_NOBODY - 1) + 1


def _shared(ino: int, mark: int, block: int) -> ImageError:
    other = "was freed" if mark == _NOBODY else f"to inode {mark - 1}"
    return ImageError(
        f"block {block} at offset {block << layout.BLOCK_SHIFT} belongs to inode {ino} and {other}",
        remedy="run fsck.xipfs",
    )
