"""``xipfs doctor``: what is there, what is missing, what is lost without it, and how to get it.

With ``--clean`` it first removes what dead daemons left: tracefs instances, and mounts that nobody
serves any more.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from xipfs.errors import EXIT_FAILURE, UsageError
from xipfs.fuse.mounts import FSTYPE, mounts, unmount
from xipfs.trace import session

_LOCKDOWN: Final = Path("/sys/kernel/security/lockdown")
_FAULT_AROUND: Final = Path("/sys/kernel/debug/fault_around_bytes")


@dataclass(frozen=True)
class Need:
    """One thing that xipfs uses; ``lost`` and ``get`` matter where it is missing.

    Without a ``needed`` one faults are not exact, or nothing can be mounted at all.
    """

    name: str
    there: bool
    found: str
    lost: str = ""
    get: str = ""
    needed: bool = False


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    parser.add_argument(
        "--clean", action="store_true", help="remove what dead daemons left (as root)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Look at everything; 1 if faults cannot be observed exactly here."""
    if args.clean and os.geteuid() != 0:
        raise UsageError("--clean without root", expected="root, to unmount and to use tracefs")
    removed = clean() if args.clean else []
    needs = examine()
    exact = all(need.there for need in needs if need.needed)
    if args.json:
        answer = {"exact": exact, "needs": [asdict(need) for need in needs], "removed": removed}
        print(json.dumps(answer, indent=2))
    else:
        print(as_text(needs, removed, exact=exact))
    return 0 if exact else EXIT_FAILURE


def clean(tracing: Path = session.TRACING) -> list[str]:
    """Remove orphaned tracefs instances and dead mounts; return what was removed."""
    removed = []
    if (tracing / "instances").is_dir():
        removed += [f"tracefs instance {name}" for name in session.clean_orphans(tracing)]
    for mount in reversed(mounts()):
        if mount.fstype == FSTYPE and _is_dead(mount.mountpoint):
            unmount(mount.mountpoint, lazy=True)
            removed.append(f"dead mount {mount.mountpoint}")
    return removed


def _is_dead(mountpoint: Path) -> bool:
    # statfs asks the daemon; stat could be answered from the kernel's cache.
    try:
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def examine(tracing: Path = session.TRACING) -> list[Need]:
    """Return every need with what was found: to mount, to observe, to do more."""
    return [*_to_mount(), *_to_observe(tracing), *_to_do_more()]


def _to_mount() -> list[Need]:
    fuse = os.access("/dev/fuse", os.R_OK | os.W_OK)
    return [
        Need(
            "/dev/fuse",
            fuse,
            "usable" if fuse else "missing or not ours",
            "nothing can be mounted",
            "as root: modprobe fuse",
            needed=True,
        ),
        _package("pyfuse3", "nothing can be mounted", "pip install xipfs[mount]", needed=True),
        _command("fusermount3", "mounts cannot be ended", "apt-get install fuse3", needed=True),
    ]


def _to_observe(tracing: Path) -> list[Need]:
    available = session.probe(tracing)
    found = available.unusable or f"{len(available.events)} events usable"
    mounted = (tracing / "instances").is_dir()
    get = "a kernel with the event" if mounted else f"as root: mount -t tracefs nodev {tracing}"
    estimate = "faults are estimated from READ requests"
    uid = os.geteuid()
    return [
        Need("root", uid == 0, f"uid {uid}", estimate, "run as root", needed=True),
        Need("tracefs", not available.unusable, found, estimate, get, needed=True),
        *(
            Need(f"event {event}", False, reason, reason.rpartition("lost: ")[2], get)
            for event, reason in available.missing.items()
        ),
        _readable("/proc/self/pagemap", "xipfs verify", "mount /proc"),
        _readable("/proc/kpagecount", "mapcounts in xipfs verify", "run as root"),
    ]


def _to_do_more() -> list[Need]:
    lockdown = _text(_LOCKDOWN) or "none"
    around = _text(_FAULT_AROUND)
    return [
        Need(
            "lockdown below confidentiality",
            "[confidentiality]" not in lockdown,
            lockdown,
            "tracing, and so exact faults",
            "boot with lockdown=integrity or without",
        ),
        Need(
            "size of fault-around",
            bool(around),
            f"{around} bytes" if around else "cannot be read",
            "it is taken as 64 KiB, the kernel's default",
            "as root: mount -t debugfs nodev /sys/kernel/debug",
        ),
        _package("numba", "events are decoded 30 times slower", "pip install xipfs[fast]"),
        _package("pyarrow", "xipfs record and faults", "pip install xipfs[trace]"),
        _command("cc", "the demo's and the tests' C programs", "apt-get install gcc libc6-dev"),
    ]


def _package(name: str, lost: str, get: str, *, needed: bool = False) -> Need:
    there = importlib.util.find_spec(name) is not None
    return Need(name, there, "installed" if there else "not installed", lost, get, needed)


def _command(name: str, lost: str, get: str, *, needed: bool = False) -> Need:
    path = shutil.which(name)
    return Need(name, path is not None, path or "not found", lost, get, needed)


def _readable(path: str, lost: str, get: str) -> Need:
    there = os.access(path, os.R_OK)
    return Need(path, there, "readable" if there else "not readable", lost, get)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def as_text(needs: list[Need], removed: list[str], *, exact: bool) -> str:
    """Return the answer for people."""
    lines = [f"removed {name}" for name in removed]
    for need in needs:
        lines.append(f"{'ok     ' if need.there else 'MISSING'} {need.name}: {need.found}")
        if not need.there:
            lines += [f"          lost: {need.lost}", f"          get it: {need.get}"]
    lines.append("exact: every fault is seen" if exact else "not exact: see what is MISSING")
    return "\n".join(lines)
