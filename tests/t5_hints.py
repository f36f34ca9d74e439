"""Hint faults on a real mount: the kernel's pages go, and each is missed exactly once."""

from __future__ import annotations

import mmap

from conftest import needs
from live import PAGE, Mounts, wait_until

pytestmark = [needs("root", "fuse", "tracefs")]

N = 31


def test_pages_touched_again_make_one_hint_fault_each(live: Mounts) -> None:
    mount = live.mount(None, "observe=tracefs")
    (mount / "file").write_bytes(bytes(N * PAGE))
    mount = live.remount(mount, "observe=tracefs", "hint=500")
    with (
        open(mount / "file", "rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
    ):
        touched = [mapped[page * PAGE] for page in range(N)]
        wait_until(
            "every page hinted",
            lambda: (
                mount.vmstat()["nr_special_ptes"] >= N
                and mount.cat_stats()["kernel"]["hinted"] >= 3 * N
            ),
        )
        before = mount.vmstat()
        touched += [mapped[page * PAGE] for page in range(N)]
        after = mount.vmstat()
    assert touched == [0] * 2 * N
    assert after["pgfault_hint"] - before["pgfault_hint"] == N
    for total in ("pgfault", "pgmajfault", "pgfault_xip", "pgfault_extra"):
        assert after[total] == before[total], total
    assert before["pgfault_xip"] >= N
