"""An end to a policy's code that does not return.

A policy is called in the daemon's one thread, so that its plans follow from the order of events
alone. As long as it computes, no request is served: one that never ended would hang every program
on the mount. An interval timer interrupts it; what it raises ends the policy, not the mount.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Final

from xipfs.migrate.registry import PolicyTimeout

#: Far longer than a decision takes on a busy machine, and short of what a user calls hung.
LIMIT_S: Final = 3.0
#: A policy that goes on regardless is interrupted again after so long.
_AGAIN_S: Final = 0.1


class Patience:
    """``with`` it, a policy is called; of the main thread only, where signals are handled."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._inside = False
        signal.signal(signal.SIGALRM, self._alarm)

    def __enter__(self) -> None:
        assert not self._inside, "a policy within a policy"
        self._inside = True
        signal.setitimer(signal.ITIMER_REAL, self._limit_s, _AGAIN_S)

    def __exit__(self, *_: object) -> None:
        self._inside = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _alarm(self, _number: int, frame: FrameType | None) -> None:
        if self._inside and (frame is None or frame.f_code not in _OWN):
            raise PolicyTimeout(f"it took more than {self._limit_s:g} s for one decision")


#: Where an alarm must raise nothing: the policy's call has not begun yet, or has ended.
_OWN: Final = {Patience.__enter__.__code__, Patience.__exit__.__code__}
