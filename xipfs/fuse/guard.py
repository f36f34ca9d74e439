"""A process beside the daemon that fails what waits for it when it is killed.

The kernel ends a FUSE connection when the last reference to /dev/fuse goes. A daemon that is
killed while one of its threads invalidates dirty pages keeps one: that thread waits, and no signal
ends it, for a WRITE that nobody answers any more; with it wait all programs that asked the mount
for anything, and the image stays locked. Only the connection's ``abort`` file ends that. So a
shell, which costs 1 MiB, waits for the death of the daemon's main thread (PR_SET_PDEATHSIG: a pidfd
tells the end of the last thread only) and writes there. It has opened the file before, which pins
it to this connection: a later one with the same number cannot be hit.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
from pathlib import Path
from typing import Final

from xipfs.fuse.mounts import Mount

log = logging.getLogger(__name__)

CONNECTIONS: Final = Path("/sys/fs/fuse/connections")
_SCRIPT: Final = """
exec 3>"$0" || exit
trap 'echo 1 >&3; kill $!; exit' TERM
sleep infinity >&- &
[ $PPID -eq "$1" ] || { kill $!; exit; }
echo ready
exec >&-
wait
"""
_COMMAND: Final = ("setpriv", "--pdeathsig", "TERM", "sh", "-c", _SCRIPT)


class Guard:
    """Watches over one mount; made by the daemon's main thread, whose end is what counts."""

    def __init__(self, mount: Mount) -> None:
        abort = CONNECTIONS / str(mount.minor) / "abort"
        if not abort.exists() and os.geteuid() == 0:
            mounting = ["mount", "-t", "fusectl", "fusectl", str(CONNECTIONS)]
            subprocess.run(mounting, capture_output=True, check=False)
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = subprocess.Popen(
                [*_COMMAND, str(abort), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd="/",
                # A terminal's interrupt is for the daemon, which ends by its unmount.
                start_new_session=True,
            )
            assert self._process.stdout is not None
            ready = self._process.stdout.read() == b"ready\n"
        except OSError:
            ready = False
        if not ready:
            log.info(
                "no guard: if this daemon is killed, programs may wait until %s is written to",
                abort,
            )

    def abort(self) -> None:
        """Fail what waits for the daemon, as at its death: the session ends."""
        if self._process is not None:
            self._process.terminate()

    def end(self) -> None:
        """Stop watching: before the daemon ends by itself."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None
