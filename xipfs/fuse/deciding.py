"""A mount's policy at work: plans of ``migrate/steering.py`` carried out in the background."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import trio

from xipfs.accounting.charges import Charge
from xipfs.errors import FsError, UsageError
from xipfs.fs.filesystem import Filesystem
from xipfs.fuse.patience import Patience
from xipfs.memory.profiles import Profile
from xipfs.migrate.decider import CHOSEN
from xipfs.migrate.policy import Move
from xipfs.migrate.registry import REPLAY_ONLY
from xipfs.migrate.steering import Steering
from xipfs.options import MountOptions


def _no_recording(_item: str, **_values: Any) -> None:
    """Take no note."""


def _check_needs_no_future(policy: str) -> None:
    if policy in REPLAY_ONLY:
        raise UsageError(
            f"policy {policy} needs to know the future", remedy="use it with `xipfs replay`"
        )


class Deciding(Steering):
    """The policy of one mount, and what it has planned; used from the trio thread.

    ``note`` records decision points and what else a replay needs to decide in the same way.
    """

    #: SIGINT and SIGTERM come by way of trio: nothing that is raised in a policy is one of them.
    _interrupts = ()

    def __init__(self, fs: Filesystem, options: MountOptions, profile: Profile | None) -> None:
        _check_needs_no_future(options.policy)
        self.patience: Patience = Patience()
        #: The policy whose code is called, also that of one that is being chosen.
        self.called = options.policy
        super().__init__(
            fs,
            options.policy,
            dict(options.policy_values),
            # Nothing can move on a read-only mount; what would is told.
            dry=options.dry or fs.read_only,
            profile=profile,
        )
        self.on_plan = self._planned_more
        self.note: Callable[..., None] = _no_recording
        self._plan: list[Move] = []
        self._turn: list[Move] = []
        self._planned = trio.Event()

    def choose(self, name: str, values: Mapping[str, Any], *, dry: bool) -> None:
        """Go on with another policy."""
        _check_needs_no_future(name)
        self.called = name
        try:
            super().choose(name, values, dry=dry)
        finally:
            self.called = self._decider.name
        self.note("policy", **self.chosen())

    def chosen(self) -> dict[str, Any]:
        """Return what a trace says of the policy."""
        told = self.describe()
        return {name: told[name] for name in CHOSEN}

    def before(self) -> dict[str, int]:
        """Return what a trace that begins now has to tell of the past: it lacks the rest of it."""
        return {
            "signals": self.signals_heard,
            "planned": len(self._plan) + len(self._turn),
            "heard_ns": self.now_ns,
        }

    def charged(self, charges: Iterable[Charge]) -> None:
        """A decision point, as told to a recording."""
        self.note("decide")
        super().charged(charges)

    def describe(self) -> dict[str, Any]:
        """Return the policy's part of ``stats.json``; what a dry one has planned is imagined."""
        super()._decided()
        return super().describe()

    def _decided(self) -> None:
        """Leave a dry policy's plan to the next turn, as others are left to theirs."""
        if self._dry is not None:
            self._planned.set()

    def _planned_more(self, moves: list[Move]) -> None:
        self._plan += moves
        self._planned.set()

    async def carry_out(
        self,
        move_all: Callable[[list[Move]], Awaitable[object]],
        drain: Callable[[], Awaitable[object]],
    ) -> None:
        """Carry out plans for ever; what is planned meanwhile moves together, at the next turn."""
        while True:
            await self._planned.wait()
            self._planned = trio.Event()
            if (dry := self._dry) is not None:
                # Each job of a real turn drains, and so tells the policy of what the next is for.
                for _ in dry.begin():
                    await drain()
                if dry is self._dry:
                    self._imagine(dry.finish)
                continue
            moves, self._plan = self._plan, []
            self._turn = moves
            self.note("turn")
            try:
                # Damage that was met ends all changes: the policy hears that its moves failed.
                if not self._fs.read_only:
                    await move_all(moves)
            except FsError:
                if not self._fs.damage:
                    raise
            finally:
                self._turn = []
                # The policy waits for the end of each of its moves, also of a plan that failed.
                now_ns = time.monotonic_ns()
                if refused := self.carried_out(moves, now_ns):
                    pages = [[move.ino, move.index, move.to.value] for move in refused]
                    self.note("refused", time_ns=now_ns, moves=pages)
