"""What the filesystem's parts share: the volume, the page cache, the clock, who holds what."""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager

from xipfs.clock import Clock
from xipfs.errors import FsError
from xipfs.fs.pagecache import PageCache
from xipfs.fs.types import Attr
from xipfs.image.layout import BLOCK_SIZE
from xipfs.image.record import Inode
from xipfs.image.volume import Volume
from xipfs.memory.frames import PhysicalMemory
from xipfs.units import Ino

#: Changes an inode that is about to be put, in the transaction of the one who puts it.
Amend = Callable[[Inode], None]


class Core:
    """One open image; shared by the parts of a Filesystem, used by one thread at a time."""

    def __init__(
        self, volume: Volume, memory: PhysicalMemory, clock: Clock, *, read_only: bool
    ) -> None:
        self.volume = volume
        self.medium = volume.medium
        self.memory = memory
        self.cache = PageCache(memory, volume.medium, clock)
        self.clock = clock
        self.read_only = read_only
        #: Why nothing is changed any more, and what was told of it.
        self.damage = ""
        self.damage_told: set[str] = set()
        #: References by inode number: looked-up names and open handles.
        self.holds: dict[int, int] = {}

    def now_ns(self) -> int:
        """Return the time that a change made now is stamped with."""
        return self.clock.realtime_ns()

    def check_writable(self) -> None:
        """Raise FsError(EROFS) on a read-only mount."""
        if self.read_only:
            raise FsError(errno.EROFS)

    def change(self) -> AbstractContextManager[None]:
        """One operation's changes: all durable at the end, or none."""
        self.check_writable()
        return self.volume.transaction()

    def inode(self, ino: int) -> Inode:
        """Return the inode, in use; raise FsError(ENOENT)."""
        return self.volume.inodes.get(ino)

    def regular(self, ino: int) -> Inode:
        """Return the inode of a regular file; raise FsError(EISDIR or EINVAL) for others."""
        inode = self.inode(ino)
        if stat.S_ISREG(inode.mode):
            return inode
        raise FsError(errno.EISDIR if stat.S_ISDIR(inode.mode) else errno.EINVAL)

    def put(self, inode: Inode) -> None:
        """Stage the inode in the open transaction."""
        self.volume.inodes.put(inode)


def attr_of(inode: Inode) -> Attr:
    """Return what stat(2) tells of ``inode``."""
    size = inode.size_bytes
    if stat.S_ISDIR(inode.mode):
        size = inode.blocks * BLOCK_SIZE
    return Attr(
        ino=Ino(inode.ino),
        generation=inode.generation,
        mode=inode.mode,
        nlink=inode.nlink,
        uid=inode.uid,
        gid=inode.gid,
        rdev=inode.rdev,
        size_bytes=size,
        blocks_512=inode.blocks * (BLOCK_SIZE // 512),
        atime_ns=inode.atime_ns,
        mtime_ns=inode.mtime_ns,
        ctime_ns=inode.ctime_ns,
    )
