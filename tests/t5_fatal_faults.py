"""Accesses that end their program: what is told of each, read live."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import needs
from live import PAGE, LiveMount, Mounts, wait_until
from t5_accounting import Toucher, fill
from t5_verify import process, verify

from xipfs.cli.stream import Stream
from xipfs.fs.types import PageKind
from xipfs.stats.trace_columns import COLUMNS

pytestmark = [needs("root", "fuse", "tracefs")]


@pytest.fixture(scope="module")
def mount(shared: Mounts) -> LiveMount:
    image = shared.image()
    fill(image, {"x": PageKind.XIP, "warm": PageKind.XIP})
    mount = shared.mount(image, "observe=tracefs")
    (mount / "x").read_bytes()
    return mount


def has_exited(mount: LiveMount, pid: int) -> bool:
    return any(line["exited"] for line in mount.cat_stats()["processes"] if line["pid"] == pid)


def rows_of(stream: Stream) -> list[dict[str, Any]]:
    return [dict(zip(COLUMNS, row, strict=True)) for rows in stream.poll() for row in rows]


def test_a_read_that_its_mapping_refuses_is_no_fault(mount: LiveMount, touch: Path) -> None:
    """No fault handler runs, so the kernel counts none, and it ends in SIGSEGV: nothing is charged.

    With protection keys it is the same (access_error, arch/x86/mm/fault.c): of the reads that a
    present PTE refused (``handled`` protection) a program can make none that ends well.
    """
    stream = Stream(mount.mount)
    words = f"map {mount / 'x'} private r read 5 mark one protect 5 none pause read 5"
    program = Toucher(touch, mount / "warm", words)
    program.until_paused()
    read = [row for row in rows_of(stream) if row["item"] == "fault" and row["path"] == "x"]
    assert [(row["page"], row["access"], row["handled"]) for row in read] == [(5, "read", "mapped")]
    answer = process(verify(mount, "--pid", str(program.pid)), program.pid)
    assert (answer["pages_differ"], answer["pages_unknown"]) == (0, {})
    program.go()
    program.finish(-signal.SIGSEGV)
    wait_until("its end is known", lambda: has_exited(mount, program.pid))
    assert [row["page"] for row in rows_of(stream) if row["item"] == "fault"] == []


def test_a_sigbus_that_ends_its_process_has_a_row(mount: LiveMount, touch: Path) -> None:
    """Nobody is left to ask which file was mapped there when the daemon comes to it."""
    stream = Stream(mount.mount)
    unknown = "SIGBUS in a mapping that is not known"
    before = mount.stats()["observer"]["unfollowed"].get(unknown, 0)
    program = Toucher(
        touch, mount / "warm", f"part {mount / 'x'} private r 40 8 pause read 5 pause"
    )
    program.until_paused()
    os.kill(mount.pid, signal.SIGSTOP)
    try:
        program.go()
        program.finish(-signal.SIGBUS)
    finally:
        os.kill(mount.pid, signal.SIGCONT)

    def counted() -> int:
        return int(mount.stats()["observer"]["unfollowed"].get(unknown, 0) - before)

    wait_until("it is counted", lambda: counted() == 1)
    (row,) = [row for row in rows_of(stream) if row["item"] == "unplaced"]
    assert (row["pid"], row["tid"], row["comm"]) == (program.pid, program.pid, "touch")
    assert (row["page"], row["address"] % PAGE) == (45, 5)
    assert row["detail"] == '{"access":"read","mode":"user"}'
    assert mount.stats()["vmstat"]["pgfault_sigbus"] == 0
