"""The inode record: between 128 bytes of the table and an object with names."""

from __future__ import annotations

import errno
import functools
import stat
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any, Final

from xipfs.errors import FsError, ImageError
from xipfs.image import layout
from xipfs.image.metadata import Block

#: The file types there are; mode 0 is a free inode and the table's own.
FILE_TYPES: Final = {
    stat.S_IFIFO,
    stat.S_IFCHR,
    stat.S_IFDIR,
    stat.S_IFBLK,
    stat.S_IFREG,
    stat.S_IFLNK,
    stat.S_IFSOCK,
}


#: Of a record's fields after its checksum: mode, uid, gid, height, kind, flags, size, blocks.
_CHECKED: Final = (0, 3, 4, 6, 7, 8, 9, 14)
#: As an owner: nobody, by the kernel's own convention (INVALID_UID, INVALID_GID). What belongs to
#: it not even root may open.
NO_ID: Final = (1 << 32) - 1
#: Decoded records: some 600 bytes each.
_RECORDS_KEPT: Final = 1024


@dataclass(slots=True)
class Inode:
    """One inode; sizes in bytes, blocks in 4 KiB blocks owned (map nodes included), times in ns.

    ``next_ino`` and ``previous_ino`` link the orphan list, or ``next_ino`` alone the free list.
    """

    ino: int
    mode: int = 0
    generation: int = 0
    nlink: int = 0
    uid: int = 0
    gid: int = 0
    rdev: int = 0
    height: int = 0
    pagecache: bool = False
    orphan: bool = False
    size_bytes: int = 0
    atime_ns: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    root: int = 0
    blocks: int = 0
    xattr_block: int = 0
    parent: int = 0
    next_ino: int = 0
    previous_ino: int = 0
    entries: int = 0
    record_offset: int = field(default=0, compare=False)
    """Where the record was read, for messages."""


def _seed(ino: int) -> int:
    return zlib.crc32(ino.to_bytes(8, "little"))


def pack_inode(inode: Inode) -> bytes:
    """Return the record's 128 bytes, checksum included; raise ImageError for what cannot be.

    A count leaves its range only if the image had a wrong one before. Raise FsError(EINVAL) for an
    owner that is nobody.
    """
    if NO_ID in (inode.uid, inode.gid):
        raise FsError(errno.EINVAL, f"inode {inode.ino} cannot belong to id {NO_ID}")
    try:
        body = _pack_body(inode)
    except struct.error as error:
        raise ImageError(
            f"inode {inode.ino} at offset {inode.record_offset} has a count that is wrong",
            remedy="run fsck.xipfs",
        ) from error
    return zlib.crc32(body, _seed(inode.ino)).to_bytes(4, "little") + body


def _pack_body(inode: Inode) -> bytes:
    return layout.INODE.pack(
        0,
        inode.mode,
        inode.generation,
        inode.nlink,
        inode.uid,
        inode.gid,
        inode.rdev,
        inode.height,
        inode.pagecache,
        layout.INODE_FLAG_ORPHAN if inode.orphan else 0,
        inode.size_bytes,
        inode.atime_ns,
        inode.mtime_ns,
        inode.ctime_ns,
        inode.root,
        inode.blocks,
        inode.xattr_block,
        inode.parent,
        inode.next_ino,
        inode.previous_ino,
        inode.entries,
        0,
    )[4:]


def unpack_inode(ino: int, block: Block, number: int, offset: int) -> Inode:
    """Return the record at ``offset`` of block ``number``; raise ImageError if it is damaged."""
    fields = _fields(ino, bytes(block[offset : offset + layout.INODE_SIZE]))
    place = (number << layout.BLOCK_SHIFT) + offset
    if fields is None:
        raise ImageError(f"inode {ino} at offset {place} is damaged", remedy="run fsck.xipfs")
    inode = Inode(*fields)
    inode.record_offset = place
    return inode


@functools.lru_cache(maxsize=_RECORDS_KEPT)
def _fields(ino: int, record: bytes) -> tuple[Any, ...] | None:
    """Return an Inode's fields but for the last, None if the record is damaged.

    Kept, since one operation reads the same inode several times.
    """
    crc, *fields, zero = layout.INODE.unpack(record)
    mode, uid, gid, height, kind, flags, size, blocks = (fields[at] for at in _CHECKED)
    sound = NO_ID not in (uid, gid)
    sound = sound and kind <= 1 and flags <= 1 and height <= layout.MAX_HEIGHT and zero == 0
    sound = sound and (mode == 0 or mode & ~0o7777 in FILE_TYPES)
    sound = sound and size <= layout.MAX_FILE_BYTES and blocks <= layout.MAX_BLOCKS
    if zlib.crc32(record[4:], _seed(ino)) != crc or not sound:
        return None
    return (ino, *fields[:7], bool(kind), bool(flags), *fields[9:])
