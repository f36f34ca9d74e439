"""The least that moves no page: what pyfuse3, a thread and the kernel's invalidation cost alone.

A filesystem of two files. A request written to ``control`` has the other file's pages dropped from
the kernel's cache, by a thread, as it must be (the kernel may wait for a READ of our own), and is
answered then; a brief one by the end of its write. It reads no request, moves nothing, counts
nothing: no move on a mount that pyfuse3 serves takes less time from request to reply.

    python bare_filesystem.py DIRECTORY
"""

from __future__ import annotations

import contextlib
import errno
import stat
import sys
from typing import Final

import pyfuse3
import trio

from xipfs.fuse.worker import Worker

CONTROL, FILE = pyfuse3.InodeT(2), pyfuse3.InodeT(3)
NAMES: Final = {b"control": CONTROL, b"file": FILE}
ANSWER: Final = b'{"result": {"moved": 1}}\n'


class Bare(pyfuse3.Operations):
    """The handlers."""

    def __init__(self) -> None:
        super().__init__()
        self._answers: list[bytes] = []
        self._worker = Worker("notify")

    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        """GETATTR."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.entry_timeout = entry.attr_timeout = 3600
        directory = inode == pyfuse3.ROOT_INODE
        entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o700 if directory else stat.S_IFREG | 0o600)
        return entry

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """LOOKUP."""
        if name not in NAMES:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(NAMES[name])

    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        """OPEN."""
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), direct_io=True, nonseekable=True)

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        """WRITE: a request, carried out."""
        await self._worker.run(_invalidate)
        if b'"brief"' not in buf:
            self._answers.append(ANSWER)
        return len(buf)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """READ: its answer, and then the end of file."""
        return self._answers.pop() if self._answers else b""


def _invalidate() -> None:
    with contextlib.suppress(FileNotFoundError):  # the kernel does not know the file
        pyfuse3.invalidate_inode(FILE)


def main() -> None:
    """Mount and serve until unmounted."""
    pyfuse3.init(Bare(), sys.argv[1], {"fsname=bare"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main()
