"""The image's counters: one line of the state block, changed in the transaction they describe.

They are what statfs, the statistics and the allocator ask for, kept so that no mount ever scans.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from xipfs.errors import ImageError
from xipfs.image import layout
from xipfs.image.metadata import Block, Metadata


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
            offset = (layout.STATE_BLOCK << layout.BLOCK_SHIFT) + layout.COUNTERS_OFFSET
            raise ImageError(
                f"the counters at offset {offset} fail their checksum", remedy="run fsck.xipfs"
            )
        return counters

    def reload(self, block: Block) -> None:
        """Go back to what the state block says."""
        _crc, _zero, *values = layout.COUNTERS.unpack_from(block, layout.COUNTERS_OFFSET)
        self.__init__(*values)  # type: ignore[misc]

    def pack(self) -> bytes:
        """Return the line's 64 bytes, checksum included."""

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

        return pack(zlib.crc32(pack(0)[4:]))

    def count_pages(self, *, xip: int = 0, pagecache: int = 0) -> None:
        """Add to the file pages by kind."""
        self.nr_xip_pages += xip
        self.nr_pagecache_pages += pagecache
        assert self.nr_xip_pages >= 0, self.nr_xip_pages
        assert self.nr_pagecache_pages >= 0, self.nr_pagecache_pages

    def stage(self, metadata: Metadata) -> None:
        """Put the counters into the open transaction."""
        metadata.write(layout.STATE_BLOCK, layout.COUNTERS_OFFSET, self.pack())
