"""Telling the kernel to forget or to keep pages: the only module that may.

Two rules decide the shape. An invalidation waits for the folio lock, which a READ in flight
holds, and the READ waits for this process: so the request must be written from a thread that
serves nothing, and no lock that READ or WRITE needs may be held meanwhile. And an invalidation of
dirty pages sends their bytes here as WRITEs before it returns: so the ranges under invalidation
are kept, for the WRITE handler to recognise the kernel's write-back that we caused ourselves.

pyfuse3 can drop a whole inode only; a range is the raw notification on the session's descriptor
(struct fuse_out_header, struct fuse_notify_inval_inode_out; include/uapi/linux/fuse.h).
"""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final

import trio

from xipfs.accounting.causes import Causes
from xipfs.fuse.worker import Worker
from xipfs.migrate.engine import runs
from xipfs.units import PAGE_SHIFT

_NOTIFY_INVAL_INODE: Final = 2
_HEADER: Final = struct.Struct("=IiQ")  # len, error (the notification's code), unique (0)
_INVAL_INODE: Final = struct.Struct("=Qqq")  # ino, off, len (0: to the end)
#: An invalidation of so few pages takes some microseconds, unless it has to wait.
_SHORT_PAGES: Final = 16


def session_fd() -> int:
    """Return this process's /dev/fuse descriptor (pyfuse3 keeps it to itself)."""
    for entry in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{entry}") == "/dev/fuse":
                return int(entry)
        except FileNotFoundError:
            continue
    raise OSError(errno.EBADF, "no /dev/fuse descriptor is open")


class Notifier:
    """Range invalidations of one mount. Used from the trio thread; the writes happen elsewhere."""

    def __init__(
        self,
        fd: int,
        causes: Causes,
        users: Callable[[int], set[int]],
        pages_in_use: Callable[[Iterable[int], int], set[int]],
    ) -> None:
        """``users(ino)`` are the file's processes; ``pages_in_use(pids, ino)`` must stay.

        The second is called in another thread.
        """
        self._fd = fd
        self._users = users
        self._pages_in_use = pages_in_use
        self._causes = causes
        self._in_flight: list[tuple[int, int, int]] = []
        # One at a time: invalidations of one mount gain nothing from running side by side.
        self._worker = Worker("xipfs-notify")
        self.invalidations = 0

    def write_back_of_ours(self, ino: int, offset: int, size: int) -> bool:
        """Return whether [offset, offset + size) bytes of ``ino`` are being invalidated now."""
        return any(
            ino == held and offset < end and start < offset + size
            for held, start, end in self._in_flight
        )

    def in_flight(self) -> set[int]:
        """Return the inodes of which pages are being invalidated now.

        The kernel unmaps a whole range before it drops the first page, which makes the record.
        """
        return {ino for ino, _, _ in self._in_flight}

    @contextmanager
    def _marked(self, ino: int, start: int, end: int) -> Iterator[None]:
        mark = (ino, start, end)
        self._in_flight.append(mark)
        try:
            yield
        finally:
            self._in_flight.remove(mark)

    async def invalidate_pages(self, ino: int, first: int, count: int, cause: str) -> set[int]:
        """Drop ``count`` pages of ``ino`` from index ``first`` from the kernel's cache.

        Except for those that direct I/O is at work on, whose bytes could be lost: they are
        returned. ``cause`` (accounting/causes.py) is what the faults that follow are marked with.

        Returns when they are gone and their dirty bytes have come back as WRITEs. An inode that
        the kernel does not know holds nothing and is no error.
        """
        assert count > 0, (ino, first, count)
        start, size = first << PAGE_SHIFT, count << PAGE_SHIFT
        with self._marked(ino, start, start + size):
            # Not abandoned on cancel: half an invalidation would leave a mark that lies.
            told = self._causes.begin(ino, first, count, cause, time.monotonic_ns())
            users = self._users(ino)
            short = count <= _SHORT_PAGES
            in_use = await self._worker.run(self._drop, ino, first, count, users, short=short)
            told.ended_ns = time.monotonic_ns()
        self.invalidations += 1
        return in_use

    async def invalidate_all(self, pages: list[tuple[int, int]], cause: str) -> None:
        """Drop the (ino, index) ``pages``, sorted, from the kernel's cache, run by run."""
        for ino, first, count in runs(pages):
            await trio.lowlevel.checkpoint()
            await self.invalidate_pages(ino, first, count, cause)

    def _drop(self, ino: int, first: int, count: int, users: set[int]) -> set[int]:
        in_use: set[int] = set()
        if users:
            in_use = self._pages_in_use(users, ino).intersection(range(first, first + count))
        at = first
        for stop in [*sorted(in_use), first + count]:
            if at < stop:
                self._send(_INVAL_INODE.pack(ino, at << PAGE_SHIFT, stop - at << PAGE_SHIFT))
            at = stop + 1
        return in_use

    def _send(self, payload: bytes) -> None:
        message = _HEADER.pack(_HEADER.size + len(payload), _NOTIFY_INVAL_INODE, 0) + payload
        try:
            os.write(self._fd, message)
        except OSError as error:
            # ENOENT: the inode is not cached. ENODEV, ENOTCONN: the mount is going away.
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ENOTCONN):
                raise
