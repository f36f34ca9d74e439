"""The daemon killed before each step of a migration, one after the other, on real mounts.

The daemon is xipfs as it is, in a process where the functions that a migration is made of are
wrapped: the wrapper counts while a chunk is moved, and sends SIGKILL to its own process at the
wanted number. A *step* is every store, flush and fence of the region (nothing else outlives a
process), and the beginning and the end of each part that fuse/migration.py has. A process that has
imported all of it forks a daemon for each mount, which is much faster than starting one.

Before each migration a program maps the file, stores and writes to some of its pages and brings
one of them to fsync. After the kill fsck must find nothing, every byte that was promised must be
there, words that were not may be old or new, and the pages of each run must be all of the old kind
or all of the new.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import io
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from live import ENVIRONMENT, INSTANCES, PAGE, is_mounted, new_image, wait_until

from xipfs.cli import main as run_xipfs
from xipfs.clock import SystemClock
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import PageKind
from xipfs.fuse.guard import CONNECTIONS
from xipfs.fuse.mounts import mount_at

NAME = "file"
PAGES = 8
HOLE = 5
#: The last page is not whole.
SIZE = PAGES * PAGE - 1000
#: Pages that a program changes before the migration; only the third is brought to fsync.
WRITTEN, STORED, SYNCED = 1, 2, 3
OLD, NEW = b"old word", b"new word"
STUCK_S = 30


class KillPointError(Exception):
    """A promise was broken, or something stayed behind."""


# The daemons


class Steps:
    """Counts the steps of a migration and ends the process before one of them."""

    def __init__(self, kill_at: int, log: Path) -> None:
        self._kill_at = kill_at
        self._log = log
        self._count = 0
        self._moving = False

    def step(self, what: str) -> None:
        """Count; the log says where the end came."""
        if self._moving:
            self._count += 1
            if self._count == self._kill_at:
                self._log.write_text(what)
                os.kill(os.getpid(), signal.SIGKILL)

    def before(self, cls: type, name: str) -> None:
        """Make a step of the moment before the call."""
        function = getattr(cls, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.step(f"before {name}")
            return function(*args, **kwargs)

        setattr(cls, name, wrapped)

    def around(self, cls: type, name: str, *, whole: bool = False) -> None:
        """Make steps of the moments before and after; a ``whole`` migration is what counts."""
        function = getattr(cls, name)

        async def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._moving |= whole
            self.step(f"before {name}")
            result = await function(*args, **kwargs)
            self.step(f"after {name}")
            self._moving &= not whole
            return result

        setattr(cls, name, wrapped)


def daemon(image: str, directory: str, kill_at: int, log: Path) -> int:
    """Serve a mount that does not survive step ``kill_at`` of its first migration."""
    from xipfs.fuse.migration import Migrator
    from xipfs.memory.region import Region

    steps = Steps(kill_at, log)
    for name, function in list(vars(Migrator).items()):
        if name.startswith("_") and inspect.iscoroutinefunction(function):
            steps.around(Migrator, name, whole=name == "_migrate_chunk")
    for name in ("store", "store_word", "flush", "fence"):
        steps.before(Region, name)
    return run_xipfs(["mount", "-f", "-o", "observe=off,ram=64K", image, directory])


def fork_daemons() -> None:
    """Fork a daemon for each line (image, directory, step, log) that arrives; tell its end."""
    import xipfs.daemon  # noqa: F401  what all children need, loaded once

    for line in sys.stdin:
        image, directory, kill_at, log = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(daemon(image, directory, int(kill_at), Path(log)))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


# The program


def page_of(word: bytes) -> bytes:
    return word * (PAGE // len(word))


def use_and_migrate(directory: Path, to: str) -> None:
    """Change pages as the module says, then migrate all of the file; prints when that is done."""
    descriptor = os.open(directory / NAME, os.O_RDWR)
    mapped = mmap.mmap(descriptor, 0)
    control = os.open(directory / ".xipfs" / "control", os.O_RDWR)
    os.pwrite(descriptor, page_of(NEW), SYNCED * PAGE)
    os.fsync(descriptor)
    os.pwrite(descriptor, page_of(NEW), WRITTEN * PAGE)
    # A stat after the store would have the kernel send it home: the writes moved the mtime.
    request = {"op": "migrate", "ino": os.fstat(descriptor).st_ino, "to": to}
    mapped[STORED * PAGE : (STORED + 1) * PAGE] = page_of(NEW)
    os.write(control, json.dumps(request).encode())
    while os.read(control, 1 << 16):
        pass
    print("migrated", flush=True)


# The judgement


def prepare(image: Path, kind: PageKind) -> None:
    """Make an image whose file has pages of ``kind``, and a hole, closed cleanly."""
    image.unlink(missing_ok=True)
    new_image(image, size_bytes=1 << 20, pagecache=kind is PageKind.PAGECACHE)
    fs = Filesystem.open(image, ram_bytes=16 * PAGE, clock=SystemClock())
    ino = fs.mknod(1, NAME.encode(), 0o100644, 0, 0, 0).ino
    for index in range(PAGES):
        if index != HOLE:
            fs.write(ino, index * PAGE, page_of(OLD))
    fs.setattr(ino, size_bytes=SIZE)
    fs.close()


def fsck(image: Path) -> None:
    """Raise KillPointError unless xipfs fsck finds nothing."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = run_xipfs(["fsck", "-n", str(image)])
    if code != 0:
        raise KillPointError(f"fsck: exit code {code}: {said.getvalue()}")


