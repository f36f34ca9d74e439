"""``xipfs fsck -n IMAGE`` (also ``fsck.xipfs``): judge an image without changing it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Final

from xipfs.errors import XipfsError
from xipfs.fs.imagelock import ImageLock
from xipfs.image.check import check
from xipfs.memory.region import Region

#: Exit bits of fsck(8).
LEFT_UNCORRECTED: Final = 4
OPERATIONAL_ERROR: Final = 8
USAGE: Final = 16


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    parser.add_argument("image", type=Path, metavar="IMAGE", help="an image that is not mounted")
    parser.add_argument(
        "-n", action="store_true", required=True, help="change nothing (nothing is repaired yet)"
    )
    parser.add_argument("--json", action="store_true", help="the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the findings; return fsck(8)'s exit bits."""
    try:
        lock = ImageLock(args.image, exclusive=True)
        try:
            region = Region(args.image, writable=False)
            try:
                findings = check(region, str(args.image))
            finally:
                region.close()
        finally:
            lock.release()
    except XipfsError as error:
        print(f"fsck.xipfs: {error}", file=sys.stderr)
        return OPERATIONAL_ERROR
    if args.json:
        rows = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"image": str(args.image), "findings": rows}, indent=2))
    else:
        for finding in findings:
            whose = "" if finding.ino is None else f" inode {finding.ino}"
            print(f"{finding.name} at offset {finding.offset}{whose}: {finding.what}")
        print(f"{args.image}: {len(findings)} findings" if findings else f"{args.image}: clean")
    return LEFT_UNCORRECTED if findings else 0


def fsck_main() -> int:
    """Run as ``fsck.xipfs``."""
    from xipfs.cli import run_verb

    try:
        return run_verb("fsck", "fsck.xipfs", sys.argv[1:])
    except SystemExit as end:
        return USAGE if end.code else 0
