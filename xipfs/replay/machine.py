"""A recorded stream run through the mount's own model, filesystem and policy code.

Each row is applied in its turn. Faults are charged anew, by what their pages are now. A policy
hears the same signals at the same decision points as on a mount.

*As recorded* (same policy, parameters and RAM): a plan is carried out in the turn, and where, that
the recording says, and pins that refused a page refuse it again. So the moves must be the recorded
ones.

*Otherwise* the recorded policy's moves are left out, and with them what they caused: pages that
left the kernel's cache, READ requests, and faults for which the page is now mapped. Such a fault
still tells that its page was touched then; if the page is not mapped (the policy of the replay has
moved it, its RAM has evicted it), the fault is made. The plans of the replay's policy are carried
out ``delay_ns`` after they were made. A touch of a mapped page that made no fault in the recording
is not known, and a page that the replay takes away may have had one: ``ptes_taken`` bounds how
many faults may be missing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from xipfs.accounting.accountant import Accountant
from xipfs.accounting.causes import EVICT, HINT, MOVE
from xipfs.accounting.charges import Charge
from xipfs.errors import FsError
from xipfs.fs.types import PageKind, WriteOrigin
from xipfs.migrate.engine import BY_HAND, Engine, Job, jobs_of, runs
from xipfs.migrate.history import ChunkEvent, History
from xipfs.migrate.policy import Move
from xipfs.migrate.refusals import REASONS
from xipfs.migrate.steering import Steering
from xipfs.mm.pte import pte_permits
from xipfs.mm.rules import Rules
from xipfs.replay.choice import Choice, Replayed
from xipfs.replay.image import ReplayedFilesystem
from xipfs.replay.trace import Page, Recorded, request_of, touched
from xipfs.stats.heat import Heat
from xipfs.stats.series import Series
from xipfs.stats.trace_items import event_of, values_of
from xipfs.trace import events as ev
from xipfs.units import PAGE_MASK, PAGE_SHIFT

_ZEROS: Final = bytes(1 << 20)

Row = Mapping[str, Any]


class Replay:
    """One replay: ``apply`` each row, then ``finish``."""

    def __init__(self, recorded: Recorded, choice: Choice) -> None:
        self.recorded = recorded
        self.ram_bytes = choice.ram_bytes or recorded.ram_bytes
        self.policy = choice.policy or recorded.policy
        self.profile = choice.profile
        self._delay_ns = choice.delay_ns
        self.fs = ReplayedFilesystem(
            recorded.nvram_bytes,
            ram_bytes=self.ram_bytes,
            struct_page_bytes=recorded.struct_page_bytes,
        )
        self._comms: dict[int, str] = {}
        self.accountant = Accountant(
            self.fs, Rules.parse(recorded.rules), self._comm, readahead=recorded.readahead
        )
        self.engine = Engine(self.fs)
        self.history = History()
        self.heat = Heat()
        #: Frames in use by the stream's time.
        self.ram_series: Series | None = None
        same = choice.policy in (None, recorded.policy)
        values = {**(recorded.values if same else {}), **choice.values}
        self.steering = Steering(
            self.fs, self.policy, values, dry=same and recorded.dry, profile=self.profile
        )
        told = self.steering.describe()
        self.as_recorded = (
            told["policy"] == recorded.policy
            and told["parameters"] == recorded.values
            and told["files_sha256"] == recorded.files_sha256
            and self.ram_bytes == recorded.ram_bytes
        )
        #: Whether a policy has another text than when it was recorded.
        self.files_changed = same and told["files_sha256"] != recorded.files_sha256
        self.steering.on_plan = self._planned
        self.history.on_moved = self.steering.moved
        self.fs.set_hooks(
            on_unmap=self._on_unmap,
            on_evict=self._on_evict,
            on_cut=self.accountant.cut,
            chooser=self.steering.victims,
        )
        self.counts = Replayed()
        #: Every page moved, in order: inode, page, new kind.
        self.moves: list[tuple[int, int, str]] = []
        #: As recorded: planned, and not begun; what is planned during a turn waits for the next.
        self._waiting: list[Move] = []
        #: As recorded: what the turn carries out, by inode, page and new kind.
        self._turn: dict[tuple[int, int, PageKind], Move] = {}
        self._due: deque[tuple[int, Move]] = deque()
        self._charges: list[Charge] = []
        self._evicted: list[Page] = []
        self._handlers = {
            "fault": self._fault, "start": self._start, "file": self._file, "read": self._read,
            "write": self._write, "size": self._size, "gone": self._gone, "kind": self._kind,
            "sync": self._sync, "write_back": self._write_back, "move": self._move,
            "decide": self._decide, "refused": self._refuse, "policy": self._policy,
            "hint": self._hint, "give_up": self._give_up, "turn": self._begin_turn,
        }  # fmt: skip

    def _comm(self, pid: int) -> str:
        return self._comms.get(pid, "")

    @property
    def now_ns(self) -> int:
        """The stream's time: the latest that any row has shown."""
        return self.fs.clock.now_ns

    def apply(self, row: Row) -> None:
        """Apply one row of the stream."""
        if row["time_ns"] > self.now_ns:
            self.fs.clock.advance(row["time_ns"] - self.now_ns)
        if self._due and self._due[0][0] <= self.now_ns:
            self._carry_out()
        touch = touched(row)
        if touch is not None:
            self._count_touch(*touch)
        handle = self._handlers.get(row["item"])
        if handle is not None:
            handle(row)
        elif not (row["cause"] and not self.as_recorded):
            event = event_of(row)
            if event is not None:
                self.accountant.consume([event])
        if self._evicted:
            self._take_evicted_away()
        if self.ram_series is None:
            self.ram_series = Series(self.now_ns)
        self.ram_series.add(self.now_ns, self.fs.nr_resident_pages)

    def finish(self) -> None:
        """Decide and carry out what is left."""
        self._decide({})
        self.fs.clock.advance(self._delay_ns)
        while self._due:
            self._carry_out()
        if self.ram_series is not None:
            self.ram_series.add(self.now_ns, self.fs.nr_resident_pages)

    # The state at the start, and files

    def _start(self, row: Row) -> None:
        told = values_of(row)
        self.steering.now_ns = told["heard_ns"]
        for ino, index, dirty in told["resident"][-self.fs.memory.ram_pages :]:
            self.fs.make_resident(ino, index, dirty=bool(dirty))

    def _file(self, row: Row) -> None:
        told = values_of(row)
        if not self.fs.knows(told["ino"]):
            self.fs.make(told["ino"], told["size_bytes"], told["runs"], pagecache=told["pagecache"])

    def _size(self, row: Row) -> None:
        self.fs.setattr(row["ino"], size_bytes=values_of(row)["size_bytes"])

    def _gone(self, row: Row) -> None:
        self.fs.free(row["ino"])

    def _kind(self, row: Row) -> None:
        cached = values_of(row)["pagecache"]
        self.fs.set_default_kind(row["ino"], PageKind.PAGECACHE if cached else PageKind.XIP)

    # Faults and requests

    def _fault(self, row: Row) -> None:
        event = event_of(row)
        assert isinstance(event, ev.Fault), row
        if row["comm"]:
            self._comms[event.pid] = row["comm"]
        if row["cause"] and not self.as_recorded:
            if self._passes(event):
                self.counts.faults_left_out += 1
                return
            self.counts.faults_made += 1
        if self.as_recorded and row["cause"] == HINT:
            # Also where the mark went before the invalidation that it announced.
            self.accountant.hints.expect(event.mm, event.address)
        charges = self.accountant.consume([event])
        self.heat.add(charge for charge in charges if not charge.hint)
        self.history.charged(charges)
        self._charges += charges

    def _passes(self, fault: ev.Fault) -> bool:
        """Return whether the model lets the access pass, and no hint waits for it."""
        mm = self.accountant.mms.get(fault.mm)
        marked = self.accountant.hints.marked_pages(fault.mm)
        if mm is None or fault.address >> PAGE_SHIFT in marked:
            return False
        return pte_permits(mm.tables.get(fault.address & PAGE_MASK), fault.write)

    def _count_touch(self, ino: int, pages: range) -> None:
        for index in pages:
            self.counts.touches += 1
            self.counts.touches_in_ram += self.fs.resident_pfn(ino, index) is not None

    def _read(self, row: Row) -> None:
        if row["cause"] and not self.as_recorded:
            return
        offset, size, pages = request_of(row)
        try:
            self.fs.read(row["ino"], offset, size)
        except FsError:
            self.counts.requests_failed += 1
            return
        self._hear_request(row, pages, write=False)

    def _write(self, row: Row) -> None:
        offset, size, pages = request_of(row)
        origin = WriteOrigin.WRITEBACK if row["cause"] else WriteOrigin.PROGRAM
        try:
            for at in range(0, size, len(_ZEROS)):
                part = memoryview(_ZEROS)[: size - at]
                self.fs.write(row["ino"], offset + at, part, origin=origin)
        except FsError:
            self.counts.requests_failed += 1
            return
        if not row["cause"]:
            self._hear_request(row, pages, write=True)

    def _hear_request(self, row: Row, pages: range, *, write: bool) -> None:
        first, last = pages.start, pages.stop - 1
        self.steering.page_io(row["time_ns"], row["pid"], row["ino"], first, last, write=write)

    def _sync(self, row: Row) -> None:
        if row["ino"] is None:
            self.fs.sync()
        else:
            self.fs.fsync(row["ino"])

    def _write_back(self, row: Row) -> None:
        self.fs.write_back(row["pages"], older_ns=values_of(row)["older_ns"])

    def _hint(self, row: Row) -> None:
        for ino, index in values_of(row)["marked"]:
            self.accountant.hints.mark(self.accountant.file(ino).mapped, index)

    # Decisions and moves

    def _policy(self, row: Row) -> None:
        told = values_of(row)
        if self.as_recorded:
            self.steering.choose(told["policy"], told["parameters"], dry=told["dry"])
            now = self.steering.describe()
            self.files_changed |= now["files_sha256"] != told.get("files_sha256", "")

    def _decide(self, _row: Row) -> None:
        charges, self._charges = self._charges, []
        self.steering.charged(charges)

    def _planned(self, moves: list[Move]) -> None:
        if self.as_recorded:
            self._waiting += moves
        else:
            self._due.extend((self.now_ns + self._delay_ns, move) for move in moves)

    def _begin_turn(self, row: Row) -> None:
        if not self.as_recorded:
            return
        # On the mount nothing was left of the last turn: what it did not move was told as refused.
        left = self.steering.carried_out(self._turn.values(), row["time_ns"])
        self.counts.moves_differ += len(left)
        moves, self._waiting = self._waiting, []
        # Of two for one page the later counts, as on the mount (jobs_of).
        self._turn = {(move.ino, move.index, move.to): move for move in moves}

    def _move(self, row: Row) -> None:
        told = values_of(row)
        to = PageKind(told["to"])
        pages = range(told["page"], told["page"] + told["pages"])
        if told["by"] == "policy" and not self.as_recorded:
            return
        refused = {
            index: reason
            for reason, pieces in told["refused"].items()
            for first, count in pieces
            for index in range(first, first + count)
        }
        before, ino, moves = len(self.moves), told["ino"], self._planned_of(told, pages)
        parts = [pages]
        if told["by"] == "policy":
            # What the replay's own policy has planned to move so.
            parts = [range(at, at + count) for _, at, count in runs([(ino, at) for at in moves])]
        for part in parts:
            self._move_pages(Job(ino, part, to, told["reason"], moves), refused)
        if self.as_recorded:
            wanted = {
                (ino, index, told["to"])
                for first, count in told["moved"]
                for index in range(first, first + count)
            }
            self.counts.moves_differ += len(wanted ^ set(self.moves[before:]))

    def _planned_of(self, told: Mapping[str, Any], pages: Iterable[int]) -> Mapping[int, Move]:
        """Return what the replay's policy has planned for a row's ``pages``, in their order."""
        if told["by"] == "manual":
            return BY_HAND
        ino, to = told["ino"], PageKind(told["to"])
        plan = {index: self._turn.get((ino, index, to)) for index in pages}
        return {index: move for index, move in plan.items() if move is not None}

    def _move_pages(
        self, job: Job, refused: Mapping[int, str]
    ) -> tuple[list[int], dict[str, list[int]]]:
        """Move what is not refused by the recording; return what has moved, what has not."""
        ino, pages, to, why, moves = job
        event = ChunkEvent(self.now_ns, ino, pages.start, pages.stop - 1, to.value, why)
        moved: list[int] = []
        failed: dict[str, list[int]] = {}
        free = [(ino, index) for index in pages if index not in refused]
        for _, first, count in runs(free):
            result = self.engine.move_pages(ino, range(first, first + count), to)
            moved += result.moved
            for code, which in result.refused.items():
                failed.setdefault(REASONS[code], []).extend(which)
        self.moves += [(ino, index, to.value) for index in moved]
        event.moved = len(moved)
        event.failed = {reason: len(which) for reason, which in failed.items()}
        self.history.record(event)
        self.history.moved(ino, moved, to, self.now_ns, moves)
        return moved, failed

    def _refused(self, job: Job, pages: Sequence[int], reason: str) -> None:
        self.engine.give_up(reason, len(pages))
        self.history.refused(job.ino, pages, job.to, job.moves)

    def _give_up(self, row: Row) -> None:
        told = values_of(row)
        if told["by"] == "policy" and not self.as_recorded:
            return
        pages = [index for first, count in told["given"] for index in range(first, first + count)]
        moves = self._planned_of(told, pages)
        if told["by"] == "policy":
            pages = list(moves)
        if pages:
            whole = range(pages[0], pages[-1] + 1)
            job = Job(told["ino"], whole, PageKind(told["to"]), "", moves)
            self._refused(job, pages, told["reason"])

    def _refuse(self, row: Row) -> None:
        if not self.as_recorded:
            return
        told = values_of(row)["moves"]
        moves = [self._turn.get((ino, index, PageKind(to))) for ino, index, to in told]
        self.steering.carried_out([each for each in moves if each is not None], row["time_ns"])

    def _carry_out(self) -> None:
        """Carry out, as a mount does, the plans whose time has come."""
        due = []
        while self._due and self._due[0][0] <= self.now_ns:
            due.append(self._due.popleft()[1])
        for job in jobs_of(due):
            if not self.fs.knows(job.ino):
                self._refused(job, job.pages, "gone")
                continue
            moved, failed = self._move_pages(job, {})
            for reason, which in failed.items():
                self._refused(job, which, reason)
            self._take_away([(job.ino, index) for index in moved], MOVE)
        self.steering.carried_out(due, self.now_ns)

    # What a mount's invalidations do to the kernel's column

    def _on_unmap(self, ino: int, first: int, count: int) -> None:
        machine = self.accountant.machine
        before = machine.nr_special_ptes + machine.nr_normal_ptes
        self.accountant.unmap_pages(ino, first, count)
        self.counts.ptes_taken += before - machine.nr_special_ptes - machine.nr_normal_ptes

    def _on_evict(self, ino: int, index: int) -> None:
        self.steering.evicted(ino, index)
        self._evicted.append((ino, index))

    def _take_evicted_away(self) -> None:
        pages, self._evicted = sorted(set(self._evicted)), []
        if not self.as_recorded:
            self._take_away(pages, EVICT)

    def _take_away(self, pages: list[Page], cause: str) -> None:
        now_ns = self.now_ns
        for ino, first, count in runs(sorted(pages)):
            told = self.accountant.causes.begin(ino, first, count, cause, now_ns)
            told.ended_ns = now_ns
            self.accountant.consume([ev.CacheDelete(now_ns, ino, first, count)])
