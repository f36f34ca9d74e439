"""Reading and writing a file's bytes, in place (XIP pages) or through frames (pagecache pages).

A write never changes a page's kind; a hole takes the inode's default kind when bytes arrive. Every
page has its home block from its first write on, so a full image is noticed by the write that does
not fit, never by a later write-back.

What a cut can leave: words of an overwritten page are old or new; a fresh block is filled and
flushed before the transaction that links it, whose first fence makes it durable, so no other
file's bytes ever show; size, times and map entries change together or not at all. Bytes behind the
end of a file may be anything (a mapping can store there, a cut append leaves some), so whoever
moves the end up zeroes from the old end to the end of its page first; that is the one place where
it is done.
"""

from __future__ import annotations

import errno
from typing import Final

import numpy as np

from xipfs.errors import FsError, OutOfFramesError
from xipfs.fs.core import Amend, Core
from xipfs.fs.segments import Segment, segments
from xipfs.fs.types import PageKind, WriteOrigin
from xipfs.image import layout
from xipfs.image.filemap import Entries
from xipfs.image.layout import BLOCK_SHIFT, MAX_FILE_BYTES
from xipfs.image.record import Inode
from xipfs.memory.region import Buffer
from xipfs.units import PAGE_SHIFT, PAGE_SIZE, Pfn

#: Pages a transaction links at most: what the kernel sends at once, so that of one request all is
#: taken or nothing. It does not look at how much of a write-back was. With the smallest journal
#: the bitmap may scatter them over this many lines and they still fit.
_CHUNK_PAGES: Final = 256
_OFFSET_MASK: Final = PAGE_SIZE - 1


