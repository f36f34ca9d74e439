"""The filesystem of a replay: files by their numbers in the trace, with places but no contents.

It is the mount's own filesystem over a blank medium, so that frames, evictions, moves, transactions
and their costs come from the same code. Only how files come to be differs: a trace tells inode
numbers and kinds of pages, no names.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

import numpy as np

from xipfs.clock import ManualClock
from xipfs.fs.build import make_image
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import PageKind
from xipfs.image import layout
from xipfs.image.record import Inode
from xipfs.image.superblock import geometry
from xipfs.memory.blank import BlankMedium
from xipfs.units import pages_of

#: Pages given homes in one transaction: with the smallest journal they fit.
_CHUNK_PAGES: Final = 128
_INODES_PER_TRANSACTION: Final = 8 * layout.INODES_PER_BLOCK

Runs = list[tuple[int, int, str]]
"""First page, number of pages, kind."""


class ReplayedFilesystem(Filesystem):
    """Files of a trace on a blank medium of ``size_bytes``; time is the stream's."""

    def __init__(self, size_bytes: int, *, ram_bytes: int, struct_page_bytes: int) -> None:
        self.blank = BlankMedium(size_bytes)
        self.clock = ManualClock(0)
        self._made: set[int] = set()
        superblock = geometry(
            size_bytes,
            uuid=os.urandom(16),
            hash_key=bytes(16),
            created_ns=0,
            default_pagecache=False,
            label="",
        )
        with self.blank.setup():
            make_image(self.blank, superblock, self.clock)
            super().__init__(
                self.blank,
                image_path=Path("(replayed)"),
                ram_bytes=ram_bytes,
                struct_page_bytes=struct_page_bytes,
                clock=self.clock,
                lock=None,
            )

    def knows(self, ino: int) -> bool:
        """Return whether the file is there."""
        return ino in self._made

    def make(self, ino: int, size_bytes: int, runs: Runs, *, pagecache: bool) -> None:
        """Make file ``ino``; its pages have kinds and homes, and none is resident."""
        volume = self._core.volume
        self._made.add(ino)
        with self.blank.setup():
            while volume.counters.inode_limit <= ino:
                with self._core.change():
                    for _ in range(_INODES_PER_TRANSACTION):
                        volume.inodes.create()
            with self._core.change():
                inode = Inode(ino=ino, generation=1)
                inode.mode, inode.nlink = stat.S_IFREG | 0o600, 1
                inode.size_bytes, inode.pagecache = size_bytes, pagecache
                self._core.put(inode)
            for first, count, kind in runs:
                for start in range(first, first + count, _CHUNK_PAGES):
                    chunk = range(start, min(start + _CHUNK_PAGES, first + count))
                    self._give_homes(ino, chunk, PageKind(kind))

    def _give_homes(self, ino: int, pages: range, kind: PageKind) -> None:
        volume, cached = self._core.volume, kind is PageKind.PAGECACHE
        with self._core.change():
            inode = self._core.inode(ino)
            blocks = np.concatenate(
                [
                    np.arange(start, start + length, dtype=np.uint64)
                    for start, length in volume.allocator.allocate(len(pages))
                ]
            )
            bodies = blocks | np.uint64(volume.maps.raw_home(0, pagecache=cached))
            volume.maps.assign(inode, pages.start, bodies)
            inode.blocks += len(pages)
            self._core.put(inode)
            volume.counters.count_pages(**{kind.value: len(pages)})

    def make_resident(self, ino: int, index: int, *, dirty: bool) -> None:
        """Give a pagecache page its frame, the hottest of all."""
        with self.blank.setup():
            self.fault_in(ino, index)
            pfn = self._core.cache.get(ino, index)
            if dirty and pfn is not None:
                self._core.cache.mark_dirty(pfn)

    def free(self, ino: int) -> None:
        """End a file; its number may be used again."""
        if pages_of(self._core.inode(ino).size_bytes):
            self.setattr(ino, size_bytes=0)
        else:
            self._core.cache.drop(self._core.cache.cut_off(ino, 0))
        self._made.remove(ino)
        with self.blank.setup(), self._core.change():
            # Not through the list of free inodes: the trace says which number is used next.
            self._core.put(Inode(ino=ino, generation=1))
