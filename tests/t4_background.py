"""Work that no request waits for: an exception in it ends no mount, is told, and it goes on.

The daemon is xipfs as it is; a function deep within one task is replaced, on a signal, by one that
raises so many times and then does what it did. Which tasks there are is read from the source.
"""

from __future__ import annotations

import ast
import errno
import mmap
import os
import random
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import needs
from live import PAGE, ROOT, LiveMount, is_mounted, new_image, wait_until, xipfs
from scripted import ScriptedMount

from xipfs.clock import SystemClock
from xipfs.fs.filesystem import Filesystem

pytestmark = [needs("root", "fuse", "tracefs")]

_SCRIPT = """
import functools, importlib, signal, sys
from pathlib import Path

order = Path(sys.argv[0]).with_suffix(".order")
restore = []

def arm(number, frame):
    while restore:
        setattr(*restore.pop())
    words = order.read_text().split()
    if words:
        place, name = words[0].rsplit(".", 1)
        module, _, owner = place.partition(":")
        target = importlib.import_module(module)
        target = getattr(target, owner) if owner else target
        original, left = getattr(target, name), [int(words[1])]

        @functools.wraps(original)
        def failing(*args, **kwargs):
            if left[0]:
                left[0] -= 1
                raise MemoryError("injected")
            order.with_suffix(".again").touch()
            return original(*args, **kwargs)

        restore.append((target, name, original))
        setattr(target, name, failing)
    order.unlink()

signal.signal(signal.SIGUSR2, arm)
"""
OPTIONS = (
    "observe=tracefs,ram=400K,hint=100,dirty_expire_ms=50,dirty_writeback_ms=20",
    "policy=fifo",
)
#: More than can fail while a test waits.
FOR_EVER = 1 << 30


class FailingMount(ScriptedMount):
    """A mount whose daemon fails where it is told to."""

    SCRIPT = _SCRIPT

    def arm(self, target: str, times: int) -> None:
        """Let ``target`` (module:Class.function) fail that often; "" makes all as it was."""
        self._again.unlink(missing_ok=True)
        self.obey(signal.SIGUSR2, f"{target} {times}" if target else "")

    @property
    def _again(self) -> Path:
        return self.directory.with_suffix(".again")

    def works_again(self) -> bool:
        """Whether the function was called after it had failed."""
        return self._again.exists()

    def failures(self) -> dict[str, int]:
        """Return the statistics' failures by task."""
        counts: dict[str, int] = self.cat_stats()["background"]["failures"]
        return counts


@pytest.fixture
def failing(tmp_path: Path) -> Iterator[FailingMount]:
    image = new_image(tmp_path / "image", pagecache=True)
    mount = FailingMount(image, tmp_path / "mnt", OPTIONS)
    mount.expected_log = [r"ERROR background task '[\w-]+' failed; the mount goes on"]
    try:
        yield mount
    finally:
        mount.close()


# How each task is made to run


def _nothing(_mount: LiveMount) -> None:
    """It runs by itself."""


def _write(mount: LiveMount) -> None:
    (mount / "written").write_bytes(b"dirty" * 10)


def _write_more_than_ram(mount: LiveMount) -> None:
    (mount / "large").write_bytes(bytes(200 * PAGE))


