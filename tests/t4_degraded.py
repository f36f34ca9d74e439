"""A mount where something is missing works in the best mode left, and says what is lost.

Each case is a mount namespace of its own in which a file of the kernel's is hidden or has other
contents; the mount, a program on it and the questions to it are all inside.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import needs
from live import COMMAND, ENVIRONMENT, new_image

from xipfs.errors import ObserverError
from xipfs.fuse import observing
from xipfs.fuse.mounts import Mount
from xipfs.options import parse_options

pytestmark = [needs("root", "fuse", "tracefs")]

TRACING = Path("/sys/kernel/tracing")
PAGES = 8
READER = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    file.write(bytes(8 * 4096))
    file.flush()
    pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    print(sum(pages[index * 4096] for index in range(8)))
"""


class Place:
    """An image and what a shell does with it in a mount namespace of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.image = new_image(directory / "image")
        (directory / "mnt").mkdir()
        (directory / "reader").write_text(READER)
        self.before: list[str] = []

    def hide(self, file: Path, contents: str) -> None:
        """Let ``file`` have other contents."""
        fake = self.directory / file.name
        fake.write_text(contents)
        self.before.append(f"mount --bind {fake} {file}")

    def inside(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Mount, touch 8 cold pages of a file, print the statistics, unmount."""
        command = " ".join(map(shlex.quote, COMMAND))
        words = " ".join(f"-o {option}" for option in options)
        script = [
            "set -e",
            *self.before,
            f"{command} mount image mnt --log log {words}",
            "trap 'umount -l mnt 2>/dev/null || true' EXIT",
            f"touch mnt/file; {sys.executable} reader mnt/file >&2",
            f"{command} stat --json mnt",
            f"{command} umount mnt",
        ]
        return subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", "\n".join(script)],
            cwd=self.directory,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
            timeout=90,
        )

    def stats(self, *options: str) -> dict[str, Any]:
        done = self.inside(*options)
        assert done.returncode == 0, (done.stderr, (self.directory / "log").read_text())
        stats: dict[str, Any] = json.loads(done.stdout)
        return stats


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def without_field(event: str, field: str) -> str:
    """Return the event's format with one field under another name."""
    text = (TRACING / "events" / event / "format").read_text()
    changed = text.replace(f" {field};", f" {field}_of_late;")
    assert changed != text
    return changed


def test_an_event_of_another_shape_and_no_way_to_switch_read_ahead_off(place: Place) -> None:
    place.hide(
        TRACING / "events/signal/signal_generate/format",
        without_field("signal/signal_generate", "sig"),
    )
    bdi = "/sys/devices/virtual/bdi"
    place.before += [f"mount --bind {bdi} {bdi}", f"mount -o remount,bind,ro {bdi}"]
    stats = place.stats("observe=auto")
    observer = stats["observer"]
    assert observer["mode"] == "tracefs"
    lost = "lost: telling a fault that ended in SIGBUS or SIGSEGV"
    name = "signal/signal_generate"
    assert observer["missing"][name] == f"{name}: no field sig; {lost}"
    assert "read_ahead_kb: Read-only file system" in observer["missing"]["read_ahead_kb"]
    assert len(observer["missing"]) == 2
    assert stats["vmstat"]["pgfault_xip"] == 1, "the other seven came with the first"
    done = place.inside("readahead=0")
    assert done.returncode == 1
    assert "readahead=0 cannot be set" in done.stderr


def test_a_needed_event_of_another_shape(place: Place) -> None:
    place.hide(
        TRACING / "events/exceptions/page_fault_user/format",
        without_field("exceptions/page_fault_user", "address"),
    )
    observer = place.stats("observe=auto")["observer"]
    assert observer["mode"] == "requests"
    assert observer["reason"].startswith(
        "a needed event is missing: exceptions/page_fault_user: no field address; each READ"
    )
    done = place.inside("observe=tracefs")
    assert done.returncode == 1
    assert done.stderr == (
        "xipfs mount: observe=tracefs is not possible: a needed event is missing: "
        "exceptions/page_fault_user: no field address; mount as root, or use observe=auto\n"
    )


def test_no_tracefs(place: Place) -> None:
    empty = place.directory / "empty"
    (empty / "not-tracefs").mkdir(parents=True)
    place.before.append(f"mount --bind {empty} {TRACING}")
    stats = place.stats("observe=auto,readahead=0")
    observer = stats["observer"]
    assert observer["mode"] == "requests"
    assert observer["reason"].startswith(f"tracefs is not mounted ({TRACING}); each READ request")
    assert stats["kernel"]["faults"] is None
    assert stats["vmstat"]["pgfault"] == PAGES


def test_another_user(place: Place) -> None:
    """Not root: READ requests stand for faults, and the mount is the user's own."""
    os.chown(place.directory, 65534, 65534)
    command = " ".join(map(shlex.quote, COMMAND))
    # A device of its own, since everybody else's may be root's; /mnt, since pytest's is.
    script = f"""set -e
        mknod -m 666 {place.directory}/fuse c 10 229
        mount --bind {place.directory}/fuse /dev/fuse
        mount --bind {place.directory} /mnt
        cd /mnt
        rmdir mnt
        exec setpriv --reuid=65534 --regid=65534 --clear-groups sh -ec '
            mkdir mnt
            {command} mkfs --size 16M own >&2
            {command} mount own mnt --log log
            trap "fusermount3 -u -z mnt 2>/dev/null || true" EXIT
            echo x > mnt/file; cat mnt/file >&2
            {command} stat --json mnt
            {command} umount mnt'"""
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    observer = json.loads(done.stdout)["observer"]
    assert observer["mode"] == "requests"
    assert observer["reason"].startswith("tracefs is not writable (/sys/kernel/tracing); each READ")


class Refusing(observing.TracefsObserver):
    """tracefs that looked usable and was not."""

    def start(self, _mount: Mount) -> None:
        raise ObserverError("cannot create the tracefs instance xipfs-1-0-G: No space left")


def test_an_observer_that_cannot_start() -> None:
    mount = Mount(0, 0, Path("/nowhere"), "image", "fuse.xipfs", frozenset())
    left, exact = observing.start_observing(parse_options([]), Refusing(), mount)
    assert (left.figures().mode, exact) == ("requests", False)
    assert left.figures().reason.startswith("cannot create the tracefs instance xipfs-1-0-G: No")
    with pytest.raises(ObserverError, match="No space left"):
        observing.start_observing(parse_options(["observe=tracefs"]), Refusing(), mount)
