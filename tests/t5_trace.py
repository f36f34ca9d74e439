"""The observer against the kernel's own count: real faults of real programs on a real mount.

The mount's own observer is off; the test has one of its own. ``tools/touch.c`` touches what its
words say, after a pause in which the observer takes it in, and prints getrusage's minor and major
faults of each stretch. Files have a prime number of pages, so one lost or doubled fault shows.
"""

from __future__ import annotations

import mmap
import os
import re
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import needs
from live import INSTANCES, PAGE, LiveMount, Mounts, wait_until

from xipfs.trace.events import Around, Event, Exit, Fault, Fork, Lost, Map, Move, Unmap, Zap
from xipfs.trace.fault_batch import expanded
from xipfs.trace.observer import Observer
from xipfs.trace.session import Instance

pytestmark = [needs("root", "fuse", "tracefs")]

N = 61


@pytest.fixture(scope="module")
def mount(shared: Mounts) -> LiveMount:
    """A mount without read-ahead: each cold page is one fault."""
    return shared.mount(shared.image(size_bytes=64 << 20), "readahead=off")


@pytest.fixture
def observer(mount: LiveMount) -> Iterator[Observer]:
    watching = Observer.start(os.stat(mount.directory).st_dev)
    try:
        watching.wait_until_compiled()
        yield watching
        seen = watching.statistics()
        assert seen.lost == 0
        assert seen.unfollowed == {}
        assert seen.missing == {}
    finally:
        watching.close()
        left = [path.name for path in INSTANCES.glob(f"xipfs-{os.getpid()}-*")]
        assert left == [], "tracefs instances left"


@pytest.fixture
def file(mount: LiveMount, request: pytest.FixtureRequest) -> Path:
    """A file of N pages that nobody has touched: what the write left cached is dropped."""
    path = mount / re.sub(r"\W", "_", request.node.name)
    path.write_bytes(b"".join(bytes([page]) * PAGE for page in range(N)))
    drop(path)
    return path


