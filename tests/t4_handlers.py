"""Every request handler ends in an errno, whatever is raised inside it, and the mount goes on.

The daemon is xipfs as it is; a trace function of the interpreter, armed by a signal, raises
MemoryError as the first thing inside one handler's own code. Which handlers there are is read from
the class, so a new one cannot be forgotten here.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pyfuse3
import pytest
from conftest import needs
from live import ENVIRONMENT, PAGE, is_mounted, new_image, wait_until, xipfs
from media import new_medium, open_medium

from xipfs.errors import ImageError
from xipfs.fuse.names import RequestHooks
from xipfs.fuse.operations import Operations

pytestmark = [needs("root", "fuse")]

_DAEMON = """
import os, signal, sys
from pathlib import Path
from xipfs.cli import main
from xipfs.fuse import names, operations

order = Path(sys.argv.pop(1))
wanted = None

def trace(frame, event, argument):
    code = frame.f_code
    if code.co_name == wanted and code.co_filename in (names.__file__, operations.__file__):
        raise MemoryError("injected")  # and the interpreter takes the trace function away

def arm(number, frame):
    global wanted
    wanted = order.read_text()
    order.unlink()
    sys.settrace(trace if wanted else None)

signal.signal(signal.SIGUSR2, arm)
sys.exit(main(sys.argv[1:]))
"""


@dataclass
class Broken:
    """A mount whose daemon fails inside the handler that it is told to fail in."""

    directory: Path
    daemon: subprocess.Popen[bytes]
    order: Path
    log: Path

    def arm(self, handler: str) -> None:
        """Let the next call of ``handler`` fail; with the empty name none."""
        self.order.with_suffix(".new").write_text(handler)
        self.order.with_suffix(".new").rename(self.order)
        os.kill(self.daemon.pid, signal.SIGUSR2)
        wait_until("the daemon is armed", lambda: not self.order.exists())


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broken]:
    work = tmp_path_factory.mktemp("broken")
    script, directory, log = work / "daemon.py", work / "mnt", work / "log"
    script.write_text(_DAEMON)
    directory.mkdir()
    words = ["mount", "-f", "-o", "observe=off", str(new_image(work / "image")), str(directory)]
    with open(log, "wb") as log_file:
        daemon = subprocess.Popen(
            [sys.executable, str(script), str(work / "order"), *words],
            env=ENVIRONMENT,
            stderr=log_file,
        )
    try:
        wait_until("the mount", lambda: b"mounted at" in log.read_bytes())
        yield Broken(directory, daemon, work / "order", log)
        xipfs("umount", directory)
        assert daemon.wait(timeout=20) == 0
    finally:
        if daemon.poll() is None:
            daemon.kill()
            daemon.wait()
        if is_mounted(directory):
            subprocess.run(["umount", "-l", str(directory)], check=True)


def handlers() -> list[str]:
    """Return the names of all handlers that xipfs has."""
    return sorted(
        name
        for name, method in inspect.getmembers(Operations, inspect.isroutine)
        if not name.startswith("_") and inspect.unwrap(method).__module__.startswith("xipfs.")
    )


@contextlib.contextmanager
def opened(path: Path | str, flags: int = os.O_RDWR) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _in_open_file(call: Callable[[int], object]) -> Callable[[Callable[[], None]], object]:
    def trigger(arm: Callable[[], None]) -> object:
        with opened("file") as descriptor:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            arm()
            return call(descriptor)

    return trigger


def _closing(arm: Callable[[], None]) -> None:
    descriptor = os.open("file", os.O_RDWR)
    arm()
    os.close(descriptor)


def _read_past_the_cache(arm: Callable[[], None]) -> None:
    # A failed READ of the page cache's would be tried again, and succeed.
    with opened("file", os.O_RDONLY | os.O_DIRECT) as descriptor, mmap.mmap(-1, PAGE) as buffer:
        arm()
        os.preadv(descriptor, [buffer], 0)


def _stat_after_write(arm: Callable[[], None]) -> None:
    Path("file").write_bytes(b"changed")
    arm()
    os.stat("file")


def _fsync_directory(arm: Callable[[], None]) -> None:
    with opened(".", os.O_RDONLY) as descriptor:
        arm()
        os.fsync(descriptor)


def _armed(call: Callable[..., object], *arguments: object) -> Callable[..., object]:
    def trigger(arm: Callable[[], None]) -> object:
        arm()
        return call(*arguments)

    return trigger


#: How to have the kernel send each request; called in the mount's root.
TRIGGERS: dict[str, Callable[[Callable[[], None]], object]] = {
    "create": _armed(lambda: os.close(os.open("created", os.O_CREAT | os.O_RDWR))),
    "flush": _closing,
    "forget": _armed(os.unlink, "forgotten"),
    "fsync": _in_open_file(os.fsync),
    "fsyncdir": _fsync_directory,
    "getattr": _stat_after_write,
    "getxattr": _armed(os.getxattr, "file", "user.x"),
    "link": _armed(os.link, "file", "linked"),
    "listxattr": _armed(os.listxattr, "file"),
    "lookup": _armed(os.stat, "unknown"),
    "mkdir": _armed(os.mkdir, "made"),
    "mknod": _armed(os.mkfifo, "fifo"),
    "open": _armed(lambda: os.close(os.open("file", os.O_RDWR))),
    "opendir": _armed(os.listdir, "dir"),
    "read": _read_past_the_cache,
    "readdir": _armed(os.listdir, "dir"),
    "readlink": _armed(os.readlink, "link"),
    "release": _closing,
    "releasedir": _armed(os.listdir, "dir"),
    "removexattr": _armed(os.removexattr, "file", "user.x"),
    "rename": _armed(os.rename, "file", "renamed"),
    "rmdir": _armed(os.rmdir, "dir"),
    "setattr": _armed(os.chmod, "file", 0o600),
    "setxattr": _armed(os.setxattr, "file", "user.y", b"1"),
    "statfs": _armed(os.statvfs, "."),
    "symlink": _armed(os.symlink, "x", "symlinked"),
    "unlink": _armed(os.unlink, "file"),
    "write": _in_open_file(lambda descriptor: os.write(descriptor, b"x")),
}
#: Requests whose answer no program ever sees.
UNSEEN = ("forget", "release", "releasedir")


def test_there_is_a_trigger_for_every_handler() -> None:
    assert sorted(TRIGGERS) == handlers()


@pytest.mark.expects_log
async def test_a_failure_while_damage_is_told_is_eio_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the dirty pages that go home then one cannot; nothing is changed any more all the same."""
    fs = open_medium(new_medium(64))

    def fail(*_args: object) -> None:
        raise MemoryError("injected")

    def damaged(*_args: object) -> None:
        raise ImageError("a structure at offset 7 is damaged")

    monkeypatch.setattr(fs, "statfs", damaged)
    monkeypatch.setattr(fs._core.cache, "sync_all", fail)
    operations = Operations(fs, cast(RequestHooks, None))
    with pytest.raises(pyfuse3.FUSEError) as raised:
        await operations.statfs(cast(pyfuse3.RequestContext, None))
    assert raised.value.errno == errno.EIO
    assert (fs.read_only, fs.damage) == (True, "a structure at offset 7 is damaged")


