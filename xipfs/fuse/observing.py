"""Which observer a mount runs at: the kernel's tracepoints, READ requests, or none.

``tracefs`` is exact. ``requests`` is what is left without root or tracefs: each READ request stands
for one fault of the process that opened the file. That is an estimate (a READ can come from
read(2) or read-ahead, and a fault on a cached page sends none), which every snapshot says.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Final, Protocol

from xipfs.errors import MountError, ObserverError
from xipfs.fuse.mounts import Mount
from xipfs.options import MountOptions
from xipfs.stats.snapshot import ObserverFigures
from xipfs.trace import events as ev
from xipfs.trace.fault_batch import FaultBatch
from xipfs.trace.observer import Observer
from xipfs.trace.session import TRACING, mount_tracefs, probe
from xipfs.units import PAGE_SHIFT

log = logging.getLogger(__name__)

REQUESTS_NOTE: Final = (
    "each READ request counts as one read fault of the file's opener: an estimate; faults on "
    "pages the kernel caches, writes and private copies are not seen"
)
#: The modelled mapping that stands for "somewhere in this process": larger than any file.
_WHOLE_FILE_PAGES: Final = 1 << 36


class LiveObserver(Protocol):
    """What a mount needs of any observer."""

    #: Whether it tells of every process that maps a file.
    sees_maps: ClassVar[bool]

    def start(self, mount: Mount) -> None:
        """Begin, once the mount has its device number; raises ObserverError."""
        ...

    def add_pids(self, pids: Iterable[int]) -> None:
        """Return once nothing these processes do can be missed. May block."""
        ...

    def follows(self, tid: int) -> bool:
        """Return whether ``add_pids`` has nothing to do for thread ``tid``; never blocks."""
        ...

    def read_request(self, pid: int, ino: int, first: int) -> None:
        """Hear of a READ request that starts at page ``first``."""
        ...

    def quiet(self) -> bool:
        """Return whether a drain now would tell nothing; never blocks."""
        ...

    def drain(self, until_ns: int) -> tuple[list[ev.Event | FaultBatch], bool]:
        """Return what happened up to ``until_ns`` since the last call, in order; is it all?

        May block.
        """
        ...

    def unsettled(self, before_ns: int) -> bool:
        """Return whether a fault is not told yet that may have been over by ``before_ns``."""
        ...

    def comm(self, pid: int) -> str:
        """Return a process's name, "" if unknown."""
        ...

    def follow(self, pid: int) -> None:
        """Let ``root_of`` name ``pid`` for itself and its descendants. May block."""
        ...

    def root_of(self, pid: int) -> int | None:
        """Return the followed process that ``pid`` stems from, None without one."""
        ...

    def figures(self) -> ObserverFigures:
        """Return the counts so far."""
        ...

    def close(self) -> None:
        """End, undoing whatever was set up."""
        ...


