"""A mount whose daemon is xipfs as it is, begun by a script that may get at its inside."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import ClassVar

from live import ENVIRONMENT, LiveMount, wait_until

_END = """
import sys
from xipfs.cli import main
sys.exit(main(sys.argv[1:]))
"""


class ScriptedMount(LiveMount):
    """Runs ``SCRIPT``, then ``xipfs mount``; the two talk by signals and ``order``.

    The script lies beside the mount's directory, so its ``sys.argv[0]`` with another suffix is
    where it finds the order.
    """

    SCRIPT: ClassVar[str]

    def _start(self, words: Sequence[str]) -> None:
        script = self.directory.with_suffix(".py")
        script.write_text(self.SCRIPT + _END)
        with open(self.log, "ab") as log:
            self.daemon = subprocess.Popen(
                [sys.executable, str(script), "mount", "-f"]
                + [*words, str(self.image), str(self.directory)],
                env=ENVIRONMENT,
                stderr=log,
            )
        wait_until("the mount", lambda: b"mounted at" in self.log.read_bytes(), 30)

    def obey(self, number: int, order: str) -> None:
        """Hand the script an order by a signal; return when it has taken the order away."""
        path = self.directory.with_suffix(".order")
        path.with_suffix(".new").write_text(order)
        path.with_suffix(".new").rename(path)
        os.kill(self.pid, number)
        wait_until("the daemon obeys", lambda: not path.exists())

    def close(self) -> None:
        """End it, and reap it."""
        super().close()
        self.daemon.wait(timeout=20)
