"""One stream of page accesses, one policy, one RAM budget: how often was the page in RAM?

The model is coarser than a mount: every access is the first touch of a new process, hence a fault;
a move is over before the next access; and when RAM is full the page promoted longest ago is
evicted, unless the policy has demoted another one before. ``optimum`` is Belady's bound with
bypass: no order of moves made after the access that asks for them has more hits.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final, NamedTuple

from xipfs.accounting.charges import PteKind
from xipfs.fs.types import PageKind, PageState
from xipfs.migrate.decider import Decider
from xipfs.migrate.dry_run import DryRun
from xipfs.migrate.history import PINGPONG_NS
from xipfs.migrate.page_moves import PageMoves
from xipfs.migrate.policy import FAULT, Page, Signal

_INO = 1
_NO_LIMIT: Final = nullcontext()


class Access(NamedTuple):
    """One touch of a page."""

    time_ns: int
    page: int
    write: bool


@dataclass(frozen=True)
class Outcome:
    """Counts of one replay; hits found the page in RAM."""

    accesses: int
    hits: int
    writes_to_region: int
    promotions: int
    demotions: int
    """By the policy, and because RAM was full."""
    pingpong: int
    """Promotions and demotions of pages that the policy had moved the other way within
    ``PINGPONG_NS``."""


def where_all_is(_page: Page) -> PageState:
    """Return where every page really is: no move is more than imagined."""
    return PageState(PageKind.XIP, resident=False, dirty=False, pfn=None)


def replay(
    accesses: Sequence[Access],
    decider: Decider,
    ram_frames: int,
    patience: AbstractContextManager[None] = _NO_LIMIT,
) -> Outcome:
    """Run the stream through the policy; ``patience`` is around each of its decisions."""
    decider.foresee((access.time_ns, (_INO, access.page)) for access in accesses)
    run = DryRun(decider, ram_frames, where_all_is)
    pages, pingpong = PageMoves(PINGPONG_NS), 0
    for time_ns, page, write in accesses:
        with patience:
            run.hear(Signal(time_ns, FAULT, 1, _INO, page, PteKind.XIP, write), 0)
            moves = run.carry_out(0)
        for move in moves:
            pingpong += pages.moved(_INO, [move.index], move.to, time_ns, 0)
    would = run.would
    return Outcome(
        accesses=len(accesses),
        hits=would.reads_in_ram + would.writes_in_ram,
        writes_to_region=sum(access.write for access in accesses) - would.writes_in_ram,
        promotions=would.promoted,
        demotions=would.demoted + would.evicted,
        pingpong=pingpong,
    )


def optimum(accesses: Sequence[Access], ram_frames: int) -> int:
    """Return the most hits that any policy can have."""
    return most_hits([access.page for access in accesses], ram_frames)


def most_hits(pages: Sequence[Hashable], ram_frames: int, resident: Iterable[Hashable] = ()) -> int:
    """Return how many of the touches of ``pages`` can find theirs in RAM: what is used latest goes.

    ``resident`` are in RAM at the start.
    """
    never = len(pages)
    next_use = [never] * never
    seen: dict[Hashable, int] = {}
    for place in range(never - 1, -1, -1):
        next_use[place] = seen.get(pages[place], never)
        seen[pages[place]] = place
    kept = {page: seen.get(page, never) for page in resident}
    # The place breaks ties: pages need not have an order.
    latest = [(-use, -number, page) for number, (page, use) in enumerate(kept.items(), 1)]
    heapq.heapify(latest)
    hits = 0
    for place, page in enumerate(pages):
        hits += page in kept
        kept[page] = next_use[place]
        heapq.heappush(latest, (-next_use[place], place, page))
        while len(kept) > ram_frames:
            use, _, page = heapq.heappop(latest)
            if kept.get(page) == -use:
                del kept[page]
    return hits


def seeded_trace(name: str, seed: int, count: int = 20_000) -> list[Access]:
    """Return ``zipf``, ``scan`` (zipf with pages used once between) or ``writes``, 1 ms apart."""
    generator = random.Random(f"{name} {seed}")
    pages = 2000
    weights = [1 / (rank + 1) for rank in range(pages)]
    hot = generator.choices(range(pages), weights, k=count)
    trace = []
    for place, page in enumerate(hot):
        once = name == "scan" and place % 2 == 1
        # In `writes` every fourth page is written, the others are only read.
        write = name == "writes" and page % 4 == 0
        trace.append(Access(place * 1_000_000, pages + place if once else page, write))
    return trace


TRACES = ("zipf", "scan", "writes")
