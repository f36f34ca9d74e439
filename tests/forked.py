"""Daemons forked from a process that has imported xipfs: a mount in a tenth of the time.

The daemon is the same program with the same arguments; only Python's start and the imports are
shared. What kills daemons by the hundred uses this; all other tests start the command.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from live import ENVIRONMENT, LiveMount, is_mounted, wait_until

from xipfs.cli import main as run_xipfs

STUCK_S = 30


class Forker:
    """The process that forks; a context manager."""

    def __enter__(self) -> Forker:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        # The end of its input ends it.
        self._process.communicate(timeout=STUCK_S)

    def fork(self, words: Sequence[str], log: Path, kill_at: int = 0, step: str = "") -> int:
        """Run ``xipfs WORDS``, its log appended to ``log``; return the pid.

        With ``kill_at`` it does not survive that step of a migration, and writes to the file
        ``step`` which one it was.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([list(words), str(log), kill_at, step]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


class ForkedMount(LiveMount):
    """A LiveMount whose daemon is forked."""

    def __init__(
        self,
        forker: Forker,
        image: Path,
        directory: Path,
        options: Sequence[str] = (),
        kill_at: int = 0,
        step: str = "",
    ) -> None:
        self._forker = forker
        self._kill_at, self._step = kill_at, step
        super().__init__(image, directory, options)

    def _start(self, words: Sequence[str]) -> None:
        place = [str(self.image), str(self.directory)]
        # Another process than ours: what waits for the mount must not be what serves it.
        self._forker.fork(["mount", "-f", *words, *place], self.log, self._kill_at, self._step)
        wait_until("the mount", lambda: is_mounted(self.directory), STUCK_S)
        os.stat(self.directory)


def in_process(*words: str | Path) -> tuple[int, str]:
    """Run the command in this process; return its exit code and what it said."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as said,
        contextlib.redirect_stderr(said),
    ):
        code = run_xipfs([str(word) for word in words])
    return code, said.getvalue().strip()


def _serve(words: list[str], log: str, kill_at: int, step: str) -> int:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDWR)
    for target, source in ((0, null), (1, null), (2, descriptor)):
        os.dup2(source, target)
    os.setsid()
    if kill_at:
        import killpoints

        killpoints.arm(kill_at, Path(step))
    return run_xipfs(words)


def _fork_as_told() -> None:
    import killpoints  # noqa: F401  and with it, as the next, what all children need

    import xipfs.daemon

    assert xipfs.daemon
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        words, log, kill_at, step = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = _serve(words, log, kill_at, step)
            finally:
                os._exit(code)
        print(pid, flush=True)


if __name__ == "__main__":
    _fork_as_told()
