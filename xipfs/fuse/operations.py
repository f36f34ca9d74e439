"""One mount's request handlers: those of names, and here those of open files and directories.

Concurrency: every handler runs on the trio thread. The filesystem's calls have no await, so each
is atomic against all others. The awaits are: before an OPEN's reply (the opener's threads enter
the trace filter first, so that none of its faults is missed), before pages go away (what faulted
on them is charged first), before a name goes (faults are told by it), and in the control files.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

import pyfuse3
import trio

from xipfs.errors import FsError, NoBlocksError
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import WriteOrigin
from xipfs.fuse.control import ControlHandle
from xipfs.fuse.names import NameOperations, RequestHooks
from xipfs.fuse.room import Room, with_room
from xipfs.fuse.setid import mode_after_emptying
from xipfs.fuse.translate import entry_of, handler
from xipfs.memory.region import Buffer


@dataclass
class OpenFile:
    """An open file of the image: which inode, and the process that opened it."""

    ino: int
    pid: int
    noatime: bool = False


class Operations(NameOperations):
    """All handlers of one mount."""

    def __init__(self, fs: Filesystem, hooks: RequestHooks, *, atime: bool = True) -> None:
        super().__init__(fs, hooks, atime=atime)
        self.room = Room(fs, self._open_inodes)
        self._next_fh = 1
        self._files: dict[int, OpenFile | ControlHandle] = {}
        self._dirs: dict[int, int] = {}
        #: Files of which a WRITE was not taken whole and no fsync has told it yet.
        self._short: set[int] = set()

    def _new_fh(self) -> pyfuse3.FileHandleT:
        self._next_fh += 1
        return pyfuse3.FileHandleT(self._next_fh)

    def _open_inodes(self) -> set[int]:
        return {file.ino for file in self._files.values() if isinstance(file, OpenFile)}

    # Files

    @handler
    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        """OPEN; the reply waits until the opener is observed."""
        fh = self._new_fh()
        if self.control.owns(inode):
            self._files[fh] = await self.control.open(inode)
            return pyfuse3.FileInfo(fh=fh, direct_io=True, nonseekable=True)
        if flags & os.O_TRUNC:
            await self.hooks.before_change(inode, 0)
            mode = mode_after_emptying(self.fs.getattr(inode), ctx)
            await self.hooks.before_attributes(
                ctx.pid, self.fs.setattr(inode, size_bytes=0, mode=mode)
            )
            self.hooks.emptied(inode)
        return await self._open_file(fh, inode, flags, ctx)

    async def _open_file(
        self, fh: pyfuse3.FileHandleT, ino: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        self.fs.hold(ino)
        self._files[fh] = OpenFile(ino, ctx.pid, bool(flags & os.O_NOATIME))
        try:
            await self.hooks.before_open_reply(ctx.pid)
        except BaseException:
            # No reply means no RELEASE will ever come for this handle.
            del self._files[fh]
            self.fs.drop(ino)
            raise
        self.hooks.opened(ino, ctx.pid)
        # The kernel may keep the pages over opens: only this daemon changes them.
        return pyfuse3.FileInfo(fh=fh, keep_cache=True)

    @handler
    @with_room
    async def create(
        self,
        parent_inode: pyfuse3.InodeT,
        name: bytes,
        mode: pyfuse3.ModeT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """CREATE: make the file and open it."""
        self._refuse_reserved(parent_inode, name, errno.EEXIST)
        attr = self.fs.mknod(parent_inode, name, mode & ~ctx.umask, 0, ctx.uid, ctx.gid)
        info = await self._open_file(self._new_fh(), attr.ino, flags, ctx)
        self.fs.hold(attr.ino)
        return info, entry_of(attr)

    @handler
    async def read(  # type: ignore[override]  # any buffer will do; pyfuse3's stub says bytes
        self, fh: pyfuse3.FileHandleT, off: int, size: int
    ) -> Buffer:
        """READ; a view of the region where the bytes lie together in it (no copy)."""
        file = self._files[fh]
        if isinstance(file, ControlHandle):
            return await file.read(off, size)
        data = self.fs.read(file.ino, off, size)
        if not file.noatime:
            self._accessed(file.ino)
        self.hooks.page_io(file.pid, file.ino, off, len(data), write=False)
        return data

    @handler
    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        """WRITE, from write(2) or from the kernel's write-back of a shared mapping."""
        file = self._files[fh]
        if isinstance(file, ControlHandle):
            return await file.write(buf)
        ours = self.hooks.write_back_of_ours(file.ino, off, len(buf))
        origin = WriteOrigin.WRITEBACK if ours else WriteOrigin.PROGRAM
        written = await self._write(file.ino, off, buf, origin)
        if written < len(buf):
            # If it was the kernel's write-back of a mapping, nobody looks at the count.
            self._short.add(file.ino)
        if not ours:
            self.hooks.page_io(file.pid, file.ino, off, written, write=True)
        return written

    async def _write(self, ino: int, off: int, data: bytes, origin: WriteOrigin) -> int:
        """Write as much as there is room for, that included which is about to come back."""
        began_s, done = trio.current_time(), 0
        while True:
            try:
                done += self.fs.write(ino, off + done, data[done:], origin=origin)
            except FsError as error:
                if isinstance(error, NoBlocksError) and await self.room.comes(began_s):
                    continue
                if done:
                    return done
                raise
            if done == len(data):
                return done

    @handler
    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        """FLUSH (one per close(2)): every WRITE is already in the frame or at home."""

    @handler
    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        """RELEASE: the last close."""
        file = self._files.pop(fh)
        if isinstance(file, ControlHandle):
            file.close()
        else:
            self.hooks.closed(file.ino, file.pid)
            await self._drop(file.ino, 1)

    @handler
    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        """FSYNC: the file's frames go home."""
        file = self._files[fh]
        if isinstance(file, OpenFile):
            self.fs.fsync(file.ino, datasync)
            if file.ino in self._short:
                self._short.discard(file.ino)
                raise FsError(errno.ENOSPC)

    # Directories

    @handler
    async def opendir(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileHandleT:
        """OPENDIR."""
        fh = self._new_fh()
        self._dirs[fh] = inode
        return fh

    @handler
    async def readdir(
        self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken
    ) -> None:
        """READDIRPLUS; ids are the directory's own stable cookies, moved up for . and .. ."""
        ino = self._dirs[fh]
        if self.control.owns(ino):
            self.control.readdir(start_id, token)
            return
        if start_id == 0:
            self._accessed(ino)
        for place, name in ((1, b"."), (2, b"..")):
            if start_id < place:
                # The kernel takes no reference for these two.
                attr = self.fs.getattr(ino if name == b"." else self.fs.parent_of(ino))
                if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), entry_of(attr), place):
                    return
        for name, attr, cookie in self.fs.readdir(ino, max(start_id - 2, 0)):
            if not pyfuse3.readdir_reply(
                token, pyfuse3.FileNameT(name), entry_of(attr), cookie + 2
            ):
                return
            self.fs.hold(attr.ino)

    @handler
    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        """RELEASEDIR."""
        del self._dirs[fh]

    @handler
    async def fsyncdir(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        """FSYNCDIR: names are durable when their call returns; what is left is the disk."""
        if not self.control.owns(self._dirs[fh]):
            self.fs.sync_names()