class TracefsObserver:
    """The kernel's own events."""

    sees_maps: ClassVar[bool] = True

    def __init__(self) -> None:
        self._observer: Observer | None = None
        #: What else could not be had, and what is lost without it.
        self.missing: dict[str, str] = {}

    def start(self, mount: Mount) -> None:
        """Make the tracefs instances."""
        self._observer = Observer.start(os.makedev(mount.major, mount.minor))

    def add_pids(self, pids: Iterable[int]) -> None:
        """Follow the processes; a failure is logged, for an open must not fail for it."""
        assert self._observer is not None
        try:
            self._observer.add_pids(pids)
        except ObserverError as error:
            log.warning("not following %s: %s", pids, error)

    def follows(self, tid: int) -> bool:
        """Ask the records."""
        return self._observer is not None and self._observer.follows(tid)

    def read_request(self, pid: int, ino: int, first: int) -> None:
        """READ requests tell nothing that the events do not."""

    def quiet(self) -> bool:
        """Look into the rings."""
        return self._observer is not None and self._observer.quiet()

    def drain(self, until_ns: int) -> tuple[list[ev.Event | FaultBatch], bool]:
        """Read the rings."""
        assert self._observer is not None
        return self._observer.drain(until_ns), not self._observer.behind

    def changing(self) -> frozenset[int]:
        """Return the address spaces that were being changed at the last drain; never blocks."""
        return frozenset() if self._observer is None else self._observer.changing

    def unsettled(self, before_ns: int) -> bool:
        """Return what the last drain left open; never blocks."""
        oldest_ns = None if self._observer is None else self._observer.unsettled_ns
        return oldest_ns is not None and oldest_ns <= before_ns

    def comm(self, pid: int) -> str:
        """Return the name the kernel last gave."""
        return "" if self._observer is None else self._observer.comm(pid)

    def follow(self, pid: int) -> None:
        """Follow a command; unlike an open, that must fail where it cannot be seen."""
        assert self._observer is not None
        self._observer.add_pids((pid,))
        self._observer.follow(pid)

    def root_of(self, pid: int) -> int | None:
        """Return what fork records say."""
        return None if self._observer is None else self._observer.root_of(pid)

    def figures(self) -> ObserverFigures:
        """Return the events' counts and the kernel's faults."""
        assert self._observer is not None
        seen = self._observer.statistics()
        return ObserverFigures(
            mode="tracefs",
            events=seen.events,
            lost=seen.lost,
            unfollowed=seen.unfollowed,
            faults=seen.faults,
            major=seen.major,
            minor=seen.minor,
            missing=seen.missing | self.missing,
            buffer_bytes=seen.buffer_bytes,
            undecoded_bytes=seen.undecoded_bytes,
        )

    def close(self) -> None:
        """Remove the tracefs instances."""
        if self._observer is not None:
            self._observer.close()


class RequestsObserver:
    """READ requests as faults: one modelled address space a process, one mapping a file."""

    sees_maps: ClassVar[bool] = False

    def __init__(self, reason: str) -> None:
        self._reason = reason
        self._events: list[ev.Event] = []
        self._spaces: dict[int, dict[int, int]] = {}
        self._numbers: dict[int, int] = {}
        self._comms: dict[int, str] = {}
        self._requests = 0

    def start(self, mount: Mount) -> None:
        """Nothing is set up."""

    def add_pids(self, pids: Iterable[int]) -> None:
        """Every opener is seen by its READs."""

    def follows(self, tid: int) -> bool:
        """Everybody is."""
        return True

    def read_request(self, pid: int, ino: int, first: int) -> None:
        """Turn the request into a read fault on its first page."""
        self._requests += 1
        if pid not in self._spaces:
            self._spaces[pid] = {}
            self._numbers[pid] = self._requests
            self._comms[pid] = _comm(pid)
        space, mm = self._spaces[pid], self._numbers[pid]
        if ino not in space:
            start = space[ino] = (len(space) + 1) * _WHOLE_FILE_PAGES << PAGE_SHIFT
            end = start + (_WHOLE_FILE_PAGES << PAGE_SHIFT)
            self._events.append(ev.Map(0, mm, pid, start, end, ino, 0, 1, False, False))
        address = space[ino] + (first << PAGE_SHIFT)
        self._events.append(
            ev.Fault(
                time.monotonic_ns(), mm, pid, pid, address, ino, first,
                write=False, execute=False, user=True, protection=False,
                verdict=ev.MAJOR, origin=ev.UNTRACED,
            )
        )  # fmt: skip

    def quiet(self) -> bool:
        """Not look: processes may have ended."""
        return False

    def drain(self, until_ns: int) -> tuple[list[ev.Event | FaultBatch], bool]:
        """Return the faults since the last call, and the ends of processes that are gone."""
        events: list[ev.Event | FaultBatch] = [*self._events]
        self._events = []
        for pid in [pid for pid in self._spaces if not os.path.exists(f"/proc/{pid}")]:
            events.append(ev.Exit(0, self._numbers.pop(pid)))
            del self._spaces[pid]
            del self._comms[pid]
        return events, True

    def unsettled(self, before_ns: int) -> bool:
        """A READ request is told at once."""
        return False

    def comm(self, pid: int) -> str:
        """Return the name the process had at its first READ."""
        return self._comms.get(pid, "")

    def follow(self, pid: int) -> None:
        """Nobody is followed."""

    def root_of(self, pid: int) -> int | None:
        """Know of no descent."""
        return None

    def figures(self) -> ObserverFigures:
        """Return how many requests there were; the kernel's own faults are not known."""
        return ObserverFigures(mode="requests", events=self._requests, reason=self._reason)

    def close(self) -> None:
        """Nothing is held."""


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


