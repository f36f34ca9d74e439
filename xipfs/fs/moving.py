"""Moving pages between the kinds: the durable half of a migration, for any number of pages.

The caller has invalidated the kernel's range before, and will see the next fault after. Here, for
each step of up to ``STEP_PAGES`` pages: zap the model's PTEs, check for pins, copy run by run,
flush and fence, commit the kinds of all of them in one transaction, drop the old copies. A page's
home block is the same before and after, so a cut anywhere finds one authoritative copy: the home
(if a dirty frame was not written yet, with its old durable bytes). Size and times do not move. A
page that is refused stays exactly as it was.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from xipfs.errors import FsError
from xipfs.fs.core import Core
from xipfs.fs.types import PageKind
from xipfs.image import layout
from xipfs.image.filemap import Entries
from xipfs.image.record import Inode
from xipfs.units import Ino, PageIndex

#: Pages of one transaction: their entries lie in two leaves at most, 4 KiB of the journal.
STEP_PAGES: Final = 256


@dataclass
class Moved:
    """What became of a range: pages moved, pages of that kind already, refused ones by errno."""

    moved: list[int] = field(default_factory=list)
    already: int = 0
    refused: dict[int, list[int]] = field(default_factory=dict)

    def refuse(self, code: int, pages: list[int]) -> None:
        """Add pages that were not moved."""
        if pages:
            self.refused.setdefault(code, []).extend(pages)


class Moving:
    """Promotes (XIP to pagecache) and demotes (pagecache to XIP)."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def wanted(self, ino: int, pages: range, to: PageKind) -> list[int]:
        """Return those of ``pages`` that are no holes and not of kind ``to``, in order."""
        bodies = self._bodies(self._core.regular(ino), pages)
        return (np.flatnonzero(_other_kind(bodies, to)) + pages.start).tolist()

    def move(self, ino: int, pages: range, to: PageKind) -> Moved:
        """Move ``pages`` to kind ``to``; holes are passed over. Raise FsError: EROFS, EINVAL.

        Refused pages: EAGAIN (somebody else refers to the frame), ENOMEM (every frame is pinned).
        """
        if to is PageKind.HOLE:
            raise FsError(errno.EINVAL, "a hole is no kind to move pages to")
        self._core.check_writable()
        result = Moved()
        # A step that needs more frames than there are would evict what it has just filled.
        step = min(STEP_PAGES, self._core.memory.ram_pages)
        for start in range(pages.start, pages.stop, STEP_PAGES):
            chunk = range(start, min(start + STEP_PAGES, pages.stop))
            bodies = self._bodies(self._core.regular(ino), chunk)
            other = (np.flatnonzero(_other_kind(bodies, to)) + start).tolist()
            result.already += int(np.count_nonzero(bodies)) - len(other)
            for at in range(0, len(other), step):
                part = other[at : at + step]
                (self._promote if to is PageKind.PAGECACHE else self._demote)(ino, part, result)
        return result

    def move_one(self, ino: int, index: int, to: PageKind) -> bool:
        """Move one page; False if there is nothing to move. Raise FsError where it is refused."""
        result = self.move(ino, range(index, index + 1), to)
        for code in result.refused:
            raise FsError(code, f"page {index} of inode {ino} cannot become {to.value} now")
        return bool(result.moved)

    def _promote(self, ino: int, pages: list[int], result: Moved) -> None:
        cache = self._core.cache
        for index in pages:
            cache.on_unmap(Ino(ino), PageIndex(index))
        bodies = self._bodies(self._core.regular(ino), range(pages[0], pages[-1] + 1))
        at = np.array(pages) - pages[0]
        homes = (bodies[at] & np.uint64(layout.ENTRY_BLOCK_MASK)).tolist()
        admitted = cache.admit_many(ino, pages, homes)
        moved = pages[: len(admitted)]
        try:
            self._commit(ino, moved)
        except BaseException:
            for page in admitted:
                cache.drop(page)
            raise
        result.moved += moved
        result.refuse(errno.ENOMEM, pages[len(moved) :])

    def _demote(self, ino: int, pages: list[int], result: Moved) -> None:
        cache = self._core.cache
        moved, pinned, frames = [], [], []
        for index in pages:
            page = cache.get(ino, index)
            if page is not None and not cache.unmap(page):
                pinned.append(index)
                continue
            moved.append(index)
            if page is not None:
                frames.append(page)
        if cache.write_home_many(frames):
            self._core.medium.fence()
        self._commit(ino, moved)
        for page in frames:
            cache.drop(page)
        result.moved += moved
        result.refuse(errno.EAGAIN, pinned)

    def _commit(self, ino: int, pages: list[int]) -> None:
        """Turn the kinds of ``pages`` over, all of them durably or none."""
        if not pages:
            return
        volume = self._core.volume
        with self._core.change():
            inode = self._core.inode(ino)
            bodies = self._bodies(inode, range(pages[0], pages[-1] + 1))
            at = np.array(pages) - pages[0]
            bodies[at] ^= np.uint64(layout.ENTRY_PAGECACHE)
            volume.maps.assign(inode, pages[0], bodies)
            # An entry in a node leaves the inode as it is; the root entry is the inode's own.
            self._core.put(inode)
            promoted = bool(int(bodies[0]) & layout.ENTRY_PAGECACHE)
            count = len(pages) if promoted else -len(pages)
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
