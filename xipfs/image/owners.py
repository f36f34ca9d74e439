"""Who owns the blocks that were met so far: a block met under a second inode is refused.

An entry's check tells a pointer that went astray, not one that was made to fit: the bitmap has no
check at all, and an image can come from anybody. So each block that is reached through an inode is
noted as that inode's. Whatever is damaged, bytes are never served under two names in one mount, and
no new bytes land in a block that a file was seen to own. What was not met yet is not known: finding
that is fsck's work.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from xipfs.errors import ImageError
from xipfs.image import layout

_MASK: Final = (1 << 32) - 1
#: Blocks of a stretch, whose 256 KiB of memory are taken when one of it is first met.
_SHIFT: Final = 16
_INSIDE: Final = (1 << _SHIFT) - 1


class Owners:
    """By block the inode number plus 1, modulo 2^32; 0 = not met."""

    def __init__(self) -> None:
        self._stretches: dict[int, npt.NDArray[np.uint32]] = {}
        # One element of a memoryview is several times faster than one of an array.
        self._fast: dict[int, memoryview[int]] = {}

    def meet(self, ino: int, block: int) -> None:
        """Note that ``ino`` owns ``block``; raise ImageError if another inode does."""
        fast = self._fast.get(block >> _SHIFT)
        if fast is None:
            self._stretch(block >> _SHIFT)
            fast = self._fast[block >> _SHIFT]
        mine, at = (ino + 1) & _MASK, block & _INSIDE
        if fast[at] != mine:
            if fast[at]:
                raise _shared(ino, fast[at] - 1, block)
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
        mine, stretch = (ino + 1) & _MASK, self._stretch(low)
        at = blocks.astype(np.int64) & _INSIDE
        known = stretch[at]
        if (known == mine).all():
            return
        wrong = (known != mine) & (known != 0)
        if wrong.any():
            first = int(np.argmax(wrong))
            raise _shared(ino, int(known[first]) - 1, int(blocks[first]))
        stretch[at] = mine

    def first_met(self, first: int, count: int) -> int | None:
        """Return the first of these blocks that somebody owns, or None."""
        for number, start, stop in _pieces(first, count):
            stretch = self._stretches.get(number)
            if stretch is None:
                continue
            met = np.flatnonzero(stretch[start:stop])
            if met.size:
                return (number << _SHIFT) + start + int(met[0])
        return None

    def forget(self, first: int, count: int = 1) -> None:
        """Nobody owns these blocks any more."""
        for number, start, stop in _pieces(first, count):
            stretch = self._stretches.get(number)
            if stretch is not None:
                stretch[start:stop] = 0

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


def _shared(ino: int, other: int, block: int) -> ImageError:
    return ImageError(
        f"block {block} at offset {block << layout.BLOCK_SHIFT} belongs to inode {ino} and to"
        f" inode {other}",
        remedy="run fsck.xipfs",
    )
