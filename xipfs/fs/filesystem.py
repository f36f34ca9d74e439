"""The filesystem: everything a mount or a tool can ask of an image, in one class.

It is synchronous and knows nothing of FUSE. One thread at a time may call it; a call that returns
has happened wholly, one that raises has changed nothing. Names are bytes, times nanoseconds, sizes
and offsets bytes, pages 4 KiB. Expected failures raise FsError with the errno of the system call;
damage raises ImageError (EIO) naming the structure and where it lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Self

from xipfs.clock import Clock
from xipfs.fs.attributes import Attributes
from xipfs.fs.content import Content
from xipfs.fs.core import Core, attr_of
from xipfs.fs.frames_by_page import Pfns
from xipfs.fs.imagelock import ImageLock
from xipfs.fs.lifetime import Lifetime, opened
from xipfs.fs.moving import Moved, Moving
from xipfs.fs.namespace import Namespace
from xipfs.fs.pagecache import CacheStatistics, Chooser, PageHook, RunHook, nobody
from xipfs.fs.placement import Placement
from xipfs.fs.reclaim import Reclaim
from xipfs.fs.rename import Rename
from xipfs.fs.types import Attr, AttrChange, PageKind, PageRun, PageState, StatFs, WriteOrigin
from xipfs.fs.xattr import ExtendedAttributes
from xipfs.image import layout
from xipfs.image.volume import Volume
from xipfs.memory.frames import ANON_PAGES, PhysicalMemory
from xipfs.memory.region import Buffer, Medium, Region
from xipfs.units import PAGE_SHIFT, Ino, Pfn


class Filesystem(Lifetime):
    """One image, opened. Use ``open`` for an image file."""

    def __init__(
        self,
        medium: Medium,
        *,
        image_path: Path,
        ram_bytes: int,
        struct_page_bytes: int,
        clock: Clock,
        lock: ImageLock | None,
        anon_pages: int = ANON_PAGES,
    ) -> None:
        self.image_path = image_path
        self._lock = lock
        volume = Volume(medium, f"image {image_path}")
        self.memory = PhysicalMemory(
            ram_pages=ram_bytes >> PAGE_SHIFT,
            nvram_pages=volume.superblock.block_count,
            anon_pages=anon_pages,
            struct_page_bytes=struct_page_bytes,
        )
        self._core = Core(volume, self.memory, clock, read_only=not medium.writable)
        self._content = Content(self._core)
        self._placement = Placement(self._core, self._content)
        self._moving = Moving(self._core)
        self._reclaim = Reclaim(self._core)
        self._attributes = Attributes(self._core, self._content, self._reclaim)
        self._names = Namespace(self._core, self._reclaim)
        self._rename = Rename(self._core, self._names)
        self._xattrs = ExtendedAttributes(self._core)
        self._begin()

    @classmethod
    def open(
        cls,
        image_path: Path,
        *,
        ram_bytes: int,
        struct_page_bytes: int = 64,
        read_only: bool = False,
        sync_fences: bool = False,
        clock: Clock,
    ) -> Self:
        """Lock and open the image file.

        An image that was not closed cleanly is recovered first: its pending transaction is
        finished and its orphans are freed (read-only: only shown so; nothing is written). With
        ``sync_fences`` every fence waits for the host's disk, not only fsync and close.
        A damaged image is opened read-only, or not at all: ``damage`` says why.
        Raise ImageBusyError if another process has it, ImageError if it is not usable.
        """
        return opened(
            lambda as_read_only: cls._open_once(
                image_path, ram_bytes, struct_page_bytes, as_read_only, sync_fences, clock
            ),
            read_only=read_only,
        )

    @classmethod
    def _open_once(
        cls,
        image_path: Path,
        ram_bytes: int,
        struct_page_bytes: int,
        read_only: bool,
        sync_fences: bool,
        clock: Clock,
    ) -> Self:
        lock = ImageLock(image_path, exclusive=not read_only)
        try:
            return cls(
                Region(image_path, writable=not read_only, sync_fences=sync_fences),
                image_path=image_path,
                ram_bytes=ram_bytes,
                struct_page_bytes=struct_page_bytes,
                clock=clock,
                lock=lock,
            )
        except BaseException:
            lock.release()
            raise

    @property
    def label(self) -> str:
        """The image's label, as given to mkfs."""
        return self._core.volume.superblock.label

    @property
    def read_only(self) -> bool:
        """Whether every change is refused with EROFS."""
        return self._core.read_only

    @property
    def medium(self) -> Medium:
        """The medium beneath: its statistics tell what was stored, flushed and fenced."""
        return self._core.medium

    def set_hooks(
        self, *, on_unmap: RunHook, on_evict: PageHook, on_cut: PageHook, chooser: Chooser = nobody
    ) -> None:
        """Install what is called around losing a frame or a page; none may call the filesystem.

        ``on_unmap(ino, first, count)`` must zap every PTE of the pages and drop the references
        that go with them; ``on_evict(ino, index)`` tells that the page is not resident any more,
        ``on_cut(ino, first)`` that the file ends before page ``first``, XIP pages included;
        ``chooser(count)`` names pages that shall lose their frames before others.
        """
        cache = self._core.cache
        cache.on_unmap, cache.on_evict, cache.on_cut = on_unmap, on_evict, on_cut
        cache.choose_victims = chooser

    def cache_statistics(self) -> CacheStatistics:
        """Return what the page cache did since the mount."""
        return self._core.cache.statistics()

    # Names

    def lookup(self, parent: int, name: bytes) -> Attr:
        """Return the attributes of ``name`` in directory ``parent``; ENOENT, ENOTDIR."""
        return self._names.lookup(parent, name)

    def readdir(self, ino: int, cookie: int) -> Iterator[tuple[bytes, Attr, int]]:
        """Yield (name, attributes, next cookie) after ``cookie``, without . and .."""
        return self._names.readdir(ino, cookie)

    def parent_of(self, ino: int) -> Ino:
        """Return the inode number of a directory's parent; the root is its own."""
        return Ino(self._core.inode(ino).parent or ino)

    def readlink(self, ino: int) -> bytes:
        """Return a symbolic link's target; EINVAL."""
        return self._names.readlink(ino)

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, uid: int, gid: int) -> Attr:
        """Make a regular file, device, FIFO or socket; EEXIST, ENOSPC, ENAMETOOLONG."""
        return self._names.mknod(parent, name, mode, rdev, uid, gid)

    def mkdir(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> Attr:
        """Make a directory; EEXIST, ENOSPC, ENAMETOOLONG."""
        return self._names.mkdir(parent, name, mode, uid, gid)

    def symlink(self, parent: int, name: bytes, target: bytes, uid: int, gid: int) -> Attr:
        """Make a symbolic link; EEXIST, ENOSPC, ENAMETOOLONG."""
        return self._names.symlink(parent, name, target, uid, gid)

    def link(self, ino: int, parent: int, name: bytes) -> Attr:
        """Give a file one more name; EPERM for directories, EEXIST, ENOSPC, EMLINK."""
        return self._names.link(ino, parent, name)

    def unlink(self, parent: int, name: bytes) -> None:
        """Remove a name; EISDIR, ENOENT."""
        self._names.unlink(parent, name)

    def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory; ENOTDIR, ENOTEMPTY, ENOENT."""
        self._names.rmdir(parent, name)

    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0
    ) -> None:
        """Rename as renameat2(2) with RENAME_NOREPLACE (1) or RENAME_EXCHANGE (2)."""
        self._rename.rename(parent, name, new_parent, new_name, flags)

    # Inodes

    def getattr(self, ino: int) -> Attr:
        """Return the attributes of an inode; ENOENT."""
        return attr_of(self._core.inode(ino))

    def setattr(
        self,
        ino: int,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size_bytes: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
    ) -> Attr:
        """Change what is given, at once: permissions, owner, size, times; EFBIG, EISDIR, EROFS."""
        change = AttrChange(mode, uid, gid, size_bytes, atime_ns, mtime_ns)
        return self._attributes.set(ino, change)

    def accessed(self, ino: int) -> None:
        """Move the access time after a read, as relatime does; nothing on a read-only mount."""
        self._attributes.accessed(ino)

    def hold(self, ino: int) -> None:
        """Take a reference: the inode's storage stays while there is one, names or not."""
        self._core.holds[ino] = self._core.holds.get(ino, 0) + 1

    def drop(self, ino: int, count: int = 1) -> None:
        """Give references back; the last one to an unlinked inode frees its storage."""
        self._names.drop(ino, count)

    def getxattr(self, ino: int, name: bytes) -> bytes:
        """Return an extended attribute's value; ENODATA."""
        return self._xattrs.get(ino, name)

    def listxattr(self, ino: int) -> list[bytes]:
        """Return the names of all extended attributes."""
        return self._xattrs.names(ino)

    def setxattr(self, ino: int, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set an extended attribute; flags XATTR_CREATE (1), XATTR_REPLACE (2); ENOSPC."""
        self._xattrs.set(ino, name, value, flags)

    def removexattr(self, ino: int, name: bytes) -> None:
        """Remove an extended attribute; ENODATA."""
        self._xattrs.remove(ino, name)

    # Bytes

    def read(self, ino: int, offset: int, size: int) -> Buffer:
        """Return up to ``size`` bytes; a view of the region if they lie in one run of it."""
        return self._content.read(ino, offset, size)

    def write(
        self,
        ino: int,
        offset: int,
        data: Buffer,
        *,
        origin: WriteOrigin = WriteOrigin.PROGRAM,
    ) -> int:
        """Write and return how many bytes were taken; ENOSPC, EFBIG, EROFS.

        ``origin`` WRITEBACK: the kernel sent its own bytes because xipfs invalidated the page; if
        that is not resident, they go straight home.
        """
        return self._content.write(ino, offset, data, origin)

    def fsync(self, ino: int, datasync: bool = False) -> None:
        """Write the file's dirty pages home and bring the image to the host's disk.

        Size, times and names were durable when their call returned: ``datasync`` saves nothing.
        """
        del datasync
        self._core.inode(ino)
        if not self.read_only:
            self._core.cache.sync_file(ino)
            self._core.medium.sync()

    def sync_names(self) -> None:
        """Bring what is durable in the region (all names and attributes) to the host's disk."""
        if not self.read_only:
            self._core.medium.sync()

    def sync(self) -> None:
        """Write all dirty pages home and bring the image to the host's disk."""
        if not self.read_only:
            self._core.cache.sync_all()
            self._core.medium.sync()

    def statfs(self) -> StatFs:
        """Return sizes and counts, true to the block."""
        counters, superblock = self._core.volume.counters, self._core.volume.superblock
        inodes_free = counters.free_blocks * layout.INODES_PER_BLOCK
        return StatFs(
            block_size=layout.BLOCK_SIZE,
            blocks_total=superblock.data_end - superblock.data_start,
            blocks_free=counters.free_blocks,
            inodes_total=counters.inodes_used + inodes_free,
            inodes_free=inodes_free,
            name_max=layout.NAME_MAX,
        )

    # Placement

    @property
    def nr_xip_pages(self) -> int:
        """File pages of kind XIP; holes count in neither kind."""
        return self._core.volume.counters.nr_xip_pages

    @property
    def nr_pagecache_pages(self) -> int:
        """File pages of kind pagecache, resident or not."""
        return self._core.volume.counters.nr_pagecache_pages

    @property
    def nr_resident_pages(self) -> int:
        """Pagecache pages that have a RAM frame now."""
        return len(self._core.cache)

    @property
    def nr_dirty_pages(self) -> int:
        """Resident pages whose bytes are not at home yet."""
        return self._core.cache.nr_dirty

    def write_back(self, limit: int, *, older_ns: int = 0) -> int:
        """Write up to ``limit`` pages home, longest dirty first; return how many."""
        return self._core.cache.write_back(limit, older_ns=older_ns)

    def page(self, ino: int, index: int) -> PageState:
        """Return one page's placement; this is no touch."""
        return self._placement.page(ino, index)

    def runs(self, ino: int) -> Iterator[PageRun]:
        """Yield the file's pages up to its end as runs of equal kind and residency."""
        return self._placement.runs(ino)

    def runs_with_bytes(self, ino: int, pages: range) -> Iterator[range]:
        """Yield the runs of ``pages`` within the file that are no holes, in order."""
        return self._placement.runs_with_bytes(ino, pages)

    def fault_in(self, ino: int, index: int) -> tuple[Pfn, bool] | None:
        """Touch the page as an mmap fault does: (frame, whether it was filled now); hole: None.

        ENXIO beyond the end of the file, ENOMEM if every frame is pinned.
        """
        return self._placement.fault_in(ino, index)

    def resident_pfn(self, ino: int, index: int) -> Pfn | None:
        """Return the frame of a resident page-cache page, None for any other; this is no touch."""
        return self._core.cache.get(ino, index)

    def resident_frames(self) -> list[Pfn]:
        """Return the frames that the page cache holds."""
        return self._core.cache.frames()

    def touch(self, ino: int, index: int) -> None:
        """Make the page the hottest if it is resident."""
        self._placement.touch(ino, index)

    def touch_frames(self, pfns: Pfns) -> None:
        """Touch the resident pages in these frames in their order."""
        self._core.cache.touch_run(pfns)

    def take_fill_mark(self, ino: int, index: int) -> bool:
        """Return whether a read filled the page's frame and nobody asked since."""
        return self._placement.take_fill_mark(ino, index)

    def take_evicted_fill(self, ino: int, index: int) -> bool:
        """Return whether a read filled the page, it was evicted, and nobody asked since."""
        return self._placement.take_evicted_fill(ino, index)

    def has_fill_mark(self, ino: int, index: int) -> bool:
        """Return whether one of the two above would return True; nothing is taken."""
        return self._placement.has_fill_mark(ino, index)

    def promote(self, ino: int, index: int) -> bool:
        """Move an XIP page to a RAM frame, durably; False if there was nothing to move; ENOMEM."""
        return self._moving.move_one(ino, index, PageKind.PAGECACHE)

    def demote(self, ino: int, index: int) -> bool:
        """Move a pagecache page to the region, durably; False if nothing to move; EAGAIN."""
        return self._moving.move_one(ino, index, PageKind.XIP)

    def move(self, ino: int, pages: range, to: PageKind) -> Moved:
        """Move a range of pages, a transaction for each step of many; tell what became of it."""
        return self._moving.move(ino, pages, to)

    def wanted(self, ino: int, pages: range, to: PageKind) -> list[int]:
        """Return those of ``pages`` that are no holes and not of kind ``to``."""
        return self._moving.wanted(ino, pages, to)

    def set_default_kind(self, ino: int, kind: PageKind) -> None:
        """Set the kind of pages not yet written; files made in a directory inherit its kind."""
        self._placement.set_default_kind(ino, kind)
