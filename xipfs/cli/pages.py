"""``xipfs pages FILE``: a map of the file's pages, one letter a page, runs merged."""

from __future__ import annotations

import argparse
import json
import os
import stat
from pathlib import Path

from xipfs.cli.client import Json, ask
from xipfs.errors import MountError, UsageError
from xipfs.fuse.mounts import Mount, mount_on

LEGEND = "X XIP   P pagecache, resident   p pagecache, not resident   . hole"
WIDTH = 64


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    parser.add_argument("file", type=Path, metavar="FILE", help="a regular file on the mount")
    parser.add_argument("--json", action="store_true", help="the runs as one JSON object")


def file_of_mount(path: Path) -> tuple[Mount, int]:
    """Return the mount and inode number of the regular file ``path``."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise MountError(f"cannot look at {path}: {error.strerror}") from None
    mount = mount_on(status.st_dev, path)
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{path} is not a regular file", expected="a file on the mount")
    if Path(os.path.realpath(path)).parent == mount.mountpoint / ".xipfs":
        raise UsageError(f"{path} is a control file", expected="a file of the image")
    return mount, status.st_ino


def run(args: argparse.Namespace) -> int:
    """Print the map."""
    mount, ino = file_of_mount(args.file)
    answer = ask(mount, f"pages.{ino}.json")
    if args.json:
        print(json.dumps({"file": str(args.file), **answer}, indent=2))
        return 0
    print(f"{args.file}  inode {ino}  {answer['size_bytes']} bytes  {answer['nr_pages']} pages")
    print(LEGEND)
    for line in picture(answer["runs"]):
        print(line)
    print(f"{'pages':>19} kind {'refcount':>9} {'mapcount':>9}")
    for run_ in answer["runs"]:
        first, last = run_["first"], run_["first"] + run_["count"] - 1
        span = f"{first}-{last}" if last > first else f"{first}"
        counts = [
            "-" if run_[name] is None else str(run_[name]) for name in ("refcount", "mapcount")
        ]
        print(f"{span:>19} {run_['letter']:>4} {counts[0]:>9} {counts[1]:>9}")
    return 0


def picture(runs: list[Json]) -> list[str]:
    """Return the map's lines of 64 letters, each with its first page; equal lines are folded.

    A sparse file can have 2**36 pages, so lines are made from runs, never page by page.
    """
    lines: list[str] = []
    current = ""
    start = 0
    for run_ in runs:
        left = int(run_["count"])
        while left:
            take = min(left, WIDTH - len(current))
            current += run_["letter"] * take
            left -= take
            if len(current) == WIDTH:
                lines.append(f"{start:>12} {current}")
                start += WIDTH
                current = ""
                if left >= 3 * WIDTH:
                    skipped = left // WIDTH - 1
                    lines.append(f"{'*':>12} {skipped} more lines of {run_['letter']}")
                    start += skipped * WIDTH
                    left -= skipped * WIDTH
    if current:
        lines.append(f"{start:>12} {current}")
    return lines
