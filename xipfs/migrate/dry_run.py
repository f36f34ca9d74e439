"""A policy whose moves are only imagined: made at once, in no machine but this one.

What it hears is what happened, with the kinds that its pages would have had. So it goes on as it
would have, and the touches of its pages tell what the moves were worth. RAM is what the mount
really has in use and what was imagined on top; when it is full, the page promoted longest ago goes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict
from typing import Final

from xipfs.accounting.charges import PteKind
from xipfs.fs.types import PageKind
from xipfs.migrate.decider import Decider, done
from xipfs.migrate.engine import jobs_of
from xipfs.migrate.estimate import Would
from xipfs.migrate.parts import Remembered
from xipfs.migrate.policy import MOVED, TOUCHES, Move, Page, Signal, demote

#: Reasons that are told apart; more are counted together.
_REASONS_MAX: Final = 256


class DryRun:
    """Where one policy's moves would have put the pages."""

    def __init__(self, decider: Decider, ram_pages: int) -> None:
        self._decider = decider
        self._ram_pages = ram_pages
        #: Pages promoted in imagination, oldest first: whether they were written since.
        self.resident: OrderedDict[Page, bool] = OrderedDict()
        #: Pages of RAM demoted in imagination.
        self._away = Remembered()
        self.would = Would()
        self.moves: Counter[tuple[str, str]] = Counter()

    def hear(self, signal: Signal, ram_pages_used: int) -> list[Move]:
        """Tell the policy; return the moves that it would have made."""
        if signal.source not in TOUCHES:
            # What really moved is no more imagined.
            self.resident.pop(signal.page, None)
            self._away.forget(signal.page)
        else:
            signal = self._imagined(signal)
        moves = self._decider.hear(signal, ram_pages_used + self._frames())
        made: list[Move] = []
        for job in jobs_of(moves):
            self.would.commit(job.pages)
        while moves:
            move, *moves = moves
            full = ram_pages_used + self._frames() >= self._ram_pages
            if move.to is PageKind.PAGECACHE and full and self.resident:
                self.would.evicted += 1
                oldest = demote(next(iter(self.resident)), "")
                moves += self._make(oldest, signal.time_ns, ram_pages_used)
            elif move.to is PageKind.PAGECACHE and full:
                self.would.evicted += 1
            made.append(move)
            self._count(move)
            moves += self._make(move, signal.time_ns, ram_pages_used)
        return made

    def _frames(self) -> int:
        return len(self.resident) - len(self._away)

    def _imagined(self, signal: Signal) -> Signal:
        """Return the signal as it would have been, and count what it would have saved."""
        page = signal.page
        if signal.kind is PteKind.XIP and page in self.resident:
            self.resident[page] |= signal.write
            self.would.writes_in_ram += signal.write
            self.would.reads_in_ram += not signal.write
            return dataclasses.replace(signal, kind=PteKind.PAGECACHE)
        if signal.kind is PteKind.PAGECACHE and self._away.get(page) is not None:
            self.would.touches_of_medium += 1
            return dataclasses.replace(signal, kind=PteKind.XIP)
        return signal

    def _count(self, move: Move) -> None:
        key = (move.to.value, move.reason)
        if key not in self.moves and len(self.moves) >= _REASONS_MAX:
            key = (move.to.value, "(other reasons)")
        self.moves[key] += 1
        self.would.promoted += move.to is PageKind.PAGECACHE
        self.would.demoted += move.to is PageKind.XIP

    def _make(self, move: Move, time_ns: int, ram_pages_used: int) -> list[Move]:
        page = (move.ino, move.index)
        if move.to is PageKind.PAGECACHE:
            if self._away.get(page) is None:
                self.resident[page] = False
            self._away.forget(page)
        elif page in self.resident:
            self.would.written_home += self.resident.pop(page)
        else:
            self._away.put(page, 1)
        return self._decider.hear(done(time_ns, MOVED, move), ram_pages_used + self._frames())
