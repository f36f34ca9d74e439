"""Migration on a live mount: the order of steps that keeps bytes and counts right.

Pages move in chunks; each chunk goes through these steps (rules R1-R15; each leaves exactly one
authoritative copy):

1. invalidate the kernel's range, holding no lock: dirty bytes come home as WRITEs, PTEs go away;
2. drain the observer: what faulted until now is charged to the page's old kind;
3. with no await inside: zap the model's PTEs, check pins, copy, persist, commit the kind durably,
   drop the old copy (fs.moving does these, migrate.engine counts them);
4. if a READ or WRITE touched the chunk between 1 and 3, invalidate once more: the kernel may hold
   pages mapped since, whose next touch must fault to be charged to the new kind.

Steps 1 and 2 are taken for up to ``GROUP_PAGES`` at once, because they cost nearly the same for one
page and for many. A chunk that a READ or WRITE touched while it waited for its turn goes through
both again, alone. A page that is pinned at 3 is tried again, up to ``PASSES_MAX`` times; it was
unmapped, so what maps it meanwhile comes through 1 and 2 again first. A page that direct I/O is at
work on is not invalidated at 1 and not moved at 3 (trace/direct_io.py), and tried again as often.

Step 3 keeps other requests waiting, so it is bounded: by ``CHUNK_PAGES`` while other requests come,
and the next chunk then waits ``_GIVE_WAY`` times as long as this one kept them, at most
``_GIVE_WAY_MAX_S``; by ``IDLE_PAGES`` while none do, which is the larger since each chunk has its
own transaction and its own books.
"""

from __future__ import annotations

import bisect
import errno
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

import trio

from xipfs.accounting.causes import MOVE
from xipfs.errors import FsError
from xipfs.fs.moving import Moved
from xipfs.fuse.notify import Notifier
from xipfs.migrate.engine import CHUNK_PAGES, IDLE_PAGES, Engine, Job, Tally, cut, jobs_of
from xipfs.migrate.history import ChunkEvent, History
from xipfs.migrate.policy import Move
from xipfs.migrate.refusals import PASSES_MAX, REASONS

GROUP_PAGES: Final = IDLE_PAGES
#: Nobody asks for anything if nobody has for so long.
_IDLE_S: Final = 0.02
#: What a move of a file meets that is not there: its inode may be something else by now.
GONE: Final = (errno.ENOENT, errno.EISDIR, errno.EINVAL)
#: Between two passes over pinned pages: 1 ms, 2 ms, ... 9 ms; 45 ms in all.
_PASS_PAUSE_S: Final = 0.001
#: Others get at least this many times the time that a bulk move takes from them.
_GIVE_WAY: Final = 8
#: But no longer than this: a chunk takes some milliseconds, and one that took seconds was itself
#: kept waiting, by the host's disk or for a processor. Eight times that would be a standstill.
_GIVE_WAY_MAX_S: Final = 0.4
#: A request that waited for a chunk to end is with its handler after so many turns of the loop.
_TURNS_TO_A_HANDLER: Final = 3


def _nobody_listens(*_: object) -> None:
    """Do nothing."""


