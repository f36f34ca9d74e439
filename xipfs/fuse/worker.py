"""One thread that makes blocking calls for the trio thread, one after the other.

trio's own worker threads do the same for many calls at once, and cost about three times as much a
call (a cache of threads, names, contexts): for one page's migration that is most of its time.

Most calls take some ten microseconds, less than the way through trio's loop and back, on which the
two threads are in each other's way (the interpreter's lock). So the trio thread stands still for a
call, but only for ``PATIENCE_S``: what the call may wait for is a request that this thread serves.

A processor that sleeps takes long to be woken, in a virtual machine longer than such a call takes.
Since the caller stands still, a call that is known to be short can have the caller's processor.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

import trio

T = TypeVar("T")
#: As long as a request or two take that others wait for meanwhile.
PATIENCE_S: Final = 0.0002
#: PyDLL: it takes no time, so the interpreter's lock is kept.
_getcpu: Final = ctypes.PyDLL(None).sched_getcpu


@dataclass
class _Call(Generic[T]):
    """A call on its way through the thread."""

    function: Callable[..., T]
    arguments: tuple[Any, ...]
    finished: threading.Lock = field(default_factory=threading.Lock)
    """Held until it is."""
    awaited: bool = False
    """Whether trio's loop must be told of its end."""
    done: bool = False
    result: T | None = None
    error: BaseException | None = None

    def make(self) -> None:
        try:
            self.result = self.function(*self.arguments)
        except BaseException as error:
            self.error = error
        self.done = True
        self.finished.release()


class Turn:
    """A lock. Where it is free, ``async with`` costs no turn of the loop, as trio's own does."""

    def __init__(self) -> None:
        self._lock = trio.Lock()

    def taken(self) -> bool:
        """Return whether somebody holds it."""
        return self._lock.locked()

    async def __aenter__(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()


class Worker:
    """The thread; it lives as long as the process, and never keeps the process alive."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[_Call[Any]] = queue.SimpleQueue()
        self._done_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._turn = Turn()
        self._processors = os.sched_getaffinity(0)
        #: The processor that it is kept on, or None.
        self._kept_on: int | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def run(self, function: Callable[..., T], *arguments: Any, short: bool = False) -> T:
        """Return what ``function`` returns in the thread; what it raises is raised here.

        A call that has begun is waited for, also by a task that was cancelled meanwhile. No
        checkpoint: who calls many times in a row lets others run in between. A ``short`` call has
        the caller's processor, any other its own.
        """
        async with self._turn:
            self._keep_on(_getcpu() if short else None)
            call = _Call(function, arguments)
            call.finished.acquire()
            self._calls.put(call)
            if not call.finished.acquire(timeout=PATIENCE_S):
                await self._wait_for(call)
        if call.error is not None:
            raise call.error
        return call.result  # type: ignore[return-value]  # set when done and without error

    def _keep_on(self, processor: int | None) -> None:
        if processor == self._kept_on:
            return
        allowed = self._processors if processor is None else {processor}
        # Where that is not to be had it runs anywhere.
        with contextlib.suppress(OSError):
            assert self._thread.native_id is not None
            os.sched_setaffinity(self._thread.native_id, allowed)
            self._kept_on = processor

    async def _wait_for(self, call: _Call[Any]) -> None:
        # Either we see here that it is done, or the thread sees that it is awaited.
        call.awaited = True
        with trio.CancelScope(shield=True):
            while not call.done:
                await trio.lowlevel.wait_readable(self._done_fd)
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._done_fd)

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            call.make()
            if call.awaited:
                os.eventfd_write(self._done_fd, 1)
