"""Which answers have the kernel drop pages, and when that is known to be done."""

from __future__ import annotations

import subprocess

import pytest
from live import wait_until

from xipfs.fs.types import Attr
from xipfs.fuse.replies import Replies
from xipfs.trace import proc
from xipfs.units import Ino

CUT = "77 0x3 0x1000 0x0 0x0 0x0 0x0 0x7ffc0000 0x7f0000"
SLEEP = "230 0x0 0x0 0x1 0x1 0x0 0x0 0x7ffc0000 0x7f0001"
INO = 7


class Scene:
    def __init__(self) -> None:
        self.mapped = {INO}
        self.calls: dict[int, str] = {}
        self.replies = Replies(self.mapped.__contains__, lambda tid: self.calls.get(tid, ""))

    def answer(self, tid: int, *, size: int = 4096, mtime_ns: int = 5, ino: int = INO) -> bool:
        """Answer thread ``tid``, which waits in its call; return whether it has to act."""
        attr = Attr(Ino(ino), 0, 0o100644, 1, 0, 0, 0, size, 8, 0, mtime_ns, 0)
        look = self.replies.to_act_on(tid, attr)
        if look is not None:
            look()
        return look is not None


@pytest.fixture
def scene() -> Scene:
    made = Scene()
    made.calls = {1: CUT, 2: CUT}
    return made


def test_only_what_is_new_of_a_mapped_file_is_acted_on(scene: Scene) -> None:
    assert scene.answer(1, ino=8) is False
    assert scene.answer(1) is True, "nothing was told of it since it is mapped"
    assert scene.answer(2) is False
    assert scene.answer(2, size=0) is True
    assert scene.answer(2, size=0, mtime_ns=6) is True
    scene.replies.emptied(INO)
    assert scene.answer(2, size=0, mtime_ns=6) is True
    assert scene.answer(0, size=9) is False, "nobody of our pid namespace"
    assert scene.replies.serials == {INO: 4}
    scene.mapped.clear()
    assert scene.answer(1, size=1) is False
    assert (scene.replies.serials, scene.replies.unfinished()) == ({}, set())


@pytest.mark.parametrize(
    ("now", "left"),
    [(CUT, {INO}), ("running", {INO}), (SLEEP, set()), ("", set()), ("-1 0x1", set())],
)
def test_it_is_done_once_the_thread_waits_elsewhere(scene: Scene, now: str, left: set[int]) -> None:
    scene.answer(1)
    assert scene.replies.unfinished() == {INO}
    scene.calls[1] = now
    assert scene.replies.unfinished() == left
    scene.calls[1] = "running"
    assert scene.replies.unfinished() == left, "what was proven stays proven"


def test_before_its_call_was_read_nothing_is_proven(scene: Scene) -> None:
    attr = Attr(Ino(INO), 0, 0o100644, 1, 0, 0, 0, 0, 8, 0, 0, 0)
    look = scene.replies.to_act_on(1, attr)
    scene.calls[1] = SLEEP
    assert scene.replies.unfinished() == {INO}
    assert look is not None


def test_who_asks_again_has_acted_on_the_answer_before(scene: Scene) -> None:
    scene.answer(1)
    scene.answer(2, size=0)
    scene.calls[1] = SLEEP
    scene.answer(2, size=1)
    assert scene.replies.unfinished() == {INO}
    scene.calls[2] = SLEEP
    assert scene.replies.unfinished() == set()


def test_proc_tells_which_call_a_thread_waits_in() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            wait_until("it sleeps", lambda: proc.call_of(process.pid).startswith("230 "))
            assert len(proc.call_of(process.pid).split()) == 9
            assert proc.in_system_call(process.pid) is True
        finally:
            process.kill()
    assert proc.call_of(process.pid) == ""
