"""Names: looking up, making, linking, renaming and removing them.

One call is one transaction, so a cut finds it done or not begun. Who may do what is not asked
here: the kernel checks permissions before it calls (mount option default_permissions), and what
needs a caller's identity (set-id bits on write and chown) arrives as a setattr.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator
from typing import Final

from xipfs.errors import FsError, ImageError
from xipfs.fs.core import Core, attr_of
from xipfs.fs.reclaim import Reclaim
from xipfs.fs.types import Attr
from xipfs.image import layout
from xipfs.image.directory import DirectoryEntry
from xipfs.image.layout import BLOCK_SHIFT, BLOCK_SIZE, LINK_MAX, NAME_MAX, SYMLINK_MAX
from xipfs.image.record import Inode

RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2


class Namespace:
    """The directories of one filesystem."""

    def __init__(self, core: Core, reclaim: Reclaim) -> None:
        self._core = core
        self._reclaim = reclaim
        self._directories = core.volume.directories

    def lookup(self, parent: int, name: bytes) -> Attr:
        """Return the inode that ``name`` means in directory ``parent``; ENOENT, ENOTDIR."""
        directory = self.directory(parent)
        if name == b".":
            return attr_of(directory)
        if name == b"..":
            return attr_of(self._core.inode(directory.parent))
        return attr_of(self._core.inode(self.entry(directory, name).ino))

    def readdir(self, ino: int, cookie: int) -> Iterator[tuple[bytes, Attr, int]]:
        """Yield (name, attributes, next cookie) after ``cookie``; 0 starts from the beginning.

        Names that are there all the time are yielded exactly once, whatever changes in between.
        """
        while entries := self._directories.following(self.directory(ino), cookie):
            attrs = [attr_of(self._core.inode(entry.ino)) for entry in entries]
            for entry, attr in zip(entries, attrs, strict=True):
                yield entry.name, attr, entry.cookie
            cookie = entries[-1].cookie

    def readlink(self, ino: int) -> bytes:
        """Return a symbolic link's target; EINVAL for anything else."""
        inode = self._core.inode(ino)
        if not stat.S_ISLNK(inode.mode):
            raise FsError(errno.EINVAL)
        body = self._core.volume.maps.entry(inode, 0)
        offset = (body & layout.ENTRY_BLOCK_MASK) << BLOCK_SHIFT
        if body == 0 or not 0 < inode.size_bytes <= SYMLINK_MAX:
            raise ImageError(
                f"symbolic link inode {ino} at offset {inode.record_offset} is damaged",
                remedy="run fsck.xipfs",
            )
        target = bytes(self._core.medium.load(offset, inode.size_bytes))
        if b"\0" in target:
            raise ImageError(
                f"symbolic link inode {ino}: the target at offset {offset} holds a zero byte",
                remedy="run fsck.xipfs",
            )
        return target

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, uid: int, gid: int) -> Attr:
        """Make a regular file, device, FIFO or socket."""
        if stat.S_IFMT(mode) in (stat.S_IFDIR, stat.S_IFLNK):
            raise FsError(errno.EINVAL)
        if stat.S_IFMT(mode) == 0:
            mode |= stat.S_IFREG
        with self._core.change():
            inode = self._make(parent, name, mode, uid, gid)
            inode.rdev = rdev if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else 0
            self._core.put(inode)
        return attr_of(inode)

    def mkdir(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> Attr:
        """Make a directory."""
        with self._core.change():
            inode = self._make(parent, name, stat.S_IFDIR | stat.S_IMODE(mode), uid, gid)
            inode.nlink, inode.parent = 2, parent
            self._core.put(inode)
        return attr_of(inode)

    def symlink(self, parent: int, name: bytes, target: bytes, uid: int, gid: int) -> Attr:
        """Make a symbolic link to ``target`` (1 to 4095 bytes)."""
        if not target:
            raise FsError(errno.ENOENT)
        if len(target) > SYMLINK_MAX:
            raise FsError(errno.ENAMETOOLONG)
        volume = self._core.volume
        with self._core.change():
            inode = self._make(parent, name, stat.S_IFLNK | 0o777, uid, gid)
            block = volume.allocator.allocate_block()
            offset = block << BLOCK_SHIFT
            self._core.medium.store(offset, target.ljust(BLOCK_SIZE, b"\0"))
            self._core.medium.flush(offset, BLOCK_SIZE)
            volume.maps.assign_one(inode, 0, volume.maps.raw_home(block))
            inode.blocks, inode.size_bytes = 1, len(target)
            self._core.put(inode)
        return attr_of(inode)

    def link(self, ino: int, parent: int, name: bytes) -> Attr:
        """Give a file one more name; EPERM for directories."""
        with self._core.change():
            inode = self._core.inode(ino)
            if stat.S_ISDIR(inode.mode):
                raise FsError(errno.EPERM)
            if inode.nlink == 0:
                raise FsError(errno.ENOENT)
            if inode.nlink >= LINK_MAX:
                raise FsError(errno.EMLINK)
            directory = self.directory(parent)
            self._insert(directory, name, inode)
            inode.nlink += 1
            inode.ctime_ns = directory.ctime_ns
            self._core.put(directory)
            self._core.put(inode)
        return attr_of(inode)

    def unlink(self, parent: int, name: bytes) -> None:
        """Remove a name that is not a directory's; the last one frees the file once not held."""
        with self._core.change():
            directory = self.directory(parent)
            entry = self.entry(directory, name)
            inode = self._core.inode(entry.ino)
            if stat.S_ISDIR(inode.mode):
                raise FsError(errno.EISDIR)
            self._directories.remove(directory, name)
            self._stamp(directory)
            self._core.put(directory)
            self.unlinked(inode, directory.ctime_ns)
        self.release(inode)

    def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory."""
        with self._core.change():
            directory = self.directory(parent)
            inode = self._core.inode(self.entry(directory, name).ino)
            self.check_removable_directory(inode)
            self._directories.remove(directory, name)
            directory.nlink -= 1
            self._stamp(directory)
            self._core.put(directory)
            self.unlinked(inode, directory.ctime_ns)
        self.release(inode)

    def drop(self, ino: int, count: int) -> None:
        """Give ``count`` references back; the last one to an unlinked inode frees it."""
        holds = self._core.holds
        left = holds.get(ino, 0) - count
        assert left >= 0, (ino, left)
        if left:
            holds[ino] = left
            return
        holds.pop(ino, None)
        if not self._core.read_only:
            self.release(self._core.inode(ino))

    def release(self, inode: Inode) -> None:
        """Free ``inode`` if it has no name and nobody holds it."""
        if inode.nlink == 0 and inode.ino not in self._core.holds:
            self._reclaim.release(inode.ino)

    def _make(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> Inode:
        """Take an inode and enter it as ``name``; the caller completes and puts it."""
        directory = self.directory(parent)
        check_name(name)
        if self._directories.lookup(directory, name) is not None:
            raise FsError(errno.EEXIST)
        if directory.mode & stat.S_ISGID:
            gid = directory.gid
            if stat.S_ISDIR(mode):
                mode |= stat.S_ISGID
        inode = self._core.volume.inodes.create()
        inode.mode, inode.uid, inode.gid, inode.nlink = mode, uid, gid, 1
        inode.pagecache = directory.pagecache
        self._insert(directory, name, inode)
        inode.atime_ns = inode.mtime_ns = inode.ctime_ns = directory.mtime_ns
        if stat.S_ISDIR(mode):
            if directory.nlink >= LINK_MAX:
                raise FsError(errno.EMLINK)
            directory.nlink += 1
        self._core.put(directory)
        return inode

    def _insert(self, directory: Inode, name: bytes, inode: Inode) -> None:
        """Enter ``name``; the caller puts the directory. EEXIST, ENOENT in a removed directory."""
        check_name(name)
        if directory.nlink == 0:
            raise FsError(errno.ENOENT)
        if self._directories.lookup(directory, name) is not None:
            raise FsError(errno.EEXIST)
        self._directories.insert(directory, name, inode.ino, stat.S_IFMT(inode.mode) >> 12)
        self._stamp(directory)

    def unlinked(self, inode: Inode, now_ns: int) -> None:
        """One name of ``inode`` is gone: count it, and make the inode an orphan with the last."""
        inode.nlink = 0 if stat.S_ISDIR(inode.mode) else inode.nlink - 1
        inode.ctime_ns = now_ns
        if inode.nlink == 0:
            self._core.volume.inodes.orphan(inode)
        else:
            self._core.put(inode)

    @staticmethod
    def check_removable_directory(inode: Inode) -> None:
        """Raise FsError unless ``inode`` is an empty directory: ENOTDIR, ENOTEMPTY."""
        if not stat.S_ISDIR(inode.mode):
            raise FsError(errno.ENOTDIR)
        if inode.entries:
            raise FsError(errno.ENOTEMPTY)

    def directory(self, ino: int) -> Inode:
        """Return the inode of a directory; ENOENT, ENOTDIR."""
        inode = self._core.inode(ino)
        if not stat.S_ISDIR(inode.mode):
            raise FsError(errno.ENOTDIR)
        return inode

    def entry(self, directory: Inode, name: bytes) -> DirectoryEntry:
        """Return the entry called ``name``; ENOENT, ENAMETOOLONG."""
        if len(name) > NAME_MAX:
            raise FsError(errno.ENAMETOOLONG)
        entry = self._directories.lookup(directory, name)
        if entry is None:
            raise FsError(errno.ENOENT)
        return entry

    def _stamp(self, directory: Inode) -> None:
        directory.mtime_ns = directory.ctime_ns = self._core.now_ns()


def check_name(name: bytes) -> None:
    """Raise FsError(EINVAL or ENAMETOOLONG) for what cannot be a new name."""
    if len(name) > NAME_MAX:
        raise FsError(errno.ENAMETOOLONG)
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise FsError(errno.EINVAL)