def abort_of(directory: Path) -> Path:
    """Return the file that ends what waits for a mount."""
    return CONNECTIONS / str(mount_at(directory).minor) / "abort"


def kinds_of(first: PageKind, second: PageKind) -> list[PageKind]:
    """Return the file's kinds where its two runs of pages have these."""
    return [first] * HOLE + [PageKind.HOLE] + [second] * (PAGES - HOLE - 1)


def judge(image: Path, kind: PageKind, to: PageKind, *, finished: bool) -> None:
    """Raise KillPointError unless ``image`` keeps what was promised before the kill."""
    fsck(image)
    fs = Filesystem.open(image, ram_bytes=16 * PAGE, clock=SystemClock())
    try:
        ino = fs.lookup(1, NAME.encode()).ino
        if (size := fs.getattr(ino).size_bytes) != SIZE:
            raise KillPointError(f"the file has {size} bytes, expected {SIZE}")
        data = bytes(fs.read(ino, 0, SIZE)).ljust(PAGES * PAGE, b"\0")
        kinds = [fs.page(ino, index).kind for index in range(PAGES)]
    finally:
        fs.close()
    fsck(image)
    # Each run of pages moves wholly or not at all, and the first one first.
    states = [(kind, kind), (to, kind), (to, to)]
    if kinds not in [kinds_of(*state) for state in (states[-1:] if finished else states)]:
        raise KillPointError(f"kinds {[each.value for each in kinds]} after a move to {to.value}")
    for index in range(PAGES):
        page = data[index * PAGE : (index + 1) * PAGE]
        words = {page[at : at + 8] for at in range(0, SIZE - index * PAGE, 8) if at < PAGE}
        allowed = {OLD, NEW} if index in (WRITTEN, STORED) else {OLD}
        allowed = {bytes(8)} if index == HOLE else {NEW} if index == SYNCED else allowed
        if not words <= allowed:
            raise KillPointError(f"page {index} has {words}, expected {allowed}")


@dataclass
class Point:
    """One kill: the number of its step, what came next, None where the migration was done."""

    number: int
    what: str | None


class KillPoints:
    """Kills at one step after the other; a context manager around the process that forks."""

    def __init__(self, scratch: Path, to: PageKind) -> None:
        self._scratch = scratch
        self._to = to
        self._kind = PageKind.XIP if to is PageKind.PAGECACHE else PageKind.PAGECACHE
        self._clean = scratch / "clean.img"
        prepare(self._clean, self._kind)

    def __enter__(self) -> KillPoints:
        self._forker = subprocess.Popen(
            [sys.executable, __file__, "daemons"],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        os.killpg(self._forker.pid, signal.SIGKILL)
        self._forker.communicate()

    def points(self, numbers: Iterator[int]) -> Iterator[Point]:
        """Kill at the steps with these numbers, until a migration has fewer; yields each."""
        for number in numbers:
            what = self._kill(number)
            yield Point(number, what)
            if what is None:
                return

    def _kill(self, number: int) -> str | None:
        image, directory = self._scratch / "image", self._scratch / "mnt"
        shutil.copyfile(self._clean, image)
        directory.mkdir(exist_ok=True)
        log = self._scratch / "step"
        log.unlink(missing_ok=True)
        assert self._forker.stdin is not None
        assert self._forker.stdout is not None
        words = [str(image), str(directory), str(number), str(log)]
        self._forker.stdin.write(json.dumps(words) + "\n")
        self._forker.stdin.flush()
        wait_until("the mount", lambda: is_mounted(directory), STUCK_S)
        try:
            said = self._run_program(directory)
        finally:
            # Whoever cleans dead mounts up on this machine may have been faster.
            subprocess.run(["umount", "-ql", directory], check=False, timeout=STUCK_S)
        if is_mounted(directory):
            raise KillPointError("the dead mount cannot be unmounted")
        code = int(self._forker.stdout.readline())
        what = log.read_text() if log.exists() else None
        try:
            if code != (0 if what is None else -signal.SIGKILL):
                raise KillPointError(f"the daemon ended with {code}")
            if left := [path.name for path in INSTANCES.glob(f"xipfs-{self._forker.pid}-*")]:
                raise KillPointError(f"tracefs instances stay: {left}")
            judge(image, self._kind, self._to, finished="migrated" in said)
        except KillPointError as error:
            where = f"killed at step {number} ({what}) of moving to {self._to.value}"
            raise KillPointError(f"{where}: {error}") from None
        return what

    def _run_program(self, directory: Path) -> str:
        """Return what the program said until it was done or the mount was dead."""
        with subprocess.Popen(
            [sys.executable, __file__, "program", str(directory), self._to.value],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            text=True,
        ) as program:
            try:
                said, error = program.communicate(timeout=STUCK_S)
            except subprocess.TimeoutExpired:
                abort_of(directory).write_text("1")
                program.kill()
                raise KillPointError(f"a program hung on the mount for {STUCK_S} s") from None
        if program.returncode != 0:
            raise KillPointError(f"the program failed: {error}")
        return said


def run(scratch: Path, to: PageKind, numbers: Iterator[int], tell: Callable[[Point], None]) -> int:
    """Kill at the steps ``numbers``; return how many were; raises KillPointError."""
    count = 0
    with KillPoints(scratch, to) as kill:
        for point in kill.points(numbers):
            tell(point)
            count += point.what is not None
    return count


if __name__ == "__main__":
    if sys.argv[1] == "daemons":
        fork_daemons()
    else:
        try:
            use_and_migrate(Path(sys.argv[2]), sys.argv[3])
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
                raise