class NoObserver:
    """Nothing is seen: ``observe=off``, or an observer that failed."""

    sees_maps: ClassVar[bool] = False

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def start(self, mount: Mount) -> None:
        """Nothing is set up."""

    def add_pids(self, pids: Iterable[int]) -> None:
        """Nobody is followed."""

    def follows(self, tid: int) -> bool:
        """Nobody need be."""
        return True

    def read_request(self, pid: int, ino: int, first: int) -> None:
        """Nothing is heard."""

    def quiet(self) -> bool:
        """Return that it is, always."""
        return True

    def drain(self, until_ns: int) -> tuple[list[ev.Event | FaultBatch], bool]:
        """Return nothing."""
        return [], True

    def unsettled(self, before_ns: int) -> bool:
        """Return that there is none."""
        return False

    def comm(self, pid: int) -> str:
        """Return no name."""
        return ""

    def follow(self, pid: int) -> None:
        """Nobody is followed."""

    def root_of(self, pid: int) -> int | None:
        """Know of no descent."""
        return None

    def figures(self) -> ObserverFigures:
        """Return the reason."""
        return ObserverFigures(mode="off", reason=self._reason)

    def close(self) -> None:
        """Nothing is held."""


def choose_observer(options: MountOptions) -> LiveObserver:
    """Return the observer that ``options`` ask for or this machine allows.

    Raises ObserverError if tracefs is demanded and not usable.
    """
    if options.observe == "off":
        return NoObserver("switched off with observe=off")
    if options.observe == "requests":
        return RequestsObserver(REQUESTS_NOTE)
    if mount_tracefs():
        log.info("mounted tracefs at %s", TRACING)
    unusable = probe().unusable
    if not unusable:
        return TracefsObserver()
    if options.observe == "tracefs":
        raise ObserverError(
            f"observe=tracefs is not possible: {unusable}",
            remedy="mount as root, or use observe=auto",
        )
    log.info("observing READ requests only: %s", unusable)
    return RequestsObserver(f"{unusable}; {REQUESTS_NOTE}")


def start_observing(
    options: MountOptions, observer: LiveObserver, mount: Mount
) -> tuple[LiveObserver, bool]:
    """Start ``observer``, or what is left; return it, and whether the kernel reads nothing ahead.

    Without read-ahead every cold page that a program touches is one READ and one major fault, so
    that is the default under tracefs. Raises XipfsError where an option demands what cannot be had.
    """
    try:
        observer.start(mount)
    except ObserverError as error:
        if options.observe == "tracefs":
            raise
        log.info("observing READ requests only: %s", error)
        observer = RequestsObserver(f"{error}; {REQUESTS_NOTE}")
    kib = options.readahead_kib
    if kib is None and isinstance(observer, TracefsObserver):
        try:
            _set_readahead(mount, 0)
        except MountError as error:
            log.info("the kernel reads ahead: %s", error)
            lost = "lost: a cold page comes with its neighbours, whose first touches then differ"
            observer.missing["read_ahead_kb"] = f"{error.what}; {lost}"
            return observer, False
        return observer, True
    if kib is not None:
        _set_readahead(mount, kib)
    return observer, kib == 0


def _set_readahead(mount: Mount, kib: int) -> None:
    """Set the mount's read-ahead; it acts on files opened from now on, and ends with the mount."""
    path = Path(f"/sys/class/bdi/{mount.major}:{mount.minor}/read_ahead_kb")
    try:
        path.write_text(str(kib))
    except OSError as error:
        raise MountError(
            f"readahead={kib} cannot be set: {path}: {error.strerror}",
            remedy="mount as root, or leave readahead= out",
        ) from None
