"""Directories: a binary trie over a keyed hash of the names, one block a leaf.

A leaf holds the names whose hash starts with its prefix. Its place in the directory's own map is
computed from depth and prefix (a heap's numbering), so the trie has no inner nodes to keep right:
exactly one leaf exists on the path of any hash, and finding it means asking the map at depth 0, 1,
2, ... A full leaf splits into two, two siblings that would fit into half a leaf merge. So a change
writes a few lines of one leaf, and now and then two blocks, whatever the directory's size.

A directory is read in the order of the hashes, and the hash is the cookie: it names a place between
names, which stays where it is while names come and go. The hash is keyed per image, so nobody
outside can choose names that all fall into one leaf; two names with all 62 bits equal do not occur.
"""

from __future__ import annotations

import errno
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from xipfs.errors import FsError, ImageError
from xipfs.image import layout
from xipfs.image.allocator import Allocator
from xipfs.image.filemap import FileMap
from xipfs.image.metadata import Metadata
from xipfs.image.record import Inode

_HEADER: Final = layout.LEAF_HEADER.size
_RECORD: Final = layout.LEAF_RECORD.size
_CRC_START: Final = 4
_HALF: Final = (layout.BLOCK_SIZE - _HEADER) // 2


def name_hash(key: bytes, name: bytes) -> int:
    """Return a name's place in the order of readdir: 1 .. 2^62 - 1."""
    digest = hashlib.blake2b(name, digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little") % ((1 << layout.HASH_BITS) - 1) + 1


def possible_name(name: bytes) -> bool:
    """Whether a program could have made that name, of at most 255 bytes."""
    return bool(name) and name not in (b".", b"..") and b"/" not in name and b"\0" not in name


@dataclass(frozen=True, slots=True)
class DirectoryEntry:
    """A name in a directory; ``kind`` is the file type of stat(2) shifted right by 12 (DT_*)."""

    name: bytes
    ino: int
    kind: int
    cookie: int

    def pack(self) -> bytes:
        """Return the record, padded to 8 bytes."""
        record = layout.LEAF_RECORD.pack(self.cookie, self.ino, self.kind, len(self.name))
        record += self.name
        return record + bytes(-len(record) % 8)


@dataclass(slots=True)
class _Leaf:
    """A leaf's place in the trie and its used bytes."""

    owner: int
    depth: int
    prefix: int
    block: int
    data: bytes

    @property
    def index(self) -> int:
        return (1 << self.depth) + self.prefix - 1

    def record(self, position: int) -> tuple[DirectoryEntry, int]:
        """Return the record at ``position`` and where the next one starts."""
        start = position + _RECORD
        if start <= len(self.data):
            hash_, ino, kind, length = layout.LEAF_RECORD.unpack_from(self.data, position)
            name = self.data[start : start + length]
            # No name leads to the root: the kernel would answer EIO without a word.
            if length and len(name) == length and ino > layout.ROOT_INO:
                return DirectoryEntry(name, ino, kind, hash_), position + (
                    _RECORD + length + 7 & ~7
                )
        raise _damaged(self.owner, self.block)

    def entries(self) -> Iterator[DirectoryEntry]:
        """Yield the entries as they lie."""
        position = _HEADER
        while position < len(self.data):
            entry, position = self.record(position)
            yield entry

    def readable(self) -> Iterator[DirectoryEntry]:
        """Yield the entries; raise ImageError at one that no name of this leaf could have."""
        for entry in self.entries():
            here = entry.cookie >> (layout.HASH_BITS - self.depth) == self.prefix
            if not here or not possible_name(entry.name):
                raise _damaged(self.owner, self.block)
            yield entry


class Directories:
    """Looks names up and changes them; the caller checks types and puts the directory's inode."""

    def __init__(
        self, metadata: Metadata, allocator: Allocator, maps: FileMap, hash_key: bytes
    ) -> None:
        self._metadata = metadata
        self._allocator = allocator
        self._maps = maps
        self._hash_key = hash_key

    def hash(self, name: bytes) -> int:
        """Return the name's place in the order of readdir: 1 .. 2^62 - 1."""
        return name_hash(self._hash_key, name)

    def lookup(self, directory: Inode, name: bytes) -> DirectoryEntry | None:
        """Return the entry called ``name``, or None."""
        hash_ = self.hash(name)
        leaf = self._leaf(directory, hash_)
        if leaf is None:
            return None
        position = self._find(leaf, hash_, name)
        return None if position < 0 else leaf.record(position)[0]

    def insert(self, directory: Inode, name: bytes, ino: int, kind: int) -> None:
        """Add a name that is not there; raise FsError(ENOSPC)."""
        hash_ = self.hash(name)
        record = DirectoryEntry(name, ino, kind, hash_).pack()
        directory.entries += 1
        leaf = self._leaf(directory, hash_)
        if leaf is None:
            self._write_new(directory, 0, 0, [record])
            return
        assert self._find(leaf, hash_, name) < 0, name
        if len(leaf.data) + len(record) <= layout.BLOCK_SIZE:
            self._rewrite(directory, leaf, leaf.data + record, len(leaf.data), +1)
            return
        records = [entry.pack() for entry in leaf.entries()]
        self._drop(directory, leaf)
        self._split(directory, leaf.depth, leaf.prefix, records + [record])

    def replace(self, directory: Inode, name: bytes, ino: int, kind: int) -> None:
        """Let the existing ``name`` mean another inode."""
        hash_ = self.hash(name)
        leaf, position = self._present(directory, hash_, name)
        record = DirectoryEntry(name, ino, kind, hash_).pack()
        data = leaf.data[:position] + record + leaf.data[position + len(record) :]
        self._rewrite(directory, leaf, data, position, 0)

    def remove(self, directory: Inode, name: bytes) -> None:
        """Remove the existing ``name``."""
        hash_ = self.hash(name)
        leaf, position = self._present(directory, hash_, name)
        directory.entries -= 1
        size = len(leaf.record(position)[0].pack())
        data = leaf.data[:position] + leaf.data[position + size :]
        if not self._merge(directory, leaf, data):
            self._rewrite(directory, leaf, data, position, -1)

    def following(self, directory: Inode, cookie: int) -> list[DirectoryEntry]:
        """Return the next leaf's entries after ``cookie`` (0: the first), in the cookies' order.

        The list is empty only at the end. It is one leaf's worth, so that a reader of a directory
        asks anew after each and never goes on by a trie that has changed meanwhile.
        """
        start = cookie + 1
        while start < 1 << layout.HASH_BITS:
            leaf = self._leaf(directory, start)
            if leaf is None:
                break
            entries = [entry for entry in self._readable(leaf) if entry.cookie >= start]
            if entries:
                return sorted(entries, key=lambda entry: entry.cookie)
            start = (leaf.prefix + 1) << (layout.HASH_BITS - leaf.depth)
        return []

    def _readable(self, leaf: _Leaf) -> list[DirectoryEntry]:
        """Return the leaf's entries; raise ImageError if a lookup of one would find another.

        The kernel takes the inode that readdir names without asking for the name again.
        """
        entries = list(leaf.readable())
        twins = len({entry.name for entry in entries}) < len(entries)
        if twins or any(self.hash(entry.name) != entry.cookie for entry in entries):
            raise _damaged(leaf.owner, leaf.block)
        return entries

    def _leaf(self, directory: Inode, hash_: int) -> _Leaf | None:
        if directory.root == 0:
            return None
        for depth in range(layout.MAX_DIRECTORY_DEPTH + 1):
            prefix = hash_ >> (layout.HASH_BITS - depth)
            leaf = self._leaf_at(directory, depth, prefix)
            if leaf is not None:
                return leaf
        raise ImageError(
            f"directory inode {directory.ino} at offset {directory.record_offset} has no leaf for"
            f" hash {hash_}",
            remedy="run fsck.xipfs",
        )

    def _leaf_at(self, directory: Inode, depth: int, prefix: int) -> _Leaf | None:
        """Return the checked leaf of this depth and prefix, or None if there is none."""
        index = (1 << depth) + prefix - 1
        body = self._maps.entry(directory, index)
        if body == 0:
            return None
        block = body & layout.ENTRY_BLOCK_MASK
        raw = bytes(self._metadata.block(block))
        crc, _count, used, owner, place, zero = layout.LEAF_HEADER.unpack_from(raw)
        sound = _HEADER <= used <= layout.BLOCK_SIZE and zero == 0
        data = raw[:used]
        if (
            not sound
            or owner != directory.ino
            or place != index
            or zlib.crc32(data[_CRC_START:]) != crc
        ):
            raise _damaged(directory.ino, block)
        return _Leaf(directory.ino, depth, prefix, block, data)

    @staticmethod
    def _find(leaf: _Leaf, hash_: int, name: bytes) -> int:
        """Return the offset of the name's record, -1 if it is not there.

        The hash is searched as bytes. A match inside another record cannot pass for one: what
        follows would have to hold an inode number, whose zero bytes no name contains.
        """
        wanted = hash_.to_bytes(8, "little")
        position = leaf.data.find(wanted, _HEADER)
        while position >= 0:
            if position % 8 == 0 and leaf.record(position)[0].name == name:
                return position
            position = leaf.data.find(wanted, position + 1)
        return -1

    def _present(self, directory: Inode, hash_: int, name: bytes) -> tuple[_Leaf, int]:
        leaf = self._leaf(directory, hash_)
        position = -1 if leaf is None else self._find(leaf, hash_, name)
        if leaf is None or position < 0:
            raise FsError(errno.ENOENT)
        return leaf, position

    def _rewrite(self, directory: Inode, leaf: _Leaf, data: bytes, start: int, added: int) -> None:
        """Stage ``data`` where it differs: a new header, and the bytes from ``start`` on."""
        count = layout.LEAF_HEADER.unpack_from(leaf.data)[1] + added
        if not 0 <= count < layout.BLOCK_SIZE:
            raise _damaged(leaf.owner, leaf.block)
        header = leaf_header(directory.ino, leaf.index, count, data[_HEADER:])
        self._metadata.write(leaf.block, 0, header)
        if start < len(data):
            self._metadata.write(leaf.block, start, data[start:])

    def _write_new(self, directory: Inode, depth: int, prefix: int, records: list[bytes]) -> None:
        block = self._allocator.allocate_block()
        self._metadata.fresh(block)
        body = b"".join(records)
        index = (1 << depth) + prefix - 1
        header = leaf_header(directory.ino, index, len(records), body)
        self._metadata.write(block, 0, header + body)
        self._maps.assign_one(directory, index, self._maps.raw_home(block))
        directory.blocks += 1

    def _drop(self, directory: Inode, leaf: _Leaf) -> None:
        self._maps.assign_one(directory, leaf.index, 0)
        self._allocator.free([leaf.block])
        directory.blocks -= 1

    def _split(self, directory: Inode, depth: int, prefix: int, records: list[bytes]) -> None:
        """Write ``records`` as the leaf of this place, or as two subtrees if they do not fit."""
        if sum(map(len, records)) <= layout.BLOCK_SIZE - _HEADER:
            self._write_new(directory, depth, prefix, records)
            return
        if depth == layout.MAX_DIRECTORY_DEPTH:
            raise FsError(errno.ENOSPC, f"directory inode {directory.ino}: too many equal hashes")
        halves: tuple[list[bytes], list[bytes]] = ([], [])
        for record in records:
            hash_ = int.from_bytes(record[:8], "little")
            halves[hash_ >> (layout.HASH_BITS - depth - 1) & 1].append(record)
        for bit, half in enumerate(halves):
            self._split(directory, depth + 1, prefix << 1 | bit, half)

    def _merge(self, directory: Inode, leaf: _Leaf, data: bytes) -> bool:
        """Merge the leaf (whose content is now ``data``) with its sibling, and on upwards.

        Return False if nothing was merged and the leaf is still to be rewritten. What is merged
        goes into the leaf's own block, so that removing a name needs no free block; where the map
        would need one and there is none, the siblings stay two. The empty leaf at the root is
        dropped: an empty directory owns no block.
        """
        records = data[_HEADER:]
        depth, prefix = leaf.depth, leaf.prefix
        merged = [leaf]
        while depth and len(records) <= _HALF:
            sibling = self._leaf_at(directory, depth, prefix ^ 1)
            if sibling is None or len(records) + len(sibling.data) - _HEADER > _HALF:
                break
            records += sibling.data[_HEADER:]
            merged.append(sibling)
            depth, prefix = depth - 1, prefix >> 1
        if len(merged) == 1:
            if depth == 0 and not records:
                self._drop(directory, leaf)
                return True
            return False
        index = (1 << depth) + prefix - 1
        if not self._can_place(directory, index):
            return False
        if index:
            # Before the old leaves go: what the map holds for them may be what this entry needs.
            self._maps.assign_one(directory, index, self._maps.raw_home(leaf.block))
        for old in merged:
            self._maps.assign_one(directory, old.index, 0)
        self._allocator.free(old.block for old in merged[1:])
        directory.blocks -= len(merged) - 1
        if index == 0:
            # All leaves went and the map with them: the root's needs no node again.
            self._maps.assign_one(directory, 0, self._maps.raw_home(leaf.block))
        count = sum(1 for old in merged for _ in old.entries()) - 1
        header = leaf_header(directory.ino, index, count, records)
        self._metadata.write(leaf.block, 0, header + records)
        return True

    def _can_place(self, directory: Inode, index: int) -> bool:
        """Whether a leaf can get this place without failing for want of a block for map nodes."""
        start = index - index % layout.FANOUT
        has_node = self._maps.entries(directory, start, layout.FANOUT).any()
        return bool(has_node) or self._allocator.free_blocks >= directory.height


def leaf_header(owner: int, index: int, count: int, body: bytes) -> bytes:
    """Return a leaf's 32-byte header for the records in ``body``."""
    used = _HEADER + len(body)
    rest = layout.LEAF_HEADER.pack(0, count, used, owner, index, 0)[_CRC_START:]
    return zlib.crc32(body, zlib.crc32(rest)).to_bytes(4, "little") + rest


def _damaged(owner: int, block: int) -> ImageError:
    return ImageError(
        f"directory inode {owner}: the leaf at offset {block << layout.BLOCK_SHIFT} is damaged",
        remedy="run fsck.xipfs",
    )
