"""``xipfs mount IMAGE DIR``: start the daemon and return once the filesystem is there.

As ``mount.fuse.xipfs`` in /sbin it is what mount(8) starts for the type, with words of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from xipfs.cli import compiling, run_verb
from xipfs.cli.client import ask
from xipfs.errors import EXIT_FAILURE, EXIT_USAGE, MountError, UsageError, XipfsError
from xipfs.fuse.mounts import FSTYPE, is_dead, mount_at, unmount
from xipfs.options import HELP, parse_options

#: What mount(8) passes on of an fstab line: options that are its own, and what every FUSE mount is.
_OF_FSTAB: Final = {
    *("nofail", "_netdev", "user", "users", "owner", "group"),
    *("nosuid", "nodev", "default_permissions"),
}
#: What the kernel alone can change of a mount that is there.
_BY_REMOUNT: Final = {"ro", "rw", "exec", "noexec"}
#: What mount(8) exits with for wrong usage, for an interruption, and for a mount that failed.
_EXITS: Final = {0: 0, EXIT_USAGE: 1, 130: 8}
_FAILED: Final = 32


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "mount options (-o):\n" + "\n".join(
        f"  {name:32} {text}" for name, text in HELP.items()
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="made by xipfs mkfs")
    parser.add_argument("directory", type=Path, metavar="DIR", help="an existing directory")
    parser.add_argument("-o", action="append", default=[], metavar="OPT,OPT", dest="options")
    parser.add_argument("-f", action="store_true", dest="foreground", help="do not go background")
    parser.add_argument("--log", type=Path, metavar="FILE", help="append the daemon's log here")
    parser.add_argument("--ready-fd", type=int, default=None, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Mount; in the background unless ``-f``."""
    options = parse_options(args.options)  # refuse a bad one before anything is started
    _check_directory(args.directory)
    if not args.image.is_file():
        raise UsageError(
            f"{args.image} is not a file", expected="an image", remedy="make one with xipfs mkfs"
        )
    # Whoever starts us with --ready-fd has done it.
    if args.ready_fd is None and compiling.is_used(options.observe):
        compiling.prepare(lambda text: print(f"xipfs mount: {text}", file=sys.stderr, flush=True))
    if args.foreground:
        return _serve(args)
    return _start_daemon(args)


def _check_directory(directory: Path) -> None:
    """Refuse what cannot be mounted on; take away a mount of ours whose daemon was killed."""
    try:
        if is_dead(directory) and _is_ours(directory):
            unmount(directory, lazy=True)
            print(f"xipfs mount: removed a dead mount from {directory}", file=sys.stderr)
        if not directory.is_dir():
            raise UsageError(f"{directory} is not a directory", expected="an existing directory")
    except OSError as error:
        raise MountError(
            f"{directory} cannot be looked at: {error.strerror}",
            remedy=f"if a dead mount is there, run: xipfs umount {directory}",
        ) from None


def _is_ours(directory: Path) -> bool:
    try:
        return mount_at(directory).fstype == FSTYPE
    except MountError:
        return False  # something above it is dead


def default_log_path() -> Path:
    """Return where a background daemon's log goes: /var/log for root, else the user's state."""
    if os.geteuid() == 0:
        return Path("/var/log/xipfs.log")
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "xipfs.log"


def _serve(args: argparse.Namespace) -> int:
    from xipfs.daemon import serve

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s xipfs[%(process)d] %(levelname)s %(message)s"
    )

    def tell(message: dict[str, Any]) -> None:
        if args.ready_fd is not None:
            os.write(args.ready_fd, json.dumps(message).encode())
            os.close(args.ready_fd)
            args.ready_fd = None

    try:
        serve(
            args.image.resolve(),
            args.directory.resolve(),
            parse_options(args.options),
            on_ready=lambda damage: tell({"ready": True, "damage": damage}),
        )
    except XipfsError as error:
        if args.ready_fd is None:
            raise
        tell({"error": str(error), "exit_code": error.exit_code})
        return error.exit_code
    return 0


def _start_daemon(args: argparse.Namespace) -> int:
    log_path = (args.log or default_log_path()).absolute()
    log_path.parent.mkdir(parents=True, exist_ok=True)
    read_fd, write_fd = os.pipe()
    command = [sys.executable, "-m", "xipfs", "mount", "-f", "--ready-fd", str(write_fd)]
    for word in args.options:
        command += ["-o", word]
    command += ["--", str(args.image.resolve()), str(args.directory.resolve())]
    # Its owner's alone: it names files, and processes that something went wrong with.
    log_fd = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with open(log_fd, "ab") as log_file:
        daemon = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log_file,
            pass_fds=[write_fd],
            start_new_session=True,
            cwd="/",
        )
    os.close(write_fd)
    with open(read_fd, "rb") as pipe:
        answer = pipe.read()
    if not answer:
        code = daemon.wait()
        raise MountError(
            f"the daemon ended with code {code} before it was ready", remedy=f"see {log_path}"
        )
    message = json.loads(answer)
    if "error" in message:
        daemon.wait()
        print(f"xipfs mount: {message['error']}", file=sys.stderr)
        return int(message.get("exit_code", EXIT_FAILURE))
    if message["damage"]:
        print(
            f"xipfs mount: {args.image} is damaged, mounted read-only: {message['damage']}",
            file=sys.stderr,
        )
    # The daemon outlives us on purpose; say so, or Popen warns that it still runs.
    daemon.returncode = 0
    return 0


def mount_main() -> int:
    """Run as ``mount.fuse.xipfs``: the helper's words and exit codes are those of mount(8)."""
    parser = argparse.ArgumentParser(
        prog="mount.fuse.xipfs", description="What mount(8) starts for the type fuse.xipfs."
    )
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("-o", default="", metavar="OPT,OPT", dest="options")
    parser.add_argument("-f", action="store_true", dest="fake", help="mount nothing")
    parser.add_argument("-t", metavar="TYPE", help=argparse.SUPPRESS)
    for flag in ("-n", "-s", "-v"):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    try:
        args = parser.parse_args()
        if args.fake:
            return 0
        words = [word for word in args.options.split(",") if word not in _OF_FSTAB]
        if "remount" in words:
            return _remount(parser.prog, args.directory, set(words) - {"remount"})
        place = ["--", args.image, args.directory]
        code = run_verb("mount", parser.prog, ["-o", ",".join(words), *place])
    except SystemExit as end:
        code = EXIT_USAGE if end.code else 0
    return _EXITS.get(code, _FAILED)


def _remount(prog: str, directory: str, words: set[str]) -> int:
    """Have the kernel change flags of a mount; the daemon hears nothing of it."""
    try:
        mount = mount_at(Path(directory))
        # mount(8) names what is there already, too.
        others = words - _BY_REMOUNT - mount.options
        if others:
            raise UsageError(
                f"{', '.join(sorted(others))} cannot be changed on a mount that is there",
                expected=", ".join(sorted(_BY_REMOUNT)),
                remedy="unmount it and mount it anew",
            )
        if "rw" in words - mount.options and ask(mount, "stats.json")["mount"]["read_only"]:
            raise UsageError(
                f"{directory} was mounted read-only, or is so for damage",
                remedy="unmount it and mount it anew",
            )
    except XipfsError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return _EXITS.get(error.exit_code, _FAILED)
    words &= _BY_REMOUNT
    # -i: not by way of a helper, which is where we are.
    options = ",".join(["remount", *sorted(words)])
    return subprocess.run(["mount", "-i", "-o", options, directory], check=False).returncode
