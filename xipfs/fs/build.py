"""Making an image: an empty one, or one that holds a copy of a real tree.

The tree is filled in through the Filesystem itself, so an image from mkfs and one that programs
wrote to are made by the same code. The image grows up under another name beside its place and is
moved there when it is complete: a failure or an interrupt leaves what was there before.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xipfs.clock import Clock
from xipfs.errors import UsageError
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.imagelock import ImageLock
from xipfs.fs.tree import Copied, Copy, Tree, check_fits
from xipfs.image import layout
from xipfs.image.record import Inode
from xipfs.image.superblock import Superblock, geometry
from xipfs.image.volume import Volume, format_medium, publish
from xipfs.memory.region import Medium, Region

#: Frames for page-cache pages while an image is filled; they go home when RAM is full.
_BUILD_RAM_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class Build:
    """What image to make: size in bytes, label, whether new pages are pagecache pages."""

    size_bytes: int
    label: str = ""
    pagecache: bool = False


@dataclass(frozen=True)
class Made:
    """What was made; sizes in bytes."""

    size_bytes: int
    free_bytes: int
    copied: Copied


def replace_image(
    path: Path, build: Build, tree: Tree | None, clock: Clock, progress: Callable[[int], None]
) -> Made:
    """Make an image at ``path``, in place of one that may be there and must not be in use.

    Raises UsageError or ImageError, having left what was there.
    """
    growing = path.with_name(f".{path.name}.{os.getpid()}.new")
    with _unused(path):
        try:
            make_empty(
                growing,
                size_bytes=build.size_bytes,
                label=build.label,
                pagecache=build.pagecache,
                clock=clock,
            )
            made = _fill(growing, build, tree, clock, progress)
            os.replace(growing, path)
        finally:
            growing.unlink(missing_ok=True)
    return made


@contextlib.contextmanager
def _unused(path: Path) -> Iterator[None]:
    """Hold the lock of an image that is about to be replaced."""
    if not path.exists():
        yield
        return
    if not path.is_file():
        raise UsageError(f"{path} is not a regular file", expected="an image, or no file")
    lock = ImageLock(path, exclusive=True)
    try:
        yield
    finally:
        lock.release()


def _fill(
    path: Path, build: Build, tree: Tree | None, clock: Clock, progress: Callable[[int], None]
) -> Made:
    fs = Filesystem.open(path, ram_bytes=_BUILD_RAM_BYTES, clock=clock)
    try:
        copied = Copied()
        if tree is not None:
            check_fits(tree, fs.statfs().blocks_free)
            copied = Copy(fs, tree, progress).run()
        free = fs.statfs()
        fs.close()
    finally:
        fs.abandon()
    return Made(build.size_bytes, free.blocks_free * free.block_size, copied)


def make_empty(path: Path, *, size_bytes: int, label: str, pagecache: bool, clock: Clock) -> None:
    """Write an image with an empty root directory to the new, not yet existing file ``path``."""
    superblock = geometry(
        size_bytes,
        uuid=os.urandom(16),
        hash_key=os.urandom(16),
        created_ns=clock.realtime_ns(),
        default_pagecache=pagecache,
        label=label,
    )
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.ftruncate(descriptor, size_bytes)
    finally:
        os.close(descriptor)
    region = Region(path, writable=True)
    try:
        make_image(region, superblock, clock)
    finally:
        region.close()


def make_image(medium: Medium, superblock: Superblock, clock: Clock) -> None:
    """Write an image with an empty root directory to a medium that holds zeros."""
    format_medium(medium, superblock)
    volume = Volume(medium, "new image", superblock)
    with volume.transaction():
        root: Inode = volume.inodes.create()
        assert root.ino == layout.ROOT_INO
        root.mode = stat.S_IFDIR | 0o755
        root.nlink = 2
        root.uid, root.gid = os.getuid(), os.getgid()
        root.parent = root.ino
        root.pagecache = volume.superblock.default_pagecache
        root.atime_ns = root.mtime_ns = root.ctime_ns = clock.realtime_ns()
        volume.inodes.put(root)
    publish(medium, superblock)
