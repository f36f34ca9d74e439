"""Background write-back: dirty page-cache frames go home before somebody has to wait for it.

As Linux does it (6.1: mm/page-writeback.c; sysctl/vm.rst), and with its defaults: above
``dirty_background_ratio`` of RAM the flusher writes the longest dirty pages until they are below;
above ``dirty_ratio`` the writer itself does so first; and what is dirty for longer than
``dirty_expire_ms`` goes home in any case. The ratios are of all page-cache frames, since the
modelled RAM holds nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio

from xipfs.fs.filesystem import Filesystem
from xipfs.options import MountOptions

#: Pages written between two chances for requests.
_PIECE_PAGES: Final = 256


@dataclass(frozen=True)
class WritebackStatistics:
    """Pages; names as in /proc/vmstat where it has them."""

    nr_dirty: int
    nr_dirty_threshold: int
    nr_dirty_background_threshold: int
    background_pages: int
    expired_pages: int
    throttled_pages: int


class Writeback:
    """The flusher of one mount; used from the trio thread."""

    def __init__(
        self, fs: Filesystem, options: MountOptions, failed: Callable[[str, Exception], None]
    ) -> None:
        """``failed(task, error)`` is told what no request can be answered with."""
        self._fs = fs
        self._failed = failed
        ram_pages = fs.memory.ram_pages
        self._background = ram_pages * options.dirty_background_ratio // 100
        self._limit = max(ram_pages * options.dirty_ratio // 100, self._background + 1)
        self._interval_s = options.dirty_writeback_ms / 1000
        self._expire_ns = options.dirty_expire_ms * 1_000_000
        self._wake = trio.Event()
        self._pages = {"background": 0, "expired": 0, "throttled": 0}

    def statistics(self) -> WritebackStatistics:
        """Return the state now and the pages written since the mount, by cause."""
        return WritebackStatistics(
            nr_dirty=self._fs.nr_dirty_pages,
            nr_dirty_threshold=self._limit,
            nr_dirty_background_threshold=self._background,
            background_pages=self._pages["background"],
            expired_pages=self._pages["expired"],
            throttled_pages=self._pages["throttled"],
        )

    def after_write(self) -> None:
        """Hear of a WRITE: wake the flusher, or have the writer wait while pages go home."""
        dirty = self._fs.nr_dirty_pages
        if dirty > self._limit:
            try:
                self._pages["throttled"] += self._fs.write_back(dirty - self._limit)
            except Exception as error:
                # What was written is taken, and dirty: fsync will answer with what becomes of it.
                self._failed("write-back", error)
        if dirty > self._background:
            self._wake.set()

    async def run(self) -> None:
        """Write back for ever."""
        while True:
            with trio.move_on_after(self._interval_s):
                await self._wake.wait()
            self._wake = trio.Event()
            while (excess := self._fs.nr_dirty_pages - self._background) > 0:
                self._pages["background"] += self._fs.write_back(min(excess, _PIECE_PAGES))
                await trio.lowlevel.checkpoint()
            while count := self._fs.write_back(_PIECE_PAGES, older_ns=self._expire_ns):
                self._pages["expired"] += count
                await trio.lowlevel.checkpoint()
