"""A mount's policy at work: signals in, plans carried out in the background.

Everything runs on the trio thread. What the policy hears has one order: that in which it is
accounted. Moves and evictions are heard where they take effect; faults and requests when the
observer was drained, merged by their times. A policy that fails is replaced by ``off``, and every
snapshot says so: a defect in it must not end the mount.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import trio

from xipfs.accounting.charges import Charge
from xipfs.errors import FsError
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import PageKind
from xipfs.memory.profiles import Profile
from xipfs.migrate.decider import done, merged
from xipfs.migrate.dry_run import DryRun
from xipfs.migrate.policy import EVICTED, MOVED, READ, REFUSED, WRITE, Move, Page, PteKind, Signal
from xipfs.migrate.registry import make_policy
from xipfs.options import MountOptions

log = logging.getLogger(__name__)


class Deciding:
    """The policy of one mount, and what it has planned."""

    def __init__(self, fs: Filesystem, options: MountOptions, profile: Profile | None) -> None:
        self._fs = fs
        self._profile = profile
        # Nothing can move on a read-only mount; what would is told.
        self.choose(options.policy, dict(options.policy_values), dry=options.dry or fs.read_only)
        self._requests: list[Signal] = []
        self._plan: list[Move] = []
        self._planned = trio.Event()

    def describe(self) -> dict[str, Any]:
        """Return the policy's part of ``stats.json``."""
        return {
            **self._decider.describe(),
            "dry": self._dry is not None,
            "failure": self._failure,
            **self._would(),
        }

    def _would(self) -> dict[str, Any]:
        """Return what a dry policy would have moved, why, and what that would cost and save."""
        if self._dry is None:
            return {"would_move": [], "dry_run": None}
        would, moves = self._dry.would, self._dry.moves.items()
        return {
            "would_move": [
                {"to": to, "reason": reason, "count": count} for (to, reason), count in moves
            ],
            "dry_run": vars(would) | would.cost(self._profile, self._fs.memory.struct_page_bytes),
        }

    def choose(self, name: str, values: Mapping[str, Any], *, dry: bool) -> None:
        """Go on with another policy, which starts knowing nothing. Raise UsageError."""
        ram_pages = self._fs.memory.ram_pages
        self._decider = make_policy(name, values.items(), ram_pages)
        self._dry = DryRun(self._decider, ram_pages) if dry else None
        self._failure = ""

    # What is heard

    def page_io(self, pid: int, ino: int, first: int, last: int, *, write: bool) -> None:
        """Hear of a READ or WRITE request of pages first..last; told at the next ``charged``."""
        source = WRITE if write else READ
        if source not in self._decider.signals:
            return
        now_ns, pages = time.monotonic_ns(), range(first, last + 1)
        try:
            xip = self._fs.wanted(ino, pages, PageKind.PAGECACHE)
            cached = self._fs.wanted(ino, pages, PageKind.XIP)
        except FsError:
            return  # the file went with the request
        for kind, indexes in ((PteKind.XIP, xip), (PteKind.PAGECACHE, cached)):
            self._requests += [
                Signal(now_ns, source, pid, ino, index, kind, write) for index in indexes
            ]

    def charged(self, charges: Iterable[Charge]) -> None:
        """Tell the policy what happened since the last call."""
        requests, self._requests = self._requests, []
        if not self._decider.signals:
            return
        if not self._decider.signals:
            return
        for signal in merged(requests, charges):
            self._hear(signal)

    def moved(self, ino: int, pages: Iterable[int], to: PageKind, now_ns: int) -> None:
        """Hear of pages that have moved just now."""
        for index in pages:
            self._hear(done(now_ns, MOVED, Move(ino, index, to, "")))

    def evicted(self, ino: int, index: int) -> None:
        """Hear of a page that lost its frame."""
        now_ns = time.monotonic_ns()
        self._hear(Signal(now_ns, EVICTED, 0, ino, index, PteKind.PAGECACHE))

    def victims(self, count: int) -> list[Page]:
        """Return pages that the policy wants evicted first; empty: it has no opinion."""
        try:
            return self._decider.victims(count, self._fs.nr_resident_pages)
        except Exception as error:
            self._fail(error)
            return []

    def _hear(self, signal: Signal) -> None:
        try:
            heard_by = self._dry or self._decider
            moves = heard_by.hear(signal, self._fs.nr_resident_pages)
        except Exception as error:
            self._fail(error)
            return
        if moves and not self._dry:
            self._plan += moves
            self._planned.set()

    def _fail(self, error: Exception) -> None:
        log.exception("policy %s failed; it is off from now on", self._decider.name)
        self._failure = f"{self._decider.name}: {error!r}"
        self._decider = make_policy("off", [], self._fs.memory.ram_pages)
        self._dry = None

    async def carry_out(self, move_all: Callable[[list[Move]], Awaitable[object]]) -> None:
        """Carry out plans for ever; what is planned meanwhile moves together, at the next turn."""
        while True:
            await self._planned.wait()
            self._planned = trio.Event()
            moves, self._plan = self._plan, []
            try:
                await move_all(moves)
            except Exception:
                log.exception("a plan of %d moves of %s failed", len(moves), self._decider.name)
            now_ns = time.monotonic_ns()
            for move in moves:
                if self._decider.is_under_way(move):
                    self._hear(done(now_ns, REFUSED, move))
