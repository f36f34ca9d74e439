"""Which blocks are in use: a bitmap, searched next-fit a block of bits at a time.

Next-fit keeps a file that is written in one go in one run, so that a read of it is one view, and
spreads the wear. Where the host's disk has no room for the blocks it comes to, the search begins
anew at the front: what was used before has its room. Blocks freed by a transaction keep their bits
until it commits: were they handed out again within it, new bytes would land in a block that the old
tree still owns.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

from xipfs.errors import FsError, ImageError, NoBlocksError
from xipfs.image import layout
from xipfs.image.counters import Counters
from xipfs.image.metadata import Metadata
from xipfs.image.owners import Owners
from xipfs.image.superblock import Superblock
from xipfs.memory.region import Medium

_NOT_FULL: Final = re.compile(rb"[^\xff]")
#: Bytes of bitmap examined at once: 2 MiB worth of blocks.
_WINDOW: Final = 64

Run = tuple[int, int]
"""First block and number of blocks that follow one another."""


class Allocator:
    """Takes and returns blocks of the data area, within the open transaction."""

    def __init__(
        self, medium: Medium, metadata: Metadata, superblock: Superblock, counters: Counters
    ) -> None:
        self._medium = medium
        self._metadata = metadata
        self._superblock = superblock
        self._counters = counters
        self._cursor = superblock.data_start
        self._freed: list[int] = []
        self._taken: list[Run] = []
        self.owners = Owners()

    @property
    def free_blocks(self) -> int:
        """How many blocks the open transaction can still take."""
        return self._counters.free_blocks

    def allocate(self, count: int) -> list[Run]:
        """Mark ``count`` blocks used and return them as runs.

        The blocks hold whatever they held: the caller fills them before the commit links them.
        Raises NoBlocksError, or what ``Medium.reserve`` raises but for ENOSPC.
        """
        assert self._metadata.in_transaction
        if count > self._counters.free_blocks:
            raise NoBlocksError
        runs: list[Run] = []
        # The counter promised them: freed in this very transaction, or the image is damaged.
        lacking: FsError = NoBlocksError()
        missing = count
        position = self._cursor
        # One pass from the cursor to the end, one from the start up to where the first began.
        for start, end in (
            (position, self._superblock.data_end),
            (self._superblock.data_start, position),
        ):
            position = start
            while missing and position < end:
                try:
                    taken, position = self._take(position, end, missing)
                except FsError as error:
                    lacking = NoBlocksError(str(error)) if error.errno == errno.ENOSPC else error
                    break
                for run in taken:
                    missing -= run[1]
                    if runs and runs[-1][0] + runs[-1][1] == run[0]:
                        runs[-1] = (runs[-1][0], runs[-1][1] + run[1])
                    else:
                        runs.append(run)
        if missing:
            raise lacking
        for first, length in runs:
            if (block := self.owners.first_met(first, length)) is not None:
                raise self._damaged(block)
        for first, length in runs:
            self.owners.take(first, length)
        self._taken += runs
        self._counters.free_blocks -= count
        self._cursor = runs[-1][0] + runs[-1][1] if runs else self._cursor
        return runs

    def allocate_block(self) -> int:
        """Take a single block."""
        return self.allocate(1)[0][0]

    def free(self, blocks: Iterable[int]) -> None:
        """Return blocks when the open transaction commits."""
        assert self._metadata.in_transaction
        for block in blocks:
            if not self._superblock.data_start <= block < self._superblock.data_end:
                offset = block << layout.BLOCK_SHIFT
                raise ImageError(
                    f"block {block} at offset {offset} is not in the data area",
                    remedy="run fsck.xipfs",
                )
            self._metadata.discard(block)
            self._freed.append(block)

    def settle(self) -> None:
        """Clear the bits of what the transaction freed: the last thing before its commit."""
        if not self._freed:
            return
        blocks = np.unique(np.array(self._freed, np.int64))
        if blocks.size != len(self._freed):
            twice = int(blocks[np.argmax(np.unique(self._freed, return_counts=True)[1])])
            raise ImageError(
                f"block {twice} at offset {twice << layout.BLOCK_SHIFT} is owned twice",
                remedy="run fsck.xipfs",
            )
        for bitmap_block in np.unique(blocks // layout.BITS_PER_BLOCK):
            self._clear(int(bitmap_block), blocks)
        self._counters.free_blocks += len(self._freed)

    def committed(self) -> None:
        """What the transaction took is taken, and what it freed is nobody's."""
        if self._freed:
            self.owners.free(np.array(self._freed, np.int64))
            self._freed.clear()
        self._taken.clear()

    def forget(self) -> None:
        """Drop what an aborted transaction took and freed."""
        for first, count in self._taken:
            self.owners.free(np.arange(first, first + count))
        self._taken.clear()
        self._freed.clear()

    def _clear(self, bitmap_block: int, blocks: npt.NDArray[np.int64]) -> None:
        number = self._superblock.bitmap_start + bitmap_block
        base = bitmap_block * layout.BITS_PER_BLOCK
        mine = blocks[blocks // layout.BITS_PER_BLOCK == bitmap_block] % layout.BITS_PER_BLOCK
        bitmap = np.frombuffer(self._metadata.block(number), np.uint8)
        for line in np.unique(mine // 512):
            inside = mine[mine // 512 == line] % 512
            bits = np.unpackbits(bitmap[line * 64 : line * 64 + 64], bitorder="little")
            if not bits[inside].all():
                wrong = int(inside[bits[inside] == 0][0])
                raise self._damaged(base + int(line) * 512 + wrong)
            bits[inside] = 0
            packed = np.packbits(bits, bitorder="little").tobytes()
            self._metadata.write(number, int(line) * 64, packed)

    def _damaged(self, block: int) -> ImageError:
        offset = (self._superblock.bitmap_start << layout.BLOCK_SHIFT) + block // 8
        return ImageError(
            f"the bitmap at offset {offset} says that block {block} is free, which is in use",
            remedy="run fsck.xipfs",
        )

    def _take(self, position: int, end: int, missing: int) -> tuple[list[Run], int]:
        """Take up to ``missing`` blocks from one window at or after ``position``.

        Return the runs and where to go on. Blocks outside [position, end) are never taken.
        Raises FsError, and takes none, if the medium has no room for them.
        """
        bitmap_block, bit = divmod(position, layout.BITS_PER_BLOCK)
        base = bitmap_block * layout.BITS_PER_BLOCK
        number = self._superblock.bitmap_start + bitmap_block
        bitmap = self._metadata.block(number)
        found = _NOT_FULL.search(bitmap, bit // 8)
        if found is None:
            return [], base + layout.BITS_PER_BLOCK
        first_byte = found.start()
        size = min(max(_WINDOW, missing // 8 + 1), layout.BLOCK_SIZE - first_byte)
        window = np.frombuffer(bitmap, np.uint8, size, first_byte)
        bits = np.unpackbits(window, bitorder="little")
        free = np.flatnonzero(bits == 0) + (base + first_byte * 8)
        free = free[(free >= position) & (free < end)][:missing]
        following = base + (first_byte + size) * 8
        if free.size == 0:
            return [], following
        bits[free - (base + first_byte * 8)] = 1
        low = (int(free[0]) - base) // 8
        high = (int(free[-1]) - base) // 8 + 1
        packed = np.packbits(bits, bitorder="little")[low - first_byte : high - first_byte]
        breaks = np.flatnonzero(np.diff(free) != 1) + 1
        starts = free[np.concatenate(([0], breaks))]
        lengths = np.diff(np.concatenate(([0], breaks, [free.size])))
        runs = [(int(start), int(length)) for start, length in zip(starts, lengths, strict=True)]
        for first, count in runs:
            self._medium.reserve(first << layout.BLOCK_SHIFT, count << layout.BLOCK_SHIFT)
        self._metadata.write(number, low, packed.tobytes())
        return runs, following
