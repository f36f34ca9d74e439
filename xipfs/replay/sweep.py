"""A grid of replays: here in several processes, or on a Dask cluster; what is done stays done.

The results file is JSON lines, locked while a sweep is at work on it. The first says what the sweep
is about (xipfs's version and the SHA-256 of its code, the trace's SHA-256, medium, delay); each
other line is one finished cell, appended and brought to the disk as it ends. A second run reads it
and does what is missing or failed. A line that a crash cut short is left out. A cell that fails, or
takes its process down, is told as failed and costs no other.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Final

from xipfs.errors import UsageError, XipfsError
from xipfs.fs.imagelock import holders_of
from xipfs.replay.cells import Cell, Figures, Key, run_cell, wrong_in

#: 2: a line has the SHA-256 of the policy's files. 3: the first line has that of xipfs's code.
SCHEMA: Final = 3

_ADDRESS: Final = re.compile(r"[a-z]+://\S+:\d+")

Told = tuple[Cell, Figures | None, str]
"""A cell with its figures, or with what went wrong."""


class Results:
    """The results file of one sweep; ``done`` holds the figures of finished cells."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path = path
        header = {"xipfs_sweep": SCHEMA, **about}
        self.done: dict[Key, Figures] = {}
        with contextlib.ExitStack() as opened:
            try:
                self._file = opened.enter_context(path.open("ab"))
                self._lock()
                self._read(header)
            except OSError as error:
                raise UsageError(
                    f"{path} cannot be read and written: {error.strerror}",
                    expected="a results file",
                ) from None
            if os.fstat(self._file.fileno()).st_size == 0:
                self._append(header)
            opened.pop_all()

    def _lock(self) -> None:
        """Keep other sweeps off, which would do every cell again; the kernel drops it with us."""
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = ", ".join(str(pid) for pid in holders_of(self._file.fileno())) or "unknown"
            raise XipfsError(
                f"{self._path} is in use by another sweep, pid {who}",
                remedy="wait for it, or name another file with -o",
            ) from None

    def _read(self, header: dict[str, Any]) -> None:
        whole = self._path.read_bytes()
        kept = whole[: whole.rfind(b"\n") + 1]
        lines = kept.split(b"\n")[:-1]
        if lines:
            self._compare(_object_of(lines[0]), header)
        for number, line in enumerate(lines[1:], 2):
            told = _object_of(line)
            wrong = _wrong_in(told, estimated=header["medium"] is not None)
            if wrong:
                raise UsageError(
                    f"{self._path}, line {number}: {wrong}",
                    expected="a line as `xipfs sweep` writes them",
                    remedy="remove the line and its cell is done again, or name another file",
                )
            if "figures" in told:
                key = told["policy"], told["files_sha256"], told["ram_bytes"]
                self.done[key] = told["figures"]
        if len(kept) < len(whole):
            os.truncate(self._path, len(kept))

    def _compare(self, found: dict[str, Any], header: dict[str, Any]) -> None:
        """Refuse a file whose first line says that it is about something else."""
        if "xipfs_sweep" not in found:
            raise UsageError(
                f"{self._path} is no results file", expected="one of `xipfs sweep`, or a new name"
            )
        differ = [name for name in header if found.get(name) != header[name]]
        if differ:
            what = "another sweep"
            if {"xipfs_sweep", "xipfs", "code_sha256"}.intersection(differ):
                what = f"another xipfs ({found.get('xipfs', 'an older one')}, other code)"
            raise UsageError(
                f"{self._path} holds the results of {what}: {', '.join(differ)} differ",
                remedy="name another file with -o, and all is done again",
            )

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


def _object_of(line: bytes) -> dict[str, Any]:
    """Return the JSON object in a line; an empty one if there is none."""
    try:
        told = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _wrong_in(line: dict[str, Any], *, estimated: bool) -> str:
    """Return what is wrong with the line of a cell; "" if nothing is."""
    if not line:
        return "it is no JSON object"
    for name, kind in (("policy", str), ("files_sha256", str), ("ram_bytes", int)):
        if type(line.get(name)) is not kind:
            return f"its {name} is {line.get(name)!r:.40}"
    if "error" in line:
        return ""
    return wrong_in(line["policy"], line.get("figures"), estimated=estimated)


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
    # A client that was given what is no address waits for ten seconds as it goes.
    if _ADDRESS.fullmatch(address) is None or not _is_known(address):
        raise UsageError(f"--dask {address}", expected="tcp://HOST:PORT")
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
            elif future.status == "error":
                figures, wrong = None, repr(future.exception())
            else:
                figures, wrong = None, f"the Dask cluster is gone, and the cell ({future.status})"
            yield futures[future], figures, wrong


def _distributed() -> Any:
    try:
        return importlib.import_module("distributed")
    except ImportError:
        raise UsageError(
            "--dask needs dask.distributed",
            remedy="in xipfs's source tree: tools/setup, or pip install '.[sweep]'",
        ) from None


def _is_known(address: str) -> bool:
    backends = importlib.import_module("distributed.comm.registry").backends
    return address.partition("://")[0] in backends


_CONNECT_S: Final = 5


def _told(cell: Cell) -> tuple[Figures | None, str]:
    """Run a cell where an exception's class may not be importable by who asked."""
    try:
        return run_cell(cell), ""
    except Exception as error:
        return None, str(error) if isinstance(error, XipfsError) else repr(error)
