"""The last part of a repair: link counts, parents, and /lost+found for what nobody names.

By now the image is one that can be mounted, so these are ordinary transactions.
"""

from __future__ import annotations

import errno
import stat
from typing import Final

from xipfs.errors import FsError, ImageError
from xipfs.image import layout
from xipfs.image.mending import Mending
from xipfs.image.record import Inode
from xipfs.image.volume import Volume

LOST_AND_FOUND: Final = b"lost+found"
_DIRECTORY: Final = stat.S_IFDIR >> 12


class Reconnecting:
    """Works on a mended image through its own structures."""

    def __init__(self, mending: Mending) -> None:
        self.mending = mending
        self.records = mending.records
        self.volume = Volume(mending.medium, "image under repair")

    def run(self) -> None:
        """Put the counts right, then connect; stops where the image is full."""
        records = self.records
        for ino in records.in_use():
            if records.links[ino]:
                self.count(ino)
        try:
            for ino in records.in_use():
                unlinked = records.orphans[ino] and records.nlinks[ino] == 0
                named = records.links[ino]
                if records.kinds[ino] == _DIRECTORY:
                    named = records.named_in[ino]
                if not named and not unlinked:
                    self.connect_somewhere(ino)
        except FsError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.mending.lacked_room = True
        except ImageError:
            # A directory on the way is damaged still, if there was no room to repair it.
            if not self.mending.lacked_room:
                raise

    def count(self, ino: int) -> None:
        """Let link count and parent be what was counted."""
        records = self.records
        links = int(records.links[ino])
        parent = int(records.named_in[ino])
        wrong_parent = records.kinds[ino] == _DIRECTORY and parent not in (0, records.parents[ino])
        if links == records.nlinks[ino] and not wrong_parent:
            return
        with self.volume.transaction():
            inode = self.volume.inodes.get(ino)
            inode.nlink = links
            if wrong_parent:
                inode.parent = parent
            self.volume.inodes.put(inode)
        self.mending.did("links", inode.record_offset, f"link count {links}", ino)

    def connect_somewhere(self, ino: int) -> None:
        """Enter an inode that nobody names into /lost+found, or where that has no room into /."""
        try:
            self.connect(ino, in_root=False)
        except FsError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.connect(ino, in_root=True)

    def connect(self, ino: int, *, in_root: bool) -> None:
        """Enter an inode that nobody names as #NUMBER."""
        volume = self.volume
        with volume.transaction():
            inode = volume.inodes.get(ino)
            place = volume.inodes.get(layout.ROOT_INO) if in_root else self.lost_and_found()
            name = b"#%d" % ino
            while volume.directories.lookup(place, name) is not None:
                name += b"~"
            volume.directories.insert(place, name, ino, inode.mode >> 12)
            inode.nlink = int(self.records.links[ino]) + 1
            if stat.S_ISDIR(inode.mode):
                inode.nlink += 1
                inode.parent = place.ino
                place.nlink += 1
            volume.inodes.put(inode)
            volume.inodes.put(place)
        directory = "" if in_root else f"/{LOST_AND_FOUND.decode()}"
        what = f"connected as {directory}/{name.decode()}"
        self.mending.did("unreachable", inode.record_offset, what, ino)

    def lost_and_found(self) -> Inode:
        """Return the directory, made if it is not there; in the open transaction."""
        volume = self.volume
        root = volume.inodes.get(layout.ROOT_INO)
        name = LOST_AND_FOUND
        while (entry := volume.directories.lookup(root, name)) is not None:
            if entry.kind == _DIRECTORY:
                return volume.inodes.get(entry.ino)
            name += b"~"
        return self.make_directory(root, name)

    def make_directory(self, root: Inode, name: bytes) -> Inode:
        """Make a directory in the root that only its owner can enter."""
        volume = self.volume
        made = volume.inodes.create()
        made.mode, made.nlink, made.parent = stat.S_IFDIR | 0o700, 2, root.ino
        made.uid, made.gid, made.pagecache = root.uid, root.gid, root.pagecache
        made.atime_ns = made.mtime_ns = made.ctime_ns = root.mtime_ns
        volume.directories.insert(root, name, made.ino, _DIRECTORY)
        root.nlink += 1
        volume.inodes.put(root)
        volume.inodes.put(made)
        return made
