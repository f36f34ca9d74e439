"""What the filesystem answers with: frozen records without any type of FUSE."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from xipfs.units import Ino, PageIndex, Pfn


class PageKind(enum.Enum):
    """Where a page of a file lives; a hole lives nowhere."""

    HOLE = "hole"
    XIP = "xip"
    PAGECACHE = "pagecache"


class WriteOrigin(enum.Enum):
    """Whose bytes a write carries.

    WRITEBACK: the kernel sends its dirty page because xipfs itself invalidated it. Nobody touched
    the page, so the write makes nothing resident and says nothing about how hot the page is.
    """

    PROGRAM = "program"
    WRITEBACK = "writeback"


@dataclass(frozen=True, slots=True)
class Attr:
    """What stat(2) tells of an inode; times in nanoseconds since the epoch."""

    ino: Ino
    generation: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size_bytes: int
    blocks_512: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class AttrChange:
    """What a setattr changes; None leaves a field as it is. Only permission bits of the mode."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size_bytes: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


@dataclass(frozen=True, slots=True)
class StatFs:
    """What statfs(2) tells; blocks of ``block_size`` bytes, inodes as many as blocks allow."""

    block_size: int
    blocks_total: int
    blocks_free: int
    inodes_total: int
    inodes_free: int
    name_max: int


@dataclass(frozen=True, slots=True)
class PageState:
    """One page's placement. ``pfn``: the frame a fault would map now; None if it must be filled."""

    kind: PageKind
    resident: bool
    dirty: bool
    pfn: Pfn | None


@dataclass(frozen=True, slots=True)
class PageRun:
    """``count`` pages from ``first`` on with the same kind and residency."""

    first: PageIndex
    count: int
    kind: PageKind
    resident: bool
