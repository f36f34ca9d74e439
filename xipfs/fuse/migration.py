"""Migration on a live mount: the order of steps that keeps bytes and counts right.

For each chunk of pages (rules R1-R15; each step leaves exactly one authoritative copy):

1. invalidate the kernel's range, holding no lock: dirty bytes come home as WRITEs, PTEs go away;
2. drain the observer: what faulted until now is charged to the page's old kind;
3. with no await inside: zap the model's PTEs, check pins, copy, persist, commit the kind durably,
   drop the old copy (fs.placement does these, migrate.engine counts them);
4. if a READ or WRITE touched the range between 1 and 3, invalidate once more: the kernel may hold
   pages mapped since, whose next touch must fault to be charged to the new kind.

Chunks bound the time for which step 3 keeps other requests waiting.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from xipfs.fs.types import PageKind
from xipfs.fuse.notify import Notifier
from xipfs.migrate.engine import Engine, Move, Tally

CHUNK_PAGES: Final = 256


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

    async def migrate(
        self, ino: int, ranges: list[range], to: PageKind
    ) -> AsyncIterator[tuple[int, int, Tally]]:
        """Move pages of ``ino`` to ``to``; yields (pages done, pages in all, tally) by chunk.

        Holes are passed over without looking at each, so a sparse file costs what it holds.
        """
        runs = [run for pages in ranges for run in self._engine.pages_with_bytes(ino, pages)]
        count = sum(len(run) for run in runs)
        done = 0
        tally = Tally()
        for run in runs:
            for start in range(run.start, run.stop, CHUNK_PAGES):
                chunk = range(start, min(start + CHUNK_PAGES, run.stop))
                tally += await self._migrate_chunk(ino, chunk, to)
                done += len(chunk)
                yield done, count, tally

    async def move_all(self, moves: list[Move]) -> Tally:
        """Carry out a policy's plan, each page by the same path."""
        total = Tally()
        for move in moves:
            total += await self._migrate_chunk(move.ino, range(move.index, move.index + 1), move.to)
        return total

    async def _migrate_chunk(self, ino: int, chunk: range, to: PageKind) -> Tally:
        wanted = self._engine.needing_move(ino, chunk, to)
        if not wanted:
            return Tally(already=len(chunk))
        window = _Window(ino, wanted[0], wanted[-1])
        self._windows.append(window)
        try:
            count = window.last - window.first + 1
            await self._notifier.invalidate_pages(ino, window.first, count)
            await self._drain()
            tally = self._engine.move_pages(ino, chunk, to)
            if window.touched:
                await self._notifier.invalidate_pages(ino, window.first, count)
        finally:
            self._windows.remove(window)
        return tally
