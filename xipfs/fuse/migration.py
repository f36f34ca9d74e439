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
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import trio

from xipfs.accounting.causes import MOVE
from xipfs.errors import FsError
from xipfs.fs.moving import Moved
from xipfs.fs.types import PageKind
from xipfs.fuse.notify import Notifier, runs
from xipfs.migrate.engine import PASSES_MAX, REASONS, Engine, Tally
from xipfs.migrate.history import ChunkEvent, History
from xipfs.migrate.policy import Move
from xipfs.units import PAGE_SIZE

CHUNK_PAGES: Final = 256
#: Between two passes over pinned pages: 1 ms, 2 ms, ... 9 ms; 45 ms in all.
_PASS_PAUSE_S: Final = 0.001


def _nobody_listens(*_: object) -> None:
    """Do nothing."""


@dataclass
class _Window:
    """A range between its invalidation and its commit."""

    ino: int
    first: int
    last: int
    event: ChunkEvent
    touched: bool = False

    def took(self, step: str, since_ns: int) -> int:
        """Add what ``step`` took since then to the event; return the time now."""
        now_ns = time.monotonic_ns()
        spent = self.event.durations_ns
        spent[step] = spent.get(step, 0) + now_ns - since_ns
        return now_ns


class Migrator:
    """Moves pages of one mount; used from the trio thread."""

    def __init__(
        self, engine: Engine, notifier: Notifier, drain: Callable[[], Awaitable[int]]
    ) -> None:
        self._engine = engine
        self._notifier = notifier
        self._drain = drain
        self._windows: list[_Window] = []
        self.history = History()
        #: Told before and after the pages of a range have moved, with nothing in between.
        self.before_move: Callable[[int], None] = _nobody_listens
        self.on_move: Callable[[int, int, range, PageKind, str, Moved], None] = _nobody_listens

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
                yield len(chunk), await self._migrate_chunk(ino, chunk, to, "manual")

    async def move_all(self, moves: list[Move]) -> Tally:
        """Carry out a policy's plan by the same path; neighbours move together."""
        total = Tally()
        for to in (PageKind.XIP, PageKind.PAGECACHE):
            # What is demoted makes room for what is promoted.
            reasons = {(move.ino, move.index): move.reason for move in moves if move.to is to}
            for ino, first, count in runs(sorted(reasons)):
                for start in range(first, first + count, CHUNK_PAGES):
                    chunk = range(start, min(start + CHUNK_PAGES, first + count))
                    why = ", ".join(sorted({reasons[ino, index] for index in chunk}))
                    total += await self._migrate_chunk(ino, chunk, to, why)
        return total

    async def _migrate_chunk(self, ino: int, chunk: range, to: PageKind, why: str) -> Tally:
        try:
            wanted = self._engine.needing_move(ino, chunk, to)
            if not wanted:
                return Tally(already=len(chunk))
            event = ChunkEvent(time.time_ns(), ino, wanted[0], wanted[-1], to.value, why)
            window = _Window(ino, wanted[0], wanted[-1], event)
            self._windows.append(window)
            try:
                tally = await self._move_window(window, chunk, to)
            finally:
                self._windows.remove(window)
            event.failed = tally.failed
            self.history.record(event)
        except FsError as error:
            if error.errno != errno.ENOENT:
                raise
            # The last name and the last handle of the file went while it was being moved.
            tally = Tally(failed={"gone": len(chunk)})
        for reason, count in tally.failed.items():
            self._engine.give_up(reason, count)
        return tally

    async def _move_window(self, window: _Window, chunk: range, to: PageKind) -> Tally:
        already = len(chunk) - len(self._engine.needing_move(window.ino, chunk, to))
        refused: dict[int, list[int]] = {}
        for number in range(PASSES_MAX):
            if number and errno.EAGAIN not in refused:
                break
            await trio.sleep(number * _PASS_PAUSE_S)
            if number == 0 or window.touched:
                await self._take_away(window)
            refused = self._move(window, chunk, to)
        if window.touched:
            start_ns = time.monotonic_ns()
            await self._invalidate(window)
            window.took("invalidate_again", start_ns)
        failed = {REASONS[code]: len(pages) for code, pages in refused.items()}
        return Tally(window.event.moved, already, failed)

    def _move(self, window: _Window, chunk: range, to: PageKind) -> dict[int, list[int]]:
        """Step 3, one pass; returns what was refused."""
        start_ns = time.monotonic_ns()
        self.before_move(window.ino)
        result = self._engine.move_pages(window.ino, chunk, to)
        now_ns = window.took("move", start_ns)
        self.on_move(now_ns, window.ino, chunk, to, window.event.reason, result)
        self.history.moved(window.ino, result.moved, to, now_ns)
        event = window.event
        event.passes += 1
        event.moved += len(result.moved)
        event.moved_bytes = event.moved * PAGE_SIZE
        event.ram_pages_used = self._engine.ram_pages_used()
        return result.refused

    async def _take_away(self, window: _Window) -> None:
        """Steps 1 and 2: after this the kernel maps no page that was not read since."""
        window.touched = False
        start_ns = time.monotonic_ns()
        await self._invalidate(window)
        start_ns = window.took("invalidate", start_ns)
        await self._drain()
        window.took("drain", start_ns)

    async def _invalidate(self, window: _Window) -> None:
        count = window.last - window.first + 1
        await self._notifier.invalidate_pages(window.ino, window.first, count, MOVE)
