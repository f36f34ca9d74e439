"""More faults than the trace buffers hold: the loss is counted, and what was believed read anew.

The daemon is stopped, as a busy machine may stop it, while a program that needs nothing of it
faults on. The kernel overwrites the oldest records, among them those of an unmap, of copies and of
pages touched for the first time.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from conftest import needs
from live import PAGE, LiveMount, Mounts, wait_until, xipfs
from t5_accounting import Toucher, fill
from t5_verify import N, process, verify

from xipfs.fs.types import PageKind

PAGES = 4096
#: Of pages 304-3183: one for each fault-around window, 16 pages aligned.
FAULTS_A_PASS = 180
A_PASS = "advise 304-3183 dontneed read 304-3183"
#: Of a fault: its own record and the window's, of 36 bytes each at least.
BYTES_A_FAULT = 72


def marks(mount: LiveMount) -> dict[int, bool]:
    return {line["pid"]: line["incomplete"] for line in mount.cat_stats()["processes"]}


def has_marked_row(verb: str, mount: LiveMount, pid: int) -> bool:
    lines = xipfs(verb, mount.directory).stdout.splitlines()
    assert ("* records were lost while it ran: its figures may be too low" in lines) is (
        any("*touch " in line for line in lines)
    )
    return any(line.startswith(f"{pid:>8}*touch ") for line in lines)


@needs("root", "fuse", "tracefs")
@pytest.mark.timeout(300)
def test_what_overwritten_records_told_is_read_from_the_kernel(live: Mounts, touch: Path) -> None:
    image = live.image()
    fill(image, {"x": PageKind.XIP, "warm": PageKind.XIP})
    mount = live.mount(image, "observe=tracefs")
    os.truncate(mount / "x", PAGES * PAGE)
    # Records of processes and of pages have a buffer each on each CPU. The program keeps to one
    # CPU and fills one buffer, several times over, since it may have grown until it is stopped.
    passes = mount.stats()["observer"]["buffer_bytes"] // BYTES_A_FAULT // FAULTS_A_PASS
    # Its mapping keeps the pages in the kernel's cache, whatever else runs here. A page that the
    # program itself mapped twice would be looked at for another reason.
    keeper = Toucher(touch, mount / "warm", f"map {mount / 'x'} shared r read 0-4095 pause")
    # What the reader has begun to read is not overwritten: the sub-buffer that the records of the
    # next hundred faults go to. The first passes fill it.
    program = Toucher(
        touch,
        mount / "warm",
        f"map {mount / 'x'} private rw read 0-3199 pause repeat 4 {{ {A_PASS} }} "
        f"unmap 100-199 write 7-9 read 3200-3295 repeat {passes} {{ {A_PASS} }} "
        "pause write 20-29 pause",
    )
    pid = str(program.pid)
    try:
        keeper.until_paused()
        program.until_paused()
        os.sched_setaffinity(program.pid, {min(os.sched_getaffinity(0))})
        before = verify(mount, "--pid", pid)
        assert (before["pages_differ"], before["pages_unknown"]) == (0, {})
        assert process(before, program.pid)["pages_compared"] == PAGES + N
        assert process(before, program.pid)["incomplete"] is False
        assert mount.stats()["observer"]["lost"] == 0
        assert marks(mount) == {program.pid: False, keeper.pid: False}
        assert not has_marked_row("stat", mount, program.pid)
        assert not has_marked_row("verify", mount, program.pid)
        os.kill(mount.pid, signal.SIGSTOP)
        try:
            program.go()
            program.until_paused()
        finally:
            os.kill(mount.pid, signal.SIGCONT)
        wait_until("the loss is told", lambda: mount.cat_stats()["observer"]["lost"] > 0, 60)
        wait_until("nothing is unknown", lambda: not verify(mount)["pages_unknown"], 60)
        after = verify(mount, "--pid", pid)
        assert (after["pages_differ"], after["invariants_broken"]) == (0, "")
        assert process(after, program.pid)["pages_compared"] == PAGES - 100 + N
        assert process(after, program.pid)["incomplete"] is True
        assert (after["copies_compared"], after["copies_differ"]) == (4, 0)
        assert after["audit"]["pages_differed"] == 0
        found = mount.stats()["observer"]["unfollowed"]
        assert found["private copies found or missed in pagemap, not charged"] == 3
        assert marks(mount) == {program.pid: True, keeper.pid: True}
        assert has_marked_row("stat", mount, program.pid)
        assert has_marked_row("verify", mount, program.pid)
        # It goes on as before the loss: faults are charged one by one.
        charged = mount.stats()["vmstat"]["pgfault_cow"]
        program.go()
        program.until_paused()
        assert mount.stats()["vmstat"]["pgfault_cow"] == charged + 10
    finally:
        for each in (program, keeper):
            each.process.kill()
            each.process.communicate()
