"""An image opened: its parts joined, and the one way to change them, a transaction.

Opening reads the superblock, finishes the journal's pending transaction and loads one line of
counters. Nothing is scanned: the cost does not depend on the image's size or its number of files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from xipfs.errors import ImageError
from xipfs.image import layout
from xipfs.image.allocator import Allocator
from xipfs.image.counters import Counters
from xipfs.image.directory import Directories
from xipfs.image.filemap import FileMap
from xipfs.image.inodes import Inodes
from xipfs.image.journal import Journal
from xipfs.image.metadata import Metadata
from xipfs.image.record import Inode, pack_inode
from xipfs.image.superblock import Superblock, encode, load
from xipfs.image.xattrs import Xattrs
from xipfs.memory.overlaid import Overlaid
from xipfs.memory.region import Medium


class Volume:
    """One image's structures over one medium. A failed transaction leaves no trace in them.

    ``superblock`` is given for an image that is being made and has none on the medium yet.
    """

    def __init__(self, medium: Medium, name: str, superblock: Superblock | None = None) -> None:
        self.medium = medium
        self.superblock = superblock or load(medium, name)
        journal = Journal(medium, self.superblock)
        self.journal_capacity_bytes = journal.capacity_bytes
        self.was_clean = self._mount_flag(name) == layout.STATE_CLEAN
        if medium.writable:
            self.recovered_records = journal.recover()
        elif pending := journal.pending():
            self.recovered_records = len(pending)
            medium = self.medium = Overlaid(medium, pending)
        else:
            self.recovered_records = 0
        self._metadata = Metadata(medium, journal, self.superblock.block_count)
        self.counters = Counters.load(self._metadata.block(layout.STATE_BLOCK))
        if self.counters.inode_limit != layout.ROOT_INO:
            # mkfs opens the image before it has a root.
            self.counters.check_range(self.superblock)
        self.allocator = Allocator(medium, self._metadata, self.superblock, self.counters)
        self.maps = FileMap(self._metadata, self.allocator, self.superblock)
        self.inodes = Inodes(self._metadata, self.allocator, self.counters, self.maps)
        self.directories = Directories(
            self._metadata, self.allocator, self.maps, self.superblock.hash_key
        )
        self.xattrs = Xattrs(self._metadata, self.allocator, self.superblock)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes within are durable when it ends, or none of them if it raises."""
        self._metadata.begin()
        try:
            yield
            self.allocator.settle()
            self.counters.stage(self._metadata)
            self._metadata.commit()
            self.allocator.committed()
        except BaseException:
            self._metadata.abort()
            self.allocator.forget()
            self.inodes.forget()
            self.maps.forget()
            self.counters.reload(self._metadata.block(layout.STATE_BLOCK))
            raise

    def set_mounted(self, mounted: bool) -> None:
        """Store the mount flag: one word, durable when this returns."""
        offset = (layout.STATE_BLOCK << layout.BLOCK_SHIFT) + layout.MOUNT_FLAG_OFFSET
        self.medium.store_word(offset, layout.STATE_MOUNTED if mounted else layout.STATE_CLEAN)
        self.medium.flush(offset, 8)
        self.medium.fence()

    def _mount_flag(self, name: str) -> int:
        offset = (layout.STATE_BLOCK << layout.BLOCK_SHIFT) + layout.MOUNT_FLAG_OFFSET
        flag = int.from_bytes(self.medium.load(offset, 8), "little")
        if flag == layout.STATE_REPAIR:
            raise ImageError(
                f"{name}: a repair was interrupted (the flag at offset {offset} says)",
                remedy="run fsck.xipfs again",
            )
        if flag not in (layout.STATE_CLEAN, layout.STATE_MOUNTED):
            raise ImageError(
                f"{name}: the mount flag at offset {offset} is damaged", remedy="run fsck.xipfs"
            )
        return flag


def format_medium(medium: Medium, superblock: Superblock) -> None:
    """Write the structures of an empty image to a medium that holds zeros; ``publish`` comes last.

    Nothing is durable yet: the transaction that makes the root directory has the next fence.
    """
    first_bits = superblock.data_start
    bitmap = superblock.bitmap_start << layout.BLOCK_SHIFT
    head = ((1 << first_bits) - 1).to_bytes((first_bits + 7) // 8, "little")
    last_byte, last_bit = divmod(superblock.data_end, 8)
    tail_size = superblock.bitmap_blocks * layout.BLOCK_SIZE - last_byte
    # The last block is the second superblock; the bits behind it belong to no block.
    tail = (((1 << (tail_size * 8)) - 1) >> last_bit << last_bit).to_bytes(tail_size, "little")
    assert len(head) <= last_byte, superblock
    counters = Counters(
        free_blocks=superblock.data_end - superblock.data_start,
        inode_limit=layout.ROOT_INO,
        free_ino=0,
        orphan_ino=0,
        nr_xip_pages=0,
        nr_pagecache_pages=0,
        inodes_used=0,
    )
    state = layout.STATE_BLOCK << layout.BLOCK_SHIFT
    for offset, data in (
        (bitmap, head),
        (bitmap + last_byte, tail),
        (state + layout.COUNTERS_OFFSET, counters.pack()),
        (state + layout.TABLE_INODE_OFFSET, pack_inode(Inode(layout.TABLE_INO))),
        (state + layout.MOUNT_FLAG_OFFSET, layout.STATE_CLEAN.to_bytes(8, "little")),
    ):
        medium.store(offset, data)
        medium.flush(offset, len(data))


def publish(medium: Medium, superblock: Superblock) -> None:
    """Write both superblocks: with either of them the medium is an image, and a whole one."""
    for block in (superblock.data_end, layout.SUPERBLOCK_A):
        medium.store(block << layout.BLOCK_SHIFT, encode(superblock))
        medium.flush(block << layout.BLOCK_SHIFT, layout.BLOCK_SIZE)
    medium.fence()