def _read_anew(mount: LiveMount) -> None:
    with open(mount / "cold", "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.read()


def _open_from_a_new_process(mount: LiveMount) -> None:
    """Until one opens before its fork's record is read: from that it would be known already."""

    def told() -> bool:
        subprocess.run(["cat", mount / "cold"], stdout=subprocess.DEVNULL, check=True)
        return "following" in mount.cat_stats()["background"]["failures"]

    wait_until("a process that was not known", told, 30)


def _fault_on_xip(mount: LiveMount) -> None:
    """The policy promotes what is touched."""
    descriptor = os.open(mount / "cold", os.O_RDONLY)
    with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as mapped:
        os.close(descriptor)
        assert mapped[0] == ord("c")
        # It has planned when the page has moved, or when that has failed.
        wait_until(
            "the policy",
            lambda: (
                "P" in mount.letters("cold")
                or mount.cat_stats()["background"]["failures"].get("policy")
            ),
        )
    xipfs("migrate", mount / "cold", "--to", "xip", check=False)


def _ask_to_unmount(mount: LiveMount) -> None:
    os.kill(mount.pid, signal.SIGTERM)


#: By task: what fails in it, and what makes it run.
TASKS: dict[str, tuple[str, Callable[[LiveMount], None]]] = {
    "observing": ("xipfs.stats.series:Series.add", _nothing),
    "audit": ("xipfs.fuse.verifying:Verifier._audit_next", _nothing),
    "evictions": ("xipfs.fuse.live:.runs", _write_more_than_ram),
    "write-back": ("xipfs.fs.pagecache:PageCache.write_back", _write),
    "hints": ("xipfs.fuse.hints:HintScanner._hint", _nothing),
    "policy": ("xipfs.fuse.migration:Migrator._begin", _fault_on_xip),
    "following": ("xipfs.trace.observer:Observer.add_pids", _open_from_a_new_process),
    "answers": ("xipfs.fuse.live:Live._note_answer", _read_anew),
    "signals": ("xipfs.daemon:.unmount", _ask_to_unmount),
}


def sources() -> Iterator[tuple[str, str]]:
    for path in [*(ROOT / "xipfs" / "fuse").glob("*.py"), ROOT / "xipfs" / "daemon.py"]:
        yield path.name, path.read_text()


def test_every_background_task_is_kept_and_tried_here() -> None:
    """No task is begun in another way; a new one must be in the table above."""
    named: set[str] = set()
    for name, text in sources():
        named |= set(re.findall(r'\bstart\((?:nursery, )?"([\w-]+)"', text))
        named |= set(re.findall(r'\b_?failed\("([\w-]+)"', text))
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        begun = [ast.unparse(call) for call in calls if ".start_soon" in ast.unparse(call.func)]
        # A conversation over the control file catches what its command raises.
        allowed = {
            "background.py": ["nursery.start_soon(self._keep, task, function, *arguments)"],
            "control.py": [
                "self._nursery.start_soon(self._take_others, answers)",
                "self._nursery.start_soon(self._stand_by)",  # turns of the loop, nothing else
            ],
            "live.py": ["token.run_sync_soon(self._answered, ino, offset, size, write)"],
        }
        assert begun == [each for each in allowed.get(name, []) if ".start_soon" in each], name
        soon = [ast.unparse(call) for call in calls if "run_sync_soon" in ast.unparse(call.func)]
        assert soon == [each for each in allowed.get(name, []) if "run_sync_soon" in each], name
    assert named == set(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_a_failure_is_told_and_ends_nothing(failing: FailingMount, task: str) -> None:
    target, run = TASKS[task]
    (failing / "cold").write_bytes(b"cold" * PAGE)
    assert failing.migrate("cold", "xip")
    failing.arm(target, 1)
    run(failing)
    wait_until("the failure is counted", lambda: failing.failures().get(task) == 1, 30)
    told = failing.cat_stats()["background"]
    assert told == {"failures": {task: 1}, "last_error": f"{task}: MemoryError('injected')"}
    line = f"ERROR background task '{task}' failed; the mount goes on"
    assert failing.log.read_text().count(line) == 1
    assert "MemoryError: injected" in failing.log.read_text()
    assert (
        f'xipfs_background_failures_total{{task="{task}"}} 1'
        in (failing / ".xipfs" / "metrics").read_text()
    )
    said = re.sub(r"\s+", " ", xipfs("stat", failing.directory).stdout)
    assert f"failed in the background (see the log): {task} 1 times; last {task}: " in said
    # The mount works, and so does the task.
    (failing / "after").write_bytes(b"works")
    assert (failing / "after").read_bytes() == b"works"
    if task != "signals":
        wait_until("the task works again", lambda: (run(failing), failing.works_again())[1], 30)
        assert failing.failures() == {task: 1}
    else:
        run(failing)
        wait_until("the mount's end", lambda: not failing.running(), 30)
        assert not is_mounted(failing.directory)


@pytest.mark.parametrize("how", ["flusher", "writer"])
def test_write_back_that_fails_keeps_the_bytes_and_fsync_tells(
    failing: FailingMount, how: str, tmp_path: Path
) -> None:
    """By the flusher, and by a writer that is throttled: 20 pages of 100 may be dirty."""
    noise = random.Random(6).randbytes(30 * PAGE if how == "writer" else 3 * PAGE)
    failing.expected_log.append("ERROR fsync failed; answering EIO")
    failing.arm("xipfs.fs.pagecache:PageCache.write_home", FOR_EVER)
    descriptor = os.open(failing / "file", os.O_RDWR | os.O_CREAT)
    try:
        assert os.write(descriptor, noise) == len(noise)
        with pytest.raises(OSError, match="Input/output") as raised:
            os.fsync(descriptor)
        assert raised.value.errno == errno.EIO
        wait_until("it is counted", lambda: failing.failures().get("write-back", 0) > 0, 30)
        assert failing.cat_stats()["writeback"]["nr_dirty"] == len(noise) // PAGE
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(descriptor, len(noise), 0) == noise
        with pytest.raises(OSError, match="Input/output"):
            os.fsync(descriptor)  # as long as it is not written home, every one says so
        failing.arm("", 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    assert failing.cat_stats()["writeback"]["nr_dirty"] == 0
    failing.kill()
    subprocess.run(["umount", "-l", str(failing.directory)], check=True)
    fs = Filesystem.open(failing.image, ram_bytes=1 << 20, clock=SystemClock())
    assert bytes(fs.read(fs.lookup(1, b"file").ino, 0, len(noise))) == noise
    fs.close()
