"""RAM as a budget: dirty pages go home in time, and a tiny RAM costs time, never bytes."""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pyfuse3
import pytest
from conftest import needs
from live import PAGE, Mounts, wait_until
from media import new_medium, open_medium

from xipfs.fuse.names import RequestHooks
from xipfs.fuse.operations import OpenFile, Operations

pytestmark = [needs("root", "fuse")]


def test_dirty_pages_go_home_in_the_background_and_writers_wait(live: Mounts) -> None:
    mount = live.mount(live.image(pagecache=True), "ram=400K")
    noise = random.Random(3).randbytes(60 * PAGE)
    (mount / "file").write_bytes(noise)
    wait_until("the flusher", lambda: mount.cat_stats()["writeback"]["nr_dirty"] <= 10)
    figures = mount.cat_stats()["writeback"]
    assert (figures["nr_dirty_threshold"], figures["nr_dirty_background_threshold"]) == (20, 10)
    assert figures["background_pages"] + figures["throttled_pages"] >= 50
    assert mount.letters("file") == "P" * 60, "written pages stay resident"
    assert mount.vmstat()["pgevict"] == 0


def test_the_thresholds_are_the_mounts_own(live: Mounts) -> None:
    mount = live.mount(
        live.image(pagecache=True),
        "ram=400K,dirty_background_ratio=40,dirty_ratio=60,dirty_expire_ms=200,"
        "dirty_writeback_ms=50",
    )
    (mount / "file").write_bytes(bytes(range(256)) * (30 * PAGE // 256))
    wait_until("expiry", lambda: mount.cat_stats()["writeback"]["nr_dirty"] == 0)
    figures = mount.cat_stats()["writeback"]
    assert (figures["nr_dirty_threshold"], figures["nr_dirty_background_threshold"]) == (60, 40)
    assert (figures["expired_pages"], figures["background_pages"]) == (30, 0)


def test_the_policy_chooses_what_leaves_a_full_ram(live: Mounts) -> None:
    """The policy `clock` names victims; every byte is there afterwards, in RAM or at home."""
    mount = live.mount(
        live.image(pagecache=True), "observe=tracefs,ram=64K,policy=clock,high=100,low=99"
    )
    noise = random.Random(5).randbytes(100 * PAGE)
    (mount / "file").write_bytes(noise)
    for _ in range(3):
        assert (mount / "file").read_bytes() == noise
    vmstat = mount.vmstat()
    assert vmstat["pgevict"] >= vmstat["pgevict_policy"] > 0
    assert vmstat["nr_resident_pages"] <= 16


def errno_of(call: Callable[[], object]) -> int | None:
    """Return the error that it ends with, 0 for none."""
    try:
        call()
    except OSError as error:
        return error.errno
    return 0


@pytest.mark.parametrize("pagecache", [False, True], ids=["xip", "pagecache"])
def test_stores_into_holes_of_a_full_image_are_kept_or_reported(
    live: Mounts, pagecache: bool
) -> None:
    """The kernel sends up to 256 pages at once and does not look at how many were taken."""
    mount = live.mount(live.image(size_bytes=2 << 20, pagecache=pagecache), "ram=1M")
    free = os.statvfs(mount.directory).f_bfree
    told = []
    for name, count in (("many", free + 100), ("some", free // 2)):
        descriptor = os.open(mount / name, os.O_RDWR | os.O_CREAT)
        os.ftruncate(descriptor, count * PAGE)
        with mmap.mmap(descriptor, count * PAGE) as mapped:
            for index in range(count):
                mapped[index * PAGE : index * PAGE + 8] = b"%8d" % index
            told.append(errno_of(mapped.flush))
        if told[-1]:
            os.ftruncate(descriptor, 0)
        os.close(descriptor)
    assert told == [errno.ENOSPC, 0], "the first does not fit, the second does"
    again = live.remount(mount, "ro")
    data = (again / name).read_bytes()
    assert [data[at * PAGE : at * PAGE + 8] for at in range(count)] == [
        b"%8d" % index for index in range(count)
    ]


class _NoHooks:
    """What handlers tell nobody here."""

    def page_io(self, *_args: object, **_how: object) -> None:
        """Hear nothing."""

    def write_back_of_ours(self, *_args: object) -> bool:
        """Not know it."""
        return False


async def test_a_write_that_is_not_taken_whole_is_told_at_fsync() -> None:
    """Of a request larger than a transaction, which this kernel does not send aligned."""
    fs = open_medium(new_medium(380))
    ino = fs.mknod(1, b"file", 0o100644, 0, 0, 0).ino
    operations = Operations(fs, cast(RequestHooks, _NoHooks()))
    handle = pyfuse3.FileHandleT(2)
    operations._files[handle] = OpenFile(ino, 1)
    assert await operations.write(handle, 0, bytes(400 * PAGE)) == 256 * PAGE
    with pytest.raises(pyfuse3.FUSEError) as raised:
        await operations.fsync(handle, False)
    assert raised.value.errno == errno.ENOSPC
    await operations.fsync(handle, False)
    assert await operations.write(handle, 0, bytes(256 * PAGE)) == 256 * PAGE
    await operations.fsync(handle, False)


def test_one_frame_of_ram_and_a_full_image_end_in_enospc(live: Mounts, tmp_path: Path) -> None:
    mount = live.mount(live.image(size_bytes=1 << 20, pagecache=True), "ram=4K")
    noise = random.Random(4).randbytes(1 << 20)

    def fill() -> None:
        with open(mount / "file", "wb", buffering=0) as file:
            for start in range(0, 1 << 20, PAGE):
                file.write(noise[start : start + PAGE])

    with pytest.raises(OSError, check=lambda error: error.errno == errno.ENOSPC):
        fill()
    size = (mount / "file").stat().st_size
    assert size > 100 * PAGE
    again = live.remount(mount, "ro")
    assert (again / "file").read_bytes() == noise[:size]
