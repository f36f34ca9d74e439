"""Inodes: fixed records in a table that is a file of its own and grows with the demand.

The table's own inode is number 0 and lives in the state block; all others live in the table, 32 a
block. A freed record goes on a list and keeps its generation, so that a number used again is not
taken for the file it was before. Orphans (unlinked, still held by someone) are on a second,
doubly linked list: after a crash it says what is left to free.
"""

from __future__ import annotations

import errno
from typing import Final

from xipfs.errors import FsError, ImageError
from xipfs.image import layout
from xipfs.image.allocator import Allocator
from xipfs.image.counters import Counters
from xipfs.image.filemap import FileMap
from xipfs.image.metadata import Metadata
from xipfs.image.record import Inode, pack_inode, unpack_inode

_TABLE_OFFSET: Final = (layout.STATE_BLOCK << layout.BLOCK_SHIFT) + layout.TABLE_INODE_OFFSET


class Inodes:
    """Reads, writes, takes and returns inode records."""

    def __init__(
        self, metadata: Metadata, allocator: Allocator, counters: Counters, maps: FileMap
    ) -> None:
        self._metadata = metadata
        self._allocator = allocator
        self._counters = counters
        self._maps = maps
        # Table blocks never move and are never freed: at most one entry for each block touched.
        self._table: dict[int, int] = {}

    def forget(self) -> None:
        """Drop what an aborted transaction may have added to the table."""
        self._table.clear()

    def table(self) -> Inode:
        """Return the inode table's own inode."""
        block = self._metadata.block(layout.STATE_BLOCK)
        return unpack_inode(layout.TABLE_INO, block, layout.STATE_BLOCK, layout.TABLE_INODE_OFFSET)

    def get(self, ino: int) -> Inode:
        """Return inode ``ino``, in use; raise FsError(ENOENT) if it is free or never was."""
        inode = self.raw(ino)
        if inode.mode == 0:
            raise FsError(errno.ENOENT, f"inode {ino} is not in use")
        return inode

    def raw(self, ino: int) -> Inode:
        """Return inode ``ino``'s record, in use or free."""
        if not layout.ROOT_INO <= ino < self._counters.inode_limit:
            raise FsError(errno.ENOENT, f"there is no inode {ino}")
        block, offset = self._place(ino)
        return unpack_inode(ino, self._metadata.block(block), block, offset)

    def listed(self, title: str, ino: int) -> Inode:
        """Return the record of an inode that the free or the orphan list leads to."""
        if not layout.ROOT_INO < ino < self._counters.inode_limit:
            raise _misled(title, ino)
        return self.raw(ino)

    def put(self, inode: Inode) -> None:
        """Stage ``inode``'s record in the open transaction."""
        if inode.ino == layout.TABLE_INO:
            block, offset = layout.STATE_BLOCK, layout.TABLE_INODE_OFFSET
        else:
            block, offset = self._place(inode.ino)
        record = pack_inode(inode)
        # Line by line: most changes (times, size) leave the second line as it was.
        self._metadata.write(block, offset, record[:64])
        self._metadata.write(block, offset + 64, record[64:])

    def create(self) -> Inode:
        """Take a free inode (its fields zero but number and generation); grow the table if none.

        Raise FsError(ENOSPC) when the table cannot grow.
        """
        counters = self._counters
        counters.inodes_used += 1
        if counters.free_ino:
            old = self.listed("free", counters.free_ino)
            if old.mode:
                raise _misled("free", old.ino)
            counters.free_ino = old.next_ino
            return Inode(ino=old.ino, generation=(old.generation + 1) & 0xFFFFFFFF)
        ino = counters.inode_limit
        page = ino // layout.INODES_PER_BLOCK
        if page * layout.BLOCK_SIZE >= self.table().size_bytes:
            self._grow(page)
        counters.inode_limit += 1
        return Inode(ino=ino, generation=1)

    def release(self, inode: Inode) -> None:
        """Put an inode that owns nothing any more on the free list."""
        assert inode.nlink == 0, inode
        if inode.blocks or inode.ino == layout.ROOT_INO:
            raise ImageError(
                f"inode {inode.ino} at offset {inode.record_offset} is to be freed and is the"
                f" root or counts {inode.blocks} blocks that its map does not have",
                remedy="run fsck.xipfs",
            )
        self._counters.inodes_used -= 1
        free = Inode(ino=inode.ino, generation=inode.generation, next_ino=self._counters.free_ino)
        self._counters.free_ino = inode.ino
        self.put(free)

    def orphan(self, inode: Inode) -> None:
        """Put ``inode`` on the list of what is to be freed once nobody holds it."""
        if inode.orphan:
            raise ImageError(
                f"inode {inode.ino} at offset {inode.record_offset} is an orphan and has names",
                remedy="run fsck.xipfs",
            )
        head = self._counters.orphan_ino
        if head:
            following = self.listed("orphan", head)
            following.previous_ino = inode.ino
            self.put(following)
        inode.next_ino, inode.previous_ino, inode.orphan = head, 0, True
        self._counters.orphan_ino = inode.ino
        self.put(inode)

    def adopt(self, inode: Inode) -> None:
        """Take ``inode`` off the orphan list; the caller puts or releases it."""
        assert inode.orphan, inode
        if inode.next_ino:
            following = self.listed("orphan", inode.next_ino)
            following.previous_ino = inode.previous_ino
            self.put(following)
        if inode.previous_ino:
            before = self.listed("orphan", inode.previous_ino)
            before.next_ino = inode.next_ino
            self.put(before)
        else:
            self._counters.orphan_ino = inode.next_ino
        inode.next_ino = inode.previous_ino = 0
        inode.orphan = False

    def _grow(self, table_page: int) -> None:
        block = self._allocator.allocate_block()
        self._metadata.fresh(block)
        table = self.table()
        self._maps.assign_one(table, table_page, self._maps.raw_home(block))
        table.blocks += 1
        table.size_bytes += layout.BLOCK_SIZE
        self.put(table)

    def _place(self, ino: int) -> tuple[int, int]:
        """Return the block that the inode's record lies in, and where in it."""
        page, slot = ino // layout.INODES_PER_BLOCK, ino % layout.INODES_PER_BLOCK
        block = self._table.get(page)
        if block is None:
            entry = self._maps.entry(self.table(), page)
            if entry == 0:
                raise ImageError(
                    f"the inode table, whose inode lies at offset {_TABLE_OFFSET}, lacks page"
                    f" {page}",
                    remedy="run fsck.xipfs",
                )
            block = self._table[page] = entry & layout.ENTRY_BLOCK_MASK
        return block, slot * layout.INODE_SIZE


def _misled(title: str, ino: int) -> ImageError:
    """Return the error for a list that leads to an inode which cannot be on it."""
    offset = (layout.STATE_BLOCK << layout.BLOCK_SHIFT) + layout.COUNTERS_OFFSET
    return ImageError(
        f"the {title} list, which starts at offset {offset}, leads to inode {ino}, which is none",
        remedy="run fsck.xipfs",
    )