@dataclass(eq=False)
class _Window:
    """A chunk between its invalidation and its commit."""

    job: Job
    chunk: range
    wanted: range  # from the first page that must move to the last
    already: int
    left: list[int]
    """Pages that are still to be moved, ascending."""
    event: ChunkEvent
    touched: bool = False
    blocked_ns: int = 0
    """For how long requests waited for it."""
    in_use: set[int] = field(default_factory=set)
    """Pages that direct I/O was at work on, which were not taken away and cannot move."""

    @property
    def ino(self) -> int:
        """The file's inode number."""
        return self.job.ino

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
        self._requests = 0
        self._last_request_s = -math.inf
        self.history = History()
        #: Told of pages that are not tried again: of which chunk, and why they do not move.
        self.on_give_up: Callable[[ChunkEvent, list[int], str], None] = _nobody_listens
        #: Told before (the inode) and after (when, the chunk, what became of its pages) pages have
        #: moved, with nothing in between.
        self.before_move: Callable[[int], None] = _nobody_listens
        self.on_move: Callable[[int, ChunkEvent, Moved], None] = _nobody_listens

    def page_io(self, ino: int, first: int, last: int) -> None:
        """Hear of a READ or WRITE of pages first..last."""
        self._requests += 1
        self._last_request_s = trio.current_time()
        for window in self._windows:
            wanted = window.wanted
            if window.ino == ino and first < wanted.stop and wanted.start <= last:
                window.touched = True

    def runs_of(self, ino: int, ranges: list[range]) -> list[range]:
        """Return the runs of ``ranges`` that are no holes, hence can move."""
        return [run for pages in ranges for run in self._engine.pages_with_bytes(ino, pages)]

    async def migrate(self, jobs: Iterable[Job]) -> AsyncGenerator[tuple[Job, int, Tally], None]:
        """Do ``jobs``, in order; yields (job, pages in the chunk, its tally) chunk by chunk.

        To be closed by who leaves it early (contextlib.aclosing).
        """
        before_ns = 0
        for job in jobs:
            for group in cut(job.pages, GROUP_PAGES):
                await self._give_way(before_ns)
                idle = trio.current_time() - self._last_request_s > _IDLE_S
                chunks = cut(group, IDLE_PAGES if idle else CHUNK_PAGES)
                windows = await self._begin(job, group, chunks)
                if not windows:
                    await trio.lowlevel.checkpoint()
                before_ns = 0
                try:
                    for chunk in chunks:
                        tally = Tally(already=len(chunk))
                        if windows and windows[0].chunk == chunk:
                            await self._give_way(before_ns)
                            before_ns, tally = await self._finish(windows)
                        yield job, len(chunk), tally
                finally:
                    for window in windows:
                        self._windows.remove(window)

    async def move_all(self, moves: list[Move]) -> Tally:
        """Carry out a policy's plan by the same path; neighbours move together."""
        total = Tally()
        async for _, _, tally in self.migrate(jobs_of(moves)):
            total += tally
        return total

    async def _begin(self, job: Job, group: range, chunks: list[range]) -> list[_Window]:
        """Take steps 1 and 2 for those ``chunks`` of ``group`` that have pages to move."""
        start_ns = time.monotonic_ns()
        ino = job.ino
        try:
            pages = self._engine.needing_move(ino, group, job.to)
        except FsError as error:
            if error.errno not in GONE:
                raise
            pages = list(group)  # told as gone when its turn comes
        windows, at = [], 0
        for chunk in chunks:
            stop = bisect.bisect_left(pages, chunk.stop, at)
            if at < stop:
                span = range(pages[at], pages[stop - 1] + 1)
                event = ChunkEvent(time.time_ns(), ino, span[0], span[-1], job.to.value, job.why)
                if job.moves:
                    event.policy = job.moves[span[0]].policy
                already, left = len(chunk) - (stop - at), pages[at:stop]
                windows.append(_Window(job, chunk, span, already, left, event))
            at = stop
        if windows:
            windows[0].blocked_ns = time.monotonic_ns() - start_ns
            self._windows += windows
            try:
                whole = range(windows[0].wanted.start, windows[-1].wanted.stop)
                await self._take_away(windows[0], whole)
            except BaseException:
                for window in windows:
                    self._windows.remove(window)
                raise
        return windows

    async def _finish(self, windows: list[_Window]) -> tuple[int, Tally]:
        """Take steps 3 and 4 for the first of ``windows``, and it from them.

        Return for how many ns others had to wait, and the tally.
        """
        window = windows[0]
        try:
            if window.touched:
                await self._take_away(window, window.wanted)
            refused = await self._move_window(window)
            for code, pages in refused.items():
                self._give_up(window, REASONS[code], pages)
        except FsError as error:
            if error.errno not in GONE:
                raise
            # The last name and the last handle of the file went while it was being moved.
            if window.left:
                self._give_up(window, "gone", window.left)
        finally:
            self._windows.remove(windows.pop(0))
            # Whoever asked may have left: what has moved until then has counted.
            self.history.record(window.event)
        event = window.event
        return window.blocked_ns, Tally(event.moved, window.already, event.failed)

    async def _move_window(self, window: _Window) -> dict[int, list[int]]:
        """Move it in as many passes as it takes; return what was refused in the last."""
        refused: dict[int, list[int]] = {}
        for number in range(PASSES_MAX):
            if number:
                await trio.sleep(number * _PASS_PAUSE_S)
                if window.touched or window.in_use:
                    await self._take_away(window, window.wanted)
            refused = self._move(window)
            if errno.EAGAIN not in refused and errno.EBUSY not in refused:
                break
        if window.touched:
            start_ns = time.monotonic_ns()
            await self._notifier.invalidate_pages(
                window.ino, window.wanted.start, len(window.wanted), MOVE
            )
            window.took("invalidate_again", start_ns)
        return refused

    def _give_up(self, window: _Window, reason: str, pages: list[int]) -> None:
        """Count pages that are not tried again, and tell of them."""
        job, event = window.job, window.event
        event.failed[reason] = len(pages)
        self._engine.give_up(reason, len(pages))
        self.history.refused(job.ino, pages, job.to, job.moves, event)
        self.on_give_up(event, pages, reason)

    def _move(self, window: _Window) -> dict[int, list[int]]:
        """Step 3, one pass; returns what was refused."""
        start_ns, to = time.monotonic_ns(), window.job.to
        self.before_move(window.ino)
        result = self._engine.move_pages(window.ino, window.wanted, to, window.in_use)
        now_ns = window.took("move", start_ns)
        for part, took_ns in result.took_ns.items():
            spent = window.event.durations_ns
            spent[part] = spent.get(part, 0) + took_ns
        self.on_move(now_ns, window.event, result)
        window.left = sorted(page for pages in result.refused.values() for page in pages)
        event = window.event
        self.history.moved(window.ino, result.moved, to, now_ns, window.job.moves, event)
        event.passes += 1
        event.ram_pages_used = self._engine.ram_pages_used()
        window.blocked_ns += time.monotonic_ns() - start_ns
        return result.refused

    async def _take_away(self, window: _Window, pages: range) -> None:
        """Steps 1 and 2: after this the kernel maps no page of ``pages`` not read since."""
        taken = [
            each
            for each in self._windows
            if each.ino == window.ino and pages.start <= each.wanted.start < pages.stop
        ]
        for each in taken:
            each.touched = False
        start_ns = time.monotonic_ns()
        in_use = await self._notifier.invalidate_pages(window.ino, pages.start, len(pages), MOVE)
        for each in taken:
            each.in_use = {page for page in in_use if page in each.wanted}
        start_ns = window.took("invalidate", start_ns)
        await self._drain()
        window.took("drain", start_ns)

    async def _give_way(self, took_ns: int) -> None:
        """Let the requests be served that waited ``took_ns`` for a chunk's end, and others."""
        if not took_ns:
            return
        before = self._requests
        for _ in range(_TURNS_TO_A_HANDLER):
            await trio.lowlevel.checkpoint()
        if self._requests != before:
            await trio.sleep(min(took_ns * _GIVE_WAY / 1e9, _GIVE_WAY_MAX_S))
