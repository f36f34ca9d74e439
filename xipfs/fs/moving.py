"""Moving pages between the kinds: the durable half of a migration, for any number of pages.

The caller has invalidated the kernel's range before, and will see the next fault after. Here, for
each step of up to ``STEP_PAGES_MAX`` pages: zap the model's PTEs, check for pins, copy run by run,
flush, commit the kinds of all of them in one transaction, drop the old copies. A page's
home block is the same before and after, so a cut anywhere finds one authoritative copy: the home
(if a dirty frame was not written yet, with its old durable bytes). Size and times do not move. A
page that is refused stays exactly as it was.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from xipfs.clock import Clock
from xipfs.errors import FsError, OutOfFramesError
from xipfs.fs.core import Core
from xipfs.fs.segments import kind_of
from xipfs.fs.types import PageKind
from xipfs.image import layout
from xipfs.image.filemap import Entries
from xipfs.image.record import Inode
from xipfs.memory.region import LINE_SIZE
from xipfs.units import Ino, PageIndex

#: Pages of one transaction. A copy drives the interpreter out of the processor's caches, so what
#: a step costs beside it falls with the number of steps.
STEP_PAGES_MAX: Final = 8192
#: What a page can add to a transaction: its share of a line of entries whose neighbours stay.
_BYTES_PER_PAGE: Final = (LINE_SIZE + layout.JOURNAL_RECORD.size) // 8
#: Kept free for the counters, the inode and the lines that a step shares with its neighbours.
_RESERVED_BYTES: Final = 8192

#: The kind that a page must have to become of this one.
_OTHER: Final = {PageKind.PAGECACHE: PageKind.XIP, PageKind.XIP: PageKind.PAGECACHE}
Positions = np.typing.NDArray[np.int64]


@dataclass
class Moved:
    """What became of a range: pages moved, pages of that kind already, refused ones by errno.

    ``took_ns`` tells how long the parts took: ``unmap`` (PTEs zapped, pins checked), ``copy``,
    ``commit`` (the kinds, durably), ``drop`` (the old copies).
    """

    moved: list[int] = field(default_factory=list)
    already: int = 0
    refused: dict[int, list[int]] = field(default_factory=dict)
    took_ns: dict[str, int] = field(default_factory=dict)

    def add(self, other: Moved) -> None:
        """Add what became of another range."""
        self.moved += other.moved
        self.already += other.already
        for code, pages in other.refused.items():
            self.refuse(code, pages)
        for part, took_ns in other.took_ns.items():
            self.took_ns[part] = self.took_ns.get(part, 0) + took_ns

    def refuse(self, code: int, pages: list[int]) -> None:
        """Add pages that were not moved."""
        if pages:
            self.refused.setdefault(code, []).extend(pages)


@dataclass(frozen=True)
class _Step:
    """One transaction's pages: those ``at`` positions of the entries from page ``first`` on."""

    ino: int
    first: int
    bodies: Entries
    at: Positions

    def pages(self) -> Positions:
        """Return the page numbers, ascending."""
        return self.at + self.first


class _Laps:
    """Adds what each part of a move took to its outcome."""

    def __init__(self, clock: Clock, result: Moved) -> None:
        self._now_ns = clock.monotonic_ns
        self._took_ns = result.took_ns
        self._since_ns = self._now_ns()

    def lap(self, part: str) -> None:
        """End ``part``, which began with the lap before."""
        now_ns = self._now_ns()
        self._took_ns[part] = self._took_ns.get(part, 0) + now_ns - self._since_ns
        self._since_ns = now_ns


