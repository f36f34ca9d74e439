"""``xipfs mkfs IMAGE`` (also ``mkfs.xipfs``): make an image, empty or with a copy of a tree."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from xipfs.clock import SystemClock
from xipfs.errors import ImageError, UsageError
from xipfs.fs.build import Build, replace_image
from xipfs.fs.tree import scan
from xipfs.units import format_size, parse_size


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    parser.add_argument("image", type=Path, metavar="IMAGE", help="the file to make")
    parser.add_argument(
        "--size", default="256M", metavar="SIZE", help="size of the NVRAM region (default 256M)"
    )
    parser.add_argument("--root-dir", type=Path, metavar="DIR", help="copy this tree into it")
    parser.add_argument("--label", default="", metavar="L", help="a name, at most 63 bytes")
    parser.add_argument(
        "--kind", choices=("xip", "pagecache"), default="xip", help="kind of pages (default xip)"
    )
    parser.add_argument("-f", "--force", action="store_true", help="replace an existing image")
    parser.add_argument("--json", action="store_true", help="tell what was made as JSON")


def run(args: argparse.Namespace) -> int:
    """Make the image; nothing of it is left if that fails."""
    began = time.monotonic()
    build = Build(
        size_bytes=parse_size(args.size), label=args.label, pagecache=args.kind == "pagecache"
    )
    image = args.image.resolve()
    if image.exists() and not args.force:
        raise UsageError(f"{args.image} exists", remedy="use -f to replace it")
    if not image.parent.is_dir():
        raise UsageError(f"{image.parent} is not a directory", expected="a place for the image")
    tree = None if args.root_dir is None else scan(args.root_dir)
    try:
        with Progress(
            TextColumn("copying"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
            console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(),
        ) as bar:  # fmt: skip
            task = bar.add_task("", total=tree.data_bytes if tree else 0)
            made = replace_image(
                image, build, tree, SystemClock(), lambda size: bar.advance(task, size)
            )
    except OSError as error:
        raise ImageError(f"{args.image} cannot be made: {error.strerror}") from error
    seconds = round(time.monotonic() - began, 3)
    if args.json:
        facts = {"image": str(args.image), "label": args.label, "kind": args.kind}
        print(json.dumps(facts | dataclasses.asdict(made) | {"duration_s": seconds}, indent=2))
        return 0
    print(f"{args.image}: {format_size(made.size_bytes)}, {format_size(made.free_bytes)} free")
    if tree is not None:
        copied = made.copied
        print(
            f"copied {copied.files} files, {copied.directories} directories, {copied.symlinks} "
            f"symlinks, {copied.hard_links} hard links; {format_size(copied.data_bytes)}"
        )
        if copied.skipped_xattrs:
            print(f"not copied: {copied.skipped_xattrs} attributes that are not user, trusted "
                  "or security")  # fmt: skip
    return 0


def mkfs_main() -> int:
    """Run as ``mkfs.xipfs``."""
    from xipfs.cli import run_verb

    return run_verb("mkfs", "mkfs.xipfs", sys.argv[1:])
