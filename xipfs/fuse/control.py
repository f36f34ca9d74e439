"""The control directory ``.xipfs``: a mount's figures and its command channel, as files.

``.xipfs`` is found by name in the root and listed nowhere. Its files are opened with direct I/O, so
the kernel caches nothing of them:

- ``stats.json``: one consistent snapshot, taken when the file is opened; ``metrics``: the same
  as OpenMetrics text, with the pages that migrated most.
- ``pages.INO.json``, ``hottest.N.json`` and others (``Live.questions``): questions with a number in
  their name, answered the same way (and so on a read-only mount too).
- ``control``, for what changes something: write one JSON object ``{"op": NAME, ...}``, then read
  JSON lines until the end of file; the last has ``"result"`` or ``"error"``, those before it
  ``"progress"``. When the last was read, another request may be written. A ``migrate`` with
  ``"brief": true`` is answered by the write itself: it returns when the pages have moved, fails
  with the errno of those that were refused (as ``failed_errno`` tells it) or of the whole request,
  and leaves nothing to read. For the move of one page that saves one of two trips to the daemon.

Files instead of a socket: whoever can see the mount can reach them, from any mount namespace, and
permissions are the kernel's (owner only). The write returns with the first answer; what is left of
a request runs in its own task, and closing the file cancels it at its next step.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import stat
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

import pyfuse3
import trio

from xipfs.errors import FsError, UsageError, XipfsError
from xipfs.stats.openmetrics import openmetrics

log = logging.getLogger(__name__)

CONTROL_NAME: Final = b".xipfs"
#: Far above any inode number an image can have (the format ends below 2**48).
DIR_INO: Final = 1 << 62
STATS_INO: Final = DIR_INO + 1
COMMAND_INO: Final = DIR_INO + 2
METRICS_INO: Final = DIR_INO + 3
_FILES: Final = {b"stats.json": STATS_INO, b"control": COMMAND_INO, b"metrics": METRICS_INO}
#: A question's inode number is this, its place in the list of questions, and its number.
_QUESTION_SHIFT: Final = 52
_QUESTION_RE: Final = re.compile(rb"([a-z]+)\.([1-9][0-9]{0,14})\.json")
MAX_REQUEST_BYTES: Final = 128 << 10
#: A command that has this many answers unread waits for its reader.
_ANSWERS_WAITING_MAX: Final = 16
#: A client reads its answer within some 20 microseconds of its write's return.
_STAND_BY_S: Final = 0.0001

Json = dict[str, Any]
#: Runs one request; yields progress objects and, last, the result.
Command = Callable[[Json], AsyncGenerator[Json, None]]
#: Answers the question that has this number in its name.
Question = Callable[[int], Awaitable[Json]]


@dataclass
class Snapshot:
    """An open ``stats.json``: fixed bytes."""

    data: bytes

    async def read(self, offset: int, size: int) -> bytes:
        """Return a slice of the snapshot."""
        return self.data[offset : offset + size]

    async def write(self, data: bytes) -> int:
        """Refuse: the file only tells."""
        raise FsError(errno.EACCES)

    def close(self) -> None:
        """Nothing is held."""


class Conversation:
    """An open ``control``: one request after the other, each with the stream of its answers."""

    def __init__(self, commands: Mapping[str, Command], nursery: trio.Nursery) -> None:
        self._commands = commands
        self._nursery = nursery
        self._running = False
        self._answers: deque[bytes] = deque()
        self._scope = trio.CancelScope()
        # Set when an answer came, was taken, or the request is over; there while somebody waits.
        self._changed: trio.Event | None = None

    async def write(self, data: bytes) -> int:
        """Start a request, return with its first answer; refused until the last one was read.

        A brief request is over by then, and leaves none to read.

        Most requests have one answer. Waited for here instead of in the READ that follows, a move
        of one page takes a tenth less time: no task, and no READ to be served meanwhile.
        """
        if self._running or self._answers:
            raise FsError(errno.EBUSY)
        if len(data) >= MAX_REQUEST_BYTES:
            raise FsError(errno.E2BIG)
        self._running = True
        brief = False
        try:
            request = json.loads(data)
            brief = isinstance(request, dict) and bool(request.get("brief"))
            answers = self._answers_to(request)
        except Exception as error:
            answers = _refused(error)
        if brief:
            await self._carry_out(answers)
            return len(data)
        await self._take(answers)
        if self._running:
            self._scope = trio.CancelScope()
            self._nursery.start_soon(self._take_others, answers)
        elif len(os.sched_getaffinity(0)) > 1:
            self._nursery.start_soon(self._stand_by)
        return len(data)

    async def _stand_by(self) -> None:
        """Keep the loop from sleeping for a moment, until the answer is read.

        That READ comes at once, and a processor that sleeps takes longer to be woken. (Where there
        is but one the reader needs it.)
        """
        end_s = trio.current_time() + _STAND_BY_S
        while self._answers and trio.current_time() < end_s:
            await trio.lowlevel.checkpoint()

    async def _carry_out(self, answers: AsyncGenerator[Json, None]) -> None:
        """Take all answers; raise FsError with the errno that the last one tells of."""
        try:
            async with aclosing(answers):
                last: Json = {}
                while "error" not in last and (answer := await _next(answers)) is not None:
                    last = answer
        finally:
            self._running = False
            self._change()
        if "error" in last:
            raise FsError(last["errno"], last["error"])
        for name in last.get("result", {}).get("failed_errno", {}).values():
            raise FsError(getattr(errno, name))

    async def _take(self, answers: AsyncGenerator[Json, None]) -> None:
        """Queue the next answer; with the last one the next request may come."""
        more = False
        try:
            answer = await _next(answers)
            if answer is not None:
                self._answers.append(_encoded(answer))
                more = not ("result" in answer or "error" in answer)
        finally:
            self._running = more
            self._change()
            if not more:
                await answers.aclose()

    async def _take_others(self, answers: AsyncGenerator[Json, None]) -> None:
        try:
            with self._scope:
                async with aclosing(answers):
                    while self._running:
                        while len(self._answers) >= _ANSWERS_WAITING_MAX:
                            await self._change_to_come()
                        await self._take(answers)
        except Exception:
            # This task runs beside the mount's own; what left it would end them all.
            log.exception("an answer of the control file could not be sent")
        if self._running:
            self._running = False
            self._change()

    def _change(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    async def _change_to_come(self) -> None:
        if self._changed is None:
            self._changed = trio.Event()
        await self._changed.wait()

    def _answers_to(self, request: object) -> AsyncGenerator[Json, None]:
        """Return the answers of the command that ``request`` asks for."""
        if not isinstance(request, dict) or request.get("op") not in self._commands:
            raise UsageError(
                "the control file got a request it does not know",
                expected='{"op": NAME}, NAME one of ' + ", ".join(sorted(self._commands)),
            )
        if request.get("brief") and request["op"] != "migrate":
            raise UsageError(f"a brief {request['op']}", expected="a brief migrate only")
        return self._commands[request["op"]](request)

    async def read(self, offset: int, size: int) -> bytes:
        """Return the next answers; empty at their end."""
        while not self._answers and self._running:
            await self._change_to_come()
        if not self._answers:
            return b""
        data = self._answers.popleft()
        if len(data) > size:
            self._answers.appendleft(data[size:])
        self._change()
        return data[:size]

    def close(self) -> None:
        """Stop a request whose client went away."""
        self._scope.cancel()


async def _refused(error: Exception) -> AsyncGenerator[Json, None]:
    yield _refusal(error)


async def _next(answers: AsyncGenerator[Json, None]) -> Json | None:
    """Return the next answer, which tells of the error that comes in its place; None at the end."""
    try:
        return await anext(answers, None)
    except Exception as error:
        return _refusal(error)


def _refusal(error: Exception) -> Json:
    """Return what is answered where a request fails."""
    if isinstance(error, XipfsError):
        return {"error": str(error), "errno": error.errno, "exit_code": error.exit_code}
    if isinstance(error, ValueError | KeyError | TypeError | OverflowError | RecursionError):
        return {"error": f"malformed request: {error!r}", "errno": errno.EINVAL, "exit_code": 2}
    log.error("control request failed", exc_info=error)
    return {"error": f"internal error: {error!r}", "errno": errno.EIO, "exit_code": 1}


def _encoded(answer: Json) -> bytes:
    return json.dumps(answer).encode() + b"\n"


ControlHandle = Snapshot | Conversation


class ControlTree:
    """The inodes of ``.xipfs`` and what opening them does."""

    def __init__(
        self,
        *,
        uid: int,
        gid: int,
        now_ns: int,
        snapshot: Callable[[], Awaitable[Json]],
        metrics: Callable[[], Awaitable[Json]],
        questions: Mapping[str, Question],
        commands: Mapping[str, Command],
        nursery: trio.Nursery,
    ) -> None:
        self._uid = uid
        self._gid = gid
        self._now_ns = now_ns
        self._snapshot = snapshot
        self._metrics = metrics
        self._questions = list(questions.items())
        self._commands = commands
        self._nursery = nursery

    def owns(self, ino: int) -> bool:
        """Return whether ``ino`` is a control inode."""
        return ino >= DIR_INO

    def lookup(self, parent: int, name: bytes) -> pyfuse3.EntryAttributes | None:
        """Return the entry if the name is a control file's, None if the image must be asked."""
        if parent == pyfuse3.ROOT_INODE and name == CONTROL_NAME:
            return self.getattr(DIR_INO)
        if parent != DIR_INO:
            return None
        if name in _FILES:
            return self.getattr(_FILES[name])
        match = _QUESTION_RE.fullmatch(name)
        for place, (question, _) in enumerate(self._questions, 1):
            if match and match[1] == question.encode() and int(match[2]) < 1 << _QUESTION_SHIFT:
                return self.getattr(DIR_INO | place << _QUESTION_SHIFT | int(match[2]))
        raise FsError(errno.ENOENT)

    def getattr(self, ino: int) -> pyfuse3.EntryAttributes:
        """Return the attributes; never cached."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(ino)
        entry.entry_timeout = entry.attr_timeout = 0
        mode = stat.S_IFDIR | 0o500 if ino == DIR_INO else stat.S_IFREG | 0o400
        entry.st_mode = pyfuse3.ModeT(mode | 0o200 if ino == COMMAND_INO else mode)
        entry.st_nlink = 2 if ino == DIR_INO else 1
        entry.st_uid, entry.st_gid = self._uid, self._gid
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._now_ns
        return entry

    def readdir(self, cookie: int, token: pyfuse3.ReaddirToken) -> None:
        """List the control files (of ``.xipfs`` itself; the root does not list ``.xipfs``)."""
        for position, (name, ino) in enumerate(_FILES.items()):
            if position >= cookie and not pyfuse3.readdir_reply(
                token, pyfuse3.FileNameT(name), self.getattr(ino), position + 1
            ):
                return

    async def open(self, ino: int) -> ControlHandle:
        """Open a control file; ``stats.json`` takes its snapshot here."""
        if ino == STATS_INO:
            return _snapshot_of(await self._snapshot())
        if ino == METRICS_INO:
            return Snapshot(openmetrics(await self._metrics()).encode())
        if ino == COMMAND_INO:
            return Conversation(self._commands, self._nursery)
        place = (ino ^ DIR_INO) >> _QUESTION_SHIFT
        if place == 0:
            raise FsError(errno.EISDIR)
        _, answer = self._questions[place - 1]
        return _snapshot_of(await answer(ino & (1 << _QUESTION_SHIFT) - 1))


def _snapshot_of(answer: Json) -> Snapshot:
    return Snapshot(json.dumps(answer, indent=2).encode() + b"\n")
