"""Two tracefs instances of our own, set up for one mount and removed again.

An instance has its own buffers, filters and pid list and disturbs no other tracer (fact 5). *G* is
filtered by device and sees every process, *P* by thread and sees the mount's users; ``records``
says which event is in which. Their names carry the daemon's pid, so that what a killed daemon left
can be told from what a living one uses.

The clock is CLOCK_MONOTONIC (``mono``) in both, so that time stamps compare with each other and
with ``time.monotonic_ns()``; 8 MiB a CPU drained every 20 ms lost nothing under two processes that
faulted flat out (fact 6). ``rings`` enlarges them where that is not enough.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import stat
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xipfs.errors import ObserverError
from xipfs.trace.formats import EventFormat, PageFormat, parse_page, read_event
from xipfs.trace.records import TABLE, Tracepoint

TRACING: Final = Path("/sys/kernel/tracing")
BUFFER_KIB: Final = 8192
#: PID_MAX_LIMIT of 64-bit kernels: every pid is below it.
NOBODY: Final = 4 << 20
#: The wall clock may have been set a little between a daemon's start and now.
_CLOCK_SLACK_S: Final = 5.0
#: Who looks through all instances of a machine has a file of ours open for a moment.
_BUSY_MAX_S: Final = 2.0
_NAME_RE: Final = re.compile(r"xipfs-(\d+)-\d+-[GP]")
_serial = itertools.count()


@dataclass(frozen=True, slots=True)
class Availability:
    """What this kernel offers: the usable events, and a reason for each one that is missing."""

    events: list[tuple[Tracepoint, EventFormat]]
    missing: dict[str, str]
    """Event name -> why it cannot be used and what is lost without it."""
    unusable: str
    """Why faults cannot be observed at all; empty when they can."""


def mount_tracefs(tracing: Path = TRACING) -> bool:
    """Mount tracefs where the kernel has it and no init system did; return whether that was done.

    Nothing is done, and nothing raised, where that is not possible: ``probe`` says what is missing.
    """
    if os.geteuid() != 0 or not tracing.is_dir() or any(tracing.iterdir()):
        return False
    command = ["mount", "-t", "tracefs", "nodev", str(tracing)]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    return False


def is_mounted(tracing: Path = TRACING) -> bool:
    """Return whether tracefs is there, for whomever: it shows its files to root only."""
    try:
        return stat.S_ISDIR((tracing / "instances").stat().st_mode)
    except PermissionError:
        return True
    except OSError:
        return False


def probe(tracing: Path = TRACING) -> Availability:
    """Find out which events can be used, from their format files alone."""
    if not os.access(tracing / "instances", os.W_OK):
        reason = "tracefs is not writable" if is_mounted(tracing) else "tracefs is not mounted"
        return Availability([], {}, f"{reason} ({tracing})")
    events: list[tuple[Tracepoint, EventFormat]] = []
    missing: dict[str, str] = {}
    unusable = ""
    for point in TABLE:
        found = read_event(tracing, point.name, ("common_pid", *point.fields))
        if isinstance(found, EventFormat):
            events.append((point, found))
            continue
        missing[point.name] = found + (f"; lost: {point.serves}" if point.serves else "")
        if point.required and not unusable:
            unusable = f"a needed event is missing: {found}"
    return Availability(events, missing, unusable)


def clean_orphans(tracing: Path = TRACING) -> list[str]:
    """Remove the instances of daemons that are no more; return their names."""
    return [path.name for path in orphans(tracing) if remove(path)]


def remove(orphan: Path) -> bool:
    """Remove an instance of a daemon that is no more; return whether that was done."""
    # Another daemon may be cleaning at the same time.
    with contextlib.suppress(OSError):
        # First of all: whoever holds one of its files keeps it, but not what it costs.
        (orphan / "events/enable").write_text("0")
    try:
        orphan.rmdir()
    except OSError:
        return False
    return True


def orphans(tracing: Path = TRACING) -> list[Path]:
    """Return the instances of daemons that are no more."""
    found = []
    for path in (tracing / "instances").iterdir():
        match = _NAME_RE.fullmatch(path.name)
        with contextlib.suppress(OSError):
            if match and not _made_by(match[1], path.stat().st_mtime):
                found.append(path)
    return found


def _made_by(pid: str, made_s: float) -> bool:
    """Return whether the process that had number ``pid`` at that time still runs.

    A killed one that nobody has reaped yet does not; one that began later has only its number.
    """
    try:
        fields = Path("/proc", pid, "stat").read_bytes().rpartition(b") ")[2].split()
        boot_s = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    except OSError:
        return False
    began_s = boot_s + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return fields[0] not in b"ZX" and began_s < made_s + _CLOCK_SLACK_S


class Instance:
    """One directory under tracefs' ``instances``; ``close`` removes it with all it enabled."""

    def __init__(self, letter: str, tracing: Path = TRACING) -> None:
        self.path = tracing / "instances" / f"xipfs-{os.getpid()}-{next(_serial)}-{letter}"
        try:
            self.path.mkdir()
        except OSError as error:
            raise ObserverError(
                f"cannot create the tracefs instance {self.path.name}: {error.strerror}",
                expected="root, and tracefs not locked down",
            ) from error

    def write(self, name: str, value: str) -> None:
        """Set one of the instance's files; an error names it."""
        try:
            (self.path / name).write_text(value)
        except OSError as error:
            raise ObserverError(f"tracefs refuses {value!r} in {name}: {error.strerror}") from error

    def configure(self) -> None:
        """Set clock and buffers; nothing is enabled yet."""
        self.write("trace_clock", "mono")
        self.write("buffer_size_kb", str(BUFFER_KIB))
        # poll(2) calls a ring readable when it has anything, not when it is half full.
        self.write("buffer_percent", "0")

    def enable(self, point: Tracepoint, condition: str) -> None:
        """Enable one event under a filter (empty: none)."""
        if condition:
            self.write(f"events/{point.name}/filter", condition)
        self.write(f"events/{point.name}/enable", "1")

    def lost(self) -> int:
        """Return how many records were overwritten or refused in this instance so far."""
        total = 0
        for path in (self.path / "per_cpu").iterdir():
            for line in (path / "stats").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in ("overrun", "commit overrun", "dropped events"):
                    total += int(value)
        return total

    def close(self) -> None:
        """Stop the events and remove the instance; the ring files must be closed by now."""
        if self.path.is_dir():
            (self.path / "events/enable").write_text("0")
            deadline_s = time.monotonic() + _BUSY_MAX_S
            while not self._removed():
                if time.monotonic() > deadline_s:
                    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self.path))
                time.sleep(0.01)

    def _removed(self) -> bool:
        """Remove the instance; False while somebody has one of its files open."""
        try:
            self.path.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True


