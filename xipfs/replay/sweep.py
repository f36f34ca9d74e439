"""A grid of replays: here in several processes, or on a Dask cluster; what is done stays done.

The results file is JSON lines. The first says what the sweep is about (the trace's SHA-256, medium,
delay); each other line is one finished cell, appended and brought to the disk as it ends. A second
run reads it and does what is missing or failed. A line that a crash cut short is left out. A cell
that fails, or takes its process down, is told as failed and costs no other.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Final

from xipfs.errors import UsageError, XipfsError
from xipfs.replay.cells import Cell, Figures, Key, run_cell

#: 2: a line has the SHA-256 of the policy's files.
SCHEMA: Final = 2

Told = tuple[Cell, Figures | None, str]
"""A cell with its figures, or with what went wrong."""


class Results:
    """The results file of one sweep; ``done`` holds the figures of finished cells."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path = path
        header = {"xipfs_sweep": SCHEMA, **about}
        self.done: dict[Key, Figures] = {}
        try:
            if path.exists():
                self._read(header)
            self._file = path.open("ab")
        except OSError as error:
            raise UsageError(
                f"{path} cannot be read and written: {error.strerror}", expected="a results file"
            ) from None
        if self._file.tell() == 0:
            self._append(header)

    def _read(self, header: dict[str, Any]) -> None:
        whole = self._path.read_bytes()
        kept = whole[: whole.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in kept.splitlines()]
            found = lines[0] if lines else header
            told = {name: found.get(name) for name in header}
            if lines and "xipfs_sweep" not in found:
                raise ValueError
            self.done = {
                (line["policy"], line["files_sha256"], line["ram_bytes"]): line["figures"]
                for line in lines[1:]
                if "figures" in line
            }
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UsageError(
                f"{self._path} is no results file", expected="one of `xipfs sweep`, or a new name"
            ) from None
        if told != header:
            differ = ", ".join(name for name in header if told[name] != header[name])
            raise UsageError(
                f"{self._path} holds the results of another sweep: {differ} differ",
                remedy="name another file with -o",
            )
        if len(kept) < len(whole):
            os.truncate(self._path, len(kept))

    def add(self, cell: Cell, figures: Figures | None, error: str) -> None:
        """Append a cell's outcome, durably."""
        line: dict[str, Any] = {
            "policy": cell.name, "files_sha256": cell.files_sha256, "ram_bytes": cell.ram_bytes,
        }  # fmt: skip
        if figures is None:
            line["error"] = error
        else:
            line["figures"] = self.done[cell.key] = figures
        self._append(line)

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def locally(
    cells: list[Cell], jobs: int, run: Callable[[Cell], Figures] = run_cell
) -> Iterator[Told]:
    """Run the cells in ``jobs`` processes; yield each as it ends."""
    left = dict.fromkeys(cells)
    for cell, figures, error in _in_a_pool(cells, jobs, run):
        if error != _BROKEN:
            del left[cell]
            yield cell, figures, error
    # A process died and took the pool down: who it was shows when each is alone.
    for cell in left:
        yield from _in_a_pool([cell], 1, run)


_BROKEN: Final = "its process died (out of memory?)"


def _in_a_pool(cells: list[Cell], jobs: int, run: Callable[[Cell], Figures]) -> Iterator[Told]:
    # A fresh interpreter for each: this one may have threads, which a fork would lose.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(max_workers=min(jobs, len(cells)), mp_context=context)
    try:
        futures = {pool.submit(run, cell): cell for cell in cells}
        for future in as_completed(futures):
            yield futures[future], *_outcome(future)
    finally:
        pool.shutdown(cancel_futures=True)


def _outcome(future: Future[Figures]) -> tuple[Figures | None, str]:
    try:
        return future.result(), ""
    except BrokenProcessPool:
        return None, _BROKEN
    except XipfsError as error:
        return None, str(error)
    except Exception as error:
        return None, repr(error)


def on_dask(cells: Iterable[Cell], address: str) -> Iterator[Told]:
    """Run the cells on the Dask cluster at ``address``; yield each as it ends."""
    distributed = _distributed()
    try:
        client = distributed.Client(address, timeout=_CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no Dask cluster answers at {address}: {error}", expected="tcp://HOST:PORT"
        ) from None
    with client:
        # Not pure: the trace is a file, of which Dask knows nothing.
        futures = {client.submit(_told, cell, pure=False): cell for cell in cells}
        for future in distributed.as_completed(list(futures), loop=client.loop):
            if future.status == "finished":
                figures, wrong = future.result()
            else:
                figures, wrong = None, repr(future.exception())
            yield futures[future], figures, wrong


def _distributed() -> Any:
    try:
        return importlib.import_module("distributed")
    except ImportError:
        raise UsageError(
            "--dask needs dask.distributed",
            remedy="in xipfs's source tree: tools/setup, or pip install '.[sweep]'",
        ) from None


_CONNECT_S: Final = 5


def _told(cell: Cell) -> tuple[Figures | None, str]:
    """Run a cell where an exception's class may not be importable by who asked."""
    try:
        return run_cell(cell), ""
    except Exception as error:
        return None, str(error) if isinstance(error, XipfsError) else repr(error)
