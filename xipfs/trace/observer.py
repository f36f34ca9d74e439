"""The facade: start observing a mount, say who uses it, and take what happened since.

``drain`` may read /proc/PID/maps, which waits for the process's mmap lock, which a page fault that
waits for this mount's READ may hold. So it is called from a worker thread, never from the one that
serves requests; ``add_pids`` waits for the kernel and is called the same way. Both take turns on
one lock where they share state; the reader of ``statistics`` waits for neither.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np

from xipfs.trace import compiled, proc, session
from xipfs.trace.copies import without_explained
from xipfs.trace.events import Event
from xipfs.trace.fault_batch import FaultBatch
from xipfs.trace.grammar import Grammar
from xipfs.trace.output import Output
from xipfs.trace.pids import Adoption, PidFilter
from xipfs.trace.plain import PlainFaults
from xipfs.trace.processes import Processes
from xipfs.trace.records import ADOPT, COLUMNS
from xipfs.trace.ring import Decoder, PlainDecoder, Plan, Rows
from xipfs.trace.rings import Rings
from xipfs.trace.settling import is_over
from xipfs.units import PAGE_SIZE

_FAULT_AROUND: Final = Path("/sys/kernel/debug/fault_around_bytes")
_FAULT_AROUND_DEFAULT_PAGES: Final = 16
#: 8 MiB a CPU last 100 ms and more, however fast programs fault.
_PUMP_INTERVAL_S: Final = 0.020
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ObserverStatistics:
    """What was seen so far."""

    mode: str
    """``tracefs``."""
    events: int
    """Trace records read."""
    lost: int
    """Trace records that were overwritten before they were read."""
    unfollowed: dict[str, int]
    """What happened that the shadow address spaces do not follow, by name."""
    faults: int
    """Faults on the mount's pages, as the kernel took them."""
    major: int
    minor: int
    pid_writes: int
    """Writes to the kernel's pid filter, each about 36 ms."""
    missing: dict[str, str]
    """Events this kernel lacks, and what is lost without them."""
    buffer_bytes: int
    """The kernel's ring buffers, all CPUs."""
    undecoded_bytes: int
    """Trace records held in memory until they are decoded."""


