"""One stream of page accesses, one policy, one RAM budget: how often was the page in RAM?

The model is coarser than a mount: every access is the first touch of a new process, hence a fault;
a move is over before the next access; and when RAM is full the page promoted longest ago is
evicted, unless the policy has demoted another one before. ``optimum`` is Belady's bound with
bypass: no order of moves made after the access that asks for them has more hits.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from xipfs.accounting.charges import PteKind
from xipfs.migrate.decider import Decider
from xipfs.migrate.dry_run import DryRun
from xipfs.migrate.policy import FAULT, Signal

_INO = 1


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


def replay(accesses: Sequence[Access], decider: Decider, ram_frames: int) -> Outcome:
    """Run the stream through the policy."""
    run = DryRun(decider, ram_frames)
    for access in accesses:
        run.hear(Signal(access.time_ns, FAULT, 1, _INO, access.page, PteKind.XIP, access.write), 0)
    would = run.would
    return Outcome(
        accesses=len(accesses),
        hits=would.reads_in_ram + would.writes_in_ram,
        writes_to_region=sum(access.write for access in accesses) - would.writes_in_ram,
        promotions=would.promoted,
        demotions=would.demoted + would.evicted,
    )


def optimum(accesses: Sequence[Access], ram_frames: int) -> int:
    """Return the most hits that any policy can have: what is used latest is given up."""
    never = len(accesses)
    next_use = [never] * never
    seen: dict[int, int] = {}
    for place in range(never - 1, -1, -1):
        next_use[place] = seen.get(accesses[place].page, never)
        seen[accesses[place].page] = place
    resident: dict[int, int] = {}
    latest: list[tuple[int, int]] = []
    hits = 0
    for place, access in enumerate(accesses):
        hits += access.page in resident
        resident[access.page] = next_use[place]
        heapq.heappush(latest, (-next_use[place], access.page))
        while len(resident) > ram_frames:
            use, page = heapq.heappop(latest)
            if resident.get(page) == -use:
                del resident[page]
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
