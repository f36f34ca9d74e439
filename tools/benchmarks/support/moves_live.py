"""Moves on a live mount, asked for on its control file as a program would."""

from __future__ import annotations

import contextlib
import functools
import json
import mmap
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.support import mounts
from benchmarks.support.context import Context
from benchmarks.support.measure import Sample, compare
from benchmarks.support.system import BenchError

_PAGE = 4096
CONTROL = ".xipfs/control"
ALONE = "pyfuse3 alone"
BRIEF = ", brief"


class Control:
    """The control file of a mount, open: one request after the other."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR)

    def ask(self, request: bytes) -> bytes:
        """Write a request; return its last answer, b"" of a brief one: that its write returns."""
        try:
            os.write(self._fd, request)
            answer = b""
            while b'"result"' not in answer and b'"brief"' not in request:
                answer = os.read(self._fd, 65536)
                if not answer or b'"error"' in answer:
                    raise BenchError(f"{request!r} was answered with {answer!r}")
        except OSError as error:
            raise BenchError(f"{request!r} failed: {error}") from None
        return answer

    def migrate(self, ino: int, to: str) -> int:
        """Move a whole file; return how many pages have moved."""
        request = {"op": "migrate", "ino": ino, "to": to}
        moved: int = json.loads(self.ask(json.dumps(request).encode()))["result"]["moved"]
        return moved

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


@contextlib.contextmanager
def _controlled(
    context: Context, image: Path, observe: str
) -> Iterator[tuple[mounts.Mounted, Control]]:
    with mounts.xipfs(context, image, 0, [f"observe={observe}", "ram=512M"]) as mounted:
        control = Control(mounted.directory / CONTROL)
        try:
            yield mounted, control
        finally:
            control.close()


def bulk(
    context: Context, image: Path, name: str, baseline: str, copy: Callable[[int], Sample]
) -> None:
    """Move a whole file by one request; nobody else uses the mount."""
    with _controlled(context, image, "off") as (mounted, control):
        status = (mounted.directory / name).stat()
        pages = status.st_size // _PAGE

        def move(to: str, _seed: int) -> Sample:
            control.migrate(status.st_ino, "xip" if to == "pagecache" else "pagecache")
            start_ns = time.perf_counter_ns()
            moved = control.migrate(status.st_ino, to)
            took_ns = time.perf_counter_ns() - start_ns
            assert moved == pages, (moved, pages)
            return {"ns_per_page": took_ns / pages}

        move("pagecache", 0)  # the host gives the frames now
        samples = context.alternate(
            "bulk moves on a mount",
            {
                baseline: copy,
                "promote": functools.partial(move, "pagecache"),
                "demote, clean": functools.partial(move, "xip"),
            },
        )
    context.comparisons.append(
        compare(
            f"{pages * _PAGE >> 20} MiB by one request on an idle mount",
            samples,
            metric="ns_per_page",
            baseline=baseline,
            command="write and read .xipfs/control",
        )
    )


def singly(context: Context, image: Path, name: str, count: int) -> None:
    """Move one page a request, with and without an observer; beside the least that it can take."""
    singly = functools.partial(_singly, context, image, name, count)
    candidates: dict[str, Callable[[int], Sample]] = {}
    for brief in ("", BRIEF):
        candidates |= {
            f"{ALONE}{brief}": functools.partial(_alone, context, count, bool(brief)),
            f"observe=off{brief}": functools.partial(singly, "off", False, bool(brief)),
            f"observe=tracefs{brief}": functools.partial(singly, "tracefs", False, bool(brief)),
        }
    candidates["tracefs, page mapped"] = functools.partial(singly, "tracefs", True, False)
    context.comparisons.append(
        compare(
            f"{count} requests of one page on an idle mount, from request to reply; {ALONE}: a "
            "filesystem that only invalidates and answers; brief: the write is the reply",
            context.alternate("one page a request", candidates),
            metric="median_us",
            baseline=ALONE,
            command="write and read .xipfs/control",
            also=("p99_us", "bare_round_trip_us"),
        )
    )


def _singly(
    context: Context,
    image: Path,
    name: str,
    count: int,
    observe: str,
    mapped: bool,
    brief: bool,
    _seed: int,
) -> Sample:
    with _controlled(context, image, observe) as (mounted, control):
        path = mounted.directory / name
        control.migrate(path.stat().st_ino, "xip")  # what was measured before may have left it so
        with contextlib.ExitStack() as stack:
            touch: Callable[[int], object] = _no_touch
            if mapped:
                file = stack.enter_context(open(path, "rb"))
                mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
                stack.enter_context(mapping)
                touch = functools.partial(_touch, mapping)
            return _one_by_one(mounted.directory / CONTROL, control, path, count, touch, brief)


def _alone(context: Context, count: int, brief: bool, _seed: int) -> Sample:
    with mounts.bare(context) as mounted:
        path = mounted.directory / "control"
        control = Control(path)
        try:
            return _one_by_one(path, control, mounted.directory / "file", count, _no_touch, brief)
        finally:
            control.close()


def _no_touch(_page: int) -> None:
    """Leave the page as it is: in no page cache."""


def _touch(mapping: mmap.mmap, page: int) -> int:
    return mapping[page * _PAGE]


def _one_by_one(
    control_path: Path,
    control: Control,
    path: Path,
    count: int,
    touch: Callable[[int], object],
    brief: bool,
) -> Sample:
    """Promote and demote one page after the other, each touched before."""
    took_us = []
    request = {"op": "migrate", "ino": path.stat().st_ino} | ({"brief": True} if brief else {})
    bare_us = _round_trip_us(control_path, count)
    for number in range(count):
        request |= {"to": "xip" if number % 2 else "pagecache", "ranges": [[number // 2, 1]]}
        # What it takes to make a request and to understand the answer is the client's.
        data = json.dumps(request).encode()
        touch(number // 2)
        start_ns = time.perf_counter_ns()
        answer = control.ask(data)
        took_us.append((time.perf_counter_ns() - start_ns) / 1000)
        assert brief or json.loads(answer)["result"]["moved"] == 1, (number, answer)
    took_us.sort()
    return {
        "median_us": statistics.median(took_us),
        "p99_us": took_us[len(took_us) * 99 // 100],
        "bare_round_trip_us": bare_us,
    }


def _round_trip_us(path: Path, count: int) -> float:
    """Return the median time of a request to the daemon that does nothing."""
    fd = os.open(path, os.O_RDWR)
    took_us = []
    for _ in range(count):
        start_ns = time.perf_counter_ns()
        os.read(fd, 1)
        took_us.append((time.perf_counter_ns() - start_ns) / 1000)
    os.close(fd)
    return statistics.median(took_us)


def readers(context: Context, image: Path, moved: str, other: str) -> None:
    """Read a file, cold, while another one moves to and fro, and while nothing moves."""
    seconds = 0.3 if context.quick else 2.0
    with mounts.xipfs(context, image, 0, ["observe=off", "ram=512M"]) as mounted:
        candidates = {
            name: functools.partial(_read, mounted.directory, moved, other, seconds, moving)
            for name, moving in (("nothing moves", False), ("a bulk move", True))
        }
        samples = context.alternate("readers", candidates)
    context.comparisons.append(
        compare(
            "random 4 KiB reads of another file, none of them cached",
            samples,
            metric="ns_per_read",
            baseline="nothing moves",
            command="pread after POSIX_FADV_DONTNEED",
            also=("moved_pages_per_s",),
        )
    )


def _read(
    directory: Path, moved: str, other: str, seconds: float, moving: bool, seed: int
) -> Sample:
    chance = random.Random(seed)
    ours, theirs = multiprocessing.Pipe()
    mover = multiprocessing.Process(target=_move_to_and_fro, args=(directory, moved, theirs))
    fd = os.open(directory / other, os.O_RDONLY)
    try:
        offsets = range(0, os.fstat(fd).st_size, _PAGE)
        if moving:
            mover.start()
            ours.recv()
        reads = 0
        start_ns = time.perf_counter_ns()
        end_ns = start_ns + int(seconds * 1e9)
        while time.perf_counter_ns() < end_ns:
            offset = chance.choice(offsets)
            os.posix_fadvise(fd, offset, _PAGE, os.POSIX_FADV_DONTNEED)
            assert len(os.pread(fd, _PAGE, offset)) == _PAGE
            reads += 1
        took_ns = time.perf_counter_ns() - start_ns
        figures = {"ns_per_read": took_ns / reads}
        if moving:
            ours.send("stop")
            figures["moved_pages_per_s"] = ours.recv()
        return figures
    finally:
        os.close(fd)
        if mover.pid is not None:
            mover.join(60)
            mover.kill()


def _move_to_and_fro(directory: Path, name: str, pipe: Connection) -> None:
    """Move a file until told to stop; tell how fast that went."""
    control = Control(directory / CONTROL)
    ino = (directory / name).stat().st_ino
    control.migrate(ino, "xip")
    pipe.send("begun")
    start_ns = time.perf_counter_ns()
    pages, to = 0, "xip"
    while not pipe.poll():
        to = "pagecache" if to == "xip" else "xip"
        pages += control.migrate(ino, to)
    pipe.send(pages * 1e9 / (time.perf_counter_ns() - start_ns))
    control.close()
