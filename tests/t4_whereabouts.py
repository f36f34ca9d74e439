"""SIGUSR1: a mount that cannot be asked any more tells where its tasks and threads stand."""

from __future__ import annotations

import json
import os
import threading

import pytest
from conftest import needs
from live import LiveMount, Mounts

pytestmark = [needs("root", "fuse")]


@pytest.fixture(scope="module")
def mnt(shared: Mounts) -> LiveMount:
    return shared.mount()


def test_a_handler_that_waits_is_told_with_its_place(mnt: LiveMount) -> None:
    control = os.open(mnt / ".xipfs" / "control", os.O_RDWR)
    os.write(control, json.dumps({"op": "events", "follow": True}).encode())
    assert json.loads(os.read(control, 4096)) == {"lost": 0}
    over = threading.Event()

    def follow() -> None:
        while not over.is_set():
            os.read(control, 4096)

    follower = threading.Thread(target=follow)
    follower.start()
    lines: list[str] = []
    try:
        # It waits most of the time, a tenth of a second for each answer.
        while not any(line.endswith(" Conversation.read") for line in lines):
            lines = mnt.whereabouts().splitlines()
    finally:
        over.set()
        follower.join(10)
        os.close(control)
    # What waits for the next answer is called by pyfuse3's compiled code, which is passed through.
    reading = next(at for at, line in enumerate(lines) if line.endswith(" Conversation.read"))
    assert any("_session_loop" in line for line in lines[reading - 6 : reading])
    assert "_real_async_yield" in "".join(lines[reading : reading + 5])
    assert any(line.endswith(" Writeback.run") for line in lines)
    at = lines.index("thread xipfs-notify")
    assert any(line.endswith(" Worker._work") for line in lines[at : at + 6])


def test_a_signal_changes_nothing(mnt: LiveMount) -> None:
    (mnt / "file").write_bytes(b"x" * 5000)
    for _ in range(3):
        assert "task <init>" in mnt.whereabouts()
    assert (mnt / "file").read_bytes() == b"x" * 5000
