"""Making, sharing and ending mounts: locks, options, signals, crashes, observers."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from acting import libc
from conftest import needs
from live import (
    COMMAND,
    ENVIRONMENT,
    INSTANCES,
    PAGE,
    LiveMount,
    Mounts,
    is_mounted,
    wait_until,
    xipfs,
)

from xipfs.fuse.mounts import mount_at, serving_pid, unmount

pytestmark = [needs("root", "fuse")]


def digest(image: Path) -> str:
    return hashlib.sha256(image.read_bytes()).hexdigest()


def filled(live: Mounts) -> Path:
    """An unmounted image with a file of 100,000 bytes."""
    mount = live.mount()
    (mount / "file").write_bytes(bytes(range(250)) * 400)
    mount.umount()
    return mount.image


def test_it_is_mounted_as_fuse_xipfs_with_the_image_as_source(live: Mounts) -> None:
    mount = live.mount()
    assert mount.mount.fstype == "fuse.xipfs"
    assert mount.mount.source == str(mount.image)
    figures = os.statvfs(mount.directory)
    assert (figures.f_bsize, figures.f_namemax) == (4096, 255)
    assert 4000 < figures.f_bfree <= figures.f_blocks <= 4096


# Locks


def test_a_second_writer_is_refused_with_the_holders_pid(live: Mounts) -> None:
    mount = live.mount()
    other = live.directory / "other"
    other.mkdir()
    for options in ([], ["-o", "ro"]):
        refused = xipfs(
            "mount", mount.image, other, "--log", other.with_suffix(".l"), *options, check=False
        )
        assert refused.returncode == 1
        assert f"in use by the process with pid {mount.pid}" in refused.stderr
        assert not is_mounted(other)
    (mount / "still").write_bytes(b"works")
    assert (mount / "still").read_bytes() == b"works"


def test_a_mount_waits_for_the_daemon_that_still_closes_the_image(live: Mounts) -> None:
    mount = live.mount()
    (mount / "kept").write_bytes(b"bytes")
    waits = f"waiting for pid [{mount.pid}], which closes it"

    def logs() -> str:
        return "".join(log.read_text() for log in live.directory.glob("*.log"))

    def let_it_close() -> None:
        try:
            wait_until("a mount that waits", lambda: waits in logs(), 20)
        finally:
            os.kill(mount.pid, signal.SIGCONT)

    # As slow as can be: the mount goes, and its daemon does not hear of it. Whether it had
    # answered the last close by then is a matter of luck.
    mount.expected_log.append(r"fuse_release\(\): fuse_reply_\* failed with No such file")
    os.kill(mount.pid, signal.SIGSTOP)
    libc("umount2", os.fsencode(mount.directory), 0)  # umount(8) would ask the daemon first
    waker = threading.Thread(target=let_it_close)
    waker.start()
    again = live.mount(mount.image)
    waker.join()
    wait_until("the first daemon's end", lambda: not mount.running())
    assert waits in again.log.read_text()
    assert (again / "kept").read_bytes() == b"bytes"


def test_many_may_read_and_nothing_is_written(live: Mounts) -> None:
    image = filled(live)
    before = digest(image)
    modified = os.stat(image).st_mtime_ns
    readers = [live.mount(image, "ro") for _ in range(3)]
    assert len({reader.pid for reader in readers}) == 3
    for reader in readers:
        assert (reader / "file").read_bytes() == bytes(range(250)) * 400
        for change in (
            lambda r=reader: (r / "new").write_bytes(b""),
            lambda r=reader: (r / "file").unlink(),
            lambda r=reader: (r / "file").rename(r / "x"),
            lambda r=reader: os.truncate(r / "file", 1),
            lambda r=reader: os.utime(r / "file"),
            lambda r=reader: (r / "dir").mkdir(),
        ):
            with pytest.raises(OSError, match="Read-only") as refused:
                change()
            assert refused.value.errno == errno.EROFS
    readers[1].umount()
    assert (readers[0] / "file").read_bytes()[:2] == b"\0\1"
    refused_writer = xipfs("mount", image, readers[1].directory, check=False)
    assert refused_writer.returncode == 1
    assert str(readers[0].pid) in refused_writer.stderr
    readers[0].umount()
    readers[2].umount()
    assert digest(image) == before
    assert os.stat(image).st_mtime_ns == modified


def test_the_lock_vanishes_with_a_killed_daemon(live: Mounts) -> None:
    mount = live.mount()
    (mount / "file").write_bytes(b"x" * 10_000)
    mount.kill()
    with pytest.raises(OSError, match="not connected"):
        (mount / "file").read_bytes()
    again = live.mount(mount.image)
    assert (again / "file").read_bytes() == b"x" * 10_000


def test_a_killed_daemons_mount_is_ended_by_umount(live: Mounts) -> None:
    mount = live.mount()
    mount.kill()
    xipfs("umount", mount.directory)
    assert not is_mounted(mount.directory)


@needs("tracefs")
def test_the_next_mount_removes_a_killed_daemons_tracefs_instances(live: Mounts) -> None:
    mount = live.mount(None, "observe=tracefs")
    mine = f"xipfs-{mount.pid}-*"
    assert len(list(INSTANCES.glob(mine))) == 2
    mount.kill()
    assert len(list(INSTANCES.glob(mine))) == 2
    xipfs("umount", mount.directory)
    live.mount(None, "observe=tracefs")
    assert list(INSTANCES.glob(mine)) == []


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("rm=64M", "unknown mount option 'rm'"),
        ("ram=lots", "size 'lots' is not a number of bytes"),
        ("struct_page=48", "struct_page=48; expected one of 32, 56, 64"),
        ("observe=maybe", "observe=maybe; expected one of auto, tracefs, requests, off"),
        ("rules=7.0", "no rule set '7.0'"),
        ("policy=threshold", "policy=threshold without promote="),
    ],
)
def test_a_wrong_option_is_an_error(live: Mounts, options: str, message: str) -> None:
    image, directory = live.image(), live.directory / "d"
    directory.mkdir()
    log = live.directory / "log"
    refused = xipfs("mount", image, directory, "--log", log, "-o", options, check=False)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert refused.stderr.startswith("xipfs mount: ")
    assert not is_mounted(directory)


def test_what_is_no_image_is_refused(live: Mounts) -> None:
    directory = live.directory / "d"
    directory.mkdir()
    text = live.directory / "text"
    text.write_bytes(b"no image" * 10_000)
    log = live.directory / "log"
    refused = xipfs("mount", text, directory, "--log", log, check=False)
    assert refused.returncode == 1
    assert str(text) in refused.stderr
    refused = xipfs("mount", live.directory / "absent", directory, check=False)
    assert refused.returncode == 2
    assert "is not a file" in refused.stderr
    refused = xipfs("mount", live.image(), text, check=False)
    assert refused.returncode == 2
    assert "is not a directory" in refused.stderr


# The end


def test_umount_of_a_busy_mount_says_so_and_leaves_it(live: Mounts) -> None:
    mount = live.mount()
    with open(mount / "busy", "wb") as file:
        refused = xipfs("umount", mount.directory, check=False)
        assert refused.returncode == 1
        assert "busy" in refused.stderr
        file.write(b"still here")
    assert (mount / "busy").read_bytes() == b"still here"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts_cleanly_with_dirty_mapped_pages(
    live: Mounts, number: signal.Signals
) -> None:
    mount = live.mount(live.image(pagecache=True))
    (mount / "file").write_bytes(bytes(32 * PAGE))
    _dirty_through_mapping(mount / "file", 32)
    os.kill(mount.pid, number)
    wait_until("the daemon's end", lambda: not mount.running())
    assert not is_mounted(mount.directory)
    assert f"{number.name}: unmounting" in mount.log.read_text()
    after = live.mount(mount.image, "ro")
    assert (after / "file").read_bytes() == b"".join(
        bytes([page + 1]) + bytes(PAGE - 1) for page in range(32)
    )


def test_a_signal_detaches_a_busy_mount_and_keeps_its_bytes(live: Mounts) -> None:
    mount = live.mount()
    (mount / "file").write_bytes(bytes(4 * PAGE))
    descriptor = os.open(mount / "file", os.O_RDWR)
    with mmap.mmap(descriptor, 4 * PAGE) as mapped:
        mapped[3 * PAGE] = 77
        os.kill(mount.pid, signal.SIGTERM)
        wait_until("the daemon's end", lambda: not mount.running())
        assert not is_mounted(mount.directory)
    with contextlib.suppress(OSError):  # ENOTCONN: nobody answers the FLUSH any more
        os.close(descriptor)
    after = live.mount(mount.image, "ro")
    assert (after / "file").read_bytes()[3 * PAGE] == 77


def _dirty_through_mapping(path: Path, pages: int) -> None:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        for page in range(pages):
            mapped[page * PAGE] = page + 1


def test_umount_preserves_dirty_mapped_pages(live: Mounts) -> None:
    mount = live.mount()
    (mount / "file").write_bytes(bytes(8 * PAGE))
    _dirty_through_mapping(mount / "file", 8)
    after = live.remount(mount, "ro")
    assert (after / "file").read_bytes()[::PAGE] == bytes(range(1, 9))


def test_foreground_is_the_daemon_itself(live: Mounts) -> None:
    image, directory = live.image(), live.directory / "front"
    directory.mkdir()
    daemon = subprocess.Popen(
        [*COMMAND, "mount", "-f", "-o", "observe=off", str(image), str(directory)],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until("the mount", lambda: is_mounted(directory))
        wait_until("the daemon's lock", lambda: serving_pid(mount_at(directory)) == daemon.pid)
        (directory / "file").write_bytes(b"front")
        xipfs("umount", directory)
        _, said = daemon.communicate(timeout=20)
        assert daemon.returncode == 0
        assert "mounted at" in said
        assert "image closed" in said
    finally:
        if daemon.poll() is None:
            daemon.kill()
            daemon.wait()
        if is_mounted(directory):
            subprocess.run(["umount", "-l", str(directory)], check=True)


# A defect in a handler


_BROKEN_DAEMON = """
import sys
from pathlib import Path
from xipfs.cli.mount import run
from xipfs.fs.filesystem import Filesystem

