"""Migration on a live mount: the order of steps that keeps bytes and counts right.

For each chunk of pages (rules R1-R15; each step leaves exactly one authoritative copy):

1. invalidate the kernel's range, holding no lock: dirty bytes come home as WRITEs, PTEs go away;
2. drain the observer: what faulted until now is charged to the page's old kind;
3. with no await inside: zap the model's PTEs, check pins, copy, persist, commit the kind durably,
   drop the old copy (fs.placement does these, migrate.engine counts them);
4. if a READ or WRITE touched the range between 1 and 3, invalidate once more: the kernel may hold
   pages mapped since, whose next touch must fault to be charged to the new kind.

A page that is pinned at 3 is tried again, up to ``PASSES_MAX`` times; it was unmapped, so what
maps it meanwhile comes through 1 and 2 again first. Chunks bound the time for which step 3 keeps
other requests waiting. A batch is one file after the other, by the same steps.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import trio

from xipfs.errors import FsError
from xipfs.fs.types import PageKind
from xipfs.fuse.notify import Notifier, runs
from xipfs.migrate.engine import PASSES_MAX, REASONS, Engine, Move, Tally

CHUNK_PAGES: Final = 256
#: Between two passes over pinned pages: 1 ms, 2 ms, ... 9 ms; 45 ms in all.
_PASS_PAUSE_S: Final = 0.001


@dataclass
class _Window:
    """A range between its invalidation and its commit."""

    ino: int
    first: int
    last: int
    touched: bool = False


class Migrator:
    """Moves pages of one mount; used from the trio thread."""

    def __init__(
        self, engine: Engine, notifier: Notifier, drain: Callable[[], Awaitable[int]]
    ) -> None:
        self._engine = engine
        self._notifier = notifier
        self._drain = drain
        self._windows: list[_Window] = []

    def page_io(self, ino: int, first: int, last: int) -> None:
        """Hear of a READ or WRITE of pages first..last."""
        for window in self._windows:
            if window.ino == ino and first <= window.last and window.first <= last:
                window.touched = True

    def runs_of(self, ino: int, ranges: list[range]) -> list[range]:
        """Return the runs of ``ranges`` that are no holes, hence can move."""
        return [run for pages in ranges for run in self._engine.pages_with_bytes(ino, pages)]

    async def migrate(
        self, ino: int, ranges: list[range], to: PageKind
    ) -> AsyncIterator[tuple[int, Tally]]:
        """Move pages of ``ino`` to ``to``; yields (pages in the chunk, its tally) chunk by chunk.

        Holes are passed over without looking at each, so a sparse file costs what it holds.
        """
        for run in self.runs_of(ino, ranges):
            for start in range(run.start, run.stop, CHUNK_PAGES):
                chunk = range(start, min(start + CHUNK_PAGES, run.stop))
                yield len(chunk), await self._migrate_chunk(ino, chunk, to)

    async def move_all(self, moves: list[Move]) -> Tally:
        """Carry out a policy's plan by the same path; neighbours move together."""
        total = Tally()
        for to in (PageKind.XIP, PageKind.PAGECACHE):
            # What is demoted makes room for what is promoted.
            pages = sorted({(move.ino, move.index) for move in moves if move.to is to})
            for ino, first, count in runs(pages):
                for start in range(first, first + count, CHUNK_PAGES):
                    chunk = range(start, min(start + CHUNK_PAGES, first + count))
                    total += await self._migrate_chunk(ino, chunk, to)
        return total

    async def _migrate_chunk(self, ino: int, chunk: range, to: PageKind) -> Tally:
        try:
            wanted = self._engine.needing_move(ino, chunk, to)
            if not wanted:
                return Tally(already=len(chunk))
            window = _Window(ino, wanted[0], wanted[-1])
            self._windows.append(window)
            try:
                tally = await self._move_window(window, chunk, to)
            finally:
                self._windows.remove(window)
        except FsError as error:
            if error.errno != errno.ENOENT:
                raise
            # The last name and the last handle of the file went while it was being moved.
            tally = Tally(failed={"gone": len(chunk)})
        for reason, count in tally.failed.items():
            self._engine.give_up(reason, count)
        return tally

    async def _move_window(self, window: _Window, chunk: range, to: PageKind) -> Tally:
        await self._take_away(window)
        result = self._engine.move_pages(window.ino, chunk, to)
        moved, already = len(result.moved), result.already
        for number in range(1, PASSES_MAX):
            if errno.EAGAIN not in result.refused:
                break
            await trio.sleep(number * _PASS_PAUSE_S)
            if window.touched:
                await self._take_away(window)
            result = self._engine.move_pages(window.ino, chunk, to)
            moved += len(result.moved)
        if window.touched:
            await self._invalidate(window)
        failed = {REASONS[code]: len(pages) for code, pages in result.refused.items()}
        return Tally(moved, already, failed)

    async def _take_away(self, window: _Window) -> None:
        """Steps 1 and 2: after this the kernel maps no page that was not read since."""
        window.touched = False
        await self._invalidate(window)
        await self._drain()

    async def _invalidate(self, window: _Window) -> None:
        count = window.last - window.first + 1
        await self._notifier.invalidate_pages(window.ino, window.first, count)
