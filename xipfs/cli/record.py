"""``xipfs record DIR -o FILE``: every fault of a mount into a trace file, until interrupted."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

from xipfs.cli.client import Json, ask
from xipfs.cli.stream import POLL_S, Stream, asked_to_end
from xipfs.errors import MountError
from xipfs.fuse.mounts import Mount, mount_at
from xipfs.migrate.decider import CHOSEN
from xipfs.stats.trace_writer import TraceWriter


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
    mount = mount_at(args.directory)
    with asked_to_end() as asked:

        def wait(faults: int, missed: int) -> bool:
            if tell:
                print(f"\r{faults} faults, {missed} missed", end="", file=sys.stderr, flush=True)
            return not asked.wait(POLL_S)

        print(f"recording to {args.output}; Ctrl-C ends it", file=sys.stderr, flush=True)
        losses = record(mount, args.output, wait, force=args.force)
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
    seen = Seen(mount)
    writer = TraceWriter(path, seen.metadata(), force=force)
    more = True
    try:
        while more:
            more = wait(seen.stream.faults, seen.missed)
            for rows in seen.stream.poll():
                writer.append(rows)
            writer.flush(seen.stream.losses())
    finally:
        told = seen.metadata()
        writer.close({**told, **also()})
    losses: Json = told["losses"]
    return losses


class Seen:
    """What is read of a mount from now on, and what a trace says about that."""

    def __init__(self, mount: Mount) -> None:
        self._mount = mount
        self._before = ask(mount, "stats.json")
        self._began_s = time.time()
        self.stream = Stream(mount)

    @property
    def missed(self) -> int:
        """Return how many faults and other items came faster than they were read."""
        return self.stream.faults_missed + self.stream.items_missed

    def metadata(self) -> Json:
        """Return the metadata up to now; of a daemon that is gone, what it was at the start."""
        whole, began = True, self._before["migration"]
        try:
            after = ask(self._mount, "stats.json")
        except MountError:
            after, whole = self._before, False
        return {
            "host": platform.node(),
            "kernel": os.uname().release,
            "mount": after["mount"],
            "observer": {"mode": after["observer"]["mode"]},
            "memory": after["memory"],
            # In force when the recording began; what changed it later is in the stream.
            "policy": {name: began[name] for name in CHOSEN},
            "began_unix_s": self._began_s,
            "ended_unix_s": time.time(),
            "losses": {"mount_outlived_recording": whole, **self.stream.losses()},
        }
