"""Kill the daemon of a real mount again and again under load; nothing promised may be missing.

Two worker processes change files of their own and say on a pipe what they begin and what has
returned. The daemon gets SIGKILL at a random moment. Then the dead mount is ended, the image is
mounted anew and every file is compared with what was promised: names, sizes and links at the
return of their call, bytes at the return of fsync or msync. The one call in flight may have
happened or not; its bytes, word by word.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kill_worker
from forked import ForkedMount, Forker, in_process
from imagecheck import check
from kill_worker import Operation, bytes_of
from live import INSTANCES, LiveMount, die_with_parent, is_mounted, new_image

IMAGE_BYTES = 32 << 20
WORKERS = 2
WORD = 8
#: A worker whose mount is dead must come back with an error, not hang.
STUCK_S = 20

Content = dict[str, bytes]


class KillError(Exception):
    """A promise was broken, or something stayed behind."""


# What must be there


def applied(content: Content, operation: Operation) -> Content:
    """Return what the files hold after ``operation``."""
    after = dict(content)
    kind, name, *rest = operation
    if kind == "write":
        offset, size, seed, _ = rest
        data = bytearray(after.get(name, b"").ljust(offset, b"\0"))
        data[offset : offset + size] = bytes_of(seed, size)
        after[name] = bytes(data)
    elif kind == "truncate":
        after[name] = after[name][: rest[0]].ljust(rest[0], b"\0")
    elif kind == "rename" and name != rest[0]:
        after[rest[0]] = after.pop(name)
    elif kind == "unlink":
        del after[name]
    return after


def violation(found: Content, content: Content, pending: Operation | None) -> str:
    """Return how ``found`` breaks the promises, "" if it keeps them all."""
    after = applied(content, pending) if pending else content
    if found in (content, after):
        return ""
    if pending is None or pending[0] != "write":
        return f"{_difference(found, content)} (in flight: {pending})"
    name = pending[1]
    others = {key: data for key, data in found.items() if key != name}
    if others != {key: data for key, data in content.items() if key != name}:
        return f"{_difference(found, content)} beside the file in flight: {pending}"
    old, new, now = content.get(name, b""), after[name], found.get(name, b"")
    if not len(old) <= len(now) <= len(new):
        return f"{name} has {len(now)} bytes; expected {len(old)} to {len(new)}: {pending}"
    for at in range(0, len(now), WORD):
        word = now[at : at + WORD]
        allowed = [new[at : at + len(word)], old[at : at + WORD].ljust(len(word), b"\0")]
        if word not in allowed:
            return f"{name} has foreign bytes at {at}: {word.hex()}; in flight: {pending}"
    return ""


def _difference(found: Content, wanted: Content) -> str:
    if set(found) != set(wanted):
        return f"names {sorted(found)}; expected {sorted(wanted)}"
    name = next(name for name in sorted(found) if found[name] != wanted[name])
    a, b = found[name], wanted[name]
    at = next((i for i in range(min(len(a), len(b))) if a[i] != b[i]), min(len(a), len(b)))
    return f"{name} differs at byte {at}; {len(a)} bytes, expected {len(b)}"


def read_all(directory: Path) -> Content:
    """Return what all files of a directory hold."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# The killing


@dataclass
class Outcome:
    """What a run did."""

    kills: int = 0
    operations: int = 0
    in_flight: dict[str, int] = field(default_factory=dict)


