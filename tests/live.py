"""A real mount for a test: made through the command, watched from beside, and always ended.

A defect can leave a program inside a page fault that nobody answers; such a program cannot be
interrupted, and if it is pytest itself, no timeout of pytest's helps. So every mount has a watchdog
process of its own that aborts the mount's connection when the test takes too long: the fault then
ends in SIGBUS, the call in ENOTCONN.

SIGTERM interrupts as Ctrl-C does, so that a test run or a tool that is ended unmounts first.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xipfs.clock import SystemClock
from xipfs.fs.build import make_empty
from xipfs.fuse.mounts import Mount, mount_at, mounts, serving_pid
from xipfs.trace.session import clean_orphans

ROOT = Path(__file__).resolve().parents[1]
#: What is tested is this tree, also where another copy is installed.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "LC_ALL": "C.UTF-8"}
COMMAND = [sys.executable, "-m", "xipfs"]
INSTANCES = Path("/sys/kernel/tracing/instances")
PAGE = 4096
WATCHDOG_S = 100
_PR_SET_PDEATHSIG = 1
_LOG_LINE = re.compile(r"\S+ \S+ xipfs\[\d+\] INFO ")

Json = dict[str, Any]

if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def xipfs(
    *words: str | Path, check: bool = True, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run the command; with ``check`` a failure fails the test and shows what it said."""
    done = subprocess.run(
        [*COMMAND, *map(str, words)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check:
        assert done.returncode == 0, (words, done.returncode, done.stdout, done.stderr)
    return done


def new_image(path: Path, *, size_bytes: int = 16 << 20, pagecache: bool = False) -> Path:
    """Make an empty image."""
    clock = SystemClock()
    make_empty(path, size_bytes=size_bytes, label="test", pagecache=pagecache, clock=clock)
    return path


def wait_until(what: str, happened: Any, timeout_s: float = 10) -> None:
    """Poll ``happened()``; fail the test if it does not become true."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have this process get the signal when the thread that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def is_mounted(directory: Path) -> bool:
    return any(mount.mountpoint == directory for mount in mounts())


class LiveMount:
    """One mount of ``image`` at ``directory``; ``close`` ends it whatever state it is in."""

    def __init__(
        self,
        image: Path,
        directory: Path,
        options: Sequence[str] = (),
        watchdog_s: float = WATCHDOG_S,
    ) -> None:
        self.image = image
        self.directory = directory
        self.log = directory.with_name(directory.name + ".log")
        #: Patterns of log records above INFO that the test provokes.
        self.expected_log: list[str] = []
        self.killed = False
        directory.mkdir(exist_ok=True)
        words = [word for option in options for word in ("-o", option)]
        self._start(words)
        self.mount: Mount = mount_at(directory)
        pid = serving_pid(self.mount)
        assert pid is not None, "nobody serves the mount"
        self.pid: int = pid
        self._pidfd = os.pidfd_open(pid)
        # Opened now: the number may come to mean a later mount, the open file does not.
        abort_file = f"/sys/fs/fuse/connections/{self.mount.minor}/abort"
        self._abort_fd = os.open(abort_file, os.O_WRONLY | os.O_CLOEXEC)
        self._watchdog = subprocess.Popen(
            ["sh", "-c", f"sleep {watchdog_s}; echo 1"],
            stdout=self._abort_fd,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def _start(self, words: Sequence[str]) -> None:
        """Have the mount made; ``words`` are its options."""
        xipfs("mount", self.image, self.directory, "--log", self.log, *words)

    def __truediv__(self, name: str) -> Path:
        return self.directory / name

    # What a test asks

    def stats(self) -> Json:
        """Return ``xipfs stat --json``."""
        answer: Json = json.loads(xipfs("stat", "--json", self.directory).stdout)
        return answer

    def cat_stats(self) -> Json:
        """Return ``.xipfs/stats.json``; much faster than starting the command."""
        answer: Json = json.loads((self.directory / ".xipfs" / "stats.json").read_bytes())
        return answer

    def vmstat(self) -> dict[str, int]:
        """Return the model's counters."""
        counters: dict[str, int] = self.cat_stats()["vmstat"]
        return counters

    def pages(self, name: str) -> list[tuple[str, int, int, int | None, int | None]]:
        """Return (letter, first, count, refcount, mapcount) of the file's runs."""
        ino = (self.directory / name).stat().st_ino
        answer = json.loads((self.directory / ".xipfs" / f"pages.{ino}.json").read_bytes())
        return [
            (run["letter"], run["first"], run["count"], run["refcount"], run["mapcount"])
            for run in answer["runs"]
        ]

    def letters(self, name: str) -> str:
        """Return the file's map, one letter a page."""
        return "".join(letter * count for letter, _, count, _, _ in self.pages(name))

    def migrate(self, name: str, to: str, pages: str | None = None) -> Json:
        """Run ``xipfs migrate``; returns its outcome, refused pages included."""
        words = ["--pages", pages] if pages else []
        done = xipfs("migrate", self.directory / name, "--to", to, "--json", *words, check=False)
        assert done.stdout, done.stderr
        answer: Json = json.loads(done.stdout)
        return answer

    def whereabouts(self) -> str:
        """Return where each task and thread of the daemon is, as its log has it on SIGUSR1."""
        before = len(self.log.read_text())
        signal.pidfd_send_signal(self._pidfd, signal.SIGUSR1)
        # One write, so whatever is there is all of it.
        wait_until("the daemon's whereabouts", lambda: "SIGUSR1:" in self.log.read_text()[before:])
        return self.log.read_text()[before:]

    # The end

    def running(self) -> bool:
        """Return whether the daemon lives; one that nobody has reaped yet does not."""
        return not select.select([self._pidfd], [], [], 0)[0]

    def umount(self) -> None:
        """Unmount as a user does; the daemon must be gone when the command returns."""
        xipfs("umount", self.directory)
        assert not self.running(), "umount returned before the daemon ended"
        assert not is_mounted(self.directory)

    def kill(self) -> None:
        """End the daemon as a crash does; what it mounted stays, dead."""
        self.killed = True
        assert self.running(), f"the daemon had ended by itself:\n{self.log.read_text()}"
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        wait_until("the killed daemon's end", lambda: not self.running())

    def abort(self) -> None:
        """Fail every request that waits for the daemon."""
        with contextlib.suppress(OSError):
            os.write(self._abort_fd, b"1")

    def _force(self) -> None:
        """End a mount that does not end by itself."""
        self.abort()
        if self.running():
            self.kill()
        while is_mounted(self.directory):
            subprocess.run(["umount", "-l", str(self.directory)], check=True, timeout=20)

    def close(self) -> None:
        """End the mount; fail the test if it was stuck, left something or logged a surprise."""
        stuck = ""
        try:
            if is_mounted(self.directory):
                done = xipfs("umount", self.directory, check=False, timeout=30)
                stuck = done.stderr
        except subprocess.TimeoutExpired as error:
            stuck = str(error)
        finally:
            # Whoever cleans dead mounts up on this machine may have ended it just now.
            deadline = time.monotonic() + 10
            while not stuck and self.running() and time.monotonic() < deadline:
                time.sleep(0.02)
            outlived = self.running()
            cleans_up = not self.killed
            self._force()
            os.close(self._pidfd)
            os.close(self._abort_fd)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._watchdog.pid, signal.SIGKILL)
            self._watchdog.wait()
        left = [path.name for path in INSTANCES.glob(f"xipfs-{self.pid}-*")]
        clean_orphans()
        assert not stuck, f"the mount did not end by itself: {stuck}"
        assert not outlived, "the daemon outlived its mount"
        assert not (left and cleans_up), f"tracefs instances left: {left}"
        surprises = self.unexpected_log_lines()
        assert not surprises, "unexpected lines in the daemon's log:\n" + "\n".join(surprises)

    def unexpected_log_lines(self) -> list[str]:
        """Return the log's lines that are neither INFO nor, with their traceback, expected."""
        unexpected = []
        expected_record = False
        for line in self.log.read_text().splitlines():
            if re.match(r"\S+ \S+ xipfs\[\d+\] ", line):
                expected_record = bool(_LOG_LINE.match(line)) or any(
                    re.search(pattern, line) for pattern in self.expected_log
                )
            if not expected_record:
                unexpected.append(line)
        return unexpected


class Mounts:
    """Makes images and mounts below one directory and ends them all."""

    def __init__(self, directory: Path, watchdog_s: float = WATCHDOG_S) -> None:
        self.directory = directory
        self._watchdog_s = watchdog_s
        self._made: list[LiveMount] = []
        self._serial = 0

    def image(self, *, size_bytes: int = 16 << 20, pagecache: bool = False) -> Path:
        """Return a new, empty image."""
        self._serial += 1
        path = self.directory / f"{self._serial}.img"
        return new_image(path, size_bytes=size_bytes, pagecache=pagecache)

    def mount(self, image: Path | None = None, *options: str) -> LiveMount:
        """Mount ``image`` (default: a new one), faults not observed unless an option says so."""
        if not any(option.startswith("observe=") for option in options):
            options = (*options, "observe=off")
        self._serial += 1
        directory = self.directory / f"mnt{self._serial}"
        made = LiveMount(image or self.image(), directory, options, self._watchdog_s)
        self._made.append(made)
        return made

    def remount(self, mount: LiveMount, *options: str) -> LiveMount:
        """Unmount and mount again: nothing that only memory held can survive."""
        mount.umount()
        return self.mount(mount.image, *options)

    def close(self) -> None:
        """End every mount, each also when another one fails."""
        errors: list[BaseException] = []
        while self._made:
            try:
                self._made.pop().close()
            except (AssertionError, OSError, subprocess.SubprocessError) as error:
                errors.append(error)
        if errors:
            raise errors[0]


@contextlib.contextmanager
def mounts_below(directory: Path, watchdog_s: float = WATCHDOG_S) -> Iterator[Mounts]:
    """Yield a maker of mounts and end them all; each is aborted after ``watchdog_s``."""
    made = Mounts(directory, watchdog_s)
    try:
        yield made
    finally:
        made.close()
