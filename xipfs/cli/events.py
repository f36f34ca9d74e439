"""``xipfs events DIR [--follow]``: what migrated, chunk by chunk, as it happens."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from xipfs.cli.client import Json, request
from xipfs.fuse.mounts import mount_of
from xipfs.migrate.history import STEPS


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="anything on the mount")
    parser.add_argument("--follow", action="store_true", help="go on with what comes (Ctrl-C ends)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def run(args: argparse.Namespace) -> int:
    """Print events; those that the daemon's ring lost are counted, never passed over.

    In JSON a loss is a line among the others: what reads them sees nothing else.
    """
    for answer in request(mount_of(args.directory), "events", follow=args.follow):
        # Answers without an event are the beat that lets Ctrl-C through while nothing happens.
        if lost := answer.get("lost"):
            if args.json:
                print(json.dumps({"lost": lost}), flush=True)
            else:
                print(f"xipfs events: {lost} events were lost before the next", file=sys.stderr)
        if event := answer.get("event"):
            print(json.dumps(event) if args.json else as_line(event), flush=True)
    return 0


def as_line(event: Json) -> str:
    """Return one event for people."""
    # The parts of a move are in it already.
    total_ms = sum(event["durations_ns"].get(step, 0) for step in STEPS) / 1e6
    refused = "".join(f", {count} {reason}" for reason, count in event["failed"].items())
    why = ": ".join(word for word in (event["policy"], event["reason"]) if word)
    outcome = f"{event['moved']} moved{refused}, {total_ms:.3f} ms"
    if event["dry"]:
        outcome = f"{event['would_move']} would move"
    return (
        f"{event['time_ns'] / 1e9:.6f} inode {event['ino']} pages {event['first']}-{event['last']} "
        f"to {event['to']} ({why}): {outcome}"
    )
