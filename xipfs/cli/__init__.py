"""The ``xipfs`` command: one verb a module; a verb has ``configure(parser)`` and ``run(args)``.

Exit codes: 0 done, 1 it failed (or a comparison differs), 2 the command line or an input is wrong,
130 interrupted. Errors go to standard error as one line starting with ``xipfs VERB:``.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final

from xipfs import __version__
from xipfs.errors import XipfsError

#: verb: one line of help. The module of the same name is imported only when its verb is used.
VERBS: Final[dict[str, str]] = {
    "mkfs": "make an image, optionally from a directory tree",
    "mount": "mount an image; faults of mapped files are accounted from then on",
    "umount": "unmount and wait until the image is closed",
    "fsck": "check an image that is not mounted, and repair it if asked to",
    "stat": "show what faults were charged, and where pages are",
    "pages": "show a file's pages: XIP, pagecache, hole",
    "run": "run a program and report its faults; with --exact no page comes without one",
    "record": "write every fault of a mount to a trace file",
    "faults": "faults of a trace file or a live mount, by process, file or page",
    "replay": "run a trace again, under another policy, RAM or medium",
    "sweep": "one trace under many policies and sizes of RAM, beside Belady's bound",
    "verify": "compare what is believed of page tables with the kernel's",
    "events": "tell what migrates, as it happens",
    "migrate": "move a file's pages between XIP and pagecache",
    "policy": "list, show and test migration policies; change a live mount's",
    "doctor": "say what this machine offers and what is lost without the rest; clean up",
    "model": "run the mm model by command files; compare it with recorded kernels",
}


def run_verb(verb: str, prog: str, argv: Sequence[str]) -> int:
    """Parse ``argv`` with the verb's own parser, run it, and return the exit code."""
    summary = VERBS[verb]
    parser = argparse.ArgumentParser(prog=prog, description=summary[0].upper() + summary[1:] + ".")
    try:
        # What cleans up after Ctrl-C cleans up after a plain kill too.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        module = importlib.import_module(f"xipfs.cli.{verb}")
        module.configure(parser)
        code: int = module.run(parser.parse_args(argv))
        sys.stdout.flush()
    except XipfsError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader (head, less) went away; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="xipfs",
        description="A filesystem and mm model that make VM_MIXEDMAP visible.",
        epilog="verbs:\n" + "\n".join(f"  {verb:10} {text}" for verb, text in VERBS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"xipfs {__version__}")
    parser.add_argument("verb", choices=VERBS, metavar="VERB")
    args = parser.parse_args(words[:1])
    return run_verb(args.verb, f"xipfs {args.verb}", words[1:])
