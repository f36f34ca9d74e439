"""``xipfs umount DIR``: unmount, and return when the daemon has ended and the image is closed."""

from __future__ import annotations

import argparse
import os
import select
from pathlib import Path

from xipfs.errors import MountError
from xipfs.fuse.mounts import mount_at, serving_pid, unmount


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="the mount point")
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="how long to wait (default 600)"
    )


def run(args: argparse.Namespace) -> int:
    """Unmount and wait."""
    mount = mount_at(args.directory)
    pid = serving_pid(mount)
    # The descriptor pins the process: its number cannot come to mean another one.
    daemon = None if pid is None else os.pidfd_open(pid)
    try:
        unmount(mount.mountpoint)
        if daemon is not None and not _ended(daemon, args.timeout):
            raise MountError(
                f"{args.directory} is unmounted but its daemon, pid {pid}, still runs after "
                f"{args.timeout:g} s",
                remedy="see the daemon's log",
            )
    finally:
        if daemon is not None:
            os.close(daemon)
    return 0


def _ended(pidfd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
