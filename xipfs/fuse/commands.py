"""The commands of the control file: what a client asks to change, or to hear of as it happens."""

from __future__ import annotations

import errno
import itertools
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

import trio

from xipfs.errors import FsError, ImageError, ObserverError, UsageError
from xipfs.fs.types import PageKind
from xipfs.fuse.control import DIR_INO, Command, Json
from xipfs.fuse.migration import GONE
from xipfs.fuse.observing import TracefsObserver
from xipfs.fuse.translate import tell_damage
from xipfs.fuse.views import would_migrate
from xipfs.migrate.engine import Job, Tally
from xipfs.migrate.history import MANUAL
from xipfs.units import pages_of

if TYPE_CHECKING:
    from xipfs.fuse.live import Live

#: A follower of events hears at least this often, if only that there are none.
_EVENTS_INTERVAL_S: Final = 0.1
#: A client hears of its move's progress this often: each word costs a READ of the control file.
_PROGRESS_INTERVAL_S: Final = 0.05
_Wanted = tuple[int, list[range]]
KINDS: Final = {"xip": PageKind.XIP, "pagecache": PageKind.PAGECACHE}


class Commands:
    """Answers the requests of one mount's control file."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def by_name(self) -> Mapping[str, Command]:
        """Return the commands by the name that a request has."""
        return {
            "migrate": self._migrate,
            "events": self._events,
            "follow": self._follow,
            "policy": self._choose_policy,
        }

    async def _follow(self, request: Json) -> AsyncGenerator[Json, None]:
        """Begin the figures of a command, before its process does anything of its own."""
        pid = int(request["pid"])
        if not isinstance(self._live.observer, TracefsObserver):
            figures = self._live.observer.figures()
            raise ObserverError(
                f"faults are not seen on this mount (observer {figures.mode}: {figures.reason})",
                remedy="mount as root with -o observe=tracefs; xipfs doctor says what is missing",
            )
        # What it did before is nobody's: charge it before the figures begin.
        await self._live.drain_settled()
        await trio.to_thread.run_sync(self._live.observer.follow, pid)
        self._live.accountant.runs.follow(pid)
        yield {"result": {}}

    async def _events(self, request: Json) -> AsyncGenerator[Json, None]:
        """Tell of past migrations, and with ``follow`` of those that come, for ever."""
        next_event = 0
        while True:
            events, lost, next_event = self._live.migrator.history.since(next_event)
            yield {"lost": lost}
            for event in events:
                yield {"event": event.describe()}
            if not request.get("follow"):
                return
            await trio.sleep(_EVENTS_INTERVAL_S)

    async def _choose_policy(self, request: Json) -> AsyncGenerator[Json, None]:
        """Change the policy; what faulted until now is still the old one's."""
        await self._live.drain_settled()
        self._live.deciding.choose(request["policy"], request["values"], dry=bool(request["dry"]))
        yield {"result": self._live.deciding.describe()}

    async def _migrate(self, request: Json) -> AsyncGenerator[Json, None]:
        """Move pages of one file (``ino``, ``ranges``) or of many (``files``: a list of such).

        One of many that is not there any more costs no other: its pages are refused, as ``gone``.
        Damage that is met ends all changes, as in a request handler.
        """
        to = KINDS.get(request["to"])
        if to is None:
            raise UsageError(f"kind {request['to']!r}", expected=" or ".join(KINDS))
        if self._live.fs.read_only and not request.get("dry_run"):
            raise FsError(errno.EROFS, "the mount is read-only: no page can change its kind")
        try:
            if request.get("dry_run"):
                await self._live.drain_settled()
            batch, gone = self._batch(request)
            if request.get("dry_run"):
                yield {"result": would_migrate(self._live, batch, gone, to)}
                return
            jobs = [
                Job(ino, run, to, MANUAL)
                for ino, to_move in itertools.chain(batch, gone)
                for run in to_move
            ]
            total = sum(len(job.pages) for job in jobs)
            done, sums = 0, {int(file["ino"]): Tally() for file in _files_of(request)}
            told_s = trio.current_time()
            async with aclosing(self._live.migrator.migrate(jobs)) as chunks:
                async for job, pages, tally in chunks:
                    done += pages
                    sums[job.ino] += tally
                    if done < total and trio.current_time() - told_s >= _PROGRESS_INTERVAL_S:
                        told_s = trio.current_time()
                        moved = sum(each.moved for each in sums.values())
                        yield {
                            "progress": {
                                "pages_done": done, "pages_total": total, "pages_moved": moved,
                            }
                        }  # fmt: skip
        except ImageError as error:
            tell_damage(self._live.fs, error)
            raise
        result = sum(sums.values(), Tally()).describe()
        if "files" in request:
            result["files"] = [{"ino": ino, **each.describe()} for ino, each in sums.items()]
        yield {"result": result}

    def _batch(self, request: Json) -> tuple[list[_Wanted], list[_Wanted]]:
        """Return the files, each with the runs to move; apart, those of many that are gone."""
        there: list[_Wanted] = []
        gone: list[_Wanted] = []
        for wanted in _files_of(request):
            ino = int(wanted["ino"])
            try:
                there.append((ino, self._runs_to_move(wanted)))
            except FsError as error:
                if "files" not in request or error.errno not in GONE or not 0 < ino < DIR_INO:
                    raise
                gone.append((ino, self._runs_of_gone(wanted)))
        return there, gone

    def _runs_of_gone(self, wanted: Json) -> list[range]:
        """Return the pages that were asked for, as runs; one page if that was all of the file."""
        asked = sum(max(int(count), 0) for _, count in wanted.get("ranges", [[0, 1]]))
        # There were no more pages with bytes than the image has.
        return [range(min(asked, self._live.fs.memory.nvram_pages))]

    def _runs_to_move(self, wanted: Json) -> list[range]:
        """Return the runs of wanted pages that are no holes: a sparse file costs what it holds."""
        ino = int(wanted["ino"])
        end = pages_of(self._live.fs.getattr(ino).size_bytes)
        ranges = [range(int(a), int(a) + int(n)) for a, n in wanted.get("ranges", [[0, end]])]
        for pages in ranges:
            if pages.start < 0 or pages.stop > end:
                raise UsageError(
                    f"pages {pages.start}-{pages.stop - 1} reach outside the file",
                    expected=f"pages 0-{end - 1}" if end else "a file that is not empty",
                )
        return self._live.migrator.runs_of(ino, ranges)


def _files_of(request: Json) -> list[Json]:
    files: list[Json] = request.get("files", [request])
    return files
