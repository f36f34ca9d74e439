"""What a benchmark is given: how hard to try, where to work, and the alternation of candidates."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.support.measure import Sample
from benchmarks.support.system import ROOT, BenchError, Interrupts, run

TMPFS = Path("/dev/shm")
#: Seed of every random order; the round's number is added, so rounds differ and runs do not.
SEED = 2008


@dataclass
class Context:
    """One run of tools/bench, as a benchmark sees it; ``work`` is a scratch directory on tmpfs."""

    rounds: int
    quick: bool
    work: Path
    interrupts: Interrupts
    progress: Progress
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def build_c(self, name: str) -> Path:
        """Compile the C program ``tools/NAME`` into the scratch directory; return the program."""
        program = self.work / Path(name).stem
        run(["cc", "-O2", "-Wall", "-o", program, ROOT / "tools" / name])
        return program

    def alternate(
        self, what: str, candidates: Mapping[str, Callable[[int], Sample]]
    ) -> dict[str, list[Sample]]:
        """Run every candidate once per round and return their samples, by name and round.

        Each is called with the round's seed. The first candidate of a round is another one every
        time, so that none always runs on a machine which its predecessor left warm.
        """
        names = list(candidates)
        samples: dict[str, list[Sample]] = {name: [] for name in names}
        task = self.progress.add_task(what, total=self.rounds * len(names))
        for number in range(self.rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                self.progress.update(task, description=f"{what}: {name}")
                samples[name].append(candidates[name](SEED + number))
                self.progress.advance(task)
        self.progress.remove_task(task)
        return samples

    def require_space(self, size_bytes: int) -> None:
        """Raise BenchError if the scratch directory has less room than ``size_bytes``."""
        free_bytes = shutil.disk_usage(self.work).free
        if free_bytes < size_bytes:
            raise BenchError(
                f"{TMPFS} has {free_bytes >> 20} MiB free, expected {size_bytes >> 20} MiB; "
                "free some memory or use --quick"
            )

    def results(self) -> dict[str, Any]:
        """Return what was measured so far, in the shape that tools/bench prints and keeps."""
        return {"settings": self.settings, "comparisons": self.comparisons}


@contextlib.contextmanager
def working_context(
    rounds: int, *, quick: bool, interrupts: Interrupts, progress: Progress
) -> Iterator[Context]:
    """Make the scratch directory for the time of one benchmark."""
    if not TMPFS.is_dir():
        raise BenchError(f"{TMPFS} is missing; expected the tmpfs that Linux systems mount there")
    # The pid tells whose it is where several run at once.
    work = Path(tempfile.mkdtemp(prefix=f"xipfs-bench-{os.getpid()}-", dir=TMPFS))
    try:
        yield Context(rounds, quick, work, interrupts, progress)
    finally:
        with interrupts.deferred():
            shutil.rmtree(work)
