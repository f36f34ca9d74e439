"""Direct I/O into a mapping of a file that migrates: its pages stay until it is over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import needs
from live import PAGE, LiveMount, Mounts, wait_until, xipfs

from xipfs.cli.client import request
from xipfs.trace.direct_io import pages_in_flight

pytestmark = [needs("root", "fuse")]

#: Maps pages 3 and 4 of FILE shared and reads two pages of SOURCE, past the page cache, into them.
#: With "fork" a child does, and its parent waits.
READER = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
view = memoryview(mmap.mmap(fd, 2 * 4096, offset=3 * 4096))
how = sys.argv[3]
if how == "fork" and os.fork():
    os.wait()
    os._exit(0)
source = os.open(sys.argv[2], os.O_RDONLY | os.O_DIRECT)
print("ready", flush=True)
sys.stdin.readline()
assert (os.readv(source, [view]) if how == "plain" else os.preadv(source, [view], 0)) == 8192
os.close(source)
print("done", flush=True)
sys.stdin.readline()
plain = os.open(sys.argv[2], os.O_RDONLY)
assert bytes(view) == os.pread(plain, 8192, 0), "what was read is not in the mapping"
print("same", flush=True)
"""

#: Reads pages of SOURCE at random past the page cache into FILE's, mapped, and looks for their
#: bytes at once; for so many seconds.
HASTY = """
import mmap, os, random, sys, time
fd, length = os.open(sys.argv[1], os.O_RDWR), 8 * 4096
view = memoryview(mmap.mmap(fd, length))
direct = os.open(sys.argv[2], os.O_RDONLY | os.O_DIRECT)
data = open(sys.argv[2], "rb").read()
lost = reads = 0
end_s = time.monotonic() + float(sys.argv[3])
print("ready", flush=True)
while time.monotonic() < end_s:
    at, to = random.randrange(len(data) // 4096) * 4096, random.randrange(8) * 4096
    assert os.preadv(direct, [view[to : to + 4096]], at) == 4096
    reads += 1
    lost += view[to : to + 4096] != data[at : at + 4096]
print(reads, lost, flush=True)
"""


