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

    def unfinished(self) -> set[int]:
        askers = self.replies.askers()
        return self.replies.unfinished(askers, self.replies.over(askers))


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
    assert (scene.replies.serials, scene.unfinished()) == ({}, set())


@pytest.mark.parametrize(
    ("now", "left"),
    [(CUT, {INO}), ("running", {INO}), (SLEEP, set()), ("", set()), ("-1 0x1", set())],
)
def test_it_is_done_once_the_thread_waits_elsewhere(scene: Scene, now: str, left: set[int]) -> None:
    scene.answer(1)
    assert scene.unfinished() == {INO}
    scene.calls[1] = now
    assert scene.unfinished() == left
    scene.calls[1] = "running"
    assert scene.unfinished() == left, "what was proven stays proven"


def test_before_its_call_was_read_nothing_is_proven(scene: Scene) -> None:
    attr = Attr(Ino(INO), 0, 0o100644, 1, 0, 0, 0, 0, 8, 0, 0, 0)
    look = scene.replies.to_act_on(1, attr)
    scene.calls[1] = SLEEP
    assert scene.unfinished() == {INO}
    assert look is not None


def test_a_thread_that_does_not_wait_yet_is_looked_at_again(scene: Scene) -> None:
    """Seen running, its very call would look like another one as soon as it waits."""
    seen = [proc.RUNNING, proc.RUNNING, CUT]
    replies = Replies(scene.mapped.__contains__, lambda _tid: seen.pop(0) if seen else CUT)
    attr = Attr(Ino(INO), 0, 0o100644, 1, 0, 0, 0, 0, 8, 0, 0, 0)
    look = replies.to_act_on(1, attr)
    assert look is not None
    look()
    assert seen == []
    askers = replies.askers()
    assert replies.unfinished(askers, replies.over(askers)) == {INO}


def test_one_that_never_waits_is_over_when_it_is_gone(scene: Scene) -> None:
    scene.calls[1] = proc.RUNNING
    scene.answer(1)
    scene.calls[1] = SLEEP
    assert scene.unfinished() == {INO}
    del scene.calls[1]
    assert scene.unfinished() == set()


def test_all_that_have_acted_are_forgotten_at_once_and_others_are_not(scene: Scene) -> None:
    for tid in (1, 2, 3, 4):
        scene.calls[tid] = CUT
        scene.answer(tid, size=tid)
    askers = scene.replies.askers()
    scene.calls |= dict.fromkeys((1, 2, 3), SLEEP)
    over = scene.replies.over(askers)
    # Meanwhile somebody asks, and the file is unmapped and mapped again.
    scene.calls[5] = CUT
    scene.answer(5, size=5)
    assert scene.replies.unfinished(askers, over) == {INO}
    assert [asker.tid for _, asker in scene.replies.askers()] == [4, 5]
    scene.mapped.clear()
    scene.answer(4)
    assert scene.replies.unfinished(askers, over) == {INO}
    assert scene.replies.askers() == []


def test_nothing_is_kept_of_files_that_nobody_maps_any_more(scene: Scene) -> None:
    for ino in (7, 8, 9):
        scene.mapped.add(ino)
        scene.answer(1, ino=ino)
    scene.replies.emptied(9)
    scene.mapped -= {8, 9}
    scene.replies.forget_unmapped()
    assert [ino for ino, _ in scene.replies.askers()] == [7]
    assert scene.replies.serials == {7: 1}
    assert scene.replies._told.keys() == {7}


def test_who_asks_again_has_acted_on_the_answer_before(scene: Scene) -> None:
    scene.answer(1)
    scene.answer(2, size=0)
    scene.calls[1] = SLEEP
    scene.answer(2, size=1)
    assert scene.unfinished() == {INO}
    scene.calls[2] = SLEEP
    assert scene.unfinished() == set()


def test_proc_tells_which_call_a_thread_waits_in() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            wait_until("it sleeps", lambda: proc.call_of(process.pid).startswith("230 "))
            assert len(proc.call_of(process.pid).split()) == 9
            assert proc.in_system_call(process.pid) is True
        finally:
            process.kill()
    assert proc.call_of(process.pid) == ""
