"""Room that is about to come back: what a full image says to a call right after a removal.

A removed file keeps its blocks until the kernel forgets it, and FUSE sends FORGET after unlink(2)
has returned. So a program that removes a file to make room and writes at once could meet ENOSPC on
an image that has the room. A call that finds none therefore waits, for as long as something
removed is on its way out, and is made again when room came.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeVar

import trio

from xipfs.errors import NoBlocksError
from xipfs.fs.filesystem import Filesystem

#: The kernel sends FORGET within a millisecond or so. What takes longer has another holder than an
#: open file (somebody's working directory) and may stay for good.
_WAIT_MAX_S: Final = 0.1
#: For all that one call waits, while others remove and take.
_CALL_MAX_S: Final = 1.0
_PAUSE_S: Final = 0.001
#: What was removed last is looked at first; so many tell whether room is coming.
_LOOKED_AT: Final = 64

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Room:
    """Knows whether something removed is on its way out of ``fs``.

    ``open_inodes`` tells what somebody has open: nobody knows when that will go.
    """

    def __init__(self, fs: Filesystem, open_inodes: Callable[[], set[int]]) -> None:
        self._fs = fs
        self._open_inodes = open_inodes
        #: Inodes whose FORGET or RELEASE has come, and is being carried out.
        self._going: Counter[int] = Counter()

    @contextmanager
    def going(self, ino: int) -> Iterator[None]:
        """A reference to ``ino`` is being given up."""
        self._going[ino] += 1
        try:
            yield
        finally:
            self._going[ino] -= 1
            if not self._going[ino]:
                del self._going[ino]

    def _leaving(self) -> set[int]:
        return set(self._fs.orphans(_LOOKED_AT)) - self._open_inodes()

    async def comes(self, began_s: float) -> bool:
        """Wait while something removed is on its way out; return whether some of it went.

        ``began_s``: when the call began that needs it (trio's time).
        """
        before, end_s = self._leaving(), began_s + _CALL_MAX_S
        give_up_s = min(trio.current_time() + _WAIT_MAX_S, end_s)
        while before and (
            trio.current_time() < give_up_s
            or (before & self._going.keys() and trio.current_time() < end_s)
        ):
            await trio.sleep(_PAUSE_S)
            if before - self._leaving():
                return True
        return False


class NeedsRoom(Protocol):
    """Somebody whose calls need room in the image."""

    room: Room


_S = TypeVar("_S", bound=NeedsRoom)


def with_room(
    method: Callable[Concatenate[_S, _P], Coroutine[Any, Any, _R]],
) -> Callable[Concatenate[_S, _P], Coroutine[Any, Any, _R]]:
    """Make the call again while it finds no free block and room comes back.

    For calls that have changed nothing when they raise.
    """

    @functools.wraps(method)
    async def patient(self: _S, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        began_s = trio.current_time()
        while True:
            try:
                return await method(self, *args, **kwargs)
            except NoBlocksError:
                if not await self.room.comes(began_s):
                    raise

    return patient  # type: ignore[return-value]  # wraps() hides that self stays first
