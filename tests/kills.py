"""Kill the daemon of a real mount again and again under load; nothing promised may be missing.

Two worker processes change files of their own and say on a pipe what they begin and what has
returned. The daemon gets SIGKILL at a random moment. Then the dead mount is ended, the image is
mounted anew and every file is compared with what was promised: names, sizes and links at the
return of their call, bytes at the return of fsync or msync. The one call in flight may have
happened or not; its bytes, word by word.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imagecheck import check
from live import INSTANCES, PAGE, LiveMount, is_mounted, new_image, xipfs

IMAGE_BYTES = 32 << 20
MAX_FILE_BYTES = 40 * PAGE
WORKERS = 2
WORD = 8
#: A worker whose mount is dead must come back with an error, not hang.
STUCK_S = 20
PR_SET_PDEATHSIG = 1

Operation = list[Any]
Content = dict[str, bytes]


class KillError(Exception):
    """A promise was broken, or something stayed behind."""


# The workers


def choose(rng: random.Random, files: dict[str, int]) -> Operation:
    """Return a random operation on a worker's files, given as name: size."""
    name = rng.choice(sorted(files)) if files and rng.random() < 0.8 else f"f{rng.randrange(12)}"
    offset = rng.randrange(MAX_FILE_BYTES - 3 * PAGE)
    kinds = ["write", "write", "write", "append"]
    if name in files:
        kinds += ["store", "truncate", "migrate", "migrate", "rename", "unlink"]
    kind = rng.choice(kinds)
    if kind == "append" or (kind == "store" and files[name] < 2 * PAGE):
        kind, offset = "write", min(files.get(name, 0), MAX_FILE_BYTES - 3 * PAGE)
    seed, size = rng.randrange(1 << 30), rng.choice([5, 700, PAGE, 2 * PAGE + 9])
    if kind == "store":
        pages = files[name] // PAGE
        return ["write", name, rng.randrange(pages) * PAGE, 512, seed, "store"]
    if kind == "write":
        return ["write", name, offset, size, seed, "fsync"]
    if kind == "truncate":
        return ["truncate", name, rng.randrange(MAX_FILE_BYTES)]
    if kind == "migrate":
        return ["migrate", name, rng.choice(["xip", "pagecache"])]
    if kind == "rename":
        return ["rename", name, f"f{rng.randrange(12)}"]
    return ["unlink", name]


def bytes_of(seed: int, size: int) -> bytes:
    """Return what a write with this seed writes."""
    return random.Random(seed).randbytes(size)


def perform(operation: Operation, control: Path) -> None:
    """Carry one operation out in the working directory; when it returns, it is promised."""
    kind, name, *rest = operation
    if kind == "write":
        offset, size, seed, how = rest
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT)
        try:
            if how == "store":
                with mmap.mmap(descriptor, 0) as mapped:
                    mapped[offset : offset + size] = bytes_of(seed, size)
                    mapped.flush()
            else:
                os.pwrite(descriptor, bytes_of(seed, size), offset)
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    elif kind == "truncate":
        os.truncate(name, rest[0])
    elif kind == "rename":
        os.rename(name, rest[0])
    elif kind == "unlink":
        os.unlink(name)
    else:
        request = {"op": "migrate", "ino": os.stat(name).st_ino, "to": rest[0]}
        descriptor = os.open(control, os.O_RDWR)
        try:
            os.write(descriptor, json.dumps(request).encode())
            while os.read(descriptor, 1 << 16):
                pass
        finally:
            os.close(descriptor)


def work(directory: Path, control: Path, seed: int) -> None:
    """Work until the mount dies, telling each operation before and after, as lines of JSON."""
    os.chdir(directory)
    rng = random.Random(seed)
    files = {entry.name: entry.stat().st_size for entry in os.scandir(".")}
    while True:
        operation = choose(rng, files)
        print(json.dumps(["begin", *operation]), flush=True)
        perform(operation, control)
        print(json.dumps(["done"]), flush=True)
        files = {entry.name: entry.stat().st_size for entry in os.scandir(".")}


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

    def __init__(self, scratch: Path, seed: int, options: list[str]) -> None:
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
        mount = LiveMount(self._image, self._scratch / f"mnt{self._serial}", self._options)
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
            done = xipfs("umount", mount.directory, check=False)
            if done.returncode == 0:
                return
            if time.monotonic() > deadline:
                who = ", ".join(holders(mount.directory)) or "nobody that /proc shows"
                raise KillError(f"{done.stderr.strip()}; held by {who}")
            time.sleep(0.1)

    def _fsck(self, when: str) -> None:
        """Raise KillError unless xipfs fsck finds nothing."""
        done = xipfs("fsck", "-n", self._image, check=False)
        if done.returncode != 0:
            said = (done.stdout + done.stderr).strip()
            raise KillError(f"fsck {when}: exit code {done.returncode}: {said}")

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
                [sys.executable, __file__, str(directory), str(control)]
                + [str(self._rng.randrange(1 << 30))],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                preexec_fn=_die_with_parent,
            )
            for directory in directories
        ]
        # All work now; the moment is random within what some dozens of operations take.
        for worker in workers:
            assert worker.stdout is not None
            select.select([worker.stdout], [], [], STUCK_S)
        time.sleep(self._rng.uniform(0.0, 0.5))
        self._dead_pid = mount.pid
        mount.kill()
        told = []
        for worker in workers:
            try:
                said, _ = worker.communicate(timeout=STUCK_S)
            except subprocess.TimeoutExpired:
                mount.abort()
                worker.kill()
                raise KillError(f"a program hung on the dead mount for {STUCK_S} s") from None
            told.append([json.loads(line) for line in said.splitlines()])
        self._unmount(mount)
        return told

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


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run(
    scratch: Path, times: int, seed: int, options: list[str], progress: Callable[[int], None]
) -> Outcome:
    """Kill ``times`` times; raises KillError at the first broken promise."""
    killer = Killer(scratch, seed, options)
    for number in range(times):
        try:
            killer.once()
        except KillError as error:
            raise KillError(f"kill {number + 1} of seed {seed}: {error}") from error
        progress(number + 1)
    return killer.outcome


if __name__ == "__main__":
    with contextlib.suppress(OSError):
        work(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
