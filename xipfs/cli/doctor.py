"""``xipfs doctor``: what is there, what is missing, what is lost without it, and how to get it.

With ``--clean`` it first removes what dead daemons left: tracefs instances, and mounts that nobody
serves any more. Each step has a limit: a tracefs or a mount that does not answer is told, not
waited for.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from xipfs.cli import compiling, preloading
from xipfs.cli.bounded import TookTooLongError, within
from xipfs.errors import EXIT_FAILURE, MountError, UsageError, XipfsError
from xipfs.fuse.mounts import FSTYPE, is_dead, mounts, unmount
from xipfs.trace import session, uffd

_UNMOUNT_S: Final = 20.0
#: For one thing that is looked at or removed.
_STEP_S: Final = 30.0
_LOCKDOWN: Final = Path("/sys/kernel/security/lockdown")
_BDI: Final = Path("/sys/class/bdi")
_FUSE_CONF: Final = Path("/etc/fuse.conf")
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
    removed, left = clean() if args.clean else ([], [])
    try:
        found = within(_STEP_S, "looking at this machine", lambda: [asdict(n) for n in examine()])
    except TookTooLongError as error:
        done = [f"removed {name}" for name in removed] + [f"NOT REMOVED {name}" for name in left]
        print("\n".join(done), file=sys.stderr)
        raise TookTooLongError(
            error.what,
            expected="answers from /proc, /sys and tracefs",
            remedy="dmesg tells what the kernel waits for",
        ) from None
    needs = [Need(**each) for each in found]
    exact = all(need.there for need in needs if need.needed)
    if args.json:
        answer = {
            "exact": exact,
            "needs": [asdict(need) for need in needs],
            "removed": removed,
            "left": left,
        }
        print(json.dumps(answer, indent=2))
    else:
        print(as_text(needs, removed, left, exact=exact))
    return 0 if exact and not left else EXIT_FAILURE


def clean(tracing: Path = session.TRACING) -> tuple[list[str], list[str]]:
    """Remove orphaned tracefs instances and dead mounts; return what was removed, and what not."""
    cleaned = _Cleaned()
    orphans = cleaned.done("tracefs", lambda: _orphans(tracing)) or []
    for path in orphans:
        name = f"tracefs instance {path}"
        gone = cleaned.done(name, functools.partial(_remove, tracing / "instances" / path))
        if gone is not None:
            cleaned.note(name, "" if gone else ", which somebody holds open")
    for mount in reversed(mounts()):
        if mount.fstype == FSTYPE:
            at = mount.mountpoint
            if cleaned.done(f"mount {at}", functools.partial(is_dead, at)):
                error = cleaned.done(f"dead mount {at}", functools.partial(_unmount, at))
                if error is not None:
                    cleaned.note(f"dead mount {at}", error)
    return cleaned.removed, cleaned.left


class _Cleaned:
    """What was removed, and what not; what does not answer keeps nobody from the rest."""

    def __init__(self) -> None:
        self.removed: list[str] = []
        self.left: list[str] = []

    def done(self, what: str, work: Callable[[], Any]) -> Any:
        """Return what ``work`` does; None if it fails or takes too long, which is told."""
        try:
            return within(_STEP_S, what, work)
        except TookTooLongError:
            self.left.append(f"{what}, which did not answer within {_STEP_S:g} s")
        except XipfsError as error:
            self.left.append(f"{what}: {error}")
        return None

    def note(self, what: str, obstacle: str) -> None:
        """Tell that it was removed, or (``obstacle``) was not."""
        if obstacle:
            self.left.append(what + obstacle)
        else:
            self.removed.append(what)


def _orphans(tracing: Path) -> list[str]:
    there = os.path.isdir(tracing / "instances")
    return [path.name for path in session.orphans(tracing)] if there else []


def _remove(orphan: Path) -> bool:
    return session.remove(orphan) or not orphan.exists()


def _unmount(mountpoint: Path) -> str:
    """Unmount; return why not, empty if that was done."""
    try:
        unmount(mountpoint, lazy=True, timeout_s=_UNMOUNT_S)
    except MountError as error:
        return f": {error}"
    return ""


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
            "as root: modprobe fuse; chmod 666 /dev/fuse lets others mount too",
            needed=True,
        ),
        _package("pyfuse3", "3.3", "nothing can be mounted", "mount", needed=True),
        _package("trio", "0.24", "nothing can be mounted", "mount", needed=True),
        _command("fusermount3", "mounts cannot be ended", "apt-get install fuse3", needed=True),
        _allow_other(),
    ]


def _to_observe(tracing: Path) -> list[Need]:
    available = session.probe(tracing)
    found = available.unusable or f"{len(available.events)} events usable"
    lockdown = _text(_LOCKDOWN) or f"unknown: {_LOCKDOWN.parent} is not mounted"
    locked = "[confidentiality]" in lockdown
    unlock = "boot with lockdown=integrity or without"
    get = f"as root: mount -t tracefs nodev {tracing}"
    if locked:
        get = unlock
    elif session.is_mounted(tracing):
        get = "run as root" if os.geteuid() != 0 else "a kernel with the event"
    estimate = "faults are estimated from READ requests"
    uid = os.geteuid()
    return [
        Need("root", uid == 0, f"uid {uid}", estimate, "run as root", needed=True),
        Need("lockdown below confidentiality", not locked, lockdown, estimate, unlock),
        Need("tracefs", not available.unusable, found, estimate, get, needed=True),
        *(
            Need(f"event {event}", False, reason, reason.rpartition("lost: ")[2], get)
            for event, reason in available.missing.items()
        ),
        _readahead(),
        _readable("/proc/self/pagemap", "xipfs verify", "mount /proc"),
        _readable("/proc/kpagecount", "mapcounts in xipfs verify", "run as root"),
    ]


def _to_do_more() -> list[Need]:
    around = _text(_FAULT_AROUND)
    no_uffd = uffd.unusable()
    compiler = preloading.compiler()
    return [
        Need(
            "userfaultfd with WP_ASYNC",
            not no_uffd,
            no_uffd or "usable",
            "xipfs run --exact: pages that fault-around maps make no fault",
            "Linux 6.7 or later with CONFIG_USERFAULTFD",
        ),
        Need(
            "a C compiler",
            compiler is not None,
            compiler or f"none of {', '.join(preloading.COMPILERS)}",
            "xipfs run --exact, and the C programs of the demo and the tests",
            "apt-get install gcc libc6-dev linux-libc-dev",
        ),
        Need(
            "size of fault-around",
            bool(around),
            f"{around} bytes" if around else "cannot be read",
            "it is taken as 64 KiB, the kernel's default",
            "as root: mount -t debugfs nodev /sys/kernel/debug (lockdown refuses it)",
        ),
        _package("numba", "0.60", "events are decoded 30 times slower", "fast"),
        _compiled(),
        _package("pyarrow", "15", "xipfs record, run -o and faults", "trace"),
    ]


def _readahead() -> Need:
    """Of any device: that of the mount is there with the mount only."""
    there = any(os.access(path, os.W_OK) for path in _BDI.glob("*/read_ahead_kb"))
    return Need(
        "the kernel's read-ahead",
        there,
        f"{_BDI} is writable" if there else f"{_BDI} is not writable",
        "a cold page comes with its neighbours, whose first touches then make no major faults",
        "run as root" if os.geteuid() != 0 else "mount -o remount,rw /sys",
    )


def _allow_other() -> Need:
    lines = [line.strip() for line in _text(_FUSE_CONF).splitlines()]
    allowed = os.geteuid() == 0 or "user_allow_other" in lines
    return Need(
        "-o allow_other",
        allowed,
        "allowed" if allowed else f"no user_allow_other in {_FUSE_CONF}",
        "other users cannot be let into a mount that is not root's",
        f"as root: echo user_allow_other >> {_FUSE_CONF}",
    )


def _compiled() -> Need:
    reason = compiling.why_not()
    ready = not reason and compiling.is_ready()
    return Need(
        "compiled code",
        ready,
        "on disk" if ready else reason or "not on disk yet",
        compiling.WITHOUT if reason else "the next mount compiles it before it serves: some 20 s",
        "see numba" if reason else f"{sys.executable} -P -m {compiling.__name__}",
    )


def _package(name: str, least: str, lost: str, extra: str, *, needed: bool = False) -> Need:
    """Whether the package is there, of version ``least`` or newer; ``extra`` is what brings it."""
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found = ""
    there = bool(found) and _version(found) >= _version(least)
    shown = f"version {found}" if there else f"version {found}, older than {least}"
    get = f"in xipfs's source tree: tools/setup, or pip install --upgrade '.[{extra}]'"
    return Need(name, there, shown if found else "not installed", lost, get, needed)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


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


def as_text(needs: list[Need], removed: list[str], left: list[str], *, exact: bool) -> str:
    """Return the answer for people."""
    lines = [f"removed {name}" for name in removed]
    lines += [f"NOT REMOVED {name}" for name in left]
    for need in needs:
        lines.append(f"{'ok     ' if need.there else 'MISSING'} {need.name}: {need.found}")
        if not need.there:
            lines += [f"          lost: {need.lost}", f"          get it: {need.get}"]
    lines.append("exact: every fault is seen" if exact else "not exact: see what is MISSING")
    return "\n".join(lines)
