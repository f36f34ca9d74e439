"""Changing what stat(2) tells: permission bits, owner, size, times; each call one change.

A call that changes several things at once, as a truncate that takes the set-user-ID bit does,
makes them in the transaction that makes the new size final, so a cut finds all or nothing.
"""

from __future__ import annotations

import errno
import stat
from typing import Final

from xipfs.errors import FsError
from xipfs.fs.content import Content
from xipfs.fs.core import Amend, Core, attr_of
from xipfs.fs.reclaim import Reclaim
from xipfs.fs.types import Attr, AttrChange
from xipfs.image.record import Inode

_TIME_MAX_NS: Final = (1 << 63) - 1
#: relatime(8): an access time older than this moves with any access.
_RELATIME_NS: Final = 24 * 3600 * 10**9


class Attributes:
    """The attributes of all inodes."""

    def __init__(self, core: Core, content: Content, reclaim: Reclaim) -> None:
        self._core = core
        self._content = content
        self._reclaim = reclaim

    def set(self, ino: int, change: AttrChange) -> Attr:
        """Make the change; EFBIG, EISDIR, EINVAL, EROFS."""
        core = self._core
        core.check_writable()
        now_ns = core.now_ns()

        def amend(inode: Inode) -> None:
            _amend(inode, change, now_ns)

        if change.size_bytes is None:
            with core.change():
                inode = core.inode(ino)
                amend(inode)
                core.put(inode)
        else:
            self._set_size(ino, change.size_bytes, amend)
        return attr_of(core.inode(ino))

    def accessed(self, ino: int) -> None:
        """Move the access time as relatime does: if it is not newer than a change, or a day old."""
        core = self._core
        inode = core.inode(ino)
        now_ns = core.now_ns()
        newest_change_ns = max(inode.mtime_ns, inode.ctime_ns)
        recent = inode.atime_ns > newest_change_ns and now_ns - inode.atime_ns < _RELATIME_NS
        if core.read_only or recent:
            return
        with core.change():
            inode.atime_ns = now_ns
            core.put(inode)

    def _set_size(self, ino: int, size_bytes: int, amend: Amend) -> None:
        if size_bytes < 0:
            raise FsError(errno.EINVAL)
        if size_bytes < self._core.regular(ino).size_bytes:
            self._reclaim.shrink(ino, size_bytes, amend)
        else:
            self._content.grow(ino, size_bytes, amend)


def _amend(inode: Inode, change: AttrChange, now_ns: int) -> None:
    if change.mode is not None:
        inode.mode = stat.S_IFMT(inode.mode) | stat.S_IMODE(change.mode)
    inode.uid = inode.uid if change.uid is None else change.uid
    inode.gid = inode.gid if change.gid is None else change.gid
    if change.size_bytes is not None:
        inode.mtime_ns = now_ns
    inode.atime_ns = inode.atime_ns if change.atime_ns is None else _clamped(change.atime_ns)
    inode.mtime_ns = inode.mtime_ns if change.mtime_ns is None else _clamped(change.mtime_ns)
    inode.ctime_ns = now_ns


def _clamped(time_ns: int) -> int:
    """Return the nearest time that the inode's signed 64 bits hold (years 1677 to 2262)."""
    return min(max(time_ns, -_TIME_MAX_NS - 1), _TIME_MAX_NS)