class Killer:
    """One image, mounted and killed ``times`` times."""

    def __init__(self, scratch: Path, seed: int, options: list[str], forker: Forker) -> None:
        self._forker = forker
        self._scratch = scratch
        self._rng = random.Random(seed)
        self._options = options
        self._image = new_image(scratch / "image", size_bytes=IMAGE_BYTES)
        self._content: list[Content] = [{} for _ in range(WORKERS)]
        self._serial = 0
        self.outcome = Outcome()

    @contextlib.contextmanager
    def _mounted(self) -> Iterator[LiveMount]:
        self._serial += 1
        directory = self._scratch / f"mnt{self._serial}"
        mount = ForkedMount(self._forker, self._image, directory, self._options)
        try:
            yield mount
            self._unmount(mount)
        finally:
            mount.close()
        mount.directory.rmdir()
        mount.log.unlink()

    @staticmethod
    def _unmount(mount: LiveMount) -> None:
        """End the mount; raises KillError, naming who holds it, if that takes long."""
        # Whoever looks through all mounts of a machine keeps one busy for a moment.
        deadline = time.monotonic() + STUCK_S
        while is_mounted(mount.directory):
            code, said = in_process("umount", mount.directory)
            if code == 0:
                return
            if time.monotonic() > deadline:
                who = ", ".join(holders(mount.directory)) or "nobody that /proc shows"
                raise KillError(f"{said}; held by {who}")
            time.sleep(0.1)

    def _fsck(self, when: str) -> None:
        """Raise KillError unless xipfs fsck finds nothing."""
        code, said = in_process("fsck", "-n", self._image)
        if code != 0:
            raise KillError(f"fsck {when}: exit code {code}: {said}")

    def once(self) -> None:
        """Mount, work, kill, mount again, compare; raises KillError."""
        with self._mounted() as mount:
            directories = [mount / f"worker{number}" for number in range(WORKERS)]
            for directory in directories:
                directory.mkdir(exist_ok=True)
            told = self._kill_under_load(mount, directories)
        self.outcome.kills += 1
        # As the kill left it, a pending journal included.
        self._fsck("after the kill")
        with self._mounted() as mount:
            left = [path.name for path in INSTANCES.glob(f"xipfs-{self._dead_pid}-*")]
            if left:
                raise KillError(f"tracefs instances of the killed daemon stay: {left}")
            for number, lines in enumerate(told):
                found = read_all(mount / f"worker{number}")
                self._judge(number, lines, found)
        self._fsck("after the next mount")
        try:
            check(self._image.read_bytes())
        except AssertionError as error:
            raise KillError(f"the image is damaged: {error}") from error

    def _kill_under_load(self, mount: LiveMount, directories: list[Path]) -> list[list[Any]]:
        """Return what each worker told until the daemon was killed."""
        control = mount / ".xipfs" / "control"
        workers = [
            subprocess.Popen(
                [sys.executable, kill_worker.__file__, str(directory), str(control)]
                + [str(self._rng.randrange(1 << 30))],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                preexec_fn=die_with_parent,
            )
            for directory in directories
        ]
        heads = self._let_work(workers)
        self._dead_pid = mount.pid
        mount.kill()
        told = []
        for worker, head in zip(workers, heads, strict=True):
            try:
                said, _ = worker.communicate(timeout=STUCK_S)
            except subprocess.TimeoutExpired:
                mount.abort()
                worker.kill()
                raise KillError(f"a program hung on the dead mount for {STUCK_S} s") from None
            told.append([json.loads(line) for line in (head + said).splitlines()])
        self._unmount(mount)
        return told

    def _let_work(self, workers: list[subprocess.Popen[bytes]]) -> list[bytes]:
        """Return what each said until the moment of the kill.

        It is random within an operation of the first, which is random among some dozens: on a slow
        machine as much has happened until then as on a fast one.
        """
        wanted = self._rng.randrange(1, 80)
        heads = [b""] * len(workers)
        deadline = time.monotonic() + STUCK_S
        while heads[0].count(b"\n") < wanted and time.monotonic() < deadline:
            for number, worker in enumerate(workers):
                assert worker.stdout is not None
                if select.select([worker.stdout], [], [], 0.01)[0]:
                    heads[number] += os.read(worker.stdout.fileno(), 1 << 16)
        time.sleep(self._rng.uniform(0.0, 0.02))
        return heads

    def _judge(self, number: int, lines: list[Any], found: Content) -> None:
        pending: Operation | None = None
        content = self._content[number]
        for line in lines:
            if line[0] == "begin":
                pending = line[1:]
            else:
                assert pending is not None
                content, pending = applied(content, pending), None
                self.outcome.operations += 1
        if pending:
            in_flight = self.outcome.in_flight
            in_flight[pending[0]] = in_flight.get(pending[0], 0) + 1
        broken = violation(found, content, pending)
        if broken:
            raise KillError(f"worker {number}: {broken}")
        self._content[number] = found


def holders(directory: Path) -> list[str]:
    """Return who keeps a mount busy: pid, name, and what of theirs lies in it."""
    below = f"{directory}/"
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            links = [process / "cwd", process / "root", process / "exe", *process.glob("fd/*")]
            for link in links:
                if f"{os.readlink(link)}/".startswith(below):
                    name = (process / "comm").read_text().strip()
                    found.append(f"{process.name} {name} ({link.name})")
            if below in (process / "maps").read_text():
                found.append(f"{process.name} (a mapping)")
    return found


def run(
    scratch: Path, times: int, seed: int, options: list[str], progress: Callable[[int], None]
) -> Outcome:
    """Kill ``times`` times; raises KillError at the first broken promise."""
    with Forker() as forker:
        killer = Killer(scratch, seed, options, forker)
        for number in range(times):
            try:
                killer.once()
            except KillError as error:
                raise KillError(f"kill {number + 1} of seed {seed}: {error}") from error
            progress(number + 1)
        return killer.outcome