class Session:
    """Both instances of one mount, from enabling to removal."""

    def __init__(self, dev: int, tracing: Path = TRACING) -> None:
        """Set up for files on kernel device ``dev`` (major << 20 | minor)."""
        self.available = probe(tracing)
        if self.available.unusable:
            raise ObserverError(
                f"faults cannot be observed through tracefs: {self.available.unusable}",
                remedy="mount with -o observe=requests",
            )
        self.page: PageFormat = parse_page((tracing / "events/header_page").read_text())
        self.instances: list[Instance] = []
        try:
            self._set_up(dev, tracing)
        except BaseException:
            self.close()
            raise

    def _set_up(self, dev: int, tracing: Path) -> None:
        by_device = Instance("G", tracing)
        self.instances.append(by_device)
        by_pid = Instance("P", tracing)
        self.instances.append(by_pid)
        for instance in self.instances:
            instance.configure()
        # A list that was never written filters nothing, so it starts with a pid nobody can have.
        by_pid.write("set_event_pid", str(NOBODY))
        by_pid.write("options/event-fork", "1")
        for point, _ in self.available.events:
            if point.by_device:
                by_device.enable(point, f"s_dev=={dev}")
            elif point.by_anybody:
                by_device.enable(point, point.filter)
            else:
                by_pid.enable(point, point.filter)

    @property
    def by_pid(self) -> Instance:
        """The instance that is filtered by thread."""
        return self.instances[1]

    def lost(self) -> int:
        """Return how many records both instances lost so far."""
        return sum(instance.lost() for instance in self.instances)

    def close(self) -> None:
        """Remove both instances, the second also when the first cannot be removed."""
        errors = []
        while self.instances:
            try:
                self.instances.pop().close()
            except OSError as error:
                errors.append(error)
        if errors:
            raise ObserverError(f"a tracefs instance cannot be removed: {errors[0]}")
