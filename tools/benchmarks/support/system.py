"""Commands, signals and the machine's description."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


class BenchError(Exception):
    """Something a benchmark needs is not there, or a step of it failed."""


class Interrupts:
    """SIGINT and SIGTERM become KeyboardInterrupt, but never in the middle of a mount or unmount.

    A mount that is half made belongs to nobody: the interrupt waits until it can be undone. And it
    is raised again at each next one: Python drops an exception that a signal raises in a finalizer
    or a weak reference's callback, and the benchmark would go on for minutes.
    """

    def __init__(self) -> None:
        self._deferrals = 0
        self._interrupted = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self._interrupted = True
        self.check()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Hold a signal back until the block is done."""
        self._deferrals += 1
        try:
            yield
        finally:
            self._deferrals -= 1
        self.check()

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has come, unless they are held back now."""
        if self._interrupted and not self._deferrals:
            raise KeyboardInterrupt


def run(command: Sequence[str | Path]) -> str:
    """Run a command to its end; return its standard output. Raises BenchError if it fails."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise BenchError(f"{words[0]} is not installed; run tools/setup") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise BenchError(f"{' '.join(words)} ended with {done.returncode}: {said}")
    return done.stdout


def cpu_seconds(pid: int) -> float:
    """Return the processor time that all threads of ``pid`` have used, to the clock tick."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    utime, stime = int(fields[11]), int(fields[12])
    return (utime + stime) / os.sysconf("SC_CLK_TCK")


def describe_host() -> dict[str, Any]:
    """Return what a reader must know to place the figures."""
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {
        "node": platform.node(),
        "kernel": f"{platform.release()} {platform.machine()}",
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average_1min": os.getloadavg()[0],
        "python": platform.python_version(),
        "pyfuse3": importlib.metadata.version("pyfuse3"),
        "bindfs": run(["bindfs", "-V"]).strip().removeprefix("bindfs "),
        "commit": _commit(),
    }


def _commit() -> str:
    try:
        return run(["git", "-C", ROOT, "describe", "--always", "--dirty"]).strip()
    except BenchError:
        return "unknown"  # no git here, or not a clone
