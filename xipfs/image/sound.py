"""What makes one structure sound, for fsck: each judged alone, from its bytes and its place.

Reading an image in use stops at the first damage; judging it goes on. So these functions say what
is right and what can be saved, and raise nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from xipfs.image import layout
from xipfs.image.directory import DirectoryEntry, name_hash, possible_name
from xipfs.image.filemap import Entries, seal, seal_pages
from xipfs.image.metadata import Block
from xipfs.image.superblock import Superblock
from xipfs.image.xattrs import NAMESPACES

#: Levels whose entries point to bytes and not to a node: pages, and the attributes' block.
PAGE_LEVEL: Final = 0
XATTR_LEVEL: Final = 7
_RECORD: Final = layout.LEAF_RECORD.size


def entry_block(
    superblock: Superblock, ino: int, level: int, position: int, word: int
) -> int | None:
    """Return the block that a sound entry points to, None for any other."""
    body = word & layout.ENTRY_BODY_MASK
    block = body & layout.ENTRY_BLOCK_MASK
    home = layout.HOME_RAW if level in (PAGE_LEVEL, XATTR_LEVEL) else layout.HOME_NODE
    kind_allowed = level == PAGE_LEVEL or not body & layout.ENTRY_PAGECACHE
    sound = seal(ino, level, position, body) == word and body >> layout.ENTRY_HOME_SHIFT == home
    if sound and kind_allowed and superblock.data_start <= block < superblock.data_end:
        return block
    return None


def sound_pages(
    superblock: Superblock, ino: int, first: int, words: Entries
) -> npt.NDArray[np.bool_]:
    """Tell for each page's entry, from page ``first`` on, whether it is there and sound."""
    bodies = words & np.uint64(layout.ENTRY_BODY_MASK)
    blocks = bodies & np.uint64(layout.ENTRY_BLOCK_MASK)
    sound: npt.NDArray[np.bool_] = (words != 0) & (seal_pages(ino, first, bodies) == words)
    sound &= bodies >> np.uint64(layout.ENTRY_HOME_SHIFT) == layout.HOME_RAW
    sound &= (blocks >= superblock.data_start) & (blocks < superblock.data_end)
    return sound


def leaf_place(page: int) -> tuple[int, int]:
    """Return the depth and the prefix of the leaf at that page of a directory's map."""
    depth = (page + 1).bit_length() - 1
    return depth, page + 1 - (1 << depth)


def is_leaf_of(raw: Block, ino: int, page: int) -> bool:
    """Whether a block says that it is this leaf, whatever its checksum says."""
    _crc, _count, _used, owner, place, _zero = layout.LEAF_HEADER.unpack_from(raw)
    return (owner, place) == (ino, page)


def read_leaf(
    superblock: Superblock, raw: Block, ino: int, page: int
) -> list[DirectoryEntry] | None:
    """Return the records of a leaf that is right in every bit, None of any other."""
    crc, count, used, owner, place, zero = layout.LEAF_HEADER.unpack_from(raw)
    depth, prefix = leaf_place(page)
    if (
        (owner, place, zero) != (ino, page, 0)
        or depth > layout.MAX_DIRECTORY_DEPTH
        or not layout.LEAF_HEADER.size <= used <= layout.BLOCK_SIZE
        or zlib.crc32(raw[4:used]) != crc
    ):
        return None
    names: list[DirectoryEntry] = []
    at = layout.LEAF_HEADER.size
    while at + _RECORD <= used:
        name = _name_at(superblock, raw, at)
        if name is None or name.cookie >> (layout.HASH_BITS - depth) != prefix:
            return None
        names.append(name)
        end = at + _RECORD + len(name.name)
        at = end + -end % 8
        if any(raw[end:at]):
            return None
    return names if at == used and len(names) == count else None


def saved_names(superblock: Superblock, raw: Block) -> Iterator[DirectoryEntry]:
    """Yield what can be recognised in a damaged leaf: records whose hash is their name's."""
    at = layout.LEAF_HEADER.size
    while at + _RECORD < layout.BLOCK_SIZE:
        name = _name_at(superblock, raw, at)
        if name is None:
            at += 8
            continue
        yield name
        at += _RECORD + len(name.name)
        at += -at % 8


def _name_at(superblock: Superblock, raw: Block, at: int) -> DirectoryEntry | None:
    hash_, ino, kind, length = layout.LEAF_RECORD.unpack_from(raw, at)
    start = at + _RECORD
    name = bytes(raw[start : start + length])
    if (
        len(name) != length
        or not possible_name(name)
        or name_hash(superblock.hash_key, name) != hash_
    ):
        return None
    return DirectoryEntry(name, ino, kind, hash_)


def is_xattrs_of(raw: Block, ino: int) -> bool:
    """Whether a block says that it holds this inode's attributes."""
    return bool(layout.XATTR_HEADER.unpack_from(raw)[3] == ino)


def read_xattrs(raw: Block, ino: int) -> tuple[dict[bytes, bytes], bool]:
    """Return the attributes that can be recognised, and whether the block is right."""
    crc, count, used, owner = layout.XATTR_HEADER.unpack_from(raw)
    at = layout.XATTR_HEADER.size
    sound = owner == ino and at < used <= layout.BLOCK_SIZE and zlib.crc32(raw[4:used]) == crc
    end = used if sound else layout.BLOCK_SIZE
    found: dict[bytes, bytes] = {}
    while at + layout.XATTR_RECORD.size <= end and len(found) < count:
        name_size, value_size = layout.XATTR_RECORD.unpack_from(raw, at)
        start = at + layout.XATTR_RECORD.size
        name = bytes(raw[start : start + name_size])
        at = start + name_size + value_size
        if not name.startswith(NAMESPACES) or name in NAMESPACES or b"\0" in name or at > end:
            sound = False
            break
        sound = sound and name not in found
        found.setdefault(name, bytes(raw[start + name_size : at]))
    return found, sound and len(found) == count and at == used
