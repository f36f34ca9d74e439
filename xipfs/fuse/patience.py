"""An end to a policy's code that does not return.

A policy is called in the daemon's one thread, so that its plans follow from the order of events
alone. As long as it computes, no request is served: one that never ended would hang every program
on the mount. So each call has three limits, each for what the one before cannot end:

- ``LIMIT_S``: an interval timer interrupts it; what that raises ends the policy, not the mount.
- ``STUCK_S``: Python raises nothing in a call that the kernel does not end, as that of a file of
  this mount, which waits for the daemon itself. ``Watchdog``, a thread, sees it and aborts the
  connection: the call fails, the session ends, and the daemon closes the image as ever.
- ``STUCK_S`` of processor time: C code that never returns keeps the interpreter's lock too, and
  no thread sees anything. The kernel ends the daemon, once its log has the stack of each thread;
  the guard (guard.py) then fails what waits. A killed daemon loses nothing that was fsync'ed.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Final

from xipfs.fuse.whereabouts import threads
from xipfs.migrate.registry import PolicyTimeout

log = logging.getLogger(__name__)

#: Far longer than a decision takes on a busy machine, and short of what a user calls hung.
LIMIT_S: Final = 3.0
#: Far longer than an interrupted call takes to end.
STUCK_S: Final = 10.0
#: A policy that goes on regardless is interrupted again after so long.
_AGAIN_S: Final = 0.1
#: Looks of the watchdog that must find the same call. A daemon that was stopped meanwhile
#: (SIGSTOP, a suspended machine) has not been looked at.
_LOOKS: Final = 5
_STDERR: Final = 2


class Patience:
    """``with`` it, a policy is called; of the main thread only, where signals are handled."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._calls = 0
        #: The number of the call that is under way, or 0.
        self.call = 0
        signal.signal(signal.SIGALRM, self._alarm)
        # Where the log goes; by its number, since what is called so may have none.
        faulthandler.register(signal.SIGVTALRM, file=_STDERR, all_threads=True, chain=True)

    def __enter__(self) -> None:
        assert not self.call, "a policy within a policy"
        self._calls += 1
        self.call = self._calls
        signal.setitimer(signal.ITIMER_REAL, self._limit_s, _AGAIN_S)
        signal.setitimer(signal.ITIMER_VIRTUAL, STUCK_S)

    def __exit__(self, *_: object) -> None:
        self.call = 0
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    def _alarm(self, _number: int, frame: FrameType | None) -> None:
        if self.call and (frame is None or frame.f_code not in _OWN):
            raise PolicyTimeout(f"it took more than {self._limit_s:g} s for one decision")


#: Where an alarm must raise nothing: the policy's call has not begun yet, or has ended.
_OWN: Final = {Patience.__enter__.__code__, Patience.__exit__.__code__}


class Watchdog:
    """A thread that ends a policy's call which no alarm ends, by ``abort`` of the connection.

    If that does not end it either, the daemon ends as one whose C code does not return.
    """

    def __init__(
        self, patience: Patience, policy: Callable[[], str], abort: Callable[[], None]
    ) -> None:
        self._patience = patience
        self._policy = policy
        self._abort = abort
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="xipfs-watchdog", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        call = looks = 0
        while not self._ended.wait(STUCK_S / _LOOKS):
            before, call = call, self._patience.call
            looks = looks + 1 if call and call == before else 0
            if looks == _LOOKS:
                log.error(
                    "policy %s does not return: the mount ends, programs on it get errors\n%s",
                    self._policy(),
                    "\n".join(threads()),
                )
                self._abort()
            elif looks == 2 * _LOOKS:
                os.kill(os.getpid(), signal.SIGVTALRM)
