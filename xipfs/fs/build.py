"""Making an image: an empty one, or one that holds a copy of a real tree.

The tree is filled in through the Filesystem itself, so an image from mkfs and one that programs
wrote to are made by the same code. The image grows up under another name beside its place and is
moved there when it is complete: a failure or an interrupt leaves what was there before.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from xipfs.clock import Clock
from xipfs.image import layout
from xipfs.image.record import Inode
from xipfs.image.superblock import geometry
from xipfs.image.volume import Volume, format_medium
from xipfs.memory.region import Region


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
        format_medium(region, superblock)
        _make_root(Volume(region, str(path)), clock)
    finally:
        region.close()


def _make_root(volume: Volume, clock: Clock) -> None:
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