def broken(self, ino, *arguments, **more):
    raise MemoryError("injected")

Filesystem.readlink = broken
real_write = Filesystem.write

def write(self, ino, offset, data, **more):
    if bytes(data[:4]) == b"boom":
        raise OverflowError("injected")
    return real_write(self, ino, offset, data, **more)

Filesystem.write = write
from xipfs.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_an_unexpected_exception_is_eio_and_a_log_line_and_the_mount_lives(
    live: Mounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon runs with a filesystem broken from outside; its own code is as always."""
    script = live.directory / "broken.py"
    script.write_text(_BROKEN_DAEMON)
    image, directory = live.image(), live.directory / "mnt"
    directory.mkdir()
    log = live.directory / "broken.log"
    with open(log, "wb") as log_file:
        daemon = subprocess.Popen(
            [sys.executable, str(script), "mount", "-f", "-o", "observe=off"]
            + [str(image), str(directory)],
            env=ENVIRONMENT,
            stderr=log_file,
        )
    try:
        wait_until("the mount", lambda: b"mounted at" in log.read_bytes())
        (directory / "file").write_bytes(b"fine")
        os.symlink("file", directory / "link")
        with pytest.raises(OSError, match="Input/output") as failed:
            os.readlink(directory / "link")
        assert failed.value.errno == errno.EIO
        with pytest.raises(OSError, match="Input/output"):
            (directory / "other").write_bytes(b"boom")
        assert (directory / "file").read_bytes() == b"fine"
        xipfs("umount", directory)
        assert daemon.wait(timeout=20) == 0
    finally:
        if daemon.poll() is None:
            daemon.kill()
            daemon.wait()
        if is_mounted(directory):
            subprocess.run(["umount", "-l", str(directory)], check=True)
    said = log.read_text()
    assert "ERROR readlink failed; answering EIO" in said
    assert "MemoryError: injected" in said
    assert "ERROR write failed; answering EIO" in said
    assert "OverflowError: injected" in said


# Observers


def test_observe_off_counts_nothing_and_says_so(live: Mounts) -> None:
    mount = live.mount(None, "observe=off")
    (mount / "file").write_bytes(bytes(5 * PAGE))
    with open(mount / "file", "rb") as file, mmap.mmap(file.fileno(), 0, prot=1) as mapped:
        assert mapped[4 * PAGE] == 0
    stats = mount.stats()
    assert stats["observer"]["mode"] == "off"
    assert stats["observer"]["reason"] == "switched off with observe=off"
    assert stats["vmstat"]["pgfault"] == 0
    assert stats["kernel"] == {
        "faults": None,
        "major": None,
        "minor": None,
        "around": 0,
        "hinted": 0,
    }


def test_requests_are_counted_as_estimated_faults(live: Mounts) -> None:
    mount = live.mount(None, "observe=requests,readahead=0")
    (mount / "file").write_bytes(bytes(7 * PAGE))
    mount = live.remount(mount, "observe=requests,readahead=0")
    _read_pages_apart(mount, "file", 7)
    stats = mount.stats()
    assert stats["observer"]["mode"] == "requests"
    assert "estimate" in stats["observer"]["reason"]
    assert stats["observer"]["events"] == 7
    assert stats["vmstat"]["pgfault"] == 7
    assert stats["vmstat"]["pgfault_xip"] == 7
    assert stats["processes"][0]["pgfault"] == 7
    assert stats["processes"][0]["pid"] == os.getpid()


def test_read_ahead_is_the_mounts_own(live: Mounts) -> None:
    mount = live.mount(None, "readahead=64")
    device = f"{mount.mount.major}:{mount.mount.minor}"
    knob = Path(f"/sys/class/bdi/{device}/read_ahead_kb")
    assert knob.read_text() == "64\n"
    mount = live.remount(mount, "readahead=off")
    device = f"{mount.mount.major}:{mount.mount.minor}"
    assert Path(f"/sys/class/bdi/{device}/read_ahead_kb").read_text() == "0\n"


def test_reads_are_merged_with_read_ahead_only(live: Mounts) -> None:
    mount = live.mount()
    (mount / "file").write_bytes(bytes(64 * PAGE))
    counted = {}
    for kib in ("0", "256"):
        mount = live.remount(mount, f"observe=requests,readahead={kib}")
        _read_pages_apart(mount, "file", 64)
        counted[kib] = mount.stats()["observer"]["events"]
    assert counted["0"] == 64
    assert counted["256"] < 32


def _read_pages_apart(mount: LiveMount, name: str, pages: int) -> None:
    with open(mount / name, "rb") as file, mmap.mmap(file.fileno(), 0, prot=1) as mapped:
        for page in range(pages):
            assert mapped[page * PAGE] == 0


def test_memory_figures_follow_the_options(live: Mounts) -> None:
    mount = live.mount(None, "ram=32M,struct_page=32")
    assert mount.stats()["memory"] == {
        "page_size_bytes": 4096,
        "struct_page_bytes": 32,
        "memmap_bytes": 8192 * 32,
        "memmap_saved_bytes": 4096 * 32,
        "ram_bytes": 32 << 20,
        "nvram_bytes": 16 << 20,
    }


def test_a_directory_with_spaces_commas_and_backslashes(live: Mounts) -> None:
    odd = live.directory / "a b,c\\d"
    odd.mkdir()
    image = live.image().rename(odd / "i m,g\\.img")
    mount = LiveMount(image, odd / "m n,t", ["observe=off"])
    with contextlib.closing(mount):
        assert mount.mount.source == str(image)
        (mount / "file").write_bytes(b"odd")
        assert mount.stats()["mount"]["mountpoint"] == str(odd / "m n,t")
        mount.umount()


def dirty_pages(image: Path) -> int:
    """Count the image's pages that the host has not brought to its disk yet."""
    with image.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        bytes_ = np.frombuffer(view, np.uint8)
        first = bytes_.ctypes.data // PAGE
        count = bytes_.size // PAGE
        assert int(bytes_[::PAGE].sum()) >= 0  # every page is mapped now
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            entries = np.frombuffer(os.pread(pagemap.fileno(), count * 8, first * 8), np.uint64)
        dirty = 0
        with open("/proc/kpageflags", "rb", buffering=0) as flags:
            for pfn in (entries & np.uint64((1 << 55) - 1)).tolist():
                dirty += os.pread(flags.fileno(), 8, pfn * 8)[0] >> 4 & 1
        del bytes_
    return dirty


def test_with_sync_the_host_s_disk_has_what_a_call_made_durable(live: Mounts) -> None:
    image = live.image(size_bytes=1 << 20)
    kind = subprocess.run(["stat", "-f", "-c", "%T", image], capture_output=True, text=True)
    if kind.stdout.strip() == "tmpfs":
        pytest.skip("a tmpfs has no disk")
    mount = live.mount(image, "sync")
    mount.directory.joinpath("made").mkdir()
    os.rename(mount.directory / "made", mount.directory / "renamed")
    assert dirty_pages(image) == 0
    mount = live.remount(mount)
    mount.directory.joinpath("renamed").rmdir()
    assert dirty_pages(image) > 0, "without the option they wait"
    fd = os.open(mount.directory, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    assert dirty_pages(image) == 0


def test_a_mount_that_is_busy_for_a_moment_is_unmounted(
    live: Mounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is closed when it has been in the way once; one that stays open is refused."""
    mount = live.mount()
    held = (mount / ".xipfs" / "stats.json").open("rb")
    tries: list[int] = []

    def run(*words: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        done = subprocess_run(*words, **options)
        tries.append(done.returncode)
        if len(tries) == 2:
            held.close()
        return done

    subprocess_run = subprocess.run
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        patch.setattr("xipfs.fuse.mounts.BUSY_S", 60.0)
        unmount(mount.directory)
    assert (tries[:2], tries[-1]) == ([1, 1], 0)
    assert not is_mounted(mount.directory)
    again = live.mount(mount.image)
    with (again / ".xipfs" / "stats.json").open("rb"):
        done = xipfs("umount", again.directory, check=False)
    assert (done.returncode, "Device or resource busy" in done.stderr) == (1, True)


def test_noatime_and_noexec(live: Mounts) -> None:
    """The kernel alone leaves access times to the daemon, so it is told too."""
    mount = live.mount(live.image(), "noatime,noexec")
    (mount / "dir").mkdir()
    (mount / "dir" / "program").write_bytes(Path("/bin/true").read_bytes())
    (mount / "dir" / "program").chmod(0o755)
    os.symlink("x", mount / "link")
    names = ("dir", "dir/program", "link")
    for name in names:
        os.utime(mount / name, ns=(1, 2), follow_symlinks=False)
    mount = live.remount(mount, "noatime,noexec")
    assert os.listdir(mount / "dir") == ["program"]
    assert (mount / "dir" / "program").read_bytes() == Path("/bin/true").read_bytes()
    assert os.readlink(mount / "link") == "x"
    with pytest.raises(PermissionError):
        subprocess.run([mount / "dir" / "program"], check=True)
    assert [os.lstat(mount / name).st_atime_ns for name in names] == [1, 1, 1]
    mount = live.remount(mount)
    subprocess.run([mount / "dir" / "program"], check=True)
    assert os.readlink(mount / "link") == "x"
    assert os.lstat(mount / "link").st_atime_ns > 2
