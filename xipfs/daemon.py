"""The one place where the live parts are joined: the filesystem, the observer, the model, FUSE.

Order of life: image opened and locked; mounted; observer started on the mount's device; requests
served. Order of death: unmounted (so the kernel has sent every dirty page), observer closed, image
closed cleanly. A signal asks for the unmount; it does not cut it short.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pyfuse3
import trio

from xipfs.clock import SystemClock
from xipfs.errors import ImageBusyError, MountError, XipfsError
from xipfs.fuse.control import ControlTree
from xipfs.fuse.guard import Guard
from xipfs.fuse.live import Live
from xipfs.fuse.mounts import FSTYPE, Mount, closing_daemons, mount_at, unmount
from xipfs.fuse.observing import choose_observer
from xipfs.fuse.operations import Operations
from xipfs.fuse.patience import Watchdog
from xipfs.fuse.recording import RecordedFilesystem
from xipfs.fuse.whereabouts import tell_on_signal
from xipfs.options import MountOptions

log = logging.getLogger(__name__)

#: How long a mount waits for the daemon of an earlier mount of its image to close it.
_CLOSING_S: Final = 30.0


def serve(
    image: Path, mountpoint: Path, options: MountOptions, *, on_ready: Callable[[str], None]
) -> None:
    """Mount ``image`` at ``mountpoint`` and serve it until it is unmounted.

    Raises XipfsError if the mount cannot be made; ``on_ready`` is called once it is there, with
    the damage for which it is read-only, if any.
    """
    observer = choose_observer(options)
    fs = _open_when_closed(image, options)
    if fs.damage:
        log.error("%s is damaged, mounted read-only: %s", image, fs.damage)
    try:
        live = Live(fs, options, observer)
        _serve_open(live, mountpoint, on_ready)
    finally:
        # After the unmount: every WRITE the kernel owed us has arrived.
        fs.close()
    log.info("%s: image closed", image)


def _open_when_closed(image: Path, options: MountOptions) -> RecordedFilesystem:
    """Open the image; wait for a daemon that has lost its mount and is about to close it.

    umount(8) returns when the mount is gone, and a mount that follows at once is no mistake.
    """
    deadline = time.monotonic() + _CLOSING_S
    told = False
    while True:
        try:
            return RecordedFilesystem.open(
                image,
                ram_bytes=options.ram_bytes,
                struct_page_bytes=options.struct_page_bytes,
                read_only=options.ro,
                sync_fences=options.sync,
                clock=SystemClock(),
            )
        except ImageBusyError:
            closing = closing_daemons(image)
            if closing is None or time.monotonic() > deadline:
                raise
            if closing and not told:
                log.info("%s: waiting for pid %s, which closes it", image, closing)
                told = True
            time.sleep(0.02)


def _serve_open(live: Live, mountpoint: Path, on_ready: Callable[[str], None]) -> None:
    operations = Operations(live.fs, live, atime=not live.options.noatime)
    try:
        pyfuse3.init(operations, str(mountpoint), _fuse_options(live))
    except RuntimeError as error:
        raise MountError(
            f"{mountpoint} cannot be mounted: {error}",
            remedy="is it a directory of yours, and /dev/fuse usable? see also the log",
        ) from None
    guard = watchdog = None
    try:
        mount = mount_at(mountpoint)
        guard = Guard(mount)
        deciding = live.deciding
        watchdog = Watchdog(deciding.patience, lambda: deciding.called, guard.abort)
        try:
            live.observe(mount)
            trio.run(_run, live, operations, mount, on_ready)
        finally:
            live.observer.close()
    finally:
        pyfuse3.close(unmount=True)
        if watchdog is not None:
            watchdog.end()
        if guard is not None:
            guard.end()


def _fuse_options(live: Live) -> set[str]:
    # libfuse splits options at commas; a backslash keeps one that belongs to the path.
    source = str(live.fs.image_path).replace("\\", "\\\\").replace(",", "\\,")
    words = {
        f"fsname={source}",
        f"subtype={FSTYPE.removeprefix('fuse.')}",
        # The kernel checks permissions, always: allow_other alone would check nothing.
        "default_permissions",
    }
    words |= {word for word in ("allow_other", "noatime", "noexec") if getattr(live.options, word)}
    if live.fs.read_only:
        words.add("ro")
    return words


async def _run(
    live: Live, operations: Operations, mount: Mount, on_ready: Callable[[str], None]
) -> None:
    tell_on_signal()
    async with trio.open_nursery() as nursery:
        operations.control = ControlTree(
            uid=os.geteuid(),
            gid=os.getegid(),
            now_ns=SystemClock().realtime_ns(),
            snapshot=live.snapshot,
            metrics=live.metrics,
            questions=live.questions(),
            commands=live.commands(),
            nursery=nursery,
        )
        live.start(nursery, mount)
        live.background.start(nursery, "signals", _unmount_on_signal, mount)
        on_ready(live.fs.damage)
        log.info("%s: mounted at %s", mount.source, mount.mountpoint)
        await pyfuse3.main()
        nursery.cancel_scope.cancel()


async def _unmount_on_signal(mount: Mount) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for number in signals:
            log.info("%s: unmounting %s", signal.Signals(number).name, mount.mountpoint)
            try:
                # From a thread: the kernel flushes dirty pages to us while it unmounts.
                await trio.to_thread.run_sync(unmount, mount.mountpoint)
            except XipfsError as error:
                log.info("%s; detaching it once its pages are written", error)
                await trio.to_thread.run_sync(_sync_and_detach, mount)
                pyfuse3.terminate()


def _sync_and_detach(mount: Mount) -> None:
    """Have the kernel write every dirty page back, then detach: busy programs lose the mount."""
    # A process of its own: pyfuse3's syncfs() would keep the interpreter's lock while it waits
    # for WRITEs that this process must answer.
    subprocess.run(["sync", "-f", str(mount.mountpoint)], check=False, timeout=600)
    unmount(mount.mountpoint, lazy=True)
