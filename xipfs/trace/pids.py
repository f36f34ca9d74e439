"""Which threads the pid-filtered instance sees, and the one writer of that list.

``set_event_pid`` filters by thread. Appending to it takes effect at once but returns only after a
grace period, 31-52 ms, however many pids one write carries (fact 7). So one thread owns the file,
takes all requests that came meanwhile in one write, and callers wait for the write that has theirs.
The kernel keeps the list true by itself (``options/event-fork`` adds children and threads, the end
of a task removes it), which makes the file the answer to "is this thread covered?": a read costs a
fraction of a millisecond, and a process whose parent was added costs no write at all.

With each process come all of its threads, listed again until no new one appears, and its parent: a
shell's next children are then born covered, before their first instruction.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from xipfs.errors import ObserverError
from xipfs.trace.proc import Identity, MapsLine, identify, read_maps, tids_of

#: Processes that are never traced: init adopts every orphan, and kthreadd forks the kernel's
#: threads.
_NEVER: Final = frozenset({0, 1, 2})


@dataclass(frozen=True, slots=True)
class Adoption:
    """A process that was running when the filter took it in.

    ``tids`` and ``maps`` (its mappings of the mount) were read after that.
    """

    time_ns: int
    identity: Identity
    tids: frozenset[int]
    maps: list[MapsLine]


@dataclass(slots=True)
class _Request:
    pids: set[int]
    done: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None


class PidFilter:
    """Owns ``set_event_pid`` of one instance. ``add`` may be called from any thread."""

    def __init__(self, instance: Path, dev: int, adopted: Callable[[Adoption], None]) -> None:
        """Start the writer. ``adopted`` is called from it for each process taken in."""
        self._path = instance / "set_event_pid"
        self._dev = dev
        self._adopted = adopted
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self.writes = 0
        self._thread = threading.Thread(target=self._serve, name="xipfs-trace-pids", daemon=True)
        self._thread.start()

    def add(self, pids: Iterable[int], timeout_s: float | None) -> None:
        """Return once every thread of the processes of ``pids``, and their parents, are covered.

        Costs no write when the kernel's list has them already. ``timeout_s`` 0 asks and does not
        wait. Raises ObserverError after ``timeout_s``, or when tracefs refuses.
        """
        request = _Request(set(pids))
        if not self._thread.is_alive():
            raise ObserverError("the trace's pid filter is closed")
        if not self._missing(self._wanted(request.pids)):
            return
        self._requests.put(request)
        if timeout_s == 0:
            return
        if not request.done.wait(timeout_s):
            raise ObserverError(f"pids {sorted(request.pids)} are not covered after {timeout_s} s")
        if request.error is not None:
            raise ObserverError(f"set_event_pid does not take pids: {request.error!r}")

    def close(self) -> None:
        """End the writer after the requests that are waiting."""
        self._requests.put(None)
        self._thread.join()

    def _wanted(self, pids: Iterable[int]) -> set[int]:
        """Return the threads of ``pids``'s processes and of their parents."""
        wanted: set[int] = set()
        for pid in pids:
            identity = identify(pid)
            if identity is None:
                continue
            for process in (identity.tgid, identity.ppid):
                if process not in _NEVER and process != os.getpid():
                    wanted |= tids_of(process)
        return wanted

    def _missing(self, tids: set[int]) -> set[int]:
        return tids - {int(word) for word in self._path.read_text().split()} if tids else set()

    def _serve(self) -> None:
        while True:
            requests = [self._requests.get()]
            while not self._requests.empty():
                requests.append(self._requests.get())
            waiting = [request for request in requests if request is not None]
            error: Exception | None = None
            try:
                self._take_in({pid for request in waiting for pid in request.pids})
            except Exception as caught:
                # Whoever waits is told; the thread serves those that come after.
                error = caught
            for request in waiting:
                request.error = error
                request.done.set()
            if None in requests:
                return

    def _take_in(self, pids: set[int]) -> None:
        """Add until a new listing shows nothing new; then tell about the processes."""
        before_ns = time.monotonic_ns()
        taken: set[int] = set()
        while missing := self._missing(self._wanted(pids)) - taken:
            self._append(missing)
            taken |= missing
        told: set[int] = set()
        for tid in sorted(taken):
            identity = identify(tid)
            if identity is None or identity.tgid in told:
                continue
            told.add(identity.tgid)
            maps = read_maps(identity.tgid, self._dev)
            tids = frozenset(tids_of(identity.tgid))
            if maps is not None:
                self._adopted(Adoption(before_ns, identity, tids, maps))

    def _append(self, tids: set[int]) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(descriptor, " ".join(map(str, sorted(tids))).encode())
        finally:
            os.close(descriptor)
        self.writes += 1
