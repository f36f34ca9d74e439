"""``xipfs migrate PATH... --to KIND``: move pages on a live mount between the two kinds."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import Progress

from xipfs.cli.client import Json, request
from xipfs.cli.pages import file_of_mount
from xipfs.errors import EXIT_FAILURE, MountError, UsageError
from xipfs.fuse.mounts import Mount
from xipfs.units import parse_page_ranges

#: Files of one request to the daemon: it answers with progress over all of them.
BATCH_FILES: Final = 1000


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    parser.add_argument(
        "paths", type=Path, nargs="+", metavar="PATH", help="regular files on the mount"
    )
    parser.add_argument(
        "-r", "--recursive", action="store_true", help="take directories with all files below"
    )
    parser.add_argument("--to", choices=("pagecache", "xip"), required=True, help="the new kind")
    parser.add_argument(
        "--pages", metavar="A-B,...", help="only these pages, as in 0-15,20 (one file; default all)"
    )
    parser.add_argument("--json", action="store_true", help="the outcome as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Move the pages; exit code 1 if any was refused."""
    if len(args.paths) == 1 and not args.recursive:
        outcome: Json = {"file": str(args.paths[0]), "to": args.to, **_one(args)}
    else:
        if args.pages is not None:
            raise UsageError("--pages with more than one file", expected="one FILE without -r")
        outcome = {"to": args.to, **_many(args)}
    if args.json:
        print(json.dumps(outcome, indent=2))
    else:
        what = outcome["file"] if "file" in outcome else f"{len(outcome['files'])} files"
        print(
            f"{what}: {outcome['moved']} pages moved to {args.to}, "
            f"{outcome['already']} already there, {sum(outcome['failed'].values())} refused"
        )
        for reason, count in outcome["failed"].items():
            print(f"  refused: {count} {reason}")
    return EXIT_FAILURE if outcome["failed"] else 0


def _one(args: argparse.Namespace) -> Json:
    ranges = None if args.pages is None else parse_page_ranges(args.pages)
    mount, ino = file_of_mount(args.paths[0])
    arguments: Json = {"ino": ino, "to": args.to}
    if ranges is not None:
        arguments["ranges"] = [[pages.start, len(pages)] for pages in ranges]
    return _answer(mount, arguments)


def _many(args: argparse.Namespace) -> Json:
    """Move all files, mount by mount; a file reached by two names or paths moves once."""
    found: dict[tuple[Path, int], tuple[Mount, Path]] = {}
    for path in args.paths:
        for file in _files_below(path) if args.recursive else [path]:
            mount, ino = file_of_mount(file)
            found.setdefault((mount.mountpoint, ino), (mount, file))
    mounts = {mount.mountpoint: mount for mount, _ in found.values()}
    files: list[Json] = []
    for mountpoint, mount in mounts.items():
        of_mount = [(ino, path) for (where, ino), (_, path) in found.items() if where == mountpoint]
        for start in range(0, len(of_mount), BATCH_FILES):
            batch = of_mount[start : start + BATCH_FILES]
            answer = _answer(mount, {"to": args.to, "files": [{"ino": ino} for ino, _ in batch]})
            for (_, path), tally in zip(batch, answer["files"], strict=True):
                files.append({"file": str(path)} | {k: v for k, v in tally.items() if k != "ino"})
    failed: Counter[str] = Counter()
    for tally in files:
        failed.update(tally["failed"])
    sums = {name: sum(tally[name] for tally in files) for name in ("moved", "already")}
    return {**sums, "failed": dict(failed), "files": files}


def _files_below(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    for directory, subdirectories, names in os.walk(path):
        subdirectories.sort()
        for name in sorted(names):
            file = Path(directory, name)
            if file.is_file() and not file.is_symlink():
                yield file


def _answer(mount: Mount, arguments: Json) -> Json:
    """Run one request with a progress bar and return its result."""
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
    return outcome
