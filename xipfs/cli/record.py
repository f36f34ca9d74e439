"""``xipfs record DIR -o FILE``: every fault of a mount into a trace file, until interrupted."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from xipfs.cli.client import Json, ask
from xipfs.errors import MountError
from xipfs.fuse.mounts import Mount, mount_at
from xipfs.stats.trace_file import TraceWriter, parse_rows

POLL_S = 0.2
#: Beyond any fault's number: the daemon answers with the next one's.
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
        f"{losses['faults']} faults in {args.output}, {losses['faults_missed']} missed, "
        f"{losses['events_lost']} events lost",
        file=sys.stderr,
    )
    return int(bool(losses["faults_missed"] or losses["events_lost"]))


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
    cursor = int(ask(mount, f"faults.{_START}.json")["next"])
    writer = TraceWriter(path, force=force)
    began_s = time.time()
    missed = 0
    more = True
    try:
        while more:
            more = wait(writer.faults, missed)
            while True:
                answer = ask(mount, f"faults.{cursor}.json")
                writer.append(parse_rows(answer["faults"]))
                cursor, missed = answer["next"], missed + answer["missed"]
                if answer["next"] >= answer["end"]:
                    break
    finally:
        whole = True
        try:
            after = ask(mount, "stats.json")
        except MountError:
            # The daemon is gone, and what it had told is kept.
            after, whole = before, False
        losses: Json = {
            "mount_outlived_recording": whole,
            "faults": writer.faults,
            "faults_missed": missed,
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
