"""The control file's standing by for its reader, without a mount."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator

import pytest
import trio
import trio.testing

from xipfs.fuse.control import Conversation, Json


async def answer(_request: Json) -> AsyncGenerator[Json, None]:
    yield {"result": {}}


@pytest.mark.parametrize(("processors", "tasks"), [({0}, 0), ({0, 5}, 1)])
@pytest.mark.parametrize("reads", [True, False])
def test_it_ends_when_the_answer_is_read_and_soon_when_it_is_not(
    monkeypatch: pytest.MonkeyPatch, processors: set[int], tasks: int, reads: bool
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: processors)
    clock = trio.testing.MockClock()

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            conversation = Conversation({"x": answer}, nursery)
            await conversation.write(b'{"op": "x"}')
            assert len(nursery.child_tasks) == tasks
            for _ in range(5):
                await trio.lowlevel.checkpoint()
            assert len(nursery.child_tasks) == tasks
            if reads:
                assert await conversation.read(0, 100) == b'{"result": {}}\n'
            else:
                clock.jump(0.00011)
            for _ in range(2):
                await trio.lowlevel.checkpoint()
            assert len(nursery.child_tasks) == 0

    trio.run(run, clock=clock)
