"""``xipfs verify DIR``: is what xipfs believes of every page table what the kernel has?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Final

from xipfs.cli.client import Json, ask
from xipfs.cli.fault_table import incomplete_lines
from xipfs.errors import EXIT_FAILURE, MountError, UsageError
from xipfs.fuse.mounts import mount_of

#: The pid that stands for all: init is never followed.
_ALL: Final = 1
#: Of an answer, what is 0 or empty if all is as it should be.
WRONG: Final = ("pages_differ", "mapcounts_differ", "copies_differ", "invariants_broken")


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="anything on the mount")
    parser.add_argument("--pid", type=int, metavar="P", help="only this process's address space")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Compare; 1 if anything differs."""
    if args.pid is not None and args.pid < 2:
        raise UsageError(f"--pid {args.pid}", expected="a process that uses the mount")
    mount = mount_of(args.directory)
    answer = ask(mount, f"verify.{args.pid or _ALL}.json")
    if "unavailable" in answer:
        raise MountError(
            f"{mount.mountpoint} cannot be verified: {answer['unavailable']}",
            remedy="mount it with -o observe=tracefs, as root",
        )
    if args.pid is not None and not answer["processes"] and not answer["pages_unknown"]:
        raise UsageError(
            f"process {args.pid} has touched no mapping of {mount.mountpoint}",
            expected="one of those that xipfs stat lists",
        )
    print(json.dumps(answer, indent=2) if args.json else as_text(answer))
    return EXIT_FAILURE if differs(answer) else 0


def differs(answer: Json) -> bool:
    """Return whether anything that was compared is not as it should be."""
    return any(answer[name] for name in WRONG)


def as_text(answer: Json) -> str:
    """Return the answer for people, under 80 columns."""
    unknown = sum(answer["pages_unknown"].values())
    lines = []
    lines.append(
        f"{answer['pages_compared']} pages compared with pagemap, "
        f"{answer['pages_differ']} differ, {unknown} unknown"
    )
    lines += [f"  {count} {reason}" for reason, count in answer["pages_unknown"].items()]
    if answer["mapcounts_compared"] is None:
        lines.append("mapcounts not compared: something was unknown, moved, or left out")
    else:
        lines.append(
            f"{answer['mapcounts_compared']} mapcounts compared with kpagecount, "
            f"{answer['mapcounts_differ']} differ"
        )
    lines.append(
        f"{answer['copies_compared']} private copies compared with the model, "
        f"{answer['copies_differ']} differ"
    )
    lines.append(f"model: {answer['invariants_broken'] or 'its counters are its PTEs'}")
    for process in answer["processes"]:
        mark = "*" if process["incomplete"] else " "
        lines.append(
            f"{process['pid']:>8}{mark}{process['comm'][:16]:16} {process['pages_compared']:>9} "
            f"compared, {process['pages_resident']} mapped, Rss {process['rss_pages_smaps']}"
        )
        lines += [
            f"         {difference['address']:#x} inode {difference['ino']} page "
            f"{difference['index']}: {difference['shadow']} here, {difference['kernel']} there"
            for difference in process["differences"]
        ]
    lines += incomplete_lines(answer["processes"])
    return "\n".join(lines)
