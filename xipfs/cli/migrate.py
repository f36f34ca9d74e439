"""``xipfs migrate FILE --to KIND``: move pages of a file on a live mount between the two kinds."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from xipfs.cli.client import Json, request
from xipfs.cli.pages import file_of_mount
from xipfs.errors import EXIT_FAILURE, MountError
from xipfs.units import parse_page_ranges


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    parser.add_argument("file", type=Path, metavar="FILE", help="a regular file on the mount")
    parser.add_argument("--to", choices=("pagecache", "xip"), required=True, help="the new kind")
    parser.add_argument(
        "--pages", metavar="A-B,...", help="only these pages, as in 0-15,20 (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="the outcome as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Move the pages; exit code 1 if any was refused."""
    ranges = None if args.pages is None else parse_page_ranges(args.pages)
    mount, ino = file_of_mount(args.file)
    arguments: Json = {"ino": ino, "to": args.to}
    if ranges is not None:
        arguments["ranges"] = [[pages.start, len(pages)] for pages in ranges]
    outcome: Json | None = None
    with Progress(
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task("migrating")
        for answer in request(mount, "migrate", **arguments):
            if "result" in answer:
                outcome = answer["result"]
            else:
                done = answer["progress"]
                bar.update(task, completed=done["pages_done"], total=done["pages_total"])
    if outcome is None:
        raise MountError("the daemon gave no answer to 'migrate'", remedy="see the daemon's log")
    if args.json:
        print(json.dumps({"file": str(args.file), "to": args.to, **outcome}, indent=2))
    else:
        print(
            f"{args.file}: {outcome['moved']} pages moved to {args.to}, "
            f"{outcome['already']} already there, {sum(outcome['failed'].values())} refused"
        )
        for reason, count in outcome["failed"].items():
            print(f"  refused: {count} {reason}")
    return EXIT_FAILURE if outcome["failed"] else 0