class Reading:
    """A process that reads from a mount whose daemon is stopped, into a mapping of another."""

    def __init__(self, mount: LiveMount, stopped: LiveMount, how: str = "vector") -> None:
        self.stopped = stopped
        words = [str(mount / "file"), str(stopped / "source"), how]
        self.process = subprocess.Popen(
            [sys.executable, "-c", READER, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.expect("ready")
        os.kill(stopped.pid, signal.SIGSTOP)
        self.say()

    def say(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def expect(self, word: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{word}\n"

    def go_on(self) -> None:
        os.kill(self.stopped.pid, signal.SIGCONT)

    def close(self) -> None:
        self.go_on()
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def two(live: Mounts) -> tuple[LiveMount, LiveMount]:
    mount, source = live.mount(), live.mount()
    (mount / "file").write_bytes(b"before..." * 8 * PAGE)
    os.truncate(mount / "file", 8 * PAGE)
    (source / "source").write_bytes(os.urandom(2 * PAGE))
    return mount, source


def in_flight(mount: LiveMount, pid: int) -> set[int]:
    return pages_in_flight([pid], mount.mount.dev, os.stat(mount / "file").st_ino, heirs=True)


def test_pages_under_direct_io_are_refused_and_its_bytes_arrive(
    two: tuple[LiveMount, LiveMount],
) -> None:
    mount, source = two
    assert mount.migrate("file", "pagecache")["moved"] == 8
    reading = Reading(mount, source)
    try:
        wait_until("the read", lambda: in_flight(mount, reading.process.pid) == {3, 4})
        outcome = mount.migrate("file", "xip")
        assert (outcome["moved"], outcome["failed"]) == (6, {"direct_io": 2})
        assert outcome["failed_errno"] == {"direct_io": "EAGAIN"}
        assert mount.letters("file") == "XXXPPXXX"
        said = xipfs("migrate", mount / "file", "--to", "xip", check=False)
        assert (said.returncode, said.stdout.splitlines()[1:]) == (
            1,
            ["  refused: 2 direct_io (EAGAIN: Resource temporarily unavailable; tried 10 times)"],
        )
        stats = mount.cat_stats()
        assert stats["vmstat"]["pgmigrate_fail"] == 4
        assert stats["migration"]["fail_reasons"] == {"direct_io": 4}
        assert stats["migration"]["fail_errno"] == {"direct_io": "EAGAIN"}
        assert "refused: 4 direct_io (EAGAIN)" in xipfs("stat", mount.directory).stdout
        metrics = xipfs("stat", mount.directory, "--openmetrics").stdout
        assert 'xipfs_migration_failed_total{why="direct_io",errno="EAGAIN"} 4' in metrics
        reading.go_on()
        reading.expect("done")
        assert in_flight(mount, reading.process.pid) == set()
        assert mount.migrate("file", "xip")["moved"] == 2
        reading.say()
        reading.expect("same")
        expected = (source / "source").read_bytes()
        assert (mount / "file").read_bytes()[3 * PAGE : 5 * PAGE] == expected
    finally:
        reading.close()


def test_a_read_that_ends_meanwhile_is_no_failure(two: tuple[LiveMount, LiveMount]) -> None:
    """The pages are tried again until it is over, as the kernel tries pinned ones."""
    mount, source = two
    ino = (mount / "file").stat().st_ino
    for attempt in range(20):
        to = "xip" if attempt % 2 else "pagecache"
        reading = Reading(mount, source, "plain")
        try:
            wait_until("the read", lambda: in_flight(mount, reading.process.pid) == {3, 4})  # noqa: B023
            moving = threading.Thread(
                target=lambda: list(request(mount.mount, "migrate", ino=ino, to=to))  # noqa: B023
            )
            moving.start()
            time.sleep(0.005 + 0.002 * attempt)  # the passes take 45 ms in all
            reading.go_on()
            moving.join(30)
            reading.expect("done")
            reading.say()
            reading.expect("same")
        finally:
            reading.close()
        answers = list(request(mount.mount, "events"))
        events = [answer["event"] for answer in answers if "event" in answer]
        if any(event["passes"] > 1 and not event["failed"] for event in events):
            return
    pytest.fail("no migration met the end of a read in 20 attempts")


def test_a_child_s_read_is_seen_without_the_kernel_s_events(
    two: tuple[LiveMount, LiveMount],
) -> None:
    mount, source = two
    reading = Reading(mount, source, "fork")
    try:
        wait_until("the read", lambda: in_flight(mount, reading.process.pid) == {3, 4})
        assert mount.migrate("file", "pagecache")["failed"] == {"direct_io": 2}
        reading.go_on()
        reading.expect("done")
        reading.say()
        reading.expect("same")
    finally:
        reading.close()


@pytest.mark.parametrize("observe", ["off", pytest.param("tracefs", marks=needs("tracefs"))])
def test_reads_of_a_fast_device_lose_no_byte(live: Mounts, tmp_path: Path, observe: str) -> None:
    """They begin and end thousands of times a second, so no look at threads finds them all."""
    source = tmp_path / "source"
    source.write_bytes(os.urandom(256 * PAGE))
    mount = live.mount(None, f"observe={observe}")
    (mount / "file").write_bytes(bytes(8 * PAGE))
    words = [sys.executable, "-c", HASTY, str(mount / "file"), str(source), "5"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        refused, turn = 0, 0
        ino = (mount / "file").stat().st_ino
        while reader.poll() is None:
            turn += 1
            to = "pagecache" if turn % 2 else "xip"
            for answer in request(mount.mount, "migrate", ino=ino, to=to):
                refused += answer.get("result", {"failed": {}})["failed"].get("direct_io", 0)
        reads, lost = map(int, reader.stdout.read().split())
    assert reads > 1000
    assert lost == 0
    assert refused > 0
