"""One run of ``xipfs fsck`` over one image: the lock, the check, the repair, what is told of it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from xipfs.cli.fsck import (
    CANCELED,
    CORRECTED,
    LEFT_UNCORRECTED,
    OPERATIONAL_ERROR,
    show_json,
)
from xipfs.cli.progress import progress_bar
from xipfs.errors import ImageBusyError, XipfsError
from xipfs.fs.imagelock import ImageLock
from xipfs.image.check import check
from xipfs.image.check_maps import Finding
from xipfs.image.repair import SAFE, mark_clean, repair, was_clean
from xipfs.memory.region import Region


class Job:
    """One run over one image."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.image: Path = args.image
        self.how: str | None = args.how
        self.force: bool = args.force
        self.progress: bool = args.progress
        self.json: bool = args.json
        self.code = 0
        self.error = ""
        self.findings: list[Finding] = []
        self.repairs: list[Finding] = []
        self.left: list[Finding] = []

    def run(self) -> int:
        """Do it; return the exit bits, whatever happens."""
        try:
            self.lock_and_check()
        except XipfsError as error:
            self.fail(OPERATIONAL_ERROR, str(error))
        except OSError as error:
            self.fail(OPERATIONAL_ERROR, f"{self.image}: {error}; what was repaired stays so")
        except KeyboardInterrupt:
            self.fail(CANCELED, f"{self.image}: canceled; what was repaired stays so")
        except Exception as error:
            # Without this Python would end with 1, which says that all is repaired.
            traceback.print_exc()
            what = f"{self.image}: a defect of fsck.xipfs: {error!r}; what was repaired stays so"
            self.fail(OPERATIONAL_ERROR, what)
        with _reader():
            if self.json:
                lists = {
                    title: [dataclasses.asdict(finding) for finding in findings]
                    for title, findings in (
                        ("findings", self.findings),
                        ("repairs", self.repairs),
                        ("left", self.left),
                    )
                }
                show_json(self.image, self.code, self.error, lists)
            sys.stdout.flush()
        return self.code

    def fail(self, bit: int, what: str) -> None:
        """Tell why the run did not come to its end."""
        self.code |= bit
        self.error = what
        print(f"fsck.xipfs: {what}", file=sys.stderr)

    def lock_and_check(self) -> None:
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
            with progress_bar("checking", lines=self.progress) as progress:
                self.findings = self.left = check(region, str(self.image), progress)
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
            try:
                answer = input(f"{self.image}: {count} findings. Repair? [y/N] ")
            except EOFError:
                answer = ""
            return answer.strip().lower() in ("y", "yes")
        return True

    def repair(self) -> None:
        """Repair everything, and see what is left."""
        region = Region(self.image, writable=True)
        try:
            with progress_bar("repairing", lines=self.progress) as progress:
                mended = repair(region, str(self.image), progress)
            self.repairs = mended.done
            if self.repairs:
                self.code |= CORRECTED
            self.show("repaired: ", self.repairs)
            with progress_bar("checking again", lines=self.progress) as progress:
                self.left = check(region, str(self.image), progress)
            if not self.left:
                mark_clean(region)
            region.sync()
        finally:
            region.close()
        self.show("left: ", self.left)
        if not self.left:
            self.say(f"{self.image}: repaired")
            return
        self.code |= LEFT_UNCORRECTED
        self.say(f"{self.image}: {len(self.left)} findings left")
        if mended.lacked_room:
            self.say(
                "  No block was free for their repair. Mount the image, delete files that are not"
                " needed,\n  unmount it and run fsck.xipfs again; or mount it with -o ro and copy"
                " what is needed to a new image."
            )

    def say(self, line: str) -> None:
        """Print a line for people."""
        if not self.json:
            with _reader():
                print(line)

    def show(self, title: str, findings: list[Finding]) -> None:
        """Print findings, a line each."""
        for finding in findings:
            whose = "" if finding.ino is None else f" inode {finding.ino}"
            self.say(f"{title}{finding.name} at offset {finding.offset}{whose}: {finding.what}")


@contextlib.contextmanager
def _reader() -> Iterator[None]:
    """Let a reader of standard output that went away (head) end no repair."""
    try:
        yield
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
