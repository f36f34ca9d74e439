"""Repairing directories: the names that can be recognised, in new leaves, put in place at once.

A name's hash, keyed by the image, tells it from anything else; so names are found in leaves whose
header or checksum is wrong. A directory with anything wrong is built again beside what it has, and
its inode, one record, decides between the two.
"""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Iterable
from typing import Final

from xipfs.image import layout
from xipfs.image.directory import DirectoryEntry, leaf_header
from xipfs.image.mending import STRUCTURE, Mending, NoRoomError
from xipfs.image.record import Inode, unpack_inode
from xipfs.image.records import DAMAGED
from xipfs.image.sound import (
    is_leaf_of,
    leaf_place,
    read_leaf,
    saved_names,
)

_BLOCK: Final = layout.BLOCK_SIZE
_HEADER: Final = layout.LEAF_HEADER.size
_DIRECTORY: Final = stat.S_IFDIR >> 12


class NameMending(Mending):
    """Repairs one directory after another; all inodes are read before."""

    lost_names: dict[int, list[DirectoryEntry]]

    def mend_directory(self, inode: Inode) -> None:
        """Keep every name that can be recognised and means something; count the links."""
        names: dict[bytes, DirectoryEntry] = {}
        spans: list[tuple[int, int]] = []
        sound = True
        for page, number in self.pages(inode):
            depth, prefix = leaf_place(page)
            width = max(layout.HASH_BITS - depth, 0)
            spans.append((prefix << width, width))
            found = read_leaf(self.superblock, self.block(number), inode.ino, page)
            if found is None:
                sound = False
                found = self.saved(inode.ino, page, number)
            for name in found:
                kept = self.meaning(inode.ino, name, names)
                sound = sound and kept == name
                if kept is not None:
                    names[kept.name] = kept
        sound = sound and _whole(spans) and (bool(names) or not spans)
        if not sound or inode.entries > len(names):
            for name in self.lost_names.get(inode.ino, ()):
                if name.name not in names and (kept := self.meaning(inode.ino, name, names)):
                    names[kept.name] = kept
                    sound = False
                    what = f"found the name {_shown(name.name)} again"
                    self.did("directory", inode.record_offset, what, inode.ino)
        if not sound:
            self.rebuild(inode, names.values())
        elif inode.entries != len(names):
            inode.entries = len(names)
            self.put(inode)
            self.did("directory", inode.record_offset, f"{len(names)} entries", inode.ino)
        for kept in names.values():
            self.records.link(inode.ino, kept.ino)

    def saved(self, ino: int, page: int, number: int) -> list[DirectoryEntry]:
        """Return the names of a leaf that is not right, unless it is another directory's."""
        raw = self.block(number)
        if not is_leaf_of(raw, ino, page):
            _crc, _count, _used, owner, place, _zero = layout.LEAF_HEADER.unpack_from(raw)
            if read_leaf(self.superblock, raw, owner, place) is not None:
                return []
        return list(saved_names(self.superblock, raw))

    def meaning(
        self, ino: int, name: DirectoryEntry, names: dict[bytes, DirectoryEntry]
    ) -> DirectoryEntry | None:
        """Return the name as it must be; None if it is taken or what it names is not there."""
        records = self.records
        if name.name in names or not layout.ROOT_INO < name.ino < records.limit:
            what = f"removed the name {_shown(name.name)}, which was for inode {name.ino}"
            self.did("directory", records.place_of(ino), what, ino)
            return None
        kind = int(records.kinds[name.ino])
        second = kind == _DIRECTORY and records.named_in[name.ino]
        if kind in (0, DAMAGED) or second or name.ino == ino:
            what = f"removed the name {_shown(name.name)} of inode {name.ino}"
            self.did("directory", records.place_of(ino), what, ino)
            return None
        if kind == _DIRECTORY:
            records.named_in[name.ino] = ino
        return dataclasses.replace(name, kind=kind)

    def rebuild(self, inode: Inode, names: Iterable[DirectoryEntry]) -> None:
        """Write the directory's leaves and map anew, then let its inode point there."""
        old = [number for _level, _position, number in self.tree(inode)]
        leaves: dict[int, bytes] = {}
        kept = sorted(names, key=lambda name: name.cookie)
        if kept:
            _place(inode.ino, 0, 0, kept, leaves)
        blocks: dict[int, int] = {}
        try:
            for page, content in leaves.items():
                blocks[page] = self.take(content, STRUCTURE)
            root, height, nodes = self.build_map(inode.ino, blocks)
        except NoRoomError:
            self.untake(list(blocks.values()))
            self.rewrite(inode, kept)
            return
        inode.root, inode.height, inode.entries = root, height, len(kept)
        inode.blocks = len(blocks) + len(nodes) + bool(inode.xattr_block)
        self.put(inode)
        self.untake(old)
        what = f"built anew with {len(kept)} names"
        self.did("directory", inode.record_offset, what, inode.ino)

    def rewrite(self, inode: Inode, names: list[DirectoryEntry]) -> None:
        """Write each leaf in its place, a transaction each: what a full image has room for.

        Nothing is done if a name had to go from one leaf to another: a cut could lose it.
        """
        wanted = {name.name for name in names}
        spans: list[tuple[int, int]] = []
        contents: dict[int, bytes] = {}
        for page, number in self.pages(inode):
            depth, prefix = leaf_place(page)
            width = max(layout.HASH_BITS - depth, 0)
            spans.append((prefix << width, width))
            here = [name for name in names if name.cookie >> width == prefix]
            found = {name.name for name in saved_names(self.superblock, self.block(number))}
            strays = found & wanted - {name.name for name in here}
            body = b"".join(name.pack() for name in here)
            if strays or len(body) > _BLOCK - _HEADER or number in self.shared:
                return
            content = leaf_header(inode.ino, page, len(here), body) + body
            contents[number] = content.ljust(_BLOCK, b"\0")
        if not _whole(spans):
            return
        for number, content in contents.items():
            self.write([(number * _BLOCK, content)])
            self.used[number] = STRUCTURE
        inode.entries = len(names)
        self.put(inode)
        what = f"written anew with {len(names)} names"
        self.did("directory", inode.record_offset, what, inode.ino)

    def break_circles(self) -> None:
        """Take one name out of each circle of directories; what it named is connected later."""
        for ino in self.records.astray():
            parent = int(self.records.named_in[ino])
            inode = self.inode_of(parent)
            names = [
                name
                for page, number in self.pages(inode)
                for name in read_leaf(self.superblock, self.block(number), parent, page) or ()
                if name.ino != ino
            ]
            self.rebuild(inode, names)
            self.records.links[ino] -= 2
            self.records.links[parent] -= 1
            self.records.named_in[ino] = 0
            self.did("unreachable", 0, "taken out of a circle of directories", ino)

    def inode_of(self, ino: int) -> Inode:
        """Return a mended inode."""
        number, at = divmod(self.records.place_of(ino), _BLOCK)
        return unpack_inode(ino, self.block(number), number, at)


def _whole(spans: list[tuple[int, int]]) -> bool:
    """Whether leaves (first hash, width in bits) cover all hashes once."""
    reached = 0
    for start, width in sorted(spans):
        if start != reached:
            return False
        reached = start + (1 << width)
    return not spans or reached == 1 << layout.HASH_BITS


def _place(
    ino: int, depth: int, prefix: int, names: list[DirectoryEntry], leaves: dict[int, bytes]
) -> None:
    """Put names, sorted by hash, into the leaf of this place or into the two below it."""
    body = b"".join(name.pack() for name in names)
    if len(body) <= _BLOCK - _HEADER:
        page = (1 << depth) + prefix - 1
        leaves[page] = leaf_header(ino, page, len(names), body) + body
        return
    middle = (prefix << 1 | 1) << layout.HASH_BITS - depth - 1
    low = [name for name in names if name.cookie < middle]
    _place(ino, depth + 1, prefix << 1, low, leaves)
    _place(ino, depth + 1, prefix << 1 | 1, names[len(low) :], leaves)


def _shown(name: bytes) -> str:
    return repr(name.decode(errors="replace"))
