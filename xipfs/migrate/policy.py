"""What a policy sees and what it returns: all that a policy's file needs to import.

A policy is a dataclass. Its fields are its parameters (whole numbers, or texts), its class
attribute ``SIGNALS`` names what it wants to hear, and ``plan`` turns one signal into moves:

    @dataclass
    class Mine:
        SIGNALS: ClassVar[frozenset[str]] = frozenset({FAULT})
        promote: int = 3

        def plan(self, signal: Signal, seen: Seen) -> Iterable[Move]: ...

All it is given are frozen values; nothing leads from them to the filesystem. But it is code that
runs in the daemon, with the daemon's rights: xipfs guards against its mistakes (an error, a wrong
plan, a call that does not return), not against its will. Signals come in the
order of the event stream, and their time stamps are a policy's only clock, so that the same stream
gives the same plans, on a mount and in a replay.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple, Protocol

from xipfs.accounting.charges import Charge, PteKind
from xipfs.fs.types import PageKind

__all__ = [
    "DONE", "EVICTED", "FAULT", "HINT", "MOVED", "READ", "REFUSED", "TOUCHES", "WRITE",
    "Charge", "Move", "Page", "PageKind", "Policy", "PteKind", "Seen", "Signal", "demote",
    "promote", "signal_of",
]  # fmt: skip

FAULT: Final = "fault"
"""A program faulted; ``kind`` is what the PTE maps now."""
HINT: Final = "hint"
"""A program touched a page again that a hint had taken away."""
READ: Final = "read"
"""A READ request: of read(2), of read-ahead, or of a fault on a page the kernel did not cache."""
WRITE: Final = "write"
"""A WRITE request: of write(2), or of the kernel's write-back of a mapping that was stored to."""
MOVED: Final = "moved"
"""A page was moved, by whom it may be; ``kind`` is the new one."""
REFUSED: Final = "refused"
"""A planned move was not made; ``kind`` is the one it was to get."""
EVICTED: Final = "evicted"
"""A page lost its frame for want of RAM; it stays a pagecache page."""
TOUCHES: Final = frozenset({FAULT, HINT, READ, WRITE})
DONE: Final = frozenset({MOVED, REFUSED, EVICTED})

Page = tuple[int, int]
"""Inode number and page index."""


@dataclass(frozen=True, slots=True)
class Signal:
    """One thing that happened to one page; ``time_ns`` is CLOCK_MONOTONIC, as tracefs stamps it."""

    time_ns: int
    source: str
    pid: int
    ino: int
    index: int
    kind: PteKind
    write: bool = False

    @property
    def page(self) -> Page:
        """The page that it happened to."""
        return self.ino, self.index


class Seen(NamedTuple):
    """The statistics at a signal, frozen: frames of the page cache; pages since the policy began.

    Of the frames in use, moves that are under way count as made. Whoever moves pages, by hand too,
    counts in ``promoted`` and ``demoted``; ``refused`` are planned moves that were not made.
    """

    ram_pages_used: int
    ram_pages: int
    promoted: int = 0
    demoted: int = 0
    refused: int = 0
    evicted: int = 0


@dataclass(frozen=True, slots=True)
class Move:
    """One page that a policy wants moved, and why.

    The decider adds which policy that was, and the process whose touch earned it (0: none).
    """

    ino: int
    index: int
    to: PageKind
    reason: str
    policy: str = ""
    pid: int = 0


class Policy(Protocol):
    """Decides on moves.

    A policy may also have ``victims(count, seen)``: the pages that the page cache should evict
    first when RAM is full. Without it the least recently used go.
    """

    SIGNALS: ClassVar[frozenset[str]]

    def plan(self, signal: Signal, seen: Seen) -> Iterable[Move]:
        """Return the moves that this signal has earned."""


def promote(page: Page, reason: str) -> Move:
    """Return the move of ``page`` to the page cache."""
    return Move(*page, PageKind.PAGECACHE, reason)


def demote(page: Page, reason: str) -> Move:
    """Return the move of ``page`` back to XIP."""
    return Move(*page, PageKind.XIP, reason)


def signal_of(charge: Charge) -> Signal:
    """Return the signal of a charged fault."""
    source = HINT if charge.hint else FAULT
    return Signal(
        charge.time_ns, source, charge.pid, charge.ino, charge.page, charge.kind, charge.write
    )
