"""The image's counters: one line of the state block, changed in the transaction they describe.

They are what statfs, the statistics and the allocator ask for, kept so that no mount ever scans.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Final

from xipfs.errors import ImageError
from xipfs.image import layout
from xipfs.image.metadata import Block, Metadata
from xipfs.image.superblock import Superblock

_OFFSET: Final = (layout.STATE_BLOCK << layout.BLOCK_SHIFT) + layout.COUNTERS_OFFSET


@dataclass(slots=True)
class Counters:
    """Free blocks, inode numbers and lists, and file pages by kind; holes count in neither."""

    free_blocks: int
    inode_limit: int
    free_ino: int
    orphan_ino: int
    nr_xip_pages: int
    nr_pagecache_pages: int
    inodes_used: int

    @classmethod
    def load(cls, block: Block) -> Counters:
        """Read the counters of the state block; raise ImageError if they are damaged."""
        crc, zero, *values = layout.COUNTERS.unpack_from(block, layout.COUNTERS_OFFSET)
        counters = cls(*values)
        if zero or counters.pack()[:4] != crc.to_bytes(4, "little"):
            raise ImageError(
                f"the counters at offset {_OFFSET} fail their checksum", remedy="run fsck.xipfs"
            )
        return counters

    def check_range(self, superblock: Superblock) -> None:
        """Raise ImageError if the image could not hold what is counted."""
        area = superblock.data_end - superblock.data_start
        limit = self.inode_limit
        if (
            max(self.free_blocks, self.nr_xip_pages, self.nr_pagecache_pages) > area
            or not layout.ROOT_INO < limit <= area * layout.INODES_PER_BLOCK
            or max(self.free_ino, self.orphan_ino, self.inodes_used) >= limit
        ):
            raise ImageError(
                f"the counters at offset {_OFFSET} count more than the image holds",
                remedy="run fsck.xipfs",
            )

    def reload(self, block: Block) -> None:
        """Go back to what the state block says."""
        _crc, _zero, *values = layout.COUNTERS.unpack_from(block, layout.COUNTERS_OFFSET)
        self.__init__(*values)  # type: ignore[misc]

    def pack(self) -> bytes:
        """Return the line's 64 bytes, checksum included; raise ImageError for what cannot be."""

        def pack(crc: int) -> bytes:
            return layout.COUNTERS.pack(
                crc,
                0,
                self.free_blocks,
                self.inode_limit,
                self.free_ino,
                self.orphan_ino,
                self.nr_xip_pages,
                self.nr_pagecache_pages,
                self.inodes_used,
            )

        try:
            return pack(zlib.crc32(pack(0)[4:]))
        except struct.error as error:
            raise self._wrong() from error

    def count_pages(self, *, xip: int = 0, pagecache: int = 0) -> None:
        """Add to the file pages by kind."""
        self.nr_xip_pages += xip
        self.nr_pagecache_pages += pagecache
        if self.nr_xip_pages < 0 or self.nr_pagecache_pages < 0:
            raise self._wrong()

    def stage(self, metadata: Metadata) -> None:
        """Put the counters into the open transaction."""
        metadata.write(layout.STATE_BLOCK, layout.COUNTERS_OFFSET, self.pack())

    @staticmethod
    def _wrong() -> ImageError:
        return ImageError(
            f"the counters at offset {_OFFSET} are wrong: one would leave its range",
            remedy="run fsck.xipfs",
        )
