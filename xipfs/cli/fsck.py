"""``xipfs fsck IMAGE`` (also ``fsck.xipfs``): judge an image, and repair what is damaged.

This module needs only Python itself, so that a missing library ends in the exit bit for it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from xipfs.cli import run_verb
from xipfs.errors import EXIT_USAGE, UsageError

#: Exit bits of fsck(8). 2 (reboot) is never needed: what is mounted is not repaired.
CORRECTED: Final = 1
LEFT_UNCORRECTED: Final = 4
OPERATIONAL_ERROR: Final = 8
USAGE: Final = 16
CANCELED: Final = 32
LIBRARY_ERROR: Final = 128

_EXIT_BITS: Final = """\
exit bits, as fsck(8) has them: 0 no findings, 1 repaired, 4 findings are left, 8 the check could
not be made or finished, 16 a wrong command line (xipfs fsck: 2), 32 canceled, 128 a library is
missing"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    parser.epilog = _EXIT_BITS
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("image", type=Path, metavar="IMAGE", help="an image that is not mounted")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "-n",
        action="store_const",
        dest="how",
        const="n",
        help="change nothing, not one byte: a pending journal is replayed in memory",
    )
    how.add_argument(
        "-p",
        "-a",
        action="store_const",
        dest="how",
        const="p",
        help="repair what is no choice, without a question; an image that was cleanly unmounted"
        " is believed to be sound and not read, unless -f is given",
    )
    how.add_argument("-y", action="store_const", dest="how", const="y", help="repair everything")
    parser.add_argument(
        "-f",
        action="store_true",
        dest="force",
        help="with -p: check what was cleanly unmounted too (-n and -y always do)",
    )
    parser.add_argument(
        "-C",
        action="store_true",
        dest="progress",
        help="tell on standard error how far it is, also if that is no terminal",
    )
    parser.add_argument("--json", action="store_true", help="findings and repairs as JSON")


def run(args: argparse.Namespace) -> int:
    """Check, and repair as asked; return fsck(8)'s exit bits."""
    if args.how is None and (args.json or not sys.stdin.isatty()):
        raise UsageError(
            "nobody can be asked what to repair",
            expected="-n (nothing), -p (what is safe) or -y (everything)",
        )
    try:
        from xipfs.cli.checking import Job
    except ImportError as error:
        what = f"a library cannot be loaded: {error}; install it"
        print(f"fsck.xipfs: {what}", file=sys.stderr)
        if args.json:
            show_json(args.image, LIBRARY_ERROR, what, {})
        return LIBRARY_ERROR
    return Job(args).run()


def show_json(image: Path, code: int, error: str, lists: Mapping[str, list[Any]]) -> None:
    """Print the answer as one object, which has the same keys however it ended."""
    empty: dict[str, list[Any]] = {"findings": [], "repairs": [], "left": []}
    answer = {"image": str(image), "exit_code": code, "error": error, **empty, **lists}
    print(json.dumps(answer, indent=2))


def fsck_main() -> int:
    """Run as ``fsck.xipfs``."""
    try:
        code = run_verb("fsck", "fsck.xipfs", sys.argv[1:])
    except SystemExit as end:
        return USAGE if end.code else 0
    return USAGE if code == EXIT_USAGE else code
