"""A policy whose moves are only imagined: in turns, in no machine but this one.

What it hears is what happened, with the kinds that its pages would have had. So it goes on as it
would have, and the touches of its pages tell what the moves were worth. As on a mount, what a
decision point has planned moves together, and what cannot move does not: the pages themselves are
looked at. RAM is what the mount really has in use and what was imagined on top; when it is full,
the page promoted longest ago goes.

A touch counts once, though it may make several signals: the READ of a page and its next fault are
one, and so are a fault that stores and the page's next WRITE. So where a program reads a page by
read(2) and then maps it, one touch too few is counted, never one too many.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Final

from xipfs.accounting.charges import PteKind
from xipfs.fs.types import PageKind, PageState
from xipfs.migrate.decider import Decider, done
from xipfs.migrate.engine import Job, cut, jobs_of
from xipfs.migrate.estimate import Would
from xipfs.migrate.parts import Remembered
from xipfs.migrate.policy import (
    EVICTED,
    MOVED,
    READ,
    REFUSED,
    TOUCHES,
    WRITE,
    Move,
    Page,
    Signal,
    demote,
)

#: Reasons that are told apart; more are counted together.
_REASONS_MAX: Final = 256
#: Turns that follow each other at once: what is planned at the end of a move is the next one's.
#: What a policy plans for ever, at each refusal anew, must not keep the mount waiting.
_TURNS_MAX: Final = 16

Look = Callable[[Page], PageState | None]
"""Tells where a page really is, None if its file is gone; changes nothing."""


class DryRun:
    """Where one policy's moves would have put the pages."""

    def __init__(self, decider: Decider, ram_pages: int, look: Look) -> None:
        self._decider = decider
        self._ram_pages = ram_pages
        self._really = look
        self._plan: list[Move] = []
        self._turn: list[Move] = []
        self._now_ns = 0
        #: Pages promoted in imagination, oldest first: whether they were written since.
        self.resident: OrderedDict[Page, bool] = OrderedDict()
        #: Pages demoted in imagination, and those of them that really have a frame.
        self._away = Remembered()
        self._vacant = Remembered()
        #: Pages whose READ may be that of a fault to come: whether it counted as a read in RAM.
        self._read = Remembered()
        #: Pages that a mapping stored to, and whose WRITE is to come.
        self._stored = Remembered()
        self.would = Would()
        self.moves: Counter[tuple[str, str]] = Counter()
        self.failed: Counter[str] = Counter()
        """Pages that would have been refused, by reason."""

    def hear(self, signal: Signal, ram_pages_used: int) -> None:
        """Tell the policy; what it plans waits for its turn."""
        self._now_ns = max(self._now_ns, signal.time_ns)
        if signal.source in TOUCHES:
            signal = self._imagined(signal)
        else:
            # What really moved is no more imagined.
            self.resident.pop(signal.page, None)
            self._vacant.forget(signal.page)
            if signal.source != EVICTED:
                self._away.forget(signal.page)
        self._tell(signal, ram_pages_used)

    def begin(self) -> list[Job]:
        """Take what was planned since the last call as one turn; return its jobs."""
        self._turn += self._plan
        self._plan = []
        return jobs_of(self._turn)

    def finish(self, ram_pages_used: int) -> list[Move]:
        """Imagine the turn; return the moves made. What is planned meanwhile is the next turn's."""
        moves, self._turn = self._turn, []
        made: list[Move] = []
        for job in jobs_of(moves):
            made += self._move(job, ram_pages_used)
        for move in moves:
            if self._decider.is_under_way(move):
                self._tell(done(self._now_ns, REFUSED, move), ram_pages_used)
        return made

    def carry_out(self, ram_pages_used: int) -> list[Move]:
        """Imagine all that was planned, turn after turn; return the moves made."""
        made: list[Move] = []
        for _ in range(_TURNS_MAX):
            if not self.begin():
                break
            made += self.finish(ram_pages_used)
        return made

    def _tell(self, signal: Signal, ram_pages_used: int) -> None:
        self._plan += self._decider.hear(signal, ram_pages_used + self._frames())

    def _frames(self) -> int:
        return len(self.resident) - len(self._vacant)

    # Touches

    def _imagined(self, signal: Signal) -> Signal:
        """Return the signal as it would have been, and count what it would have saved."""
        page = signal.page
        first, read_in_ram = self._is_new_touch(signal)
        if signal.kind is PteKind.XIP and page in self.resident:
            self.resident[page] |= signal.write
            self.would.writes_in_ram += signal.write and (first or read_in_ram)
            self.would.reads_in_ram += not signal.write and first
            # The READ was for a store.
            self.would.reads_in_ram -= signal.write and read_in_ram
            if signal.source == READ:
                self._read.put(page, 1)
            return dataclasses.replace(signal, kind=PteKind.PAGECACHE)
        if signal.kind is PteKind.PAGECACHE and self._away.get(page) is not None:
            self.would.touches_of_medium += first
            state = self._look(page)
            if state is not None and state.resident:
                self._vacant.put(page, 1)
            return dataclasses.replace(signal, kind=PteKind.XIP)
        if signal.kind is PteKind.PAGECACHE:
            self.resident.pop(page, None)  # the touch has really filled its frame
        return signal

    def _is_new_touch(self, signal: Signal) -> tuple[bool, bool]:
        """Return whether the signal is a touch's first, and whether that was a READ in RAM."""
        page = signal.page
        if signal.source == READ:
            self._read.put(page, 0)
            return True, False
        if signal.source == WRITE:
            stored = self._stored.get(page) is not None
            self._stored.forget(page)
            return not stored, False
        if signal.write and signal.kind in (PteKind.XIP, PteKind.PAGECACHE):
            self._stored.put(page, 1)
        read = self._read.get(page)
        self._read.forget(page)
        return read is None, read == 1

    # Moves

    def _look(self, page: Page) -> PageState | None:
        """Return where the page really is; None if there is none to move."""
        state = self._really(page)
        if state is not None and state.kind is not PageKind.HOLE:
            return state
        if self.resident.pop(page, None) is not None:
            self.would.frames_back += 1
        return state

    def _kind(self, page: Page, state: PageState) -> PageKind:
        """Return the kind that the page would have."""
        if page in self.resident:
            return PageKind.PAGECACHE
        if state.kind is PageKind.PAGECACHE and self._away.get(page) is not None:
            return PageKind.XIP
        return state.kind

    def _move(self, job: Job, ram_pages_used: int) -> list[Move]:
        """Imagine a job; what is no page of the other kind is passed over."""
        other = PageKind.XIP if job.to is PageKind.PAGECACHE else PageKind.PAGECACHE
        wanted: dict[int, PageState] = {}
        for index in job.pages:
            page = (job.ino, index)
            state = self._look(page)
            if state is None:
                self.failed["gone"] += 1
            elif self._kind(page, state) is other:
                wanted[index] = state
        indexes = list(wanted)
        for part in cut(range(len(indexes)), self._ram_pages):
            self.would.commit(indexes[part.start : part.stop])
        made = [job.moves[index] for index in indexes]
        for move in made:
            self._count(move)
            make = self._promote if job.to is PageKind.PAGECACHE else self._demote
            make((move.ino, move.index), wanted[move.index], ram_pages_used)
        for move in made:
            self._tell(done(self._now_ns, MOVED, move), ram_pages_used)
        return made

    def _count(self, move: Move) -> None:
        key = (move.to.value, move.reason)
        if key not in self.moves and len(self.moves) >= _REASONS_MAX:
            key = (move.to.value, "(other reasons)")
        self.moves[key] += 1

    def _promote(self, page: Page, state: PageState, ram_pages_used: int) -> None:
        self._make_room(ram_pages_used)
        self.would.promoted += 1
        self._away.forget(page)
        if state.resident:
            self._vacant.forget(page)
        else:
            self.resident[page] = False

    def _make_room(self, ram_pages_used: int) -> None:
        while ram_pages_used + self._frames() >= self._ram_pages:
            oldest = next(iter(self.resident), None)
            if oldest is not None:
                self._look(oldest)
                if oldest not in self.resident:
                    continue  # it has left RAM with the end of its file
                self.would.written_home += self.resident.pop(oldest)
                self._tell(done(self._now_ns, MOVED, demote(oldest, "")), ram_pages_used)
            self.would.evicted += 1
            return

    def _demote(self, page: Page, state: PageState, _ram_pages_used: int) -> None:
        self.would.demoted += 1
        if state.kind is PageKind.PAGECACHE:
            self._away.put(page, 1)
        if page in self.resident:
            self.would.written_home += self.resident.pop(page)
            self.would.frames_back += 1
        elif state.resident:
            self.would.written_home += state.dirty
            self.would.frames_back += 1
            self._vacant.put(page, 1)
