"""One policy at work: what it is told, what of its plans is let through, what was held back.

These rules hold for every policy, shipped or a user's own; each is off (0) unless a parameter or
the policy's own default sets it.

- What a policy returns is checked in full first: one wrong move is a failure of the policy.
- A page whose move is under way is not asked for again, and counts in ``Seen`` as moved.
- ``pages_per_s`` bounds the moves of each second of the stream; what is above it is dropped, and
  the page's next touch may earn it again (numa_balancing_promote_rate_limit_MBps does the same).
- ``stay_ms`` damps ping-pong: a page is not moved back sooner after its last move.

Each signal is a point of decision. So a plan follows from the stream alone, however it was cut
into pieces on its way here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Final

from xipfs.accounting.charges import Charge
from xipfs.fs.types import PageKind
from xipfs.image import layout
from xipfs.migrate.parts import NS_PER_MS, RateLimit, Remembered
from xipfs.migrate.policy import (
    DONE,
    EVICTED,
    MOVED,
    REFUSED,
    Move,
    Page,
    Policy,
    PteKind,
    Seen,
    Signal,
    signal_of,
)

#: Parameters that every policy has, with their defaults; a policy's own field replaces a default.
COMMON: Final[dict[str, int]] = {"pages_per_s": 0, "stay_ms": 0}
#: Of what is told of a mount's policy (``Steering.describe``) what it is; the rest are counts.
CHOSEN: Final = ("policy", "parameters", "files_sha256", "dry")
#: Moves under way at once; a plan is dropped above it, since nobody carries plans out.
_UNDER_WAY_MAX: Final = 1 << 18
#: Of what a policy returns, what the format can hold at all (see image/layout.py).
_INDEX_LIMIT: Final = layout.MAX_FILE_PAGES
_INO_LIMIT: Final = layout.MAX_FILE_PAGES * layout.INODES_PER_BLOCK
#: Characters of a move's reason, which is kept and shown by reason.
_REASON_MAX: Final = 200
#: What a move to that kind adds to the frames in use.
_FRAMES: Final = {PageKind.PAGECACHE: 1, PageKind.XIP: -1}


@dataclasses.dataclass(frozen=True)
class DeciderStatistics:
    """Pages: asked for by the policy, let through, not yet carried out, and held back by cause."""

    asked: int
    planned: int
    moves_under_way: int
    held_back: dict[str, int]


class Decider:
    """Runs one policy. ``name`` is what it was chosen by, ``values`` all its parameters.

    ``digest`` tells apart the texts that a policy of this name may have (registry.py).
    """

    def __init__(
        self, name: str, policy: Policy, values: Mapping[str, Any], ram_pages: int, digest: str
    ) -> None:
        assert values.keys() >= COMMON.keys(), values
        self.name = name
        self.values = dict(values)
        self.digest = digest
        self.signals = policy.SIGNALS
        self._policy = policy
        self._rate = RateLimit(values["pages_per_s"])
        self._stay_ns = values["stay_ms"] * NS_PER_MS
        self._ram_pages = ram_pages
        self._under_way: dict[Page, Move] = {}
        self._frames_to_come = 0
        self._moved_ns = Remembered()
        self._asked = self._planned = 0
        self._promoted = self._demoted = self._refused = self._evicted = 0
        self._held_back = {"under_way": 0, "rate": 0, "stay": 0}

    def statistics(self) -> DeciderStatistics:
        """Return the counts since the policy was chosen."""
        under_way = len(self._under_way)
        return DeciderStatistics(self._asked, self._planned, under_way, dict(self._held_back))

    def describe(self) -> dict[str, Any]:
        """Return the policy's name, the signals it uses, its parameters and its counts."""
        return {
            "policy": self.name,
            "parameters": self.values,
            "files_sha256": self.digest,
            "signals": sorted(self.signals),
            **vars(self.statistics()),
        }

    def hear(self, signal: Signal, ram_pages_used: int) -> list[Move]:
        """Tell the policy of one signal; return the moves that it has earned."""
        if signal.source in (MOVED, REFUSED):
            move = self._under_way.pop(signal.page, None)
            if move is not None:
                self._frames_to_come -= _FRAMES[move.to]
        if signal.source == MOVED and self._stay_ns:
            self._moved_ns.put(signal.page, signal.time_ns)
        if signal.source in DONE:
            self._count(signal)
        if signal.source not in self.signals:
            return []
        plan = self._policy.plan(signal, self._seen(ram_pages_used))
        if not isinstance(plan, Iterable):
            raise ValueError(f"plan returned {_shown(plan)}; expected an iterable of moves")
        moves = (self._checked(move, signal.pid) for move in plan)
        return [move for move in moves if self._let_through(move, signal.time_ns)]

    def foresee(self, touches: Iterable[tuple[int, Page]]) -> None:
        """Tell a policy that asks for it all touches to come, as (time in ns, page)."""
        learn = getattr(self._policy, "foresee", None)
        if learn is not None:
            learn(touches)

    def victims(self, count: int, ram_pages_used: int) -> list[Page]:
        """Return up to ``count`` pages in RAM that the policy would rather lose than others.

        The method ``victims(count, seen)`` of a policy is optional; none: nothing to say.
        """
        choose = getattr(self._policy, "victims", None)
        if choose is None:
            return []
        chosen = choose(count, self._seen(ram_pages_used))
        if not isinstance(chosen, Iterable):
            raise ValueError(f"victims returned {_shown(chosen)}; expected an iterable of pages")
        pages = list(islice(chosen, count))
        for page in pages:
            if type(page) is not tuple or len(page) != 2:
                raise ValueError(f"victims named {_shown(page)}; expected (inode, index)")
            _check_page("victims named a page", *page)
        return pages

    def _count(self, signal: Signal) -> None:
        if signal.source == MOVED:
            self._promoted += signal.kind is PteKind.PAGECACHE
            self._demoted += signal.kind is PteKind.XIP
        self._refused += signal.source == REFUSED
        self._evicted += signal.source == EVICTED

    def _seen(self, ram_pages_used: int) -> Seen:
        used = max(ram_pages_used + self._frames_to_come, 0)
        done = self._promoted, self._demoted, self._refused, self._evicted
        return Seen(used, self._ram_pages, *done)

    def is_under_way(self, move: Move) -> bool:
        """Return whether this very move was let through and nothing was heard of it since.

        Its page may have moved, somebody moved it back, and the policy planned the same anew.
        """
        return self._under_way.get((move.ino, move.index)) is move

    def _checked(self, move: Any, pid: int) -> Move:
        """Return the move as it is carried out; raise if it is none that can be."""
        if not isinstance(move, Move):
            raise ValueError(f"plan holds {_shown(move)}; expected a Move")
        checked = Move(move.ino, move.index, move.to, move.reason, self.name, pid)
        _check_page("plan holds a move", checked.ino, checked.index)
        to, reason = checked.to, checked.reason
        if to is not PageKind.PAGECACHE and to is not PageKind.XIP:
            expected = "PageKind.PAGECACHE or PageKind.XIP"
            raise ValueError(f"plan holds a move to {_shown(to)}; expected {expected}")
        if (
            type(reason) is not str
            or not 0 < len(reason) <= _REASON_MAX
            or not reason.isprintable()
        ):
            raise ValueError(
                f"plan holds a move with reason {_shown(reason)};"
                f" expected 1 to {_REASON_MAX} printable characters"
            )
        return checked

    def _let_through(self, move: Move, time_ns: int) -> bool:
        self._asked += 1
        page = (move.ino, move.index)
        moved_ns = self._moved_ns.get(page) if self._stay_ns else None
        if page in self._under_way or len(self._under_way) == _UNDER_WAY_MAX:
            self._held_back["under_way"] += 1
        elif moved_ns is not None and time_ns - moved_ns < self._stay_ns:
            self._held_back["stay"] += 1
        elif not self._rate.take(time_ns):
            self._held_back["rate"] += 1
        else:
            self._under_way[page] = move
            self._frames_to_come += _FRAMES[move.to]
            self._planned += 1
            return True
        return False


def _check_page(what: str, ino: Any, index: Any) -> None:
    for name, value, least, limit in (
        ("ino", ino, 1, _INO_LIMIT),
        ("index", index, 0, _INDEX_LIMIT),
    ):
        # An exact int: True is 1 elsewhere, but here a mistake.
        if type(value) is not int or not least <= value < limit:
            expected = f"a whole number from {least} to {limit - 1}"
            raise ValueError(f"{what} with {name} {_shown(value)}; expected {expected}")


def _shown(value: object) -> str:
    return f"{value!r:.100}"


def done(time_ns: int, source: str, move: Move) -> Signal:
    """Return the signal that tells of a move's outcome: MOVED or REFUSED."""
    kind = PteKind.XIP if move.to is PageKind.XIP else PteKind.PAGECACHE
    return Signal(time_ns, source, 0, move.ino, move.index, kind)


def merged(requests: Iterable[Signal], charges: Iterable[Charge]) -> list[Signal]:
    """Return the signals of one drain in the order of their times: requests, then faults.

    Both are in order already. Of equal times the request comes first: it was sent by then.
    """
    return sorted([*requests, *map(signal_of, charges)], key=lambda signal: signal.time_ns)