def drop(path: Path) -> None:
    """Drop the kernel's cached pages of the file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


class Run:
    """What the observer and the kernel said about one run of touch."""

    def __init__(self, observer: Observer, touch: Path, words: str, status: int = 0) -> None:
        with subprocess.Popen(
            [str(touch), "pause", *words.split()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            try:
                assert process.stdout.readline() == "paused\n"
                observer.add_pids([process.pid])
                observer.drain()  # what came before is no concern of this run
                output, _ = process.communicate("\n", timeout=60)
            except BaseException:
                process.kill()
                raise
        assert process.returncode == status
        self.pid = process.pid
        self.events: list[Event] = list(expanded(observer.drain()))
        self.faults = [event for event in self.events if isinstance(event, Fault)]
        self.marks = {
            name: (int(minor), int(major))
            for name, minor, major in re.findall(r"(\w+) minflt=(\d+) majflt=(\d+)", output)
        }
        assert not any(isinstance(event, Lost) for event in self.events)

    def indexes(self, pid: int | None = None) -> list[int]:
        return [fault.index for fault in self.faults if pid in (None, fault.pid)]

    def verdicts(self) -> Counter[str]:
        return Counter(fault.verdict for fault in self.faults)

    def of(self, kind: type) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]


def test_cold_reads_are_counted_exactly(observer: Observer, touch: Path, file: Path) -> None:
    run = Run(observer, touch, f"map {file} private r mark start read 0-{N - 1} mark read")
    assert run.indexes() == list(range(N))
    assert run.verdicts() == {"major": N}
    assert run.marks["read"][1] == N
    assert all(fault.ino == file.stat().st_ino and fault.user for fault in run.faults)
    (told,) = run.of(Map)
    assert isinstance(told, Map)
    assert (told.end - told.start, told.pgoff, told.prot, told.shared) == (N * PAGE, 0, 1, False)
    assert len(run.of(Exit)) == 1


def test_warm_reads_come_with_their_neighbours(observer: Observer, touch: Path, file: Path) -> None:
    file.read_bytes()
    run = Run(observer, touch, f"map {file} private r mark start read 0-{N - 1} mark read")
    minor, major = run.marks["read"]
    assert major == 0
    assert run.verdicts() == {"minor": len(run.faults)}
    # All that getrusage counted, less what touch's own memory needed: none, or a page or two.
    assert len(run.faults) <= minor <= len(run.faults) + 2
    assert 4 <= len(run.faults) <= 5  # windows of 16 pages, aligned by address
    mapped: set[int] = set()
    for around in run.of(Around):
        assert isinstance(around, Around)
        mapped |= set(range(around.first, around.last + 1))
    assert mapped == set(range(N))


def test_private_writes(observer: Observer, touch: Path, file: Path) -> None:
    words = f"map {file} private rw write 0-30 read 31-60 write 31-60 mark all"
    run = Run(observer, touch, words)
    assert run.indexes() == [*range(31), *range(31, 61), *range(31, 61)]
    firsts, reads, copies = run.faults[:31], run.faults[31:61], run.faults[61:]
    assert all(f.write and not f.protection and f.verdict == "major" for f in firsts)
    assert all(not f.write and f.verdict == "major" for f in reads)
    assert all(f.write and f.protection and f.verdict == "minor" for f in copies)


def test_shared_writes(observer: Observer, touch: Path, file: Path) -> None:
    run = Run(observer, touch, f"map {file} shared rw read 0-30 write 0-30 write 31-60")
    assert run.indexes() == [*range(31), *range(31), *range(31, 61)]
    assert [f.protection for f in run.faults] == [False] * 31 + [True] * 31 + [False] * 30
    (told,) = run.of(Map)
    assert isinstance(told, Map)
    assert told.shared


def test_fork(observer: Observer, touch: Path, file: Path) -> None:
    words = f"map {file} private rw write 0-6 fork {{ write 0-2 read 20-22 }} write 0-6"
    run = Run(observer, touch, words)
    (fork,) = run.of(Fork)
    assert isinstance(fork, Fork)
    child = [f for f in run.faults if f.pid == fork.child_pid]
    assert [f.index for f in child] == [0, 1, 2, 20, 21, 22]
    assert {f.mm for f in child} == {fork.child_mm}
    # The child copied 0 to 2 and is gone: whether the parent copies or keeps, it faults on each.
    assert run.indexes(run.pid) == [*range(7), *range(7)]
    assert len(run.of(Exit)) == 2


def test_unmap_move_and_drop(observer: Observer, touch: Path, file: Path) -> None:
    words = (
        f"map {file} private r read 0-9 unmap 3-4 advise 0-1 dontneed read 0-1"
        f" part {file} private r 20 10 read 0-9 remap 30 read 0-29"
    )
    run = Run(observer, touch, words)
    assert run.indexes()[:10] == list(range(10))
    (unmap,) = run.of(Unmap)
    (zap,) = run.of(Zap)
    (move,) = run.of(Move)
    assert isinstance(unmap, Unmap)
    assert isinstance(zap, Zap)
    assert isinstance(move, Move)
    assert unmap.end - unmap.start == zap.end - zap.start == 2 * PAGE
    assert (move.end - move.start, move.new_end - move.new_start) == (10 * PAGE, 30 * PAGE)
    # Fault-around maps cached neighbours again; the rest of the moved mapping was never read.
    after = run.indexes()[10:]
    assert after[0] == 0
    assert after[-20:] == list(range(30, 50))
    assert all(f.verdict == "major" for f in run.faults[-20:])


def test_threads(observer: Observer, touch: Path, file: Path) -> None:
    words = (
        f"map {file} private r thread {{ read 0-29 mark a }} thread {{ read 30-60 mark b }} join"
    )
    run = Run(observer, touch, words)
    assert sorted(run.indexes()) == list(range(N))
    assert {f.mm for f in run.faults} == {run.faults[0].mm}
    by_thread = Counter(f.tid for f in run.faults)
    assert sorted(by_thread.values()) == [30, 31]
    assert run.pid not in by_thread
    assert run.marks["a"][1] + run.marks["b"][1] == N


def test_exec_from_the_mount(observer: Observer, touch: Path, mount: LiveMount) -> None:
    program = mount / "program"
    shutil.copy(touch, program)
    program.chmod(0o755)
    drop(program)
    ino = program.stat().st_ino
    first = Run(observer, touch, f"exec {program}")
    text = [f for f in first.faults if f.ino == ino]
    assert any(f.execute for f in text)
    assert any(f.verdict == "major" for f in text)
    assert all(f.pid != first.pid for f in text)
    maps = [m for m in first.of(Map) if isinstance(m, Map) and m.ino == ino]
    assert len(maps) >= 2  # text, and at least one of data
    again = Run(observer, touch, f"exec {program}")
    assert not any(f.verdict == "major" for f in again.faults)


def test_two_hundred_short_lives(observer: Observer, touch: Path, mount: LiveMount) -> None:
    """Each is gone before anybody could have read its /proc/PID/maps."""
    program = mount / "short"
    shutil.copy(touch, program)
    program.chmod(0o755)
    Run(observer, touch, f"exec {program}")
    run = Run(observer, touch, f"exec {program} " * 200)
    lives = Counter(f.pid for f in run.faults)
    assert len(lives) == 200
    assert len(run.of(Exit)) == 200
    # The same program does the same each time: its own faults differ only by window and address.
    assert max(lives.values()) - min(lives.values()) <= 8


def test_populate_and_lock(observer: Observer, touch: Path, file: Path) -> None:
    run = Run(observer, touch, f"map {file} shared r populate part {file} private r 0 7 lock 0-6")
    assert {f.origin for f in run.faults} == {"populate"}
    assert set(run.indexes()) >= {0}
    assert len({f.mm for f in run.faults}) == 1


def test_who_is_followed_is_known_without_asking_the_kernel(
    observer: Observer, touch: Path, file: Path
) -> None:
    words = f"pause map {file} private r read 0 fork {{ read 1 pause }} pause"
    with subprocess.Popen([str(touch), *words.split()], stdin=-1, stdout=-1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"paused\n"
            assert not observer.follows(process.pid)
            observer.add_pids([process.pid])
            observer.drain()
            assert observer.follows(process.pid)
            for _ in range(2):
                process.stdin.write(b"\n")
                process.stdin.flush()
                assert process.stdout.readline() == b"paused\n"
                faults = [e for e in expanded(observer.drain()) if isinstance(e, Fault)]
                assert all(observer.follows(fault.tid) for fault in faults)
            process.communicate(b"\n")
        finally:
            process.kill()
    observer.drain()
    assert not observer.follows(process.pid)


def test_past_the_end_is_sigbus(observer: Observer, touch: Path, file: Path) -> None:
    """Not even the kernel counts it in getrusage; the mapping is known by its first page."""
    run = Run(observer, touch, f"part {file} private r {N - 1} 3 read 0 read 2", status=-7)
    assert [(f.index, f.verdict) for f in run.faults] == [(N - 1, "major"), (N + 1, "sigbus")]


def test_a_program_that_nobody_announced(observer: Observer, touch: Path, file: Path) -> None:
    """As with a passed descriptor: seen by its page-cache records, then followed to its end."""
    words = f"pause map {file} shared rw read 0-20 pause write 0-30 pause"
    with subprocess.Popen(
        [str(touch), *words.split()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            seen: list[list[Event]] = []
            for _ in range(3):
                assert process.stdout.readline() == "paused\n"
                seen.append(list(expanded(observer.drain())))
                observer.add_pids([process.pid] if len(seen) > 1 else [])
                process.stdin.write("\n")
                process.stdin.flush()
            assert process.wait(timeout=30) == 0
        except BaseException:
            process.kill()
            raise
    seen.append(list(expanded(observer.drain())))
    before, after = (
        [event for event in events if isinstance(event, Fault)] for events in seen[1:3]
    )
    assert [(f.index, f.origin, f.verdict) for f in before] == [
        (index, "untraced", "major") for index in range(21)
    ]
    assert [(f.index, f.origin, f.protection) for f in after] == [
        (index, "trap", index < 21) for index in range(31)
    ]
    assert len([event for event in seen[3] if isinstance(event, Exit)]) == 1


def test_an_observer_is_quiet_until_something_happens(
    observer: Observer, touch: Path, file: Path
) -> None:
    def settled() -> bool:
        if not observer.quiet():
            observer.drain()
        return observer.quiet()

    Run(observer, touch, f"map {file} private r read 0-{N - 1}")
    wait_until("all of it is told", settled)
    assert observer.drain() == []
    drop(file)
    assert not observer.quiet(), "pages left the page cache"
    gone = observer.drain()
    assert gone
    wait_until("that is told as well", settled)
    with open(file, "rb") as held, mmap.mmap(held.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[5 * PAGE] == 5
    assert not observer.quiet(), "a page was read, by a process that nobody announced"


def test_an_instance_that_somebody_looks_at_is_removed_when_he_is_done() -> None:
    instance = Instance("G")
    reader = (instance.path / "trace_clock").open()
    closing = threading.Timer(0.2, reader.close)
    try:
        with pytest.raises(OSError, match="busy"):
            instance.path.rmdir()
        closing.start()
        instance.close()
    finally:
        closing.cancel()
        reader.close()
    assert not instance.path.exists()


def test_another_mount_s_faults_stay_out(
    observer: Observer, touch: Path, file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(N * PAGE))
    words = f"map {other} private rw read 0-60 write 0-60 map {file} private r read 0-2"
    run = Run(observer, touch, words)
    assert run.indexes() == [0, 1, 2]
