"""More faults than the trace buffers hold: the loss is counted, and what was believed read anew.

The daemon is stopped, as a busy machine may stop it, while a program that needs nothing of it
faults on. The kernel overwrites the oldest records, among them those of an unmap and of copies.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from conftest import needs
from live import PAGE, Mounts, wait_until
from t5_accounting import Toucher, fill
from t5_verify import N, process, verify

from xipfs.fs.types import PageKind

PAGES = 4096
#: Of pages 200-4095: one for each fault-around window, 16 pages aligned.
FAULTS_A_PASS = 244
#: Of a fault: its own record and the window's, of 36 bytes each at least.
BYTES_A_FAULT = 72


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
    program = Toucher(
        touch,
        mount / "warm",
        # The first mapping keeps the pages in the kernel's cache, whatever else runs here.
        f"map {mount / 'x'} shared r read 0-4095 map {mount / 'x'} private rw read 0-4095 pause "
        f"unmap 100-199 write 7-9 repeat {passes} {{ advise 200-4095 dontneed read 200-4095 }} "
        "pause write 20-29 pause",
    )
    pid = str(program.pid)
    try:
        program.until_paused()
        os.sched_setaffinity(program.pid, {min(os.sched_getaffinity(0))})
        before = verify(mount, "--pid", pid)
        assert (before["pages_differ"], before["pages_unknown"]) == (0, {})
        assert process(before, program.pid)["pages_compared"] == 2 * PAGES + N
        assert mount.stats()["observer"]["lost"] == 0
        os.kill(mount.pid, signal.SIGSTOP)
        try:
            program.go()
            program.until_paused()
        finally:
            os.kill(mount.pid, signal.SIGCONT)
        wait_until("the loss is told", lambda: mount.stats()["observer"]["lost"] > 0, 60)
        wait_until("nothing is unknown", lambda: not verify(mount)["pages_unknown"], 60)
        after = verify(mount, "--pid", pid)
        assert (after["pages_differ"], after["invariants_broken"]) == (0, "")
        assert process(after, program.pid)["pages_compared"] == 2 * PAGES - 100 + N
        assert (after["copies_compared"], after["copies_differ"]) == (4, 0)
        assert after["audit"]["pages_differed"] == 0
        # It goes on as before the loss: faults are charged one by one.
        charged = mount.stats()["vmstat"]["pgfault_cow"]
        program.go()
        program.until_paused()
        assert mount.stats()["vmstat"]["pgfault_cow"] == charged + 10
    finally:
        program.process.kill()
        program.process.communicate()
