"""Giving storage back: shrinking files and unlinked inodes, in steps that fit the journal.

A file can own more pages than one transaction can free. So the first step makes the outcome final
(the new size, or no link any more) and, if pages are left over, puts the inode on the orphan list;
further steps free them, and the last takes the inode off. A cut in between leaves an orphan, and
the next mount goes on where this one stopped.
"""

from __future__ import annotations

import stat

import numpy as np

from xipfs.errors import ImageError
from xipfs.fs.core import Amend, Core
from xipfs.image import layout
from xipfs.image.record import Inode
from xipfs.units import pages_of

#: What freeing one page can add to a transaction: a line of the bitmap with its record header,
#: and its share of the map.
_BYTES_PER_PAGE = 64 + layout.JOURNAL_RECORD.size + 16
#: Kept free for the inode, its neighbours on the list, the counters and the map's upper nodes.
_RESERVED_BYTES = 8192


class Reclaim:
    """Frees pages and inodes."""

    def __init__(self, core: Core) -> None:
        self._core = core
        capacity = core.volume.journal_capacity_bytes - _RESERVED_BYTES
        self._pages_per_step = max(capacity // _BYTES_PER_PAGE, 1)

    def shrink(self, ino: int, size_bytes: int, amend: Amend) -> None:
        """Cut the file to ``size_bytes``; the pages behind it are freed."""
        core = self._core
        inode = core.inode(ino)
        assert size_bytes < inode.size_bytes
        frames = core.cache.cut_off(ino, pages_of(size_bytes))
        with core.change():
            inode.size_bytes = size_bytes
            amend(inode)
            done = self._free_pages(inode, pages_of(size_bytes))
            if not done and not inode.orphan:
                core.volume.inodes.orphan(inode)
            core.put(inode)
        core.cache.drop(frames)
        if not done:
            self._finish(ino)

    def release(self, ino: int) -> None:
        """Free an unlinked inode that nobody holds, with all it owns."""
        core = self._core
        assert ino not in core.holds, ino
        core.cache.drop(core.cache.cut_off(ino, 0))
        self._finish(ino)

    def recover(self) -> int:
        """Free what a crash left on the orphan list; return how many inodes that were."""
        count = 0
        while ino := self._core.volume.counters.orphan_ino:
            self._finish(ino)
            count += 1
        return count

    def orphans(self, count: int) -> list[int]:
        """Return the first ``count`` inodes on the orphan list: what was put there last."""
        inodes, found = self._core.volume.inodes, list[int]()
        ino = self._core.volume.counters.orphan_ino
        while ino and len(found) < count:
            found.append(ino)
            ino = inodes.listed("orphan", ino).next_ino
        return found

    def _finish(self, ino: int) -> None:
        """Free the rest of an inode on the orphan list; take it off unless it is only held."""
        core = self._core
        done = False
        while not done:
            with core.change():
                inode = core.volume.inodes.listed("orphan", ino)
                if inode.mode == 0 or not inode.orphan:
                    raise ImageError(
                        f"the orphan list leads to inode {ino} at offset {inode.record_offset},"
                        " which is none",
                        remedy="run fsck.xipfs",
                    )
                kept = inode.nlink > 0 or ino in core.holds
                done = self._free_pages(inode, pages_of(inode.size_bytes) if kept else 0)
                if done and not kept:
                    self._retire(inode)
                    break
                if done and inode.nlink > 0:
                    core.volume.inodes.adopt(inode)
                core.put(inode)

    def _retire(self, inode: Inode) -> None:
        volume = self._core.volume
        volume.xattrs.drop(inode)
        volume.inodes.adopt(inode)
        volume.inodes.release(inode)

    def _free_pages(self, inode: Inode, first: int) -> bool:
        """Free pages from ``first`` on, as many as one step may; return whether none is left."""
        volume = self._core.volume
        budget = self._pages_per_step
        while budget > 0:
            bodies = volume.maps.take(inode, first, budget)
            if bodies is None:
                return True
            volume.allocator.free((bodies & np.uint64(layout.ENTRY_BLOCK_MASK)).tolist())
            inode.blocks -= bodies.size
            # The leaf and the nodes above it may go too, each with a line of the bitmap and one
            # of its parent: in a sparse file that is most of what a step writes.
            budget -= bodies.size + 2 * inode.height
            if stat.S_ISREG(inode.mode):
                cached = int(np.count_nonzero(bodies & np.uint64(layout.ENTRY_PAGECACHE)))
                volume.counters.count_pages(xip=cached - bodies.size, pagecache=-cached)
        return False