class Moving:
    """Promotes (XIP to pagecache) and demotes (pagecache to XIP)."""

    def __init__(self, core: Core) -> None:
        self._core = core
        capacity = core.volume.journal_capacity_bytes - _RESERVED_BYTES
        self._step_pages = min(STEP_PAGES_MAX, capacity // _BYTES_PER_PAGE)

    def wanted(self, ino: int, pages: range, to: PageKind) -> list[int]:
        """Return those of ``pages`` that are no holes and not of kind ``to``, in order."""
        inode = self._core.regular(ino)
        if len(pages) == 1:
            body = self._core.volume.maps.entry(inode, pages.start)
            return list(pages) if kind_of(body) is _OTHER[to] else []
        other = np.flatnonzero(_other_kind(self._bodies(inode, pages), to))
        numbers: list[int] = (other + pages.start).tolist()
        return numbers

    def move(self, ino: int, pages: range, to: PageKind) -> Moved:
        """Move ``pages`` to kind ``to``; holes are passed over. Raise FsError: EROFS, EINVAL.

        Refused pages: EAGAIN (somebody else refers to the frame), ENOMEM (every frame is pinned).
        """
        if to is PageKind.HOLE:
            raise FsError(errno.EINVAL, "a hole is no kind to move pages to")
        self._core.check_writable()
        result = Moved()
        if len(pages) == 1:
            self._move_single(ino, pages, to, result)
            return result
        # A step that needs more frames than there are would evict what it has just filled.
        step = min(self._step_pages, self._core.memory.ram_pages)
        one_step = self._promote if to is PageKind.PAGECACHE else self._demote
        for start in range(pages.start, pages.stop, self._step_pages):
            chunk = range(start, min(start + self._step_pages, pages.stop))
            bodies = self._bodies(self._core.regular(ino), chunk)
            other = np.flatnonzero(_other_kind(bodies, to))
            result.already += int(np.count_nonzero(bodies)) - other.size
            for at in range(0, other.size, step):
                one_step(_Step(ino, start, bodies, other[at : at + step]), result)
        return result

    def move_one(self, ino: int, index: int, to: PageKind) -> bool:
        """Move one page; False if there is nothing to move. Raise FsError where it is refused."""
        result = self.move(ino, range(index, index + 1), to)
        for code in result.refused:
            raise FsError(code, f"page {index} of inode {ino} cannot become {to.value} now")
        return bool(result.moved)

    def _move_single(self, ino: int, pages: range, to: PageKind, result: Moved) -> None:
        """The steps of a move for one page; on arrays they would cost several times as much."""
        index, cache = pages.start, self._core.cache
        if not 0 <= index < layout.MAX_FILE_PAGES:
            raise FsError(errno.EINVAL, f"page {index} is beyond the largest file")
        inode = self._core.regular(ino)
        body = self._core.volume.maps.entry(inode, index)
        if kind_of(body) is not _OTHER[to]:
            result.already += body != 0
            return
        laps = _Laps(self._core.clock, result)
        cache.on_unmap(Ino(ino), PageIndex(index), 1)
        laps.lap("unmap")
        if to is PageKind.PAGECACHE:
            try:
                pfn = cache.admit(ino, index, body & layout.ENTRY_BLOCK_MASK, load=True)
            except OutOfFramesError:
                result.refuse(errno.ENOMEM, [index])
                return
            laps.lap("copy")
            try:
                self._commit_single(inode, index, body)
            except BaseException:
                cache.drop_one(pfn)
                raise
            laps.lap("commit")
        else:
            held = cache.get(ino, index)
            if held is not None:
                if cache.is_pinned(held):
                    result.refuse(errno.EAGAIN, [index])
                    return
                if cache.is_dirty(held):
                    # As in _demote, the fence before the transaction's mark is enough.
                    cache.write_home(np.array([held]))
            laps.lap("copy")
            self._commit_single(inode, index, body)
            laps.lap("commit")
            if held is not None:
                cache.drop_one(held)
                laps.lap("drop")
        result.moved.append(index)

    def _commit_single(self, inode: Inode, index: int, body: int) -> None:
        volume = self._core.volume
        body ^= layout.ENTRY_PAGECACHE
        count = 1 if body & layout.ENTRY_PAGECACHE else -1
        with self._core.change():
            volume.maps.replace(inode, index, body)
            if inode.height == 0:
                self._core.put(inode)
            volume.counters.count_pages(xip=-count, pagecache=count)

    def _promote(self, step: _Step, result: Moved) -> None:
        cache = self._core.cache
        pages = step.pages()
        laps = _Laps(self._core.clock, result)
        cache.unmap(step.ino, pages)
        laps.lap("unmap")
        homes = (step.bodies[step.at] & np.uint64(layout.ENTRY_BLOCK_MASK)).astype(np.int64)
        admitted = cache.admit_run(step.ino, pages, homes)
        count = admitted.size
        laps.lap("copy")
        try:
            self._commit(step, step.at[:count])
        except BaseException:
            cache.drop(admitted)
            raise
        laps.lap("commit")
        result.moved += pages[:count].tolist()
        result.refuse(errno.ENOMEM, pages[count:].tolist())

    def _demote(self, step: _Step, result: Moved) -> None:
        cache = self._core.cache
        pages = step.pages()
        laps = _Laps(self._core.clock, result)
        frames = cache.get_run(step.ino, pages)
        resident = frames >= 0
        cache.unmap(step.ino, pages)
        pinned = np.zeros(pages.size, bool)
        pinned[resident] = cache.pinned(frames[resident])
        gone = frames[resident & ~pinned]
        laps.lap("unmap")
        # Flushed; the fence before the transaction's mark makes them durable before their kinds.
        cache.write_home(gone)
        laps.lap("copy")
        self._commit(step, step.at[~pinned])
        laps.lap("commit")
        cache.drop(gone)
        laps.lap("drop")
        result.moved += pages[~pinned].tolist()
        result.refuse(errno.EAGAIN, pages[pinned].tolist())

    def _commit(self, step: _Step, at: Positions) -> None:
        """Turn the kinds of the pages ``at`` over, all of them durably or none."""
        if not at.size:
            return
        volume, bodies = self._core.volume, step.bodies
        bodies[at] ^= np.uint64(layout.ENTRY_PAGECACHE)
        first, stop = int(at[0]), int(at[-1]) + 1
        with self._core.change():
            inode = self._core.inode(step.ino)
            volume.maps.replace_many(inode, step.first + first, bodies[first:stop])
            if inode.height == 0:
                self._core.put(inode)  # the root entry is the inode's own
            promoted = bool(int(bodies[first]) & layout.ENTRY_PAGECACHE)
            count = at.size if promoted else -at.size
            volume.counters.count_pages(xip=-count, pagecache=count)

    def _bodies(self, inode: Inode, pages: range) -> Entries:
        if not 0 <= pages.start <= pages.stop <= layout.MAX_FILE_PAGES:
            raise FsError(errno.EINVAL, f"page {pages.stop - 1} is beyond the largest file")
        return self._core.volume.maps.entries(inode, pages.start, len(pages))


def _other_kind(bodies: Entries, to: PageKind) -> np.typing.NDArray[np.bool_]:
    """Tell for each entry whether it is a page of the kind that is not ``to``."""
    cached = bodies & np.uint64(layout.ENTRY_PAGECACHE) != 0
    other: np.typing.NDArray[np.bool_] = (bodies != 0) & (cached != (to is PageKind.PAGECACHE))
    return other
