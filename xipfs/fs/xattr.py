"""Extended attributes as calls: one attribute at a time, with the flags of setxattr(2)."""

from __future__ import annotations

import errno
from typing import Final

from xipfs.errors import FsError
from xipfs.fs.core import Core
from xipfs.image.xattrs import NAMESPACES

XATTR_CREATE: Final = 1
XATTR_REPLACE: Final = 2
_NAME_MAX: Final = 255


class ExtendedAttributes:
    """The attributes of all inodes."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def get(self, ino: int, name: bytes) -> bytes:
        """Return the value; ENODATA if there is none, EOPNOTSUPP for a namespace not kept."""
        _check_namespace(name)
        try:
            return self._core.volume.xattrs.load(self._core.inode(ino))[name]
        except KeyError:
            raise FsError(errno.ENODATA) from None

    def names(self, ino: int) -> list[bytes]:
        """Return the names, oldest first."""
        return list(self._core.volume.xattrs.load(self._core.inode(ino)))

    def set(self, ino: int, name: bytes, value: bytes, flags: int) -> None:
        """Set or replace; EEXIST, ENODATA by the flags, ERANGE for a name, ENOSPC, EOPNOTSUPP."""
        if not 0 < len(name) <= _NAME_MAX:
            raise FsError(errno.ERANGE)
        _check_namespace(name)
        if flags not in (0, XATTR_CREATE, XATTR_REPLACE):
            raise FsError(errno.EINVAL)
        with self._core.change():
            inode = self._core.inode(ino)
            attributes = self._core.volume.xattrs.load(inode)
            if flags == XATTR_CREATE and name in attributes:
                raise FsError(errno.EEXIST)
            if flags == XATTR_REPLACE and name not in attributes:
                raise FsError(errno.ENODATA)
            attributes[name] = value
            self._save(ino, attributes)

    def remove(self, ino: int, name: bytes) -> None:
        """Remove; ENODATA if there is none, EOPNOTSUPP for a namespace not kept."""
        _check_namespace(name)
        with self._core.change():
            attributes = self._core.volume.xattrs.load(self._core.inode(ino))
            if attributes.pop(name, None) is None:
                raise FsError(errno.ENODATA)
            self._save(ino, attributes)

    def _save(self, ino: int, attributes: dict[bytes, bytes]) -> None:
        inode = self._core.inode(ino)
        self._core.volume.xattrs.save(inode, attributes)
        inode.ctime_ns = self._core.now_ns()
        self._core.put(inode)


def _check_namespace(name: bytes) -> None:
    if not name.startswith(NAMESPACES):
        raise FsError(errno.EOPNOTSUPP)
    if name in NAMESPACES:
        raise FsError(errno.EINVAL)
