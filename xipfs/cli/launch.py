"""One program, started but held before its first instruction until somebody is ready for it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Final, Self

NOT_FOUND: Final = 127
NOT_EXECUTABLE: Final = 126
#: What Python ignores, and a program must not inherit ignored.
_IGNORED_BY_PYTHON: Final = (signal.SIGPIPE, signal.SIGXFSZ)


class Launched:
    """A child process with ``pid``; it executes the command at ``release``.

    ``exit_status`` is as a shell's: 128 and the number of a signal, 127 if the command was not
    found, 126 if it could not be executed; in the last two cases ``failure`` says why.

    While it runs, Ctrl-C at the terminal is its own affair, and SIGTERM is passed on to it. Left
    without a release it ends without having executed anything.
    """

    def __init__(self, command: list[str], environment: Mapping[str, str] | None) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        gate, self._gate = os.pipe2(os.O_CLOEXEC)
        self._answer, answer = os.pipe2(os.O_CLOEXEC)
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._gate)  # or the gate would stay open when the parent dies
            _become(gate, answer, command, os.environ if environment is None else environment)
        os.close(gate)
        os.close(answer)
        self.failure = ""
        self._pidfd = os.pidfd_open(self.pid)
        self._released = False
        self.exit_status = 0
        self._name = command[0]
        self._ended = False
        self._handlers = {
            signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._pass_on),
        }

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def release(self) -> None:
        """Let it execute the command; further calls do nothing."""
        if not self._released:
            self._released = True
            os.write(self._gate, b"1")
            os.close(self._gate)

    def wait(self, timeout_s: float | None) -> bool:
        """Return whether it has ended, after ``timeout_s`` at most; sets ``exit_status``."""
        if not self._ended and select.select([self._pidfd], [], [], timeout_s)[0]:
            _, status = os.waitpid(self.pid, 0)
            code = os.waitstatus_to_exitcode(status)
            self.exit_status = code if code >= 0 else 128 - code
            if number := os.read(self._answer, 16):
                self.failure = f"{self._name}: {os.strerror(int(number))}"
            self._ended = True
        return self._ended

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if not self._released:
            os.close(self._gate)
        self.wait(None)
        os.close(self._pidfd)
        os.close(self._answer)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def _become(gate: int, answer: int, command: list[str], environment: Mapping[str, str]) -> None:
    """In the child: wait, then be the command. Never returns."""
    code = NOT_EXECUTABLE
    try:
        if os.read(gate, 1):
            for number in (signal.SIGINT, signal.SIGTERM, *_IGNORED_BY_PYTHON):
                # What our own parent had us ignore (a shell's background), the program ignores too.
                inherited = signal.getsignal(number) is signal.SIG_IGN
                if number in _IGNORED_BY_PYTHON or not inherited:
                    signal.signal(number, signal.SIG_DFL)
            os.execvpe(command[0], command, environment)
    except OSError as error:
        os.write(answer, str(error.errno).encode())
        code = NOT_FOUND if isinstance(error, (FileNotFoundError, NotADirectoryError)) else code
    finally:
        os._exit(code)