class Content:
    """The bytes of regular files."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def read(self, ino: int, offset: int, size: int) -> Buffer:
        """Return up to ``size`` bytes at ``offset``; fewer at the end of the file.

        Pages that lie in one run of the region come as a view of it. Pagecache pages become
        resident and are touched.
        """
        inode = self._core.regular(ino)
        if offset < 0 or size < 0:
            raise FsError(errno.EINVAL)
        size = min(size, inode.size_bytes - offset)
        if size <= 0:
            return b""
        first = offset >> PAGE_SHIFT
        count = ((offset + size - 1) >> PAGE_SHIFT) - first + 1
        bodies = self._core.volume.maps.entries(inode, first, count)
        skip = offset & _OFFSET_MASK
        parts = list(segments(bodies))
        if len(parts) == 1 and parts[0].kind is PageKind.XIP:
            return self._core.medium.load((parts[0].block << BLOCK_SHIFT) + skip, size)
        pages = bytearray(count << PAGE_SHIFT)
        for part in parts:
            self._copy_out(ino, first, part, pages)
        return memoryview(pages)[skip : skip + size]

    def write(
        self, ino: int, offset: int, data: Buffer, origin: WriteOrigin = WriteOrigin.PROGRAM
    ) -> int:
        """Write ``data`` at ``offset`` and return how many bytes were taken.

        Fewer than given only if the image fills up on the way. Raise FsError: ENOSPC, EFBIG,
        EROFS, EISDIR, EINVAL.
        """
        self._core.check_writable()
        if offset < 0:
            raise FsError(errno.EINVAL)
        if offset >= MAX_FILE_BYTES and len(data):
            raise FsError(errno.EFBIG)
        view = memoryview(data)[: MAX_FILE_BYTES - offset]
        done = 0
        while done < len(view):
            at = offset + done
            room = _CHUNK_PAGES * PAGE_SIZE - (at & _OFFSET_MASK)
            chunk = view[done : done + room]
            try:
                self._write_chunk(ino, at, chunk, origin)
            except FsError as error:
                if error.errno == errno.ENOSPC and done:
                    break
                raise
            done += len(chunk)
        return done

    def grow(self, ino: int, size_bytes: int, amend: Amend) -> None:
        """Move the end of the file up to ``size_bytes``; what is new reads as zeros."""
        if size_bytes > MAX_FILE_BYTES:
            raise FsError(errno.EFBIG)
        self._core.check_writable()
        self._zero_behind_end(self._core.regular(ino))
        with self._core.change():
            inode = self._core.inode(ino)
            inode.size_bytes = size_bytes
            amend(inode)
            self._core.put(inode)

    def resident(self, ino: int, index: int, home: int) -> tuple[Pfn, bool]:
        """Touch a pagecache page; return its frame and whether that had to be filled from home.

        Raise OutOfFramesError if every frame is pinned.
        """
        page = self._core.cache.get(ino, index)
        if page is not None:
            self._core.cache.touch(page)
            return page, False
        return self._core.cache.admit(ino, index, home, load=True), True

    def _copy_out(self, ino: int, first: int, part: Segment, pages: bytearray) -> None:
        """Copy one segment's bytes to their place in ``pages`` (which holds zeros)."""
        start, stop = part.start << PAGE_SHIFT, part.stop << PAGE_SHIFT
        medium = self._core.medium
        if part.kind is PageKind.XIP:
            pages[start:stop] = medium.load(part.block << BLOCK_SHIFT, stop - start)
        elif part.kind is PageKind.PAGECACHE:
            for number in range(part.start, part.stop):
                home = part.block + number - part.start
                at = number << PAGE_SHIFT
                try:
                    page, filled = self.resident(ino, first + number, home)
                except OutOfFramesError:
                    # Everything is pinned: the page stays where it is and is read from there.
                    pages[at : at + PAGE_SIZE] = medium.load(home << BLOCK_SHIFT, PAGE_SIZE)
                    continue
                if filled:
                    self._core.cache.mark_filled(page)
                pages[at : at + PAGE_SIZE] = self._core.cache.bytes_of(page)

    def _write_chunk(self, ino: int, offset: int, data: memoryview, origin: WriteOrigin) -> None:
        """Write up to ``_CHUNK_PAGES`` pages' worth of bytes with one transaction."""
        core = self._core
        inode = core.regular(ino)
        end = offset + len(data)
        if end > inode.size_bytes:
            self._zero_behind_end(inode)
        first = offset >> PAGE_SHIFT
        count = ((end - 1) >> PAGE_SHIFT) - first + 1
        bodies = core.volume.maps.entries(inode, first, count)
        overwritten = [part for part in segments(bodies) if part.kind is PageKind.XIP]
        with core.change():
            if (bodies == 0).any():
                through = origin is WriteOrigin.WRITEBACK
                self._link(inode, first, bodies, offset, data, through=through)
            # In place, so only when nothing is left that could be refused.
            for part in overwritten:
                self._store(part, first, offset, data)
            inode.size_bytes = max(inode.size_bytes, end)
            inode.mtime_ns = inode.ctime_ns = core.now_ns()
            core.put(inode)
        for part in segments(bodies):
            if part.kind is PageKind.PAGECACHE:
                self._write_frames(ino, first, part, offset, data, origin)

    def _store(self, part: Segment, first: int, offset: int, data: memoryview) -> None:
        """Store the bytes that fall into ``part`` in place and flush them."""
        begin = max((first + part.start) << PAGE_SHIFT, offset)
        stop = min((first + part.stop) << PAGE_SHIFT, offset + len(data))
        at = (part.block << BLOCK_SHIFT) + begin - ((first + part.start) << PAGE_SHIFT)
        self._core.medium.store(at, data[begin - offset : stop - offset])
        self._core.medium.flush(at, stop - begin)

    def _link(
        self,
        inode: Inode,
        first: int,
        bodies: Entries,
        offset: int,
        data: memoryview,
        *,
        through: bool,
    ) -> None:
        """Give the holes in ``bodies`` homes, filled, of the inode's default kind; set entries.

        XIP pages are filled with their data at once, and so are pagecache pages if ``through``;
        other pagecache pages get zeros: their bytes go to their frames.
        """
        volume, medium = self._core.volume, self._core.medium
        holes = np.flatnonzero(bodies == 0)
        runs = volume.allocator.allocate(int(holes.size))
        blocks = np.concatenate(
            [np.arange(start, start + length, dtype=np.uint64) for start, length in runs]
        )
        template = volume.maps.raw_home(0, pagecache=inode.pagecache)
        new = np.zeros(bodies.size, np.uint64)
        new[holes] = blocks | np.uint64(template)
        for part in segments(new):
            if part.kind is PageKind.HOLE:
                continue
            at, size = part.block << BLOCK_SHIFT, (part.stop - part.start) << PAGE_SHIFT
            begin = (first + part.start) << PAGE_SHIFT
            direct = through or part.kind is PageKind.XIP
            if not direct or begin < offset or begin + size > offset + len(data):
                medium.store(at, bytes(size))
            if direct:
                self._store(part, first, offset, data)
            medium.flush(at, size)
        # Whoever mapped the pages has what stands for a hole there (rules R2, R4).
        self._core.cache.unmap(inode.ino, holes + first)
        bodies[holes] = new[holes]
        volume.maps.assign(inode, first, bodies)
        inode.blocks += int(holes.size)
        kind = "pagecache" if inode.pagecache else "xip"
        volume.counters.count_pages(**{kind: int(holes.size)})

    def _write_frames(
        self,
        ino: int,
        first: int,
        part: Segment,
        offset: int,
        data: memoryview,
        origin: WriteOrigin,
    ) -> None:
        """Write the bytes that fall into a segment of pagecache pages to their frames.

        Straight home instead where a page is not resident and the bytes are write-back, or where
        every frame is pinned.
        """
        cache = self._core.cache
        for number in range(part.start, part.stop):
            index = first + number
            home = part.block + number - part.start
            page_start = index << PAGE_SHIFT
            begin = max(page_start, offset)
            stop = min(page_start + PAGE_SIZE, offset + len(data))
            page = cache.get(ino, index)
            if page is not None:
                cache.touch(page)
            elif origin is WriteOrigin.PROGRAM:
                try:
                    page = cache.admit(ino, index, home, load=stop - begin < PAGE_SIZE)
                except OutOfFramesError:
                    page = None
            if page is None:
                single = Segment(number, number + 1, part.kind, home)
                self._store(single, first, offset, data)
                continue
            frame = cache.bytes_of(page)
            frame[begin - page_start : stop - page_start] = data[begin - offset : stop - offset]
            cache.mark_dirty(page)

    def _zero_behind_end(self, inode: Inode) -> None:
        """Zero from the end of the file to the end of its page, in the home and in a frame.

        The home too if there is a frame: the new end is durable before the frame goes home, and a
        cut in between must not show again what was cut off.
        """
        used = inode.size_bytes & _OFFSET_MASK
        index = inode.size_bytes >> PAGE_SHIFT
        body = self._core.volume.maps.entry(inode, index) if used else 0
        if body == 0:
            return
        zeros = bytes(PAGE_SIZE - used)
        page = self._core.cache.get(inode.ino, index)
        if page is not None:
            # Both get the same bytes: a clean frame stays clean.
            self._core.cache.bytes_of(page)[used:] = zeros
        medium = self._core.medium
        at = ((body & layout.ENTRY_BLOCK_MASK) << BLOCK_SHIFT) + used
        if medium.load(at, len(zeros)) != zeros:
            medium.store(at, zeros)
            medium.flush(at, len(zeros))
