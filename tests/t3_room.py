"""Room that is about to come back: who waits for it, for how long, and who does not."""

from __future__ import annotations

import errno
from typing import cast

import pytest
import trio

from xipfs.errors import FsError, NoBlocksError
from xipfs.fs.filesystem import Filesystem
from xipfs.fuse.room import Room, with_room


class Files:
    """What has no name any more and is still held."""

    def __init__(self, *inos: int) -> None:
        self.gone = list(inos)
        self.opened: set[int] = set()
        self.room = Room(cast(Filesystem, self), lambda: self.opened)

    def orphans(self, count: int) -> list[int]:
        return self.gone[:count]


class Caller:
    """A request that finds no room, until the files have gone."""

    def __init__(self, files: Files, error: FsError) -> None:
        self.room = files.room
        self.files = files
        self.error = error
        self.tries = 0

    @with_room
    async def call(self) -> str:
        self.tries += 1
        if self.files.gone:
            raise self.error
        return "done"


async def test_a_call_is_made_again_when_what_was_removed_has_gone() -> None:
    files = Files(7)
    caller = Caller(files, NoBlocksError())

    async def forget() -> None:
        await trio.sleep(0.02)
        files.gone.clear()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(forget)
        assert await caller.call() == "done"
    assert caller.tries == 2


async def test_nobody_waits_for_what_is_open_or_for_nothing() -> None:
    files = Files(7)
    files.opened = {7}
    start_s = trio.current_time()
    for _ in range(2):
        assert not await files.room.comes(start_s)
        files.gone.clear()
    assert trio.current_time() - start_s < 0.05


async def test_what_somebody_holds_for_good_is_given_up() -> None:
    caller, start_s = Caller(Files(7), NoBlocksError()), trio.current_time()
    with pytest.raises(NoBlocksError):
        await caller.call()
    assert caller.tries == 1
    assert 0.09 < trio.current_time() - start_s < 5


async def test_a_forget_that_has_come_is_waited_for_longer() -> None:
    """Charging the faults so far comes before the drop, and can take its time."""
    files = Files(7)
    caller = Caller(files, NoBlocksError())

    async def forget() -> None:
        with files.room.going(7), files.room.going(7):
            await trio.sleep(0.25)
            files.gone.clear()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(forget)
        assert await caller.call() == "done"
    with pytest.raises(NoBlocksError):
        await Caller(Files(7), NoBlocksError()).call()


async def test_others_that_come_and_go_keep_nobody_waiting_for_ever() -> None:
    files = Files(7)
    caller, start_s = Caller(files, NoBlocksError()), trio.current_time()

    async def churn() -> None:
        ino = 7
        while True:
            await trio.sleep(0.005)
            ino += 1
            files.gone[:] = [ino]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(churn)
        with pytest.raises(NoBlocksError):
            await caller.call()
        assert 0.9 < trio.current_time() - start_s < 5
        nursery.cancel_scope.cancel()


async def test_what_no_removal_can_help_is_not_tried_again() -> None:
    caller = Caller(Files(7), FsError(errno.ENOSPC))
    with pytest.raises(FsError):
        await caller.call()
    assert caller.tries == 1
