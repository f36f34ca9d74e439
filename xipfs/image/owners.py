"""Who owns the blocks that were met so far: a block met under a second inode is refused.

An entry's check tells a pointer that went astray, not one that was made to fit: the bitmap has no
check at all, and an image can come from anybody. So each block that is reached through an inode is
noted as that inode's, in 4 bytes of memory that the host gives out when they are first written.
Whatever is damaged, bytes are never served under two names in one mount, and no new bytes land in
a block that a file was seen to own. What was not met yet is not known: finding that is fsck's work.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from xipfs.errors import ImageError
from xipfs.image import layout

_MASK = (1 << 32) - 1


class Owners:
    """By block the inode number plus 1, modulo 2^32; 0 = not met."""

    def __init__(self, block_count: int) -> None:
        self._by_block: npt.NDArray[np.uint32] = np.zeros(block_count, np.uint32)
        # One element of a memoryview is several times faster than one of an array.
        self._fast = self._by_block.data

    def meet(self, ino: int, block: int) -> None:
        """Note that ``ino`` owns ``block``; raise ImageError if another inode does."""
        mine = (ino + 1) & _MASK
        if self._fast[block] != mine:
            if self._fast[block]:
                raise self._shared(ino, block)
            self._fast[block] = mine

    def meet_many(self, ino: int, blocks: npt.NDArray[np.uint64]) -> None:
        """``meet`` for many blocks at once."""
        mine = (ino + 1) & _MASK
        known = self._by_block[blocks]
        if (known == mine).all():
            return
        wrong = (known != mine) & (known != 0)
        if wrong.any():
            raise self._shared(ino, int(blocks[np.argmax(wrong)]))
        self._by_block[blocks] = mine

    def first_met(self, first: int, count: int) -> int | None:
        """Return the first of these blocks that somebody owns, or None."""
        met = np.flatnonzero(self._by_block[first : first + count])
        return first + int(met[0]) if met.size else None

    def forget(self, blocks: npt.NDArray[np.int64] | slice) -> None:
        """Nobody owns these blocks any more."""
        self._by_block[blocks] = 0

    def _shared(self, ino: int, block: int) -> ImageError:
        return ImageError(
            f"block {block} at offset {block << layout.BLOCK_SHIFT} belongs to inode {ino} and"
            f" to inode {self._fast[block] - 1}",
            remedy="run fsck.xipfs",
        )
