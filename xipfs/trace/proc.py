"""What /proc says about processes that the events have not told.

A process may end between any two reads: every function here answers None or an empty result for a
process that is gone, and raises nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xipfs.units import PAGE_SHIFT

_PROC: Final = Path("/proc")
_MAPS_RE: Final = re.compile(
    r"^([0-9a-f]+)-([0-9a-f]+) ([r-])([w-])([x-])([sp]) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+)",
    re.MULTILINE,
)

#: What ``call_of`` returns of a thread that does not wait.
RUNNING: Final = "running"
PROT_READ: Final = 1
PROT_WRITE: Final = 2
PROT_EXEC: Final = 4


#: The kernel writes as many lines into one read as fit.
_MAPS_BYTES: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class MapsLine:
    """One line of /proc/PID/maps: addresses and ``pgoff`` as the kernel's VMA has them."""

    start: int
    end: int
    prot: int
    shared: bool
    pgoff: int
    ino: int


def kernel_dev(st_dev: int) -> int:
    """Return ``st_dev`` of stat(2) as tracepoints print dev_t: major << 20 | minor."""
    return os.major(st_dev) << 20 | os.minor(st_dev)


def parse_maps(text: str, dev: int) -> list[MapsLine]:
    """Return the mappings of files on kernel device ``dev`` in ``text`` (a maps file)."""
    tag = f" {dev >> 20:02x}:{dev & 0xFFFFF:02x} "
    found = []
    for line in text.splitlines():
        if tag not in line:
            continue
        match = _MAPS_RE.match(line)
        if match is None or (int(match[8], 16) << 20 | int(match[9], 16)) != dev:
            continue
        prot = sum(
            bit
            for bit, letter in zip(
                (PROT_READ, PROT_WRITE, PROT_EXEC), (match[3], match[4], match[5]), strict=True
            )
            if letter != "-"
        )
        found.append(
            MapsLine(
                start=int(match[1], 16),
                end=int(match[2], 16),
                prot=prot,
                shared=match[6] == "s",
                pgoff=int(match[7], 16) >> PAGE_SHIFT,
                ino=int(match[10]),
            )
        )
    return found


def read_maps(pid: int, dev: int) -> list[MapsLine] | None:
    """Return the mappings process ``pid`` has of files on ``dev``; None when it is gone."""
    text = read_maps_text(pid)
    return parse_maps(text, dev) if text else None


def read_maps_text(pid: int) -> str:
    """Return /proc/PID/maps of process ``pid``; empty when it is gone."""
    try:
        with open(f"{_PROC}/{pid}/maps", "rb", buffering=_MAPS_BYTES) as file:
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def tids_of(pid: int) -> set[int]:
    """Return the thread ids of the process that thread or process ``pid`` belongs to."""
    try:
        return {int(name) for name in os.listdir(_PROC / str(pid) / "task")}
    except OSError:
        return set()


def heirs_of(pids: Iterable[int]) -> set[int]:
    """Return the processes of these threads with their descendants: they may have inherited a file.

    All processes there are if one of ``pids`` is gone: whoever has what it had descends from nobody
    now.
    """
    found: set[int] = set()
    pending = list(pids)
    while pending:
        pid = pending.pop()
        tids = tids_of(pid)
        if not tids and pid not in found:
            return {int(name) for name in os.listdir(_PROC) if name.isdigit()}
        found.add(pid)
        for tid in tids:
            try:
                children = (_PROC / str(pid) / "task" / str(tid) / "children").read_text().split()
            except OSError:
                continue
            new = {int(child) for child in children} - found
            found |= new
            pending += new
    return found


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose thread this is: process id, parent's process id, name, whether of a 32-bit program."""

    tgid: int
    ppid: int
    comm: str
    compat: bool = False


def identify(tid: int) -> Identity | None:
    """Return who thread ``tid`` is; None when it is gone."""
    try:
        text = (_PROC / str(tid) / "status").read_text(errors="replace")
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    tgid = int(fields["Tgid"])
    return Identity(tgid, int(fields["PPid"]), fields["Name"].strip(), _is_compat(tgid))


def _is_compat(pid: int) -> bool:
    """Tell a 32-bit program by its auxiliary vector: two of its words lie in one of ours."""
    try:
        first = (_PROC / str(pid) / "auxv").read_bytes()[:8]
    except OSError:
        return False
    return int.from_bytes(first, "little") >= 1 << 32


def call_of(tid: int) -> str:
    """Return which system call thread ``tid`` waits in, with arguments, stack and return address.

    RUNNING: it runs, or is ready to, so /proc cannot tell; "": it is gone. May block.
    """
    try:
        return (_PROC / str(tid) / "syscall").read_text().strip()
    except OSError:
        return ""


def in_system_call(tid: int) -> bool | None:
    """Tell whether thread ``tid`` waits inside a system call.

    False: it waits in the kernel outside one, which is where a page fault waits. None: it runs, or
    is ready to, so /proc cannot tell user from kernel mode. A thread that is gone is in none: True,
    since whatever it did is over.
    """
    call = call_of(tid)
    return None if call == RUNNING else not call.startswith("-1")


def sleeps_lightly(tid: int) -> bool:
    """Tell whether any signal would wake thread ``tid``, which a sleep for a lock is not (S)."""
    try:
        return (_PROC / str(tid) / "stat").read_bytes().rpartition(b") ")[2].startswith(b"S")
    except OSError:
        return True


def run_ns(tid: int) -> int:
    """Return how long thread ``tid`` has been on a processor, as of the last tick; 0 if unknown."""
    try:
        return int((_PROC / str(tid) / "schedstat").read_text().split()[0])
    except OSError:
        return 0
