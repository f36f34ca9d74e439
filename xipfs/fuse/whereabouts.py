"""Where the daemon stands: what SIGUSR1 has it write into its log.

A mount that answers nothing cannot be asked through its control directory, and a debugger shows
the loop of trio and not what waits in it. So for each task the places in the source are told at
which it waits, the innermost last, as in a traceback; and for each thread where it is. (Where the
kernel keeps a thread is in /proc/PID/task/TID/stack.)
"""

from __future__ import annotations

import gc
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any, Final

import trio

log = logging.getLogger(__name__)


def tell_on_signal() -> None:
    """Have SIGUSR1 tell; to be called in the main thread, within trio's run."""
    root = trio.lowlevel.current_root_task()
    assert root is not None

    def tell(_number: int, _frame: FrameType | None) -> None:
        log.info("SIGUSR1:\n%s", "\n".join([*_tasks(root), *threads()]))

    signal.signal(signal.SIGUSR1, tell)


def _tasks(task: trio.lowlevel.Task) -> Iterator[str]:
    # trio's own (its init task and run-sync-soon) are told too: what hangs may be there.
    yield f"task {task.name}"
    yield from _awaited(task.coro)
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield from _tasks(child)


def _awaited(waiting: Any) -> Iterator[str]:
    """Tell the places of what waits, from the outermost to the innermost.

    Like trio's ``iter_await_frames``, which ends at the first compiled coroutine: a request handler
    is called by one.
    """
    while waiting is not None:
        for frame_of, awaited_of in _WAITS:
            if hasattr(waiting, frame_of):
                frame = getattr(waiting, frame_of)
                yield _place(frame, frame.f_lineno)
                waiting = getattr(waiting, awaited_of)
                break
        else:
            # What ``__await__`` of a coroutine returns, or a step of an asynchronous generator.
            waiting = next(filter(_is_waiting, gc.get_referents(waiting)), None)


#: Coroutines, generators and asynchronous generators: their frame, and what they wait for.
_WAITS: Final = (("cr_frame", "cr_await"), ("gi_frame", "gi_yieldfrom"), ("ag_frame", "ag_await"))


def _is_waiting(thing: object) -> bool:
    return any(hasattr(thing, frame_of) for frame_of, _ in _WAITS)


def threads() -> Iterator[str]:
    """Yield each thread's name and where it is."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, innermost in sys._current_frames().items():
        yield f"thread {names.get(ident, ident)}"
        for frame, line in reversed([*traceback.walk_stack(innermost)]):
            yield _place(frame, line)


def _place(frame: FrameType, line: int) -> str:
    return f"  {frame.f_code.co_filename}:{line} {frame.f_code.co_qualname}"
