"""rename(2) with its flags: one transaction, so neither name can be lost."""

from __future__ import annotations

import errno
import stat

from xipfs.errors import FsError, ImageError
from xipfs.fs.core import Core
from xipfs.fs.namespace import RENAME_EXCHANGE, RENAME_NOREPLACE, Namespace, check_name
from xipfs.image.record import Inode


class Rename:
    """Moves names between directories."""

    def __init__(self, core: Core, namespace: Namespace) -> None:
        self._core = core
        self._names = namespace
        self._directories = core.volume.directories

    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int
    ) -> None:
        """Give what is called ``name`` the name ``new_name``, replacing what had it.

        Raise FsError as rename(2): ENOENT, EEXIST, EISDIR, ENOTDIR, ENOTEMPTY, EINVAL (into
        itself), ENOSPC.
        """
        if flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
            raise FsError(errno.EINVAL)
        check_name(new_name)
        victim: Inode | None = None
        with self._core.change():
            old = self._names.directory(parent)
            new = old if new_parent == parent else self._names.directory(new_parent)
            moved = self._core.inode(self._names.entry(old, name).ino)
            self._refuse_into_itself(moved, new)
            target = self._directories.lookup(new, new_name)
            if target is None:
                if flags == RENAME_EXCHANGE or new.nlink == 0:
                    raise FsError(errno.ENOENT)
                self._directories.insert(new, new_name, moved.ino, _kind(moved))
                self._leave(old, name, new, moved)
            elif flags == RENAME_NOREPLACE:
                raise FsError(errno.EEXIST)
            elif target.ino == moved.ino:
                return
            elif flags == RENAME_EXCHANGE:
                self._exchange(old, name, new, new_name, moved, self._core.inode(target.ino))
            else:
                victim = self._core.inode(target.ino)
                self._replace(new, new_name, moved, victim)
                self._leave(old, name, new, moved)
        if victim is not None:
            self._names.release(victim)

    def _refuse_into_itself(self, moved: Inode, target: Inode) -> None:
        """Raise EINVAL if ``moved`` is ``target`` or a directory above it."""
        if not stat.S_ISDIR(moved.mode):
            return
        above = target
        seen = {above.ino}
        while above.ino != moved.ino:
            if above.parent == above.ino:
                return
            above = self._names.directory(above.parent)
            if above.ino in seen:
                raise ImageError(
                    f"the directory at offset {above.record_offset}, inode {above.ino}, lies"
                    " below itself",
                    remedy="run fsck.xipfs",
                )
            seen.add(above.ino)
        raise FsError(errno.EINVAL)

    def _leave(self, old: Inode, name: bytes, new: Inode, moved: Inode) -> None:
        """Take the old name away, with ``moved`` entered under its new one."""
        self._directories.remove(old, name)
        self._reparent(moved, old, new)
        self._stamp(old, new, moved)

    def _replace(self, new: Inode, new_name: bytes, moved: Inode, victim: Inode) -> None:
        if stat.S_ISDIR(victim.mode):
            if not stat.S_ISDIR(moved.mode):
                raise FsError(errno.EISDIR)
            self._names.check_removable_directory(victim)
            new.nlink -= 1
        elif stat.S_ISDIR(moved.mode):
            raise FsError(errno.ENOTDIR)
        self._directories.replace(new, new_name, moved.ino, _kind(moved))
        self._names.unlinked(victim, self._core.now_ns())

    def _exchange(
        self, old: Inode, name: bytes, new: Inode, new_name: bytes, moved: Inode, other: Inode
    ) -> None:
        self._refuse_into_itself(other, old)
        self._directories.replace(old, name, other.ino, _kind(other))
        self._directories.replace(new, new_name, moved.ino, _kind(moved))
        self._reparent(moved, old, new)
        self._reparent(other, new, old)
        self._stamp(old, new, moved, other)

    @staticmethod
    def _reparent(moved: Inode, old: Inode, new: Inode) -> None:
        if stat.S_ISDIR(moved.mode) and old is not new:
            old.nlink -= 1
            new.nlink += 1
            moved.parent = new.ino

    def _stamp(self, old: Inode, new: Inode, *moved: Inode) -> None:
        now = self._core.now_ns()
        for directory in (old, new):
            directory.mtime_ns = directory.ctime_ns = now
            self._core.put(directory)
        for inode in moved:
            inode.ctime_ns = now
            self._core.put(inode)


def _kind(inode: Inode) -> int:
    return stat.S_IFMT(inode.mode) >> 12
