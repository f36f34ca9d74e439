"""What fsck keeps of every inode while it reads an image: 51 bytes an inode number.

And what the fields of an inode can be by its type: ``plain`` returns a record without the others.
"""

from __future__ import annotations

import dataclasses
import stat
from typing import Final

import numpy as np
import numpy.typing as npt

from xipfs.image import layout
from xipfs.image.record import Inode

#: In ``kinds``: the record could not be read.
DAMAGED: Final = 255
_DIRECTORY: Final = stat.S_IFDIR >> 12
_SIZED: Final = (stat.S_IFREG, stat.S_IFLNK)

Flags = npt.NDArray[np.bool_]


class Records:
    """By inode number, below ``limit``: the stored fields that others refer to, and the counted."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        #: The file type (DT_*); 0 free, DAMAGED unreadable.
        self.kinds = np.zeros(limit, np.uint8)
        self.orphans = np.zeros(limit, np.bool_)
        self.nlinks = np.zeros(limit, np.uint32)
        self.links = np.zeros(limit, np.uint32)
        self.parents = np.zeros(limit, np.uint64)
        self.following = np.zeros(limit, np.uint64)
        self.previous = np.zeros(limit, np.uint64)
        #: Where the record lies; 0: there is none.
        self.places = np.zeros(limit, np.uint64)
        #: Directories: the one that names it.
        self.named_in = np.zeros(limit, np.uint64)
        self._reached = np.zeros(limit, np.uint8)

    def note(self, inode: Inode) -> None:
        """Take over a record that was read."""
        ino = inode.ino
        self.kinds[ino] = inode.mode >> 12
        self.orphans[ino] = inode.orphan
        self.nlinks[ino] = inode.nlink
        self.parents[ino] = inode.parent
        self.following[ino], self.previous[ino] = inode.next_ino, inode.previous_ino
        self.places[ino] = inode.record_offset

    def note_damaged(self, ino: int, offset: int) -> None:
        """Note that the record at ``offset`` cannot be read."""
        self.kinds[ino] = DAMAGED
        self.places[ino] = offset

    def place_of(self, ino: int) -> int:
        """Return where the record lies, 0 if nowhere."""
        return int(self.places[ino]) if ino < self.limit else 0

    def link(self, parent: int, ino: int) -> None:
        """Count a name of ``ino`` in directory ``parent``."""
        self.links[ino] += 1
        if self.kinds[ino] == _DIRECTORY:
            self.links[ino] += 1
            self.links[parent] += 1
            self.named_in[ino] = parent

    def in_use(self) -> list[int]:
        """Return the inodes in use whose records were read."""
        return np.flatnonzero((self.kinds != 0) & (self.kinds != DAMAGED)).tolist()

    def nr_in_use(self) -> int:
        """Return how many inodes are in use and readable."""
        return int(np.count_nonzero((self.kinds != 0) & (self.kinds != DAMAGED)))

    def free(self) -> Flags:
        """Tell by number which inodes are free."""
        flags: Flags = (self.kinds == 0) & (self.places != 0)
        return flags

    def orphaned(self) -> Flags:
        """Tell by number which inodes are in use and say that they are orphans."""
        flags: Flags = self.orphans & (self.kinds != 0)
        return flags

    def astray(self) -> list[int]:
        """Return named directories from which no way leads up to the root: circles, one each."""
        reached, circles = self._reached, []
        for start in np.flatnonzero(self.named_in).tolist():
            path, ino = [], start
            while reached[ino] == 0 and ino != layout.ROOT_INO and ino:
                reached[ino] = 2
                path.append(ino)
                ino = int(self.named_in[ino])
            if ino != layout.ROOT_INO and ino and reached[ino] == 2:
                circles.append(ino)
            reached[path] = 1
        return circles


def is_plain(inode: Inode) -> bool:
    """Whether the inode has only those fields set that its type can have."""
    if inode.mode == 0:
        return inode == plain(inode)
    kind = stat.S_IFMT(inode.mode)
    return (
        (inode.orphan or not inode.next_ino | inode.previous_ino)
        and (inode.size_bytes == 0 or kind in _SIZED)
        and (kind == stat.S_IFDIR or not inode.parent | inode.entries)
        and (inode.root != 0 or inode.height == 0)
    )


def plain(inode: Inode) -> Inode:
    """Return the inode with only those fields set that its type can have."""
    if inode.mode == 0:
        return Inode(
            inode.ino,
            generation=inode.generation,
            next_ino=inode.next_ino,
            record_offset=inode.record_offset,
        )
    kept = dataclasses.replace(inode)
    if not inode.orphan:
        kept.next_ino = kept.previous_ino = 0
    if stat.S_ISDIR(inode.mode):
        kept.size_bytes = 0
    else:
        kept.parent = kept.entries = 0
        if stat.S_IFMT(inode.mode) not in _SIZED:
            kept.size_bytes = 0
    if inode.root == 0:
        kept.height = 0
    return kept


def plain_table(table: Inode) -> Inode:
    """Return the inode table's inode with only its own fields."""
    return Inode(
        layout.TABLE_INO,
        height=table.height,
        size_bytes=table.size_bytes,
        root=table.root,
        blocks=table.blocks,
    )
