"""``xipfs record DIR -o FILE``: every fault of a mount into a trace file, until interrupted."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from xipfs.cli.client import Json, ask
from xipfs.errors import MountError
from xipfs.fuse.mounts import Mount, mount_at
from xipfs.stats.trace_file import TraceWriter, parse_rows

POLL_S = 0.2
#: Beyond any number: the daemon begins to keep what comes, and answers with the next number.
_START = 10**15 - 1


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="where the image is mounted")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="the trace file (Parquet)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite FILE")


def run(args: argparse.Namespace) -> int:
    """Record; exits 1 if anything was lost."""
    tell = sys.stderr.isatty()
    asked_to_end = threading.Event()

    def end(number: int, _frame: FrameType | None) -> None:
        # A flag, for an exception could come in the middle of an answer; at the second time that.
        asked_to_end.set()
        signal.signal(number, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)

    def wait(faults: int, missed: int) -> bool:
        if tell:
            print(f"\r{faults} faults, {missed} missed", end="", file=sys.stderr, flush=True)
        return not asked_to_end.wait(POLL_S)

    print(f"recording to {args.output}; Ctrl-C ends it", file=sys.stderr, flush=True)
    losses = record(mount_at(args.directory), args.output, wait, force=args.force)
    print(
        f"{losses['faults']} faults in {args.output}, "
        f"{losses['faults_missed'] + losses['items_missed']} missed, "
        f"{losses['events_lost']} events lost",
        file=sys.stderr,
    )
    return int(any(losses[name] for name in ("faults_missed", "items_missed", "events_lost")))


def record(
    mount: Mount,
    path: Path,
    wait: Callable[[int, int], bool],
    *,
    force: bool = False,
    also: Callable[[], Json] = dict,
) -> Json:
    """Write the faults of ``mount`` from now on to ``path`` while ``wait(faults, missed)`` says so.

    ``also`` adds to the file's metadata, at the end.
    Returns the losses as in the file, which is closed whole also when the daemon ends or the
    recording is interrupted elsewhere than in ``wait``.
    """
    before = ask(mount, "stats.json")
    began_s = time.time()
    stream = _Stream(mount)
    writer = TraceWriter(path, force=force)
    more = True
    try:
        while more:
            more = wait(stream.faults, stream.faults_missed + stream.items_missed)
            stream.poll(writer)
    finally:
        whole = True
        try:
            after = ask(mount, "stats.json")
        except MountError:
            # The daemon is gone, and what it had told is kept.
            after, whole = before, False
        losses: Json = {
            "mount_outlived_recording": whole,
            "faults": stream.faults,
            "faults_missed": stream.faults_missed,
            "items_missed": stream.items_missed,
            "events_lost": after["observer"]["lost"] - before["observer"]["lost"],
        }
        writer.close(
            {
                "host": platform.node(),
                "kernel": os.uname().release,
                "mount": after["mount"],
                "observer": {"mode": after["observer"]["mode"]},
                "memory": after["memory"],
                "began_unix_s": began_s,
                "ended_unix_s": time.time(),
                "losses": losses,
                **also(),
            }
        )
    return losses


class _Stream:
    """The daemon's two logs, put together in the order in which things happened.

    It begins with the state of now; faults told before that are not of this recording.
    """

    def __init__(self, mount: Mount) -> None:
        self._mount = mount
        self._next_fault = self._next_item = _START
        #: Items told before the faults that come before them, each with the next fault's number.
        self._held: deque[tuple[int, list[Any]]] = deque()
        self.faults = self.faults_missed = self.items_missed = 0
        ask(self._mount, f"faults.{_START}.json")
        self._ask_items()
        self._next_fault = self._held[0][0]

    def poll(self, writer: TraceWriter) -> None:
        """Write what has happened since the last time."""
        while True:
            answer = ask(self._mount, f"faults.{self._next_fault}.json")
            # Items up to those faults are in the other log by now.
            while not self._ask_items():
                pass
            self.faults_missed += answer["missed"]
            rows = parse_rows(answer["faults"], answer["columns"])
            for number, row in enumerate(rows, answer["next"] - len(rows)):
                writer.append([*self._items_before(number), row])
            writer.append(self._items_before(answer["next"]))
            self.faults += len(rows)
            self._next_fault = answer["next"]
            if answer["next"] >= answer["end"]:
                return

    def _ask_items(self) -> bool:
        """Take the next items; return whether these were all."""
        answer = ask(self._mount, f"items.{self._next_item}.json")
        rows = parse_rows(answer["items"], answer["columns"])
        self._held.extend(zip(answer["next_faults"], rows, strict=True))
        if self._next_item != _START:
            self.items_missed += answer["missed"]
        self._next_item = answer["next"]
        return bool(answer["next"] >= answer["end"])

    def _items_before(self, fault: int) -> list[list[Any]]:
        rows = []
        while self._held and self._held[0][0] <= fault:
            rows.append(self._held.popleft()[1])
        return rows
