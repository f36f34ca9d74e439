"""Work that may wait in the kernel for ever, done by a child that can be left behind.

A thread would not do: a process ends with the last of its threads only, and what waits
uninterruptibly does not end.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from xipfs.errors import XipfsError


class TookTooLongError(XipfsError):
    """Something in the kernel did not answer."""


def within(timeout_s: float, what: str, work: Callable[[], Any]) -> Any:
    """Return what ``work`` returns in a child, which JSON can hold.

    Raises TookTooLongError after ``timeout_s``; the child is killed, which it may notice late.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        _work(sender, work)
    os.close(sender)
    told, deadline_s = b"", time.monotonic() + timeout_s
    try:
        while select.select([receiver], [], [], max(deadline_s - time.monotonic(), 0))[0]:
            piece = os.read(receiver, 1 << 16)
            if not piece:
                os.waitpid(child, 0)
                try:
                    return json.loads(told)
                except ValueError:  # nothing, or the half of it
                    raise XipfsError(f"{what} failed: its process ended") from None
            told += piece
    finally:
        os.close(receiver)
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, os.WNOHANG)
    raise TookTooLongError(f"{what} took longer than {timeout_s:g} s")


def _work(sender: int, work: Callable[[], Any]) -> None:
    """Do the work and end the process, whatever comes of it."""
    status = 1
    try:
        told = json.dumps(work()).encode()
        with os.fdopen(sender, "wb") as pipe:
            pipe.write(told)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
