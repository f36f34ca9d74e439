"""Hint faults on a real mount: the kernel's pages go, and each is missed exactly once."""

from __future__ import annotations

import mmap
import subprocess
import sys

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


_TOUCH = """
import mmap, sys, time
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
end_s = time.monotonic() + 2
while time.monotonic() < end_s:
    for at in range(0, len(mapped), 4096):
        mapped[at]
    time.sleep(0.01)
"""


def test_hints_of_two_processes_that_share_a_file_count_in_no_other_total(live: Mounts) -> None:
    """Both miss each page that was taken: which of them reads it, the other waits for."""
    mount = live.mount(None, "observe=tracefs", "hint=200")
    (mount / "file").write_bytes(bytes(N * PAGE))
    command = [sys.executable, "-c", _TOUCH, str(mount / "file")]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [each.wait(30) for each in both] == [0, 0]
    counts = mount.vmstat()
    assert counts["pgfault"] <= 2 * N, "the first touches, and those no oftener"
    # Some 400 pages are taken from both, of each at least one misses it.
    assert counts["pgfault_hint"] >= 200
