"""Extended attributes: one block an inode, rewritten whole with every change.

Like ext4 without large values: names and values of one inode share one block, and what does not
fit is refused with ENOSPC. That bounds what a change writes.
"""

from __future__ import annotations

import errno
import zlib
from typing import Final

from xipfs.errors import FsError, ImageError
from xipfs.image import layout
from xipfs.image.allocator import Allocator
from xipfs.image.filemap import FileMap, seal
from xipfs.image.metadata import Metadata
from xipfs.image.record import Inode
from xipfs.image.superblock import Superblock

_HEADER: Final = layout.XATTR_HEADER.size
#: The pointer's place in the entry check: no map has a level 7.
_LEVEL: Final = 7
#: How every name begins. POSIX ACLs (system.*) would have to be enforced, not only kept.
NAMESPACES: Final = (b"user.", b"trusted.", b"security.")


def pack_xattrs(ino: int, attributes: dict[bytes, bytes]) -> bytes:
    """Return the used bytes of a block that holds these attributes."""
    body = b"".join(
        layout.XATTR_RECORD.pack(len(name), len(value)) + name + value
        for name, value in attributes.items()
    )
    rest = layout.XATTR_HEADER.pack(0, len(attributes), _HEADER + len(body), ino)[4:] + body
    return zlib.crc32(rest).to_bytes(4, "little") + rest


class Xattrs:
    """Reads and writes an inode's attributes; the caller puts the inode."""

    def __init__(self, metadata: Metadata, allocator: Allocator, superblock: Superblock) -> None:
        self._metadata = metadata
        self._allocator = allocator
        self._superblock = superblock

    def load(self, inode: Inode) -> dict[bytes, bytes]:
        """Return all attributes of ``inode``."""
        if inode.xattr_block == 0:
            return {}
        block = self._block(inode)
        raw = bytes(self._metadata.block(block))
        crc, count, used, owner = layout.XATTR_HEADER.unpack_from(raw)
        found: dict[bytes, bytes] = {}
        position = _HEADER
        sound = owner == inode.ino and _HEADER <= used <= layout.BLOCK_SIZE
        sound = sound and zlib.crc32(raw[4:used]) == crc
        while sound and position < used:
            sound = position + layout.XATTR_RECORD.size <= used
            if sound:
                name_size, value_size = layout.XATTR_RECORD.unpack_from(raw, position)
                start = position + layout.XATTR_RECORD.size
                position = start + name_size + value_size
                name = raw[start : start + name_size]
                found[name] = raw[start + name_size : position]
                sound = name.startswith(NAMESPACES) and name not in NAMESPACES
        if not sound or position != used or len(found) != count:
            raise self._damaged(inode, block << layout.BLOCK_SHIFT)
        return found

    def save(self, inode: Inode, attributes: dict[bytes, bytes]) -> None:
        """Stage ``attributes`` as all that ``inode`` has; raise FsError(ENOSPC)."""
        if not attributes:
            self.drop(inode)
            return
        used = _HEADER + sum(
            layout.XATTR_RECORD.size + len(name) + len(value) for name, value in attributes.items()
        )
        if used > layout.BLOCK_SIZE:
            raise FsError(errno.ENOSPC, f"attributes of {used} bytes exceed one block")
        if inode.xattr_block:
            block = self._block(inode)
        else:
            block = self._allocator.allocate_block()
            self._metadata.fresh(block)
            self._allocator.owners.meet(inode.ino, block)
            inode.xattr_block = seal(inode.ino, _LEVEL, 0, FileMap.raw_home(block))
            inode.blocks += 1
        self._metadata.write(block, 0, pack_xattrs(inode.ino, attributes))

    def drop(self, inode: Inode) -> None:
        """Free the attributes' block, if any."""
        if inode.xattr_block:
            self._allocator.free([self._block(inode)])
            inode.xattr_block = 0
            inode.blocks -= 1

    def _block(self, inode: Inode) -> int:
        body = inode.xattr_block & layout.ENTRY_BODY_MASK
        block = body & layout.ENTRY_BLOCK_MASK
        if (
            seal(inode.ino, _LEVEL, 0, body) != inode.xattr_block
            or body >> layout.ENTRY_HOME_SHIFT != layout.HOME_RAW
            or body & layout.ENTRY_PAGECACHE
            or not self._superblock.data_start <= block < self._superblock.data_end
        ):
            raise self._damaged(inode, inode.record_offset + layout.INODE_XATTR_OFFSET)
        self._allocator.owners.meet(inode.ino, block)
        return block

    @staticmethod
    def _damaged(inode: Inode, offset: int) -> ImageError:
        return ImageError(
            f"the extended attributes of inode {inode.ino} at offset {offset} are damaged",
            remedy="run fsck.xipfs",
        )
