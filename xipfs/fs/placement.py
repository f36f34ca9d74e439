"""Where each page lives: its kind, its frame, what a fault on it finds (moving: fs/moving.py)."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from xipfs.errors import FsError, OutOfFramesError
from xipfs.fs.content import Content
from xipfs.fs.core import Core
from xipfs.fs.frames_by_page import Pfns
from xipfs.fs.segments import kind_of
from xipfs.fs.types import PageKind, PageRun, PageState
from xipfs.image import layout
from xipfs.image.filemap import Entries
from xipfs.image.record import Inode
from xipfs.units import PageIndex, Pfn, pages_of


class Placement:
    """Asks for and changes the placement of pages of regular files."""

    def __init__(self, core: Core, content: Content) -> None:
        self._core = core
        self._content = content

    def page(self, ino: int, index: int) -> PageState:
        """Return the page's placement; this is no touch."""
        body = self._body(self._core.regular(ino), index)
        kind = kind_of(body)
        if kind is PageKind.HOLE:
            return PageState(kind, resident=False, dirty=False, pfn=None)
        if kind is PageKind.XIP:
            return PageState(kind, resident=False, dirty=False, pfn=self._nvram_pfn(body))
        pfn = self._core.cache.get(ino, index)
        if pfn is None:
            return PageState(kind, resident=False, dirty=False, pfn=None)
        return PageState(kind, resident=True, dirty=self._core.cache.is_dirty(pfn), pfn=pfn)

    def runs_with_bytes(self, ino: int, pages: range) -> Iterator[range]:
        """Yield the runs of ``pages`` within the file that are no holes, in order.

        Costs what lies in the range, however large the file is.
        """
        inode = self._core.regular(ino)
        end = min(pages.stop, pages_of(inode.size_bytes))
        if end - pages.start == 1:
            if self._body(inode, pages.start):
                yield range(pages.start, end)
            return
        pending = range(0)
        for start, filled in self._core.volume.maps.used(inode, pages.start):
            if start >= end:
                break
            for run in _runs_of(start, filled[: end - start]):
                if pending and pending.stop == run.start:
                    pending = range(pending.start, run.stop)
                    continue
                if pending:
                    yield pending
                pending = run
        if pending:
            yield pending

    def runs(self, ino: int) -> Iterator[PageRun]:
        """Yield the file's pages up to its end as runs of equal kind and residency, holes too."""
        inode = self._core.regular(ino)
        end = pages_of(inode.size_bytes)
        resident = np.array(sorted(self._core.cache.pages_of(ino)), np.int64)
        pending: PageRun | None = None
        for run in self._raw_runs(inode, end, resident):
            if pending and (pending.kind, pending.resident) == (run.kind, run.resident):
                pending = PageRun(pending.first, pending.count + run.count, run.kind, run.resident)
                continue
            if pending:
                yield pending
            pending = run
        if pending:
            yield pending

    def fault_in(self, ino: int, index: int) -> tuple[Pfn, bool] | None:
        """Touch the page as an mmap fault does.

        Return the frame to map and whether it had to be filled now; None for a hole. Raise
        FsError: ENXIO beyond the end of the file (rule K16), ENOMEM if every frame is pinned.
        """
        inode = self._core.regular(ino)
        if index >= pages_of(inode.size_bytes):
            raise FsError(errno.ENXIO, f"page {index} is beyond the end of inode {ino}")
        body = self._body(inode, index)
        kind = kind_of(body)
        if kind is PageKind.HOLE:
            return None
        if kind is PageKind.XIP:
            return self._nvram_pfn(body), False
        try:
            return self._content.resident(ino, index, body & layout.ENTRY_BLOCK_MASK)
        except OutOfFramesError as error:
            raise FsError(errno.ENOMEM, str(error)) from error

    def touch(self, ino: int, index: int) -> None:
        """Make the page the hottest if it is resident; nothing else changes."""
        pfn = self._core.cache.get(ino, index)
        if pfn is not None:
            self._core.cache.touch(pfn)

    def take_fill_mark(self, ino: int, index: int) -> bool:
        """Return whether a read filled the page's frame and nobody asked since."""
        pfn = self._core.cache.get(ino, index)
        return pfn is not None and self._core.cache.take_fill_mark(pfn)

    def take_evicted_fill(self, ino: int, index: int) -> bool:
        """Return whether a read filled the page, it was evicted, and nobody asked since."""
        return self._core.cache.take_evicted_fill(ino, index)

    def has_fill_mark(self, ino: int, index: int) -> bool:
        """Return whether a fault of the page has either of the two marks to take."""
        return self._core.cache.has_fill_mark(ino, index)

    def set_default_kind(self, ino: int, kind: PageKind) -> None:
        """Set the kind that pages written from now on into holes of this file take."""
        if kind is PageKind.HOLE:
            raise FsError(errno.EINVAL, "a hole is no kind to place pages by")
        with self._core.change():
            inode = self._core.inode(ino)
            inode.pagecache = kind is PageKind.PAGECACHE
            self._core.put(inode)

    def _body(self, inode: Inode, index: int) -> int:
        if not 0 <= index < layout.MAX_FILE_PAGES:
            raise FsError(errno.EINVAL, f"page {index} is beyond the largest file")
        return self._core.volume.maps.entry(inode, index)

    def _nvram_pfn(self, body: int) -> Pfn:
        return self._core.memory.nvram_pfn(body & layout.ENTRY_BLOCK_MASK)

    def _raw_runs(self, inode: Inode, end: int, resident: Pfns) -> Iterator[PageRun]:
        """Yield runs in order, neighbours not yet merged; gaps between leaves are holes."""
        position = 0
        for start, bodies in self._core.volume.maps.leaves(inode, 0):
            if start >= end:
                break
            if start > position:
                yield PageRun(PageIndex(position), start - position, PageKind.HOLE, False)
            position = min(start + bodies.size, end)
            yield from _leaf_runs(start, bodies[: position - start], resident)
        if position < end:
            yield PageRun(PageIndex(position), end - position, PageKind.HOLE, False)


def _leaf_runs(start: int, bodies: Entries, resident: Pfns) -> Iterator[PageRun]:
    kinds = np.where(bodies == 0, 0, 1 + (bodies & np.uint64(layout.ENTRY_PAGECACHE) != 0))
    low, high = np.searchsorted(resident, (start, start + bodies.size))
    kinds[resident[low:high] - start] = 3
    cuts = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), bodies.size]
    names = (PageKind.HOLE, PageKind.XIP, PageKind.PAGECACHE, PageKind.PAGECACHE)
    for begin, stop in pairwise(cuts):
        code = int(kinds[begin])
        yield PageRun(PageIndex(start + begin), stop - begin, names[code], code == 3)


def _runs_of(start: int, filled: npt.NDArray[np.bool_]) -> Iterator[range]:
    """Yield the runs of true ``filled``, the first of which is of page ``start``."""
    if filled.all():  # as most are: a tenth of the time
        yield range(start, start + filled.size)
        return
    edges = np.flatnonzero(np.diff(filled, prepend=False, append=False)) + start
    for begin, stop in edges.reshape(-1, 2).tolist():
        yield range(begin, stop)
