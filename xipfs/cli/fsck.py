"""``xipfs fsck IMAGE`` (also ``fsck.xipfs``): judge an image, and repair what is damaged."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from xipfs.errors import EXIT_USAGE, ImageBusyError, UsageError, XipfsError
from xipfs.fs.imagelock import ImageLock
from xipfs.image.check import check
from xipfs.image.check_maps import Finding
from xipfs.image.repair import SAFE, mark_clean, repair, was_clean
from xipfs.memory.region import Region

#: Exit bits of fsck(8). 2 (reboot) is never needed: what is mounted is not repaired.
CORRECTED: Final = 1
LEFT_UNCORRECTED: Final = 4
OPERATIONAL_ERROR: Final = 8
USAGE: Final = 16
CANCELED: Final = 32
LIBRARY_ERROR: Final = 128

_PROGRESS_S: Final = 0.2


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    parser.add_argument("image", type=Path, metavar="IMAGE", help="an image that is not mounted")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("-n", action="store_const", dest="how", const="n", help="change nothing")
    how.add_argument(
        "-p",
        "-a",
        action="store_const",
        dest="how",
        const="p",
        help="repair what is no choice",
    )
    how.add_argument("-y", action="store_const", dest="how", const="y", help="repair everything")
    parser.add_argument(
        "-f",
        action="store_true",
        dest="force",
        help="with -p: check what is marked clean too",
    )
    parser.add_argument("--json", action="store_true", help="findings and repairs as JSON")


def run(args: argparse.Namespace) -> int:
    """Check, and repair as asked; return fsck(8)'s exit bits."""
    if args.how is None and (args.json or not sys.stdin.isatty()):
        raise UsageError(
            "nobody can be asked what to repair",
            expected="-n (nothing), -p (what is safe) or -y (everything)",
        )
    job = _Job(args)
    try:
        job.run()
    except XipfsError as error:
        print(f"fsck.xipfs: {error}", file=sys.stderr)
        job.code |= OPERATIONAL_ERROR
    except KeyboardInterrupt:
        print("fsck.xipfs: canceled; what was repaired stays so", file=sys.stderr)
        job.code |= CANCELED
    if args.json:
        job.show_json()
    return job.code


class _Job:
    """One run over one image."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.image: Path = args.image
        self.how: str | None = args.how
        self.force: bool = args.force
        self.json: bool = args.json
        self.code = 0
        self.findings: list[Finding] = []
        self.repairs: list[Finding] = []
        self.left: list[Finding] = []

    def run(self) -> None:
        """Lock the image, do it, let it go."""
        try:
            lock: ImageLock | None = ImageLock(self.image, exclusive=self.how != "n")
        except ImageBusyError as error:
            if self.how != "n":
                raise
            lock = None
            print(
                f"fsck.xipfs: warning: {error.what}: what it changes meanwhile shows as damage",
                file=sys.stderr,
            )
        try:
            self.check_and_repair()
        finally:
            if lock is not None:
                lock.release()

    def check_and_repair(self) -> None:
        """Check; then repair if that was asked for, and check again."""
        region = Region(self.image, writable=False)
        try:
            if self.how == "p" and not self.force and was_clean(region, str(self.image)):
                self.say(f"{self.image}: cleanly unmounted, not checked; -f checks it")
                return
            self.findings = self.left = check(region, str(self.image), _progress("checked"))
        finally:
            region.close()
        self.show("", self.findings)
        if not self.findings:
            self.say(f"{self.image}: clean")
        elif self.may_repair():
            self.repair()
        else:
            self.code |= LEFT_UNCORRECTED

    def may_repair(self) -> bool:
        """Whether the user wants what was found repaired."""
        count = len(self.findings)
        if self.how == "n":
            self.say(f"{self.image}: {count} findings")
            return False
        unsafe = sorted({finding.name for finding in self.findings} - SAFE)
        if self.how == "p" and unsafe:
            self.say(f"{self.image}: {count} findings; {', '.join(unsafe)}: run fsck.xipfs by hand")
            return False
        if self.how is None:
            answer = input(f"{self.image}: {count} findings. Repair? [y/N] ")
            return answer.strip().lower() in ("y", "yes")
        return True

    def repair(self) -> None:
        """Repair everything, and see what is left."""
        region = Region(self.image, writable=True)
        try:
            self.repairs = repair(region, str(self.image), _progress("repaired"))
            self.code |= CORRECTED
            self.show("repaired: ", self.repairs)
            self.left = check(region, str(self.image), _progress("checked again"))
            if not self.left:
                mark_clean(region)
            region.sync()
        finally:
            region.close()
        self.show("left: ", self.left)
        if self.left:
            self.code |= LEFT_UNCORRECTED
            self.say(f"{self.image}: {len(self.left)} findings left")
        else:
            self.say(f"{self.image}: repaired")

    def say(self, line: str) -> None:
        """Print a line for people."""
        if not self.json:
            print(line)

    def show(self, title: str, findings: list[Finding]) -> None:
        """Print findings, a line each."""
        for finding in findings:
            whose = "" if finding.ino is None else f" inode {finding.ino}"
            self.say(f"{title}{finding.name} at offset {finding.offset}{whose}: {finding.what}")

    def show_json(self) -> None:
        """Print everything as one object."""
        answer: dict[str, object] = {"image": str(self.image), "exit_code": self.code}
        for title in ("findings", "repairs", "left"):
            answer[title] = [dataclasses.asdict(finding) for finding in getattr(self, title)]
        print(json.dumps(answer, indent=2))


def _progress(what: str) -> Callable[[int, int], None] | None:
    """Return what shows progress on a terminal, None elsewhere."""
    if not sys.stderr.isatty():
        return None
    shown = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown >= _PROGRESS_S:
            shown = time.monotonic()
            percent = 100 * done // max(total, 1)
            print(f"\r{what}: {percent} % of {total} inodes ", end="", file=sys.stderr, flush=True)
            if total - done <= 32:
                print(file=sys.stderr)

    return progress


def fsck_main() -> int:
    """Run as ``fsck.xipfs``."""
    try:
        from xipfs.cli import run_verb
    except ImportError as error:
        print(f"fsck.xipfs: {error}", file=sys.stderr)
        return LIBRARY_ERROR
    try:
        code = run_verb("fsck", "fsck.xipfs", sys.argv[1:])
    except SystemExit as end:
        return USAGE if end.code else 0
    return USAGE if code == EXIT_USAGE else code
