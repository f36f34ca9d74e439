"""One policy at the stream's wheel: what it hears, in which order and with which times.

A live mount and a replay use the same object, so that the same stream gives the same plans. What
the policy hears has one order: that in which things take effect. Moves and evictions are heard at
once; faults and requests at the next *decision point* (``charged``), merged by their times. No
clock is read: each signal's time comes with it, and an eviction's is the latest that was heard.

A policy that fails (raises whatever it be, plans what is no move), or on a live mount does not
return, is replaced by ``off``, and every snapshot says so: a defect in it must not end the mount.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

from xipfs.accounting.charges import Charge
from xipfs.errors import FsError, ImageError, UsageError
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import PageKind, PageState
from xipfs.memory.profiles import Profile
from xipfs.migrate.decider import done, merged
from xipfs.migrate.dry_run import DryRun
from xipfs.migrate.policy import EVICTED, MOVED, READ, REFUSED, WRITE, Move, Page, PteKind, Signal
from xipfs.migrate.refusals import errnos_of
from xipfs.migrate.registry import make_policy, said_by

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class Steering:
    """The policy of one filesystem.

    ``on_plan`` is told the moves that a signal has earned, ``on_would`` those of a dry policy.
    """

    #: Around each call of the policy's code.
    patience: AbstractContextManager[None] = nullcontext()
    #: Whatever a policy's code raises is its failure, but for this: Ctrl-C ends a replay.
    _interrupts: tuple[type[BaseException], ...] = (KeyboardInterrupt,)

    def __init__(
        self,
        fs: Filesystem,
        policy: str,
        values: Mapping[str, Any],
        *,
        dry: bool,
        profile: Profile | None,
    ) -> None:
        self._fs = fs
        self._profile = profile
        Steering.choose(self, policy, values, dry=dry)
        self._requests: list[Signal] = []
        #: The latest time that was heard, which is that of an eviction.
        self.now_ns = 0
        self.on_plan: Callable[[list[Move]], None] | None = None
        self.on_would: Callable[[list[Move]], None] | None = None

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
            "dry_run": {
                **vars(would),
                "failed": dict(self._dry.failed),
                "failed_errno": errnos_of(self._dry.failed),
                **would.cost(self._profile, self._fs.memory.struct_page_bytes),
            },
        }

    def choose(self, name: str, values: Mapping[str, Any], *, dry: bool) -> None:
        """Go on with another policy, which starts knowing nothing. Raise UsageError."""
        ram_pages = self._fs.memory.ram_pages
        try:
            with self.patience:
                decider = make_policy(name, values.items(), ram_pages)
        except UsageError:
            raise
        except self._interrupts:
            raise
        except BaseException as error:
            raise UsageError(f"policy {name} cannot be begun: {self._said(error)}") from None
        self._decider = decider
        self._dry = DryRun(self._decider, ram_pages, self._where) if dry else None
        self._failure = ""
        self._heard = 0

    @property
    def signals_heard(self) -> int:
        """How many signals the policy has heard, or soon will: what it remembers comes of these."""
        return self._heard + len(self._requests)

    def foresee(self, touches: Iterable[tuple[int, Page]]) -> None:
        """Tell a policy that asks for it all touches to come, as (time in ns, page)."""
        self._decider.foresee(touches)

    def page_io(
        self, now_ns: int, pid: int, ino: int, first: int, last: int, *, write: bool
    ) -> None:
        """Hear of a READ or WRITE request of pages first..last; told at the next ``charged``."""
        self.now_ns = max(self.now_ns, now_ns)
        source = WRITE if write else READ
        if source not in self._decider.signals:
            return
        pages = range(first, last + 1)
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
        """A decision point: tell the policy of requests and faults since the last one."""
        requests, self._requests = self._requests, []
        if not self._decider.signals:
            return
        for signal in merged(requests, charges):
            self.now_ns = max(self.now_ns, signal.time_ns)
            self._hear(signal)
        self._decided()

    def moved(self, ino: int, pages: Iterable[int], to: PageKind, now_ns: int) -> None:
        """Hear of pages that have moved just now."""
        self.now_ns = max(self.now_ns, now_ns)
        if not self._decider.signals:
            return  # it listens to nothing, so it has planned nothing
        for index in pages:
            self._hear(done(now_ns, MOVED, Move(ino, index, to, "")))
        self._decided()

    def evicted(self, ino: int, index: int) -> None:
        """Hear of a page that lost its frame, in the middle of what it was lost for.

        A dry policy's plan waits for the next decision point: no page can be looked at now.
        """
        if not self._decider.signals:
            return
        self._hear(Signal(self.now_ns, EVICTED, 0, ino, index, PteKind.PAGECACHE))

    def carried_out(self, moves: Iterable[Move], now_ns: int) -> list[Move]:
        """Hear that nothing more will come of these moves; return those that were not made."""
        refused = [move for move in moves if self._decider.is_under_way(move)]
        if refused:  # else nothing was heard, and no recording tells of it
            self.now_ns = max(self.now_ns, now_ns)
        for move in refused:
            self._hear(done(now_ns, REFUSED, move))
        return refused

    def victims(self, count: int) -> list[Page]:
        """Return pages that the policy wants evicted first; empty: it has no opinion, or no say."""
        if self._dry is not None:
            return []
        return self._called(self._decider.victims, count, self._fs.nr_resident_pages) or []

    def _hear(self, signal: Signal) -> None:
        self._heard += 1
        hear = self._decider.hear if self._dry is None else self._dry.hear
        moves = self._called(hear, signal, self._fs.nr_resident_pages)
        if moves and self.on_plan is not None:
            self.on_plan(moves)

    def _decided(self) -> None:
        """Go on after a decision point: what a dry policy has planned is imagined at once."""
        if self._dry is not None:
            self._imagine(self._dry.carry_out)

    def _imagine(self, moves_of: Callable[[int], list[Move]]) -> None:
        """Have the moves of a dry policy imagined, and told of."""
        made = self._called(moves_of, self._fs.nr_resident_pages)
        if made and self.on_would is not None:
            self.on_would(made)

    def _called(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Return what a call of the policy's code returns; None, and it is off, if it fails."""
        try:
            with self.patience:
                return function(*args, **kwargs)
        except self._interrupts:
            raise
        except BaseException as error:
            self._fail(error)
            return None

    def _where(self, page: Page) -> PageState | None:
        """Return where a page is, None if no such page can be; this is no touch."""
        try:
            return self._fs.page(*page)
        except (FsError, ImageError):  # no such file, or a damaged map: no page of it can move
            return None

    def _said(self, error: BaseException) -> str:
        try:
            with self.patience:
                return said_by(error)
        except self._interrupts:
            raise
        except BaseException as other:
            return type(other).__name__

    def _fail(self, error: BaseException) -> None:
        name, said = self._decider.name, self._said(error)
        where = "".join(traceback.format_tb(error.__traceback__))
        log.error("policy %s failed; it is off from now on: %s\n%s", name, said, where)
        self._failure = f"{name}: {said}"
        self._decider = make_policy("off", [], self._fs.memory.ram_pages)
        self._dry = None
