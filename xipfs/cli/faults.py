"""``xipfs faults FILE|DIR``: faults by process, file or page; of a trace file or a live mount."""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Final, Protocol

from xipfs.cli.client import Json
from xipfs.cli.fault_table import KEYS, Batch, FaultTable, file_name, totals
from xipfs.cli.record import Seen
from xipfs.cli.stream import POLL_S, asked_to_end
from xipfs.errors import MountError
from xipfs.fuse.mounts import mount_of
from xipfs.stats.partial_trace import follow
from xipfs.stats.trace_columns import COLUMNS, FAULT_COLUMNS
from xipfs.stats.trace_file import TraceReader, is_partial
from xipfs.trace.events import SIGBUS

#: A table that is followed is printed so often, if it has changed.
TABLE_INTERVAL_S: Final = 1.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    parser.add_argument(
        "path",
        type=Path,
        metavar="FILE|DIR",
        help="a file of `xipfs record`, or anything on a mount: its faults from now on",
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="tell each fault as it comes, or with --by print the table again and again",
    )
    parser.add_argument("--by", choices=KEYS, help="default: process")
    parser.add_argument(
        "--json",
        action="store_true",
        help="metadata and lines as one object; with --follow one object a line",
    )


def run(args: argparse.Namespace) -> int:
    """Count faults and print them."""
    view: View = LineView(args.json)
    if args.by or not args.follow:
        view = TableView(args.by or "process", args.json, follow=args.follow)
    if os.path.isdir(args.path):
        return watch(args.path, view)
    if args.follow and is_partial(args.path):
        follow_file(args.path, view)
        return 0
    with TraceReader(args.path) as trace:
        for batch in trace.batches():
            view.add(batch)
        view.end(trace.metadata)
    return 0


def follow_file(path: Path, view: View) -> None:
    """Show what is recorded into the file until its recording ends, or until interrupted."""
    with asked_to_end() as asked:
        for batch, metadata in follow(path, lambda: not (asked.wait(POLL_S) or reader_left())):
            if batch:
                view.add(batch)
                view.tick(metadata["losses"])
    view.end(metadata)


def watch(directory: Path, view: View) -> int:
    """Show the faults of a live mount until interrupted; what was seen is shown in any case."""
    mount = mount_of(directory)
    ended: MountError | None = None
    with asked_to_end() as asked:
        seen, more = Seen(mount), True
        print("counting faults from now on; Ctrl-C ends it", file=sys.stderr, flush=True)
        while more:
            more = not asked.wait(POLL_S)
            try:
                for rows in seen.stream.poll():
                    view.add(dict(zip(COLUMNS, zip(*rows, strict=True), strict=True)))
            except MountError as error:
                ended, more = error, False
            view.tick(seen.stream.losses())
            if reader_left():
                raise BrokenPipeError
    view.end(seen.metadata())
    if ended is not None:
        raise ended
    return 0


def reader_left() -> bool:
    """Return whether whoever reads our output has gone; nothing may be written for long."""
    output = select.poll()
    output.register(sys.stdout, 0)
    return any(what & select.POLLERR for _, what in output.poll(0))


class View(Protocol):
    """How faults are shown."""

    def add(self, batch: Batch) -> None:
        """Take rows of a trace."""
        ...

    def tick(self, losses: Json) -> None:
        """Show what has come; ``losses`` are those of all until now."""
        ...

    def end(self, metadata: Json) -> None:
        """Show the rest, and the totals."""
        ...


class LineView:
    """One line a fault, as it comes; losses on standard error, in JSON among the faults."""

    def __init__(self, as_json: bool) -> None:
        self._json = as_json
        self._told: Json = {}

    def add(self, batch: Batch) -> None:
        """Print the batch's faults."""
        chosen = zip(*(batch[column] for column in FAULT_COLUMNS), strict=True)
        for item, detail, values in zip(batch["item"], batch["detail"], chosen, strict=True):
            fault = dict(zip(FAULT_COLUMNS, values, strict=True))
            if item == "unplaced":
                fault |= unplaced(detail)
            if item in ("fault", "unplaced"):
                print(json.dumps(fault) if self._json else fault_line(fault))

    def tick(self, losses: Json) -> None:
        """Tell of losses that are new."""
        lost = {name: losses[name] for name in ("faults_missed", "items_missed", "events_lost")}
        if any(count > self._told.get(name, 0) for name, count in lost.items()):
            self._tell({"losses": lost}, f"{totals(losses)} so far")
        self._told = lost
        sys.stdout.flush()

    def end(self, metadata: Json) -> None:
        """Tell the totals."""
        answer: Json = {key: metadata[key] for key in ("losses", "unfinished") if key in metadata}
        self._tell(answer, totals(metadata["losses"]) + unfinished(metadata))

    def _tell(self, answer: Json, text: str) -> None:
        if self._json:
            print(json.dumps(answer), flush=True)
        else:
            sys.stdout.flush()
            print(f"xipfs faults: {text}", file=sys.stderr, flush=True)


def unfinished(metadata: Json) -> str:
    """Return what is to be said of a recording that was not ended."""
    return f"; {metadata['unfinished']}" if "unfinished" in metadata else ""


def unplaced(detail: str) -> Json:
    """Return what takes the place of a fault's columns where an access's file is not known."""
    told: Json = json.loads(detail)
    return told | {"verdict": SIGBUS, "charged": "unknown", "path": "(unknown)"}


def fault_line(fault: Json) -> str:
    """Return one fault for people."""
    return (
        f"{fault['time_ns'] / 1e9:15.6f} {fault['pid']:>7} {fault['comm'][:15]:15} "
        f"{fault['access']:5} {fault['verdict']:6} {fault['charged']:9} {fault['page']:>7} "
        f"{file_name(fault)}"
    )


class TableView:
    """A table at the end; with ``follow`` also every second if it has changed."""

    def __init__(self, by: str, as_json: bool, *, follow: bool) -> None:
        self._table = FaultTable(by)
        self._json = as_json
        self._follow = follow
        self._shown: tuple[float, Json] = 0.0, {}

    def add(self, batch: Batch) -> None:
        """Count the batch's faults."""
        self._table.add(batch)

    def tick(self, losses: Json) -> None:
        """Print the table, in place of the one before where that can be done."""
        shown_s, shown = self._shown
        if not self._follow or losses == shown or time.monotonic() - shown_s < TABLE_INTERVAL_S:
            return
        self._shown = time.monotonic(), losses
        if self._json:
            answer = {"by": self._table.by, "lines": self._table.lines(), "losses": losses}
            print(json.dumps(answer), flush=True)
        elif sys.stdout.isatty():
            lines = [totals(losses), *self._table.as_text(shutil.get_terminal_size().lines - 3)]
            print("\x1b[H\x1b[J" + "\n".join(lines), flush=True)
        else:
            print("\n".join([totals(losses), *self._table.as_text(), ""]), flush=True)

    def end(self, metadata: Json) -> None:
        """Print the whole table, with what is known of where it came from."""
        answer: dict[str, Any] = {"by": self._table.by, "lines": self._table.lines()}
        if self._json and self._follow:
            print(json.dumps(answer | {"losses": metadata["losses"]}))
        elif self._json:
            print(json.dumps({"metadata": metadata, **answer}, indent=2))
        else:
            mode = metadata["observer"]["mode"]
            print(f"{totals(metadata['losses'])}; observer {mode}{unfinished(metadata)}")
            print("\n".join(self._table.as_text()))