@pytest.mark.parametrize("handler", handlers())
def test_an_exception_in_a_handler_is_eio_and_a_log_line(broken: Broken, handler: str) -> None:
    before, home = broken.log.read_text(), os.getcwd()
    os.chdir(broken.directory)
    try:
        Path("file").write_bytes(b"fine")
        Path("forgotten").touch()
        os.setxattr("file", "user.x", b"1")
        os.makedirs("dir", exist_ok=True)
        if not os.path.islink("link"):
            os.symlink("file", "link")

        def arm() -> None:
            broken.arm(handler)

        if handler in UNSEEN:
            TRIGGERS[handler](arm)
        else:
            with pytest.raises(OSError, match="Input/output") as raised:
                TRIGGERS[handler](arm)
            assert raised.value.errno == errno.EIO
        line = f"ERROR {handler} failed; answering EIO"
        wait_until(f"'{line}' in the log", lambda: line in broken.log.read_text())
        said = broken.log.read_text().removeprefix(before)
        assert said.count("MemoryError: injected") == 1
        broken.arm("")

        if handler not in ("lookup", "forget"):  # these two find nothing more to do
            TRIGGERS[handler](lambda: None)
        Path("after").write_bytes(b"works")
        assert Path("after").read_bytes() == b"works"
        os.unlink("after")
    finally:
        os.chdir(home)
    assert broken.daemon.poll() is None
