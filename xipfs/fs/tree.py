"""Copying a real directory tree into an open filesystem: what mkfs --root-dir does.

Two passes. ``scan`` walks the tree without reading file data and adds up what it will need at
least; a tree that cannot fit is refused before anything is written. ``copy`` makes every entry
through the Filesystem, files with their holes left out (SEEK_DATA), and stamps a directory's times
last, after what goes into it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from xipfs.errors import FsError, ImageError, UsageError
from xipfs.fs.filesystem import Filesystem
from xipfs.image import layout
from xipfs.image.xattrs import NAMESPACES
from xipfs.units import PAGE_SHIFT, PAGE_SIZE, format_size, pages_of

#: Reserved in the root of every image for the mount's control files.
RESERVED_NAME: Final = b".xipfs"
_CHUNK_BYTES: Final = 1 << 20


@dataclass
class Entry:
    """One name to make; ``extents`` are a file's (offset, size) runs of data in bytes."""

    path: bytes
    parent: int
    """Position of the directory in the list of entries."""
    status: os.stat_result
    extents: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Tree:
    """A scanned tree: entries in the order in which they must be made; the first is the root."""

    entries: list[Entry]
    data_bytes: int = 0
    needed_blocks: int = 0
    """What the tree needs at least; directories may need a little more."""


@dataclass
class Copied:
    """What was copied, by type; ``hard_links`` are names beyond the first."""

    files: int = 0
    directories: int = 0
    symlinks: int = 0
    hard_links: int = 0
    special_files: int = 0
    data_bytes: int = 0
    skipped_xattrs: int = 0


