"""The daemon killed before each step of a migration, one after the other, on real mounts.

The daemon is xipfs as it is, in a process where the functions that a migration is made of are
wrapped: the wrapper counts while a chunk is moved, and sends SIGKILL to its own process at the
wanted number. A *step* is every store, flush, fence and sync of the region (nothing else outlives a
process), and the beginning and the end of each part that fuse/migration.py and fs/moving.py have.
t4_kill.py looks into the source for parts and ways to the region that are not wrapped.

Before each migration a program maps the file, stores and writes to some of its pages and brings
one of them to fsync. After the kill fsck must find nothing, every byte that was promised must be
there, words that were not may be old or new, and the pages of each run must be all of the old kind
or all of the new.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kill_worker
from forked import STUCK_S, ForkedMount, Forker, in_process
from kill_worker import HOLE, NAME, NEW, OLD, PAGES, STORED, SYNCED, WRITTEN, page_of
from live import PAGE, new_image, wait_until

from xipfs.clock import SystemClock
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import PageKind

#: What is wrapped, by class.
MIGRATOR_PARTS = ("_begin", "_finish", "_move_window", "_take_away", "_give_way")
NOTIFIER_PARTS = ("invalidate_pages",)
REGION_CALLS = ("store", "store_word", "flush", "fence", "sync")
#: As the number of a step: list them all.
LIST = -1
#: The last page is not whole.
SIZE = PAGES * PAGE - 1000


class KillPointError(Exception):
    """A promise was broken, or something stayed behind."""


# The daemons


class Steps:
    """Counts the steps of a migration and ends the process before one of them."""

    def __init__(self, kill_at: int, log: Path) -> None:
        """With ``LIST`` nothing ends; the log gets a line for each step."""
        self._kill_at = kill_at
        self._log = log
        self._count = 0
        self._moving = False

    def step(self, what: str) -> None:
        """Count; the log says where the end came."""
        if self._moving:
            self._count += 1
            if self._kill_at == LIST:
                with open(self._log, "a") as log:
                    log.write(f"{what}\n")
            elif self._count == self._kill_at:
                self._log.write_text(what)
                os.kill(os.getpid(), signal.SIGKILL)

    def before(self, cls: type, name: str) -> None:
        """Make a step of the moment before the call."""
        function = getattr(cls, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            words = [word for word in args if isinstance(word, str)]  # which lap
            self.step(" ".join(["before", name, *words]))
            return function(*args, **kwargs)

        setattr(cls, name, wrapped)

    def around(self, cls: type, name: str) -> None:
        """Make steps of the moments before and after a coroutine."""
        function = getattr(cls, name)

        async def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.step(f"before {name}")
            result = await function(*args, **kwargs)
            self.step(f"after {name}")
            return result

        setattr(cls, name, wrapped)

    def during(self, cls: type, name: str) -> None:
        """Count only while the asynchronous generator runs; what it yields is a step too."""
        function = getattr(cls, name)

        async def wrapped(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            self._moving = True
            async with contextlib.aclosing(function(*args, **kwargs)) as items:
                async for item in items:
                    self.step(f"{name} yields")
                    yield item
            self._moving = False

        setattr(cls, name, wrapped)


def arm(kill_at: int, log: Path) -> None:
    """Let this process not survive step ``kill_at`` of its migrations; ``log`` tells which."""
    from xipfs.fs.moving import _Laps
    from xipfs.fuse.live import Live
    from xipfs.fuse.migration import Migrator
    from xipfs.fuse.notify import Notifier
    from xipfs.memory.region import Region

    steps = Steps(kill_at, log)
    for cls, names in (
        (Migrator, MIGRATOR_PARTS),
        (Notifier, NOTIFIER_PARTS),
        (Live, ("drain_for_move",)),
    ):
        for name in names:
            steps.around(cls, name)
    steps.during(Migrator, "migrate")
    for name in REGION_CALLS:
        steps.before(Region, name)
    steps.before(_Laps, "lap")


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
    code, said = in_process("fsck", "-n", image)
    if code != 0:
        raise KillPointError(f"fsck: exit code {code}: {said}")


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
    """Kills at one step after the other."""

    def __init__(self, scratch: Path, to: PageKind, forker: Forker) -> None:
        self._scratch = scratch
        self._to = to
        self._kind = PageKind.XIP if to is PageKind.PAGECACHE else PageKind.PAGECACHE
        self._forker = forker
        self._clean = scratch / "clean.img"
        prepare(self._clean, self._kind)

    def points(self, numbers: Iterator[int]) -> Iterator[Point]:
        """Kill at the steps with these numbers, until a migration has fewer; yields each."""
        for number in numbers:
            what = self._kill(number)
            yield Point(number, what)
            if what is None:
                return

    def steps(self) -> list[str]:
        """Return all steps of a migration that nobody ends."""
        assert self._kill(LIST) is None
        return (self._scratch / "step").read_text().splitlines()

    def _kill(self, number: int) -> str | None:
        image, log = self._scratch / "image", self._scratch / "step"
        shutil.copyfile(self._clean, image)
        log.unlink(missing_ok=True)
        options = ["observe=off,ram=64K"]
        mount = ForkedMount(
            self._forker, image, self._scratch / "mnt", options, kill_at=number, step=str(log)
        )
        try:
            said = self._run_program(mount)
            mount.killed = number != LIST and log.exists()
            wait_until("the daemon's end", lambda: not (mount.killed and mount.running()))
        finally:
            mount.close()
        what = log.read_text() if mount.killed else None
        try:
            judge(image, self._kind, self._to, finished="migrated" in said)
        except KillPointError as error:
            where = f"killed at step {number} ({what}) of moving to {self._to.value}"
            raise KillPointError(f"{where}: {error}") from None
        return what

    def _run_program(self, mount: ForkedMount) -> str:
        """Return what the program said until it was done or the mount was dead."""
        with subprocess.Popen(
            [sys.executable, kill_worker.__file__, str(mount.directory), self._to.value],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as program:
            try:
                said, error = program.communicate(timeout=STUCK_S)
            except subprocess.TimeoutExpired:
                mount.abort()
                program.kill()
                raise KillPointError(f"a program hung on the mount for {STUCK_S} s") from None
        if program.returncode != 0:
            raise KillPointError(f"the program failed: {error}")
        return said


def run(scratch: Path, to: PageKind, numbers: Iterator[int], tell: Callable[[Point], None]) -> int:
    """Kill at the steps ``numbers``; return how many were; raises KillPointError."""
    count = 0
    with Forker() as forker:
        for point in KillPoints(scratch, to, forker).points(numbers):
            tell(point)
            count += point.what is not None
    return count