def fault_around_pages() -> int:
    """Return how many pages the kernel's fault-around spans; 16 where debugfs is locked."""
    try:
        return int(_FAULT_AROUND.read_text()) // PAGE_SIZE
    except (OSError, ValueError):
        return _FAULT_AROUND_DEFAULT_PAGES


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Hold off garbage collection: a drain makes many objects, none of them in a cycle.

    Looking for cycles among them anyway took half of its time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Observer:
    """Watches the mount's users from creation to ``close``.

    ``pids``' threads, their parents and all their later children are followed; a process that gets
    at the mount another way (a passed descriptor) is seen by its page-cache events, told as
    ``UNTRACED`` faults, and added.
    """

    def __init__(self, st_dev: int, tracing: Path = session.TRACING) -> None:
        """Observe the files whose stat(2) has device number ``st_dev``.

        Raises ObserverError, having undone everything, where tracefs cannot be used.
        """
        dev = proc.kernel_dev(st_dev)
        self._lock = threading.Lock()
        self._session = session.Session(dev, tracing)
        self._rings: Rings | None = None
        self._filter: PidFilter | None = None
        self._closing = threading.Event()
        self._pump: threading.Thread | None = None
        try:
            plan = Plan(self._session.available.events, self._session.page)
            paths = [instance.path for instance in self._session.instances]
            self._rings = Rings(paths, plan.page.size)
            self._filter = PidFilter(self._session.by_pid.path, dev, self._adopted)
        except BaseException:
            self.close()
            raise
        self._output = Output()
        self._processes = Processes(
            self._output, proc.identify, lambda pid: proc.read_maps(pid, dev)
        )
        around_pages = fault_around_pages()
        self._grammar = Grammar(self._processes, self._take_adoption, around_pages)
        self._plain = PlainFaults(self._processes, self._grammar, around_pages)
        self._adoption_rows: deque[tuple[int, int]] = deque()
        self._adoptions: dict[int, Adoption] = {}
        self._held: Rows = np.zeros((0, COLUMNS), np.uint64)
        self._events = 0
        #: The last record of the oldest fault that may be over and that the last drain did not
        #: tell, if there is one. Needs no lock to be read, as all of these.
        self.unsettled_ns: int | None = None
        #: The address spaces that a thread was changing, in a call or a fault, at the last drain.
        self.changing: frozenset[int] = frozenset()
        #: Whether the last drain left older records undecoded.
        self.behind = False
        self._decoder: Decoder = PlainDecoder(plan)
        self._compiler = compiled.start_compiling(plan, self._use, self._plain.use)
        self._pump = threading.Thread(target=self._pump_until_closed, daemon=True)
        self._pump.start()

    @classmethod
    def start(cls, st_dev: int) -> Self:
        """Remove what dead daemons left, then observe the mount with device number ``st_dev``."""
        session.clean_orphans()
        return cls(st_dev)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def add_pids(self, pids: Iterable[int], timeout_s: float | None = 5.0) -> None:
        """Return once nothing that the processes of ``pids`` do can be missed.

        Any thread id will do. Costs a fraction of a millisecond when they are followed already,
        else 31-52 ms, shared with all callers that wait meanwhile. Raises ObserverError after
        ``timeout_s``.
        """
        assert self._filter is not None
        pids = set(pids)
        self._processes.openers.update(pids)
        self._filter.add(pids, timeout_s)

    def follows(self, tid: int) -> bool:
        """Return whether thread ``tid`` is covered for sure, by what its records say; never blocks.

        It opens a file of the mount, which is noted. No other thread can have got its number since
        the last drain: all others come first.
        """
        thread = self._processes.threads.get(tid)
        if thread is None or not thread.traced:
            return False
        self._processes.openers.add(tid)
        return True

    def quiet(self) -> bool:
        """Return whether ``drain`` now would tell nothing; never blocks.

        False also where that cannot be seen at once. Threads that ended without a record of it,
        which only /proc tells, are left to the next drain.
        """
        if not self._lock.acquire(blocking=False):
            return False
        try:
            assert self._rings is not None
            left = self.changing or self.behind or len(self._held) or self._adoption_rows
            return not (left or self._processes.newcomers) and self._rings.empty()
        finally:
            self._lock.release()

    def drain(self, until_ns: int | None = None) -> list[Event | FaultBatch]:
        """Return what happened until ``until_ns`` (default: now) and was not returned before.

        In the order in which it took effect. A fault that is still inside the kernel comes with a
        later call, once; so may the last one of a thread that runs on, if its page is mapped no
        more: ``unsettled_ns`` tells whether there is one to ask for again. What proves others over
        came a little after ``until_ns``, and so may what is returned. Of a backlog one call returns
        a part, and ``behind`` says so.
        """
        with self._lock, _collector_paused():
            now_ns = time.monotonic_ns()
            cut_ns = now_ns if until_ns is None else min(until_ns, now_ns)
            reached_ns = self._feed(cut_ns)
            self.behind = reached_ns < cut_ns
            if not self.behind:
                # What /proc says now is later than records that wait to be decoded.
                if self._grammar.look(is_over):
                    reached_ns = self._feed(time.monotonic_ns())
                self._grammar.settle(reached_ns)
                self._grammar.bury(cut_ns)
            if self._processes.newcomers:
                newcomers, self._processes.newcomers = self._processes.newcomers, []
                self.add_pids(newcomers, timeout_s=0)
            self.unsettled_ns = 0 if self.behind else self._grammar.unsettled_ns
            self.changing = self._grammar.changing()
            return self._output.take()

    def statistics(self) -> ObserverStatistics:
        """Return the counts so far; losses are the kernel's own figures of this moment."""
        faults = self._grammar.faults
        assert self._filter is not None
        assert self._rings is not None
        return ObserverStatistics(
            mode="tracefs",
            events=self._events,
            lost=self._session.lost(),
            unfollowed=dict(self._processes.unfollowed),
            faults=faults.total,
            major=faults.major,
            minor=faults.minor,
            pid_writes=self._filter.writes,
            missing=dict(self._session.available.missing),
            buffer_bytes=self._rings.buffer_bytes,
            undecoded_bytes=self._rings.pumped_bytes,
        )

    def comm(self, pid: int) -> str:
        """Return the name of process ``pid``, or an empty string when it is not followed."""
        return self._processes.comms.get(pid, "")

    def follow(self, pid: int) -> None:
        """Let ``root_of`` name ``pid`` for itself and for what descends from it from now on."""
        self._processes.roots[pid] = pid

    def root_of(self, pid: int) -> int | None:
        """Return the followed process that ``pid`` is or descends from, None if there is none."""
        return self._processes.roots.get(pid)

    def close(self) -> None:
        """Stop, and remove both tracefs instances. Events not drained yet are gone."""
        self._closing.set()
        if self._pump is not None:
            self._pump.join()
        with self._lock:
            if self._filter is not None:
                self._filter.close()
            if self._rings is not None:
                self._rings.close()
            self._session.close()

    def wait_until_compiled(self) -> None:
        """Return when the fast decoder is in use, or will not be."""
        if self._compiler is not None:
            self._compiler.join()

    def _pump_until_closed(self) -> None:
        """Empty the rings while ``drain``'s caller is busy with what it got."""
        assert self._rings is not None
        while not self._closing.wait(_PUMP_INTERVAL_S):
            try:
                self._rings.pump()
            except Exception:
                # Drains empty them too. What overflows meanwhile is counted as lost.
                log.exception("the trace's rings are emptied by drains only from now on")
                return

    def _use(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def _adopted(self, adoption: Adoption) -> None:
        number = id(adoption)
        self._adoptions[number] = adoption
        self._adoption_rows.append((adoption.time_ns, number))

    def _take_adoption(self, number: int) -> Adoption:
        return self._adoptions.pop(number)

    def _feed(self, until_ns: int) -> int:
        """Have the records up to ``until_ns`` put together; return up to when that was done."""
        rows, reached_ns = self._read(until_ns)
        self._plain.feed(without_explained(rows))
        return reached_ns

    def _read(self, until_ns: int) -> tuple[Rows, int]:
        """Return rows sorted by time, and the time up to which they are all; keep later ones."""
        assert self._rings is not None
        batches, reached_ns = self._rings.read(self._decoder, until_ns)
        self._events += sum(len(batch) for batch in batches)
        batches.insert(0, self._held)
        while self._adoption_rows:
            time_ns, number = self._adoption_rows.popleft()
            batches.append(np.array([[time_ns, ADOPT, number, 0, 0, 0, 0, 0]], np.uint64))
        rows = self._decoder.merge(np.concatenate(batches))
        count = int(np.searchsorted(rows[:, 0], np.uint64(reached_ns), side="right"))
        self._held = rows[count:].copy()
        return rows[:count], reached_ns
