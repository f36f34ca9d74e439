"""By which name each file that the kernel knows was reached last.

An inode has no name of its own, and may have many. As /proc/PID/maps does, a file is called by the
name that it was looked up by; if that is removed, by the same name and ``(deleted)``. Kept are the
inodes that the kernel holds: 210 bytes each (tracemalloc, 200,000 names of 21 bytes), beside 1,088
of the kernel's own (fuse_inode and dentry in /proc/slabinfo, 6.18).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from xipfs.errors import FsError
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import Attr
from xipfs.image.layout import ROOT_INO
from xipfs.stats.trace_columns import printable

_EXCHANGE: Final = 2


class _Name(NamedTuple):
    parent: int
    name: bytes
    deleted: bool = False


class Paths:
    """Names by inode; ``of`` puts them together."""

    def __init__(self) -> None:
        self._names: dict[int, _Name] = {}
        self._made: dict[int, str] = {}

    def name(self, ino: int, parent: int, name: bytes) -> None:
        """Hear that ``ino`` is reached by ``name`` in directory ``parent``."""
        told = _Name(parent, name)
        known = self._names.get(ino)
        if known != told:
            self._names[ino] = told
            self._made.pop(ino, None)
            if known is not None:
                # Of a directory: what lies below it has another path as well.
                self._made.clear()

    def unname(self, ino: int, parent: int, name: bytes) -> None:
        """Hear that the name is gone."""
        if self._names.get(ino) == _Name(parent, name):
            self._names[ino] = _Name(parent, name, deleted=True)
            self._made.clear()

    def forget(self, ino: int) -> None:
        """Hear that nobody holds the inode any more."""
        self._names.pop(ino, None)
        self._made.pop(ino, None)

    def of(self, ino: int) -> str:
        """Return the file's path below the mount point; "" if it is not known."""
        path = self._made.get(ino)
        if path is None:
            path = self._made[ino] = self._path(ino)
        return path

    def _path(self, ino: int) -> str:
        known = self._names.get(ino)
        if known is None:
            return ""
        parts = [known.name]
        parent = known.parent
        while parent != ROOT_INO:
            above = self._names.get(parent)
            # The kernel forgets a directory only after what it knows below it.
            parts.append(b"?" if above is None else above.name)
            parent = ROOT_INO if above is None else above.parent
        path = printable(b"/".join(reversed(parts)))
        return f"{path} (deleted)" if known.deleted else path


class NamedFilesystem(Filesystem):
    """A filesystem that keeps ``paths``, the names by which its files are used."""

    def __init__(self, *words: Any, **options: Any) -> None:
        self.paths = Paths()
        super().__init__(*words, **options)

    def lookup(self, parent: int, name: bytes) -> Attr:
        """Return the attributes of a name, and know the file by it."""
        return self._named(super().lookup(parent, name), parent, name)

    def readdir(self, ino: int, cookie: int) -> Iterator[tuple[bytes, Attr, int]]:
        """Yield entries; one that the caller goes on after is known to the kernel."""
        for name, attr, following in super().readdir(ino, cookie):
            yield name, attr, following
            self.paths.name(attr.ino, ino, name)

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, uid: int, gid: int) -> Attr:
        """Make a file."""
        return self._named(super().mknod(parent, name, mode, rdev, uid, gid), parent, name)

    def mkdir(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> Attr:
        """Make a directory."""
        return self._named(super().mkdir(parent, name, mode, uid, gid), parent, name)

    def link(self, ino: int, parent: int, name: bytes) -> Attr:
        """Give a file one more name, which is the latest."""
        return self._named(super().link(ino, parent, name), parent, name)

    def unlink(self, parent: int, name: bytes) -> None:
        """Remove a name."""
        ino = super().lookup(parent, name).ino
        super().unlink(parent, name)
        self.paths.unname(ino, parent, name)

    def rmdir(self, parent: int, name: bytes) -> None:
        """Remove a directory."""
        ino = super().lookup(parent, name).ino
        super().rmdir(parent, name)
        self.paths.unname(ino, parent, name)

    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0
    ) -> None:
        """Rename; what had the new name has the old one then, or none."""
        ino = super().lookup(parent, name).ino
        try:
            other = super().lookup(new_parent, new_name).ino
        except FsError:
            other = ino
        super().rename(parent, name, new_parent, new_name, flags)
        if other != ino and flags & _EXCHANGE:
            self.paths.name(other, parent, name)
        elif other != ino:
            self.paths.unname(other, new_parent, new_name)
        self.paths.name(ino, new_parent, new_name)

    def drop(self, ino: int, count: int = 1) -> None:
        """Give references back; with the last the file's name is forgotten."""
        super().drop(ino, count)
        if ino not in self._core.holds:
            self.paths.forget(ino)

    def _named(self, attr: Attr, parent: int, name: bytes) -> Attr:
        self.paths.name(attr.ino, parent, name)
        return attr
