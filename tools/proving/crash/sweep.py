"""Many workloads explored by some processes, each outcome a line of a log that can be resumed.

The log's first line names the sources that were explored; a log of other sources is refused, so
that one figure never mixes two filesystems.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from proving.crash.explorer import Explorer, Tally
from proving.crash.medium import keep_memory
from proving.crash.workloads import Workload, base_image
from xipfs.errors import UsageError

ROOT: Final = Path(__file__).resolve().parents[3]
#: What the outcome of a workload depends on.
SOURCES: Final = ("xipfs/memory", "xipfs/image", "xipfs/fs", "tools/proving/crash")
#: Workloads handed to a process at once: they begin with the same operation and share its twins.
_BATCH: Final = 12

Progress = Callable[[int, int, float], None]
"""Called with workloads done, workloads in all, and seconds left by the rate so far."""


def fingerprint() -> str:
    """Return a number for the sources that decide the outcome."""
    digest = hashlib.blake2b(digest_size=8)
    for directory in SOURCES:
        for path in sorted((ROOT / directory).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


class Log:
    """The outcomes so far, a JSON object a line, appended as they come."""

    def __init__(self, path: Path | None, seed: int) -> None:
        self.done: dict[str, dict[str, Any]] = {}
        self._path = path
        head = {"sources": fingerprint(), "seed": seed}
        if path is None:
            return
        if path.exists():
            lines = [json.loads(line) for line in _whole_lines(path)]
            if not lines or lines[0] != head:
                raise UsageError(
                    f"{path} is the log of other sources or another seed",
                    remedy="remove it, or name another with --log",
                )
            self.done = {line["workload"]: line for line in lines[1:]}
        else:
            self._append(head)

    def add(self, outcome: dict[str, Any]) -> None:
        """Keep one workload's outcome."""
        self.done[outcome["workload"]] = outcome
        if self._path is not None:
            self._append(outcome)

    def _append(self, line: dict[str, Any]) -> None:
        assert self._path is not None
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _whole_lines(path: Path) -> list[str]:
    """Return the log's lines; cut off one that an interrupt left unfinished."""
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return whole.splitlines()


def sweep(
    todo: Sequence[Workload], log: Log, *, seed: int, processes: int, progress: Progress
) -> Tally:
    """Explore what the log does not have yet; return the sum over all of ``todo``."""
    left = [workload for workload in todo if workload.name not in log.done]
    done = len(todo) - len(left)
    began = time.monotonic()
    for outcome in _outcomes(left, seed, processes):
        log.add(outcome)
        done += 1
        explored = done - (len(todo) - len(left))
        rate = explored / (time.monotonic() - began)
        progress(done, len(todo), (len(todo) - done) / rate)
    total = Tally()
    for workload in todo:
        _add(total, log.done[workload.name])
    return total


def _outcomes(left: list[Workload], seed: int, processes: int) -> Iterator[dict[str, Any]]:
    """Yield each workload's name and what exploring it counted."""
    batches = [left[at : at + _BATCH] for at in range(0, len(left), _BATCH)]
    if processes == 1 or len(batches) < 2:
        _start(seed)
        for batch in batches:
            yield from map(_outcome, batch)
        return
    context = multiprocessing.get_context("fork")
    with context.Pool(processes, _start_worker, (seed,)) as pool:
        for outcomes in pool.imap_unordered(_batch, batches):
            yield from outcomes


_explorers: list[Explorer] = []


def _start_worker(seed: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells when to end
    _start(seed)


def _start(seed: int) -> None:
    keep_memory()
    _explorers[:] = [Explorer(base_image(), seed=seed)]


def _batch(batch: list[Workload]) -> list[dict[str, Any]]:
    return [_outcome(workload) for workload in batch]


def _outcome(workload: Workload) -> dict[str, Any]:
    (explorer,) = _explorers
    explorer.tally = Tally()
    explorer.explore(workload.name, *workload.steps())
    return {"workload": workload.name, **dataclasses.asdict(explorer.tally)}


def _add(total: Tally, outcome: dict[str, Any]) -> None:
    for field in dataclasses.fields(Tally):
        setattr(total, field.name, getattr(total, field.name) + outcome[field.name])
