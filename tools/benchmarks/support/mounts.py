"""The filesystems that are compared, each served by a process that ends with its ``with`` block.

Both daemons run in the foreground as children of this process, so they can be waited for and
their processor time read. A mount that does not end when asked is ended by aborting its FUSE
connection: a benchmark must not leave a dead directory behind.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.support.context import Context
from benchmarks.support.system import BenchError, cpu_seconds, run

_PATIENCE_S = 60.0
#: Nobody works who took less than a tenth of this from the processor, for so long.
_IDLE_S = 0.2
#: VM_READAHEAD_PAGES of the kernel, in KiB: what a mount has that nobody configures.
DEFAULT_READAHEAD_KIB = 128


@dataclass(frozen=True)
class Mounted:
    """A filesystem that is mounted now: where, and the pid that serves it."""

    directory: Path
    pid: int

    def xipfs_stats(self) -> dict[str, Any]:
        """Return an xipfs mount's statistics; every fault up to now is in them."""
        stats: dict[str, Any] = json.loads((self.directory / ".xipfs/stats.json").read_bytes())
        return stats


@contextlib.contextmanager
def bindfs(context: Context, source: Path, readahead_kib: int) -> Iterator[Mounted]:
    """Mount ``source`` through bindfs."""
    directory = _mount_point(context, "bindfs")
    command = ["bindfs", "-f", "--no-allow-other", str(source), str(directory)]
    with _serving(context, command, directory) as mounted:
        _bdi_path(directory).write_text(str(readahead_kib))
        _check_readahead(directory, readahead_kib)
        yield mounted


@contextlib.contextmanager
def xipfs(
    context: Context, image: Path, readahead_kib: int, options: Sequence[str]
) -> Iterator[Mounted]:
    """Mount ``image`` with ``options`` besides the read-ahead."""
    directory = _mount_point(context, "xipfs")
    words = ",".join([*options, f"readahead={readahead_kib}"])
    command = [
        sys.executable,
        "-m",
        "xipfs",
        "mount",
        "-f",
        "-o",
        words,
        str(image),
        str(directory),
    ]
    with _serving(context, command, directory) as mounted:
        try:
            mounted.xipfs_stats()
        except OSError as error:
            raise BenchError(f"{directory} does not answer: {error}; {_log(directory)}") from None
        _wait_until_idle(mounted.pid)
        _check_readahead(directory, readahead_kib)
        yield mounted


@contextlib.contextmanager
def bare(context: Context) -> Iterator[Mounted]:
    """Mount support/bare_filesystem.py."""
    directory = _mount_point(context, "bare")
    program = str(Path(__file__).with_name("bare_filesystem.py"))
    with _serving(context, [sys.executable, program, str(directory)], directory) as mounted:
        yield mounted


def _mount_point(context: Context, name: str) -> Path:
    directory = context.work / f"mnt-{name}"
    directory.mkdir(exist_ok=True)
    return directory


@contextlib.contextmanager
def _serving(context: Context, command: Sequence[str], directory: Path) -> Iterator[Mounted]:
    """Run a daemon in the foreground, wait for its mount, and end both after the block."""
    daemon = None
    try:
        with context.interrupts.deferred(), open(directory.with_suffix(".log"), "ab") as log:
            daemon = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # The terminal's interrupt is for us; the daemon ends by its unmount.
                start_new_session=True,
            )
        _wait_for_mount(daemon, directory)
        yield Mounted(directory, daemon.pid)
    finally:
        with context.interrupts.deferred():
            if daemon is not None:
                _end(daemon, directory)


def _wait_for_mount(daemon: subprocess.Popen[bytes], directory: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while device_of(directory) is None:
        if daemon.poll() is not None:
            raise BenchError(f"{daemon.args!r} ended with {daemon.returncode}; {_log(directory)}")
        if time.monotonic() > deadline:
            raise BenchError(f"{daemon.args!r} has mounted nothing within {_PATIENCE_S:g} s")
        time.sleep(0.01)


def _wait_until_idle(pid: int) -> None:
    """Return when a daemon has loaded its compiled code, which takes it half a second."""
    deadline = time.monotonic() + _PATIENCE_S
    before_s, spent_s = cpu_seconds(pid), _IDLE_S
    while spent_s > _IDLE_S / 10:
        if time.monotonic() > deadline:
            raise BenchError(f"the daemon (pid {pid}) is still at work after {_PATIENCE_S:g} s")
        time.sleep(_IDLE_S)
        now_s = cpu_seconds(pid)
        before_s, spent_s = now_s, now_s - before_s


def _log(directory: Path) -> str:
    return directory.with_suffix(".log").read_text(errors="replace").strip()[-500:] or "no log"


def _end(daemon: subprocess.Popen[bytes], directory: Path) -> None:
    """Unmount and wait; by force if it does not end by itself."""
    device, said = device_of(directory), ""
    if device is None:
        daemon.terminate()
    else:
        # Programs are gone when we come here; umount waits until what they wrote is sent.
        unmounting = subprocess.run(
            ["umount", str(directory)], capture_output=True, text=True, check=False
        )
        said = unmounting.stderr.strip()
    try:
        daemon.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        if device is not None:
            with contextlib.suppress(OSError):
                minor = device.partition(":")[2]
                Path(f"/sys/fs/fuse/connections/{minor}/abort").write_text("1")
        daemon.kill()
        daemon.wait()
        raise BenchError(
            f"{daemon.args!r} did not end within {_PATIENCE_S:g} s; its mount was aborted; {said}"
        ) from None
    finally:
        # A daemon that was ended while it mounted, or by force, leaves the mount to us.
        if device_of(directory) is not None:
            subprocess.run(["umount", "-l", str(directory)], capture_output=True, check=False)


def device_of(directory: Path) -> str | None:
    """Return MAJOR:MINOR of what is mounted at ``directory``, None if nothing is.

    Read from mountinfo: a stat would ask the filesystem, which may not answer.
    """
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        if fields[4] == str(directory):
            return fields[2]
    return None


def _bdi_path(directory: Path) -> Path:
    return Path(f"/sys/class/bdi/{device_of(directory)}/read_ahead_kb")


def _check_readahead(directory: Path, expected_kib: int) -> None:
    found = int(_bdi_path(directory).read_text())
    if found != expected_kib:
        raise BenchError(f"{directory} has {found} KiB of read-ahead, expected {expected_kib}")


def migrate(path: Path, kind: str) -> None:
    """Make every page of ``path`` on an xipfs mount one kind: xip or pagecache."""
    run([sys.executable, "-m", "xipfs", "migrate", path, "--to", kind])
