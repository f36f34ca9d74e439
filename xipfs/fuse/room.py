"""Room that is about to come back: what a full image says to a call right after a removal.

A removed file keeps its blocks until the kernel forgets it, and FUSE sends FORGET after unlink(2)
has returned. So a program that removes a file to make room and writes at once could meet ENOSPC on
an image that has the room. A call that finds none therefore waits, for as long as something
removed is on its way out, and is made again when room came.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeVar

import trio

from xipfs.errors import FsError
from xipfs.fs.filesystem import Filesystem

#: The kernel sends FORGET within a millisecond or so. What takes longer has another holder than an
#: open file (somebody's working directory) and may stay for good.
_WAIT_MAX_S: Final = 0.1
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

    def _leaving(self) -> set[int]:
        return set(self._fs.orphans(_LOOKED_AT)) - self._open_inodes()

    async def comes(self) -> bool:
        """Wait while something removed is on its way out; return whether some of it went."""
        before, give_up_s = self._leaving(), trio.current_time() + _WAIT_MAX_S
        while before and trio.current_time() < give_up_s:
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
    """Make the call again for as long as it ends in ENOSPC and room comes back.

    For calls that have changed nothing when they raise.
    """

    @functools.wraps(method)
    async def patient(self: _S, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        while True:
            try:
                return await method(self, *args, **kwargs)
            except FsError as error:
                if error.errno != errno.ENOSPC or not await self.room.comes():
                    raise

    return patient  # type: ignore[return-value]  # wraps() hides that self stays first
