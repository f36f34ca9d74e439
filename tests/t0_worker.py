"""The thread that makes blocking calls: results, errors, who runs meanwhile, and on which CPU."""

from __future__ import annotations

import os
import threading
import time

import pytest
import trio

from xipfs.fuse.worker import PATIENCE_S, Worker


async def test_results_and_errors_come_back_in_order() -> None:
    worker = Worker("test")
    assert [await worker.run(divmod, number, 3) for number in (7, 8)] == [(2, 1), (2, 2)]
    with pytest.raises(ZeroDivisionError):
        await worker.run(divmod, 1, 0, short=True)
    assert await worker.run(threading.get_native_id) == await worker.run(threading.get_native_id)
    assert await worker.run(threading.get_native_id) != threading.get_native_id()


@pytest.mark.parametrize("short", [False, True])
async def test_others_run_while_a_call_takes_long(short: bool) -> None:
    """As it may where the kernel waits for a request that this thread serves."""
    worker, served = Worker("test"), threading.Event()

    async def serve() -> None:
        await trio.sleep(PATIENCE_S)
        served.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        assert await worker.run(served.wait, 20, short=short)


async def test_a_short_call_has_the_callers_processor_and_any_other_its_own() -> None:
    worker, allowed = Worker("test"), os.sched_getaffinity(0)
    assert await worker.run(os.sched_getaffinity, 0) == allowed
    try:
        for cpu in allowed:
            os.sched_setaffinity(0, {cpu})
            assert await worker.run(os.sched_getaffinity, 0, short=True) == {cpu}
            assert await worker.run(os.sched_getaffinity, 0, short=True) == {cpu}
        assert await worker.run(os.sched_getaffinity, 0) == allowed
    finally:
        os.sched_setaffinity(0, allowed)


async def test_where_the_processor_is_not_to_be_had_the_call_is_made_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_tid: int, _cpus: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("os.sched_setaffinity", refuse)
    worker = Worker("test")
    start_s = time.monotonic()
    assert await worker.run(abs, -3, short=True) == 3
    assert time.monotonic() - start_s < 20