def scan(root: Path) -> Tree:
    """Walk ``root`` and add up what it needs; raise UsageError if it cannot be copied."""
    if not root.is_dir():
        raise UsageError(f"{root} is not a directory", expected="the tree to copy")
    # The root itself may be named by a symbolic link; what lies below is never followed.
    tree = Tree([Entry(os.fsencode(root), 0, os.stat(root))])
    seen: set[tuple[int, int]] = set()
    inodes = name_bytes = 0
    for position, entry in enumerate(_walk(tree.entries)):
        status = entry.status
        name_bytes += len(os.path.basename(entry.path)) + layout.LEAF_RECORD.size
        if stat.S_ISDIR(status.st_mode):
            tree.needed_blocks += position > 0  # a leaf; the root's is counted by its names
        elif (status.st_dev, status.st_ino) in seen:
            continue
        elif stat.S_ISREG(status.st_mode):
            entry.extents = _extents(entry.path, status.st_size)
            tree.data_bytes += sum(size for _, size in entry.extents)
            tree.needed_blocks += _file_blocks(entry.extents)
        elif stat.S_ISLNK(status.st_mode):
            tree.needed_blocks += 1
        seen.add((status.st_dev, status.st_ino))
        inodes += 1
    tree.needed_blocks += -(-inodes // layout.INODES_PER_BLOCK) + (name_bytes >> PAGE_SHIFT)
    return tree


def _walk(entries: list[Entry]) -> Iterator[Entry]:
    """Yield the entries while the list grows by what each directory holds."""
    position = 0
    while position < len(entries):
        entry = entries[position]
        yield entry
        if stat.S_ISDIR(entry.status.st_mode):
            try:
                names = sorted(os.listdir(entry.path))
            except OSError as error:
                raise _unreadable(entry.path, error) from error
            if position == 0 and RESERVED_NAME in names:
                raise UsageError(
                    f"{os.fsdecode(entry.path)} has an entry .xipfs, the control directory's name",
                    remedy="rename it, or copy the tree without it",
                )
            for name in names:
                path = os.path.join(entry.path, name)
                entries.append(Entry(path, position, os.lstat(path)))
        position += 1


def _unreadable(path: bytes, error: OSError) -> UsageError:
    return UsageError(
        f"{os.fsdecode(path)} cannot be read: {error.strerror}",
        remedy="run as a user who may read it, or leave it out of the tree",
    )


def _extents(path: bytes, size: int) -> list[tuple[int, int]]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise _unreadable(path, error) from error
    extents = []
    try:
        at = 0
        while at < size:
            try:
                start = os.lseek(descriptor, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    break  # a hole up to the end
                raise
            at = os.lseek(descriptor, start, os.SEEK_HOLE)
            extents.append((start, min(at, size) - start))
    finally:
        os.close(descriptor)
    return extents


def _file_blocks(extents: list[tuple[int, int]]) -> int:
    """Return the blocks of a file's data and of its map."""
    pages = 0
    last = -1
    leaves: set[int] = set()
    for offset, size in extents:
        first, stop = max(offset >> PAGE_SHIFT, last + 1), pages_of(offset + size)
        pages += max(stop - first, 0)
        last = stop - 1
        leaves.update(range(first // layout.FANOUT, -(-stop // layout.FANOUT)))
    nodes = 0
    level = leaves if last > 0 else set()
    while level:
        nodes += len(level)
        level = {node // layout.FANOUT for node in level} if max(level) else set()
    return pages + nodes


def check_fits(tree: Tree, free_blocks: int) -> None:
    """Raise ImageError, saying by how much, if the tree cannot fit into ``free_blocks``."""
    if tree.needed_blocks > free_blocks:
        short = (tree.needed_blocks - free_blocks) * PAGE_SIZE
        raise ImageError(
            f"the tree needs at least {format_size(tree.needed_blocks * PAGE_SIZE)} and the image "
            f"has room for {format_size(free_blocks * PAGE_SIZE)}: {format_size(short)} short",
            remedy="give a larger --size",
        )


class Copy:
    """Copies a scanned tree; ``progress`` hears of every piece of data, in bytes."""

    def __init__(self, fs: Filesystem, tree: Tree, progress: Callable[[int], None]) -> None:
        self._fs = fs
        self._tree = tree
        self._progress = progress
        self._made: dict[tuple[int, int], int] = {}
        self._inos: list[int] = []
        self.copied = Copied()

    def run(self) -> Copied:
        """Copy everything; raises ImageError if the image is full after all."""
        entries = self._tree.entries
        try:
            for position, entry in enumerate(entries):
                self._inos.append(self._make(position, entry))
            for ino, entry in zip(reversed(self._inos), reversed(entries), strict=True):
                if stat.S_ISDIR(entry.status.st_mode):
                    self._stamp(ino, entry.status)
        except FsError as error:
            if error.errno != errno.ENOSPC:
                raise
            done = self.copied.data_bytes
            raise ImageError(
                f"the image is full after {format_size(done)} of "
                f"{format_size(self._tree.data_bytes)} of file data",
                remedy="give a larger --size",
            ) from error
        return self.copied

    def _make(self, position: int, entry: Entry) -> int:
        status = entry.status
        if position == 0:
            ino = layout.ROOT_INO
            self._copy_xattrs(entry.path, ino)
            return ino
        parent, name = self._inos[entry.parent], os.path.basename(entry.path)
        identity = (status.st_dev, status.st_ino)
        if identity in self._made and not stat.S_ISDIR(status.st_mode):
            self._fs.link(self._made[identity], parent, name)
            self.copied.hard_links += 1
            return self._made[identity]
        ino = self._make_inode(entry, parent, name)
        self._made[identity] = ino
        self._copy_xattrs(entry.path, ino)
        if not stat.S_ISDIR(status.st_mode):
            self._stamp(ino, status)
        return ino

    def _make_inode(self, entry: Entry, parent: int, name: bytes) -> int:
        fs, status, copied = self._fs, entry.status, self.copied
        uid, gid = status.st_uid, status.st_gid
        if stat.S_ISDIR(status.st_mode):
            copied.directories += 1
            return fs.mkdir(parent, name, stat.S_IMODE(status.st_mode), uid, gid).ino
        if stat.S_ISLNK(status.st_mode):
            copied.symlinks += 1
            return fs.symlink(parent, name, os.readlink(entry.path), uid, gid).ino
        ino = fs.mknod(parent, name, status.st_mode, status.st_rdev, uid, gid).ino
        if stat.S_ISREG(status.st_mode):
            copied.files += 1
            self._copy_data(entry, ino)
        else:
            copied.special_files += 1
        return ino

    def _copy_data(self, entry: Entry, ino: int) -> None:
        with open(entry.path, "rb", buffering=0) as file:
            for offset, size in entry.extents:
                end = offset + size
                while offset < end:
                    data = os.pread(file.fileno(), min(_CHUNK_BYTES, end - offset), offset)
                    if not data:
                        break  # the file became shorter meanwhile; copy what is there
                    self._fs.write(ino, offset, data)
                    offset += len(data)
                    self.copied.data_bytes += len(data)
                    self._progress(len(data))
        if self._fs.getattr(ino).size_bytes < entry.status.st_size:
            self._fs.setattr(ino, size_bytes=entry.status.st_size)

    def _copy_xattrs(self, path: bytes, ino: int) -> None:
        try:
            names = os.listxattr(path, follow_symlinks=False)
        except OSError as error:
            if error.errno == errno.ENOTSUP:
                return
            raise _unreadable(path, error) from error
        for name in map(os.fsencode, names):
            if name.startswith(NAMESPACES):
                value = os.getxattr(path, name, follow_symlinks=False)
                self._fs.setxattr(ino, name, value)
            else:
                self.copied.skipped_xattrs += 1

    def _stamp(self, ino: int, status: os.stat_result) -> None:
        """Set what making and filling the inode has moved: mode, owner, times."""
        self._fs.setattr(
            ino,
            mode=None if stat.S_ISLNK(status.st_mode) else stat.S_IMODE(status.st_mode),
            uid=status.st_uid,
            gid=status.st_gid,
            atime_ns=status.st_atime_ns,
            mtime_ns=status.st_mtime_ns,
        )
