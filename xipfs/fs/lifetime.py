"""Opening and closing an image, and what becomes of a mount whose image proves damaged.

An image that cannot be opened for writing because of damage is opened read-only, with the reason.
Damage met later, in whatever call, ends all changes: what was written so far goes home first, and
the image is not marked clean, so that fsck looks at it.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from typing import Final, TypeVar

from xipfs.errors import FsError, ImageBusyError, ImageError, XipfsError
from xipfs.fs.core import Core
from xipfs.fs.imagelock import ImageLock
from xipfs.fs.reclaim import Reclaim
from xipfs.image import layout

_F = TypeVar("_F", bound="Lifetime")
#: Errors told at most; a walk over a broken image meets the same ones again and again.
_TOLD_MAX: Final = 100


class Lifetime:
    """The part of a Filesystem that begins it and ends it."""

    _core: Core
    _reclaim: Reclaim
    _lock: ImageLock | None
    _closed: bool

    def _begin(self) -> None:
        """See that there is a root; on a writable medium go on from what a crash left."""
        volume = self._core.volume
        try:
            root = volume.inodes.get(layout.ROOT_INO)
            wrong = not stat.S_ISDIR(root.mode)
        except FsError:
            wrong = True
        if wrong:
            offset = (layout.STATE_BLOCK << layout.BLOCK_SHIFT) + layout.TABLE_INODE_OFFSET
            raise ImageError(
                f"inode 1 is no directory (its table is at offset {offset})",
                remedy="run fsck.xipfs",
            )
        self._closed = False
        if self._core.medium.writable:
            volume.set_mounted(True)
            self._reclaim.recover()

    def close(self) -> None:
        """Write every dirty page home, mark the image clean, bring it to disk, drop the lock.

        A damaged image is not marked clean. Nor is one that a page did not get home to, for want of
        room on the host: FsError is raised then, with all the rest at home and the lock dropped.
        """
        if self._closed:
            return
        core = self._core
        try:
            if core.medium.writable:
                try:
                    core.cache.sync_all()
                    # Unlinked files that were still held end with the mount.
                    core.holds.clear()
                    if not core.damage:
                        self._reclaim.recover()
                        core.volume.set_mounted(False)
                finally:
                    core.medium.sync()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Drop everything as a crash of the process would: nothing is written any more."""
        if not self._closed:
            self._closed = True
            self._core.medium.close()
            if self._lock is not None:
                self._lock.release()

    def orphans(self, count: int) -> list[int]:
        """Return at most ``count`` inodes that have no name and are still held, newest first."""
        return self._reclaim.orphans(count)

    @property
    def damage(self) -> str:
        """Why the image is not changed any more; empty as long as nothing wrong was met."""
        return self._core.damage

    def note_damage(self, error: ImageError) -> bool:
        """Change the image no more; return whether this error was not told before."""
        core, text = self._core, str(error)
        if not core.damage:
            core.damage = text
            if not core.read_only:
                core.read_only = True
                core.cache.sync_all()
        if text in core.damage_told or len(core.damage_told) >= _TOLD_MAX:
            return False
        core.damage_told.add(text)
        return True


def opened(open_as: Callable[[bool], _F], *, read_only: bool) -> _F:
    """Return ``open_as(read_only)``, or the image read-only if damage forbids to write it.

    Raise the first error if it cannot be read either.
    """
    try:
        return open_as(read_only)
    except ImageBusyError:
        raise
    except ImageError as error:
        if read_only:
            raise
        try:
            fs = open_as(True)
        except XipfsError:
            raise error from None
        fs.note_damage(error)
        return fs
