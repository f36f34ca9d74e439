"""The work that no request waits for: a defect in it must neither end the mount nor go unseen.

An exception that leaves a task leaves trio's nursery, and with it the mount of every user. So each
task runs under ``keep``: what is raised is logged, counted (``background`` in the statistics), and
the task begins again, after a pause that grows while it fails. Nothing of the filesystem depends on
one of them: a page whose write-back failed stays dirty, and the next fsync, eviction or unmount
writes it, and answers with the error if it cannot.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio

from xipfs.errors import ImageError
from xipfs.fs.filesystem import Filesystem
from xipfs.fuse.translate import tell_damage

log = logging.getLogger(__name__)

_PAUSE_MIN_S: Final = 1.0
#: So a task that always fails writes a line a minute.
_PAUSE_MAX_S: Final = 60.0


class Background:
    """The tasks of one mount and what failed in them; used from the trio thread."""

    def __init__(self, fs: Filesystem) -> None:
        self._fs = fs
        self._failures: Counter[str] = Counter()
        self._last = ""

    def start(
        self,
        nursery: trio.Nursery,
        task: str,
        function: Callable[..., Awaitable[None]],
        *arguments: Any,
    ) -> None:
        """Begin a task of that name."""
        nursery.start_soon(self._keep, task, function, *arguments)

    async def _keep(
        self, task: str, function: Callable[..., Awaitable[None]], *arguments: Any
    ) -> None:
        pause_s = _PAUSE_MIN_S
        while True:
            began_s = trio.current_time()
            try:
                await function(*arguments)
                return
            except Exception as error:
                self.failed(task, error)
            if trio.current_time() - began_s > _PAUSE_MAX_S:
                pause_s = _PAUSE_MIN_S
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_MAX_S)

    def failed(self, task: str, error: Exception) -> None:
        """Log and count a failure; comes while ``error`` is handled.

        Damage of the image is no defect: it is told as a request's is.
        """
        if isinstance(error, ImageError):
            tell_damage(self._fs, error)
            return
        self._failures[task] += 1
        self._last = f"{task}: {error!r}"
        log.exception("background task %r failed; the mount goes on", task)

    def describe(self) -> dict[str, Any]:
        """Return the failures by task, and the last one."""
        return {"failures": dict(self._failures), "last_error": self._last}
