"""RAM as a budget: dirty pages go home in time, and a tiny RAM costs time, never bytes."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest
from conftest import needs
from live import PAGE, Mounts, wait_until

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
