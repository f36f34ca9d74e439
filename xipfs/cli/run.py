"""``xipfs run -- CMD``: run a program unmodified; report what it did on a mount, fault by fault.

Without ``--exact`` the kernel's fault-around is left as it is: the report says how many pages came
by a fault of their own and how many without. With it a small library registers the program's
mappings (``preload/register.c``), so that each first touch of a page is one fault; the touches for
which that could not be had are counted by reason.

The exit status is the program's (128 and the signal's number if a signal ended it; 127 not found,
126 not to be executed). The report goes to standard error, since standard output is the program's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Final, TextIO

from xipfs.cli import preloading
from xipfs.cli.client import Json, ask, request
from xipfs.cli.launch import Launched
from xipfs.cli.record import record
from xipfs.cli.stream import POLL_S
from xipfs.errors import MountError, UsageError, XipfsError
from xipfs.fuse.mounts import FSTYPE, Mount, mount_at, mounts
from xipfs.trace import uffd

SCHEMA: Final = 1
REASONS: Final = {
    "before_library": "before the library ran: exec and the loader",
    "shared_read_only": "shared mappings of read-only descriptors",
    "past_library": "past the library: in dlopen, MAP_LOCKED, raw system calls",
    "without_library": "programs without the library: static, set-uid, clone(2)",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    parser.add_argument(
        "--mount",
        type=Path,
        metavar="DIR",
        help="the mount (default: the one that CMD or an argument lies on, the current directory "
        "lies on, or the only one)",
    )
    parser.add_argument(
        "--exact", action="store_true", help="no fault-around: each first touch is a fault"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="record the mount's faults meanwhile"
    )
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write the report there, not to standard error"
    )
    parser.add_argument("--json", action="store_true", help="the report as one JSON object")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="CMD", help="the program and its arguments"
    )


def run(args: argparse.Namespace) -> int:
    """Run the program and report; returns its exit status."""
    if args.command[:1] == ["--"]:
        del args.command[0]
    if not args.command:
        raise UsageError("no command", expected="xipfs run [OPTIONS] -- CMD [ARGUMENTS]")
    if args.force and args.output is None:
        raise UsageError("--force without -o", expected="-o FILE, which it overwrites")
    mount = mount_at(args.mount) if args.mount is not None else choose_mount(args.command)
    environment = exact_environment(mount, os.environ) if args.exact else None
    before = ask(mount, "stats.json")
    with _report_file(args.report) as report, Launched(args.command, environment) as launched:
        list(request(mount, "follow", pid=launched.pid))
        told: Json = {
            "schema": SCHEMA,
            "command": args.command,
            "pid": launched.pid,
            "mountpoint": str(mount.mountpoint),
            "exact": args.exact,
        }
        if args.output is None:
            launched.release()
            launched.wait(None)
            failure = _finish(told, mount, launched, before)
        else:
            failure = _recorded(args, told, mount, launched, before)
        if launched.failure:
            print(f"xipfs run: {launched.failure}", file=sys.stderr)
        elif failure is not None:
            # The program has run: its status is what the caller goes by.
            print(f"xipfs run: no report: {failure}", file=sys.stderr)
        else:
            print(json.dumps(told, indent=2) if args.json else as_text(told), file=report)
        return launched.exit_status


def _recorded(
    args: argparse.Namespace, told: Json, mount: Mount, launched: Launched, before: Json
) -> XipfsError | None:
    failure: XipfsError | None = None

    def wait(_faults: int, _missed: int) -> bool:
        launched.release()
        return not launched.wait(POLL_S)

    def finish() -> Json:
        nonlocal failure
        launched.wait(None)
        failure = _finish(told, mount, launched, before)
        return {"run": told}

    losses = record(mount, args.output, wait, force=args.force, also=finish)
    told["recorded"] = losses
    return failure


def _finish(told: Json, mount: Mount, launched: Launched, before: Json) -> XipfsError | None:
    """Complete the report when the program has ended; return why that is not possible."""
    told["exit_status"] = launched.exit_status
    try:
        figures = ask(mount, f"run.{launched.pid}.json")
        after = ask(mount, "stats.json")
    except XipfsError as error:
        return error
    if "unknown" in figures:
        return MountError("the daemon has forgotten the run")
    told |= figures
    told["events_lost"] = after["observer"]["lost"] - before["observer"]["lost"]
    if not told["exact"]:
        # Nobody tried: these reasons are of exact mode.
        for name in ("inexact", "without_library", "programs_registered"):
            del told[name]
    return None


def choose_mount(command: Sequence[str]) -> Mount:
    """Return the mount that a word of ``command`` or the current directory lies on, or the only."""
    known = {
        os.makedev(mount.major, mount.minor): mount for mount in mounts() if mount.fstype == FSTYPE
    }
    for word in (*command, "."):
        try:
            device = os.stat(word).st_dev
        except OSError:
            continue
        if device in known:
            return known[device]
    if len(known) == 1:
        return next(iter(known.values()))
    there = ", ".join(str(mount.mountpoint) for mount in known.values())
    raise UsageError(
        f"which mount? {there} are mounted" if known else "no image is mounted",
        expected="a mount of xipfs that the command names a file of",
        remedy="name it with --mount DIR" if known else "mount one with xipfs mount",
    )


def exact_environment(mount: Mount, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment that makes programs register their mappings of ``mount``."""
    reason = uffd.unusable()
    if reason:
        raise UsageError(
            f"--exact is not possible here: {reason}",
            expected="Linux 6.7 or later with CONFIG_USERFAULTFD",
            remedy="run without --exact",
        )
    earlier = environment.get("LD_PRELOAD")
    preload = str(preloading.library())
    return {
        **environment,
        "LD_PRELOAD": f"{preload}:{earlier}" if earlier else preload,
        "XIPFS_DEV": f"{mount.major}:{mount.minor}",
    }


def _report_file(path: Path | None) -> AbstractContextManager[TextIO]:
    """Open what the report goes to, before the program runs; it has a command line: ours alone."""
    if path is None:
        return nullcontext(sys.stderr)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return open(os.open(path, flags, 0o600), "w")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None


def as_text(told: Json) -> str:
    """Return the report for people."""
    own, around = told["pages_own_fault"], told["pages_around"]
    pages = f"{own + around} pages mapped: {own} by a fault of their own, {around} without"
    lines = [f"{told['faults']} faults; {pages}"]
    if told["exact"]:
        lines.append(
            f"{told['programs_registered']} of {told['programs']} address spaces registered; "
            f"{around} pages inexact:"
        )
        lines += [f"{told['inexact'][name]:>8} {text}" for name, text in REASONS.items()]
        lines += [f"{pages:>12} {name}" for name, pages in told["without_library"].items()]
    if unsure := told["pages_unsure"]:
        lines.append(f"{unsure} of those without are unsure: no event tells if they were mapped")
    if told["programs_living"]:
        lines.append(f"{told['programs_living']} address spaces of it live on, uncounted from here")
    if told["events_lost"]:
        lines.append(f"{told['events_lost']} events lost: the figures are too low")
    if "recorded" in told:
        losses = told["recorded"]
        lines.append(f"{losses['faults']} faults recorded, {losses['faults_missed']} missed")
    return "\n".join(lines)
