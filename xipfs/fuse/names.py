"""Handlers of names and attributes; operations.py adds those of open files and directories.

Handlers translate, call the filesystem, translate back. Nothing is decided here.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Protocol

import pyfuse3

from xipfs.errors import FsError
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import Attr
from xipfs.fuse.control import CONTROL_NAME, ControlTree
from xipfs.fuse.room import Room, with_room
from xipfs.fuse.setid import mode_after_setattr
from xipfs.fuse.translate import entry_of, handler, no_entry, unanswered


class RequestHooks(Protocol):
    """What the rest of the daemon wants to know of requests."""

    async def before_open_reply(self, tid: int) -> None:
        """Return once all threads of ``tid``'s process are observed."""
        ...

    async def before_change(self, ino: int, size_bytes: int | None = None) -> None:
        """Charge what has faulted before pages of ``ino`` go: cut to a size, or with its name."""
        ...

    async def before_name_change(self) -> None:
        """Return once the faults so far are told by the names that their files have now."""
        ...

    async def before_attributes(self, tid: int, attr: Attr) -> None:
        """Hear that thread ``tid`` is about to be told ``attr``, which it may have to act on."""
        ...

    def emptied(self, ino: int) -> None:
        """Hear that the kernel will set the file's size and times by itself."""
        ...

    def opened(self, ino: int, pid: int) -> None:
        """Hear of a handle that a thread of this process has got."""
        ...

    def closed(self, ino: int, pid: int) -> None:
        """Hear that a handle of theirs is gone, and all mappings made with it."""
        ...

    def page_io(self, pid: int, ino: int, offset: int, size: int, *, write: bool) -> None:
        """Hear of a READ or WRITE of these bytes by a file that process ``pid`` opened."""
        ...

    def write_back_of_ours(self, ino: int, offset: int, size: int) -> bool:
        """Return whether a WRITE there is the kernel's answer to our own invalidation."""
        ...


class NameOperations(pyfuse3.Operations):
    """LOOKUP to RENAME, GETATTR to REMOVEXATTR."""

    supports_dot_lookup = False
    # write(2) reaches the daemon at once, as it would reach a DAX or XIP filesystem.
    enable_writeback_cache = False
    #: Set before the first request is served.
    control: ControlTree
    room: Room

    def __init__(self, fs: Filesystem, hooks: RequestHooks, *, atime: bool = True) -> None:
        """``atime``: whether reading changes access times."""
        super().__init__()
        self.fs = fs
        self.hooks = hooks
        self._atime = atime

    def _accessed(self, ino: int) -> None:
        if self._atime:
            self.fs.accessed(ino)

    def _refuse_reserved(self, parent: int, name: bytes, errno_: int) -> None:
        """The control directory's name is not the image's to use, and control files are fixed."""
        if parent == pyfuse3.ROOT_INODE and name == CONTROL_NAME:
            raise FsError(errno_)
        self._refuse_control(parent)

    def _refuse_control(self, ino: int) -> None:
        if self.control.owns(ino):
            raise FsError(errno.EPERM)

    # Names

    @handler
    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """LOOKUP; a missing name is cached too."""
        control_entry = self.control.lookup(parent_inode, name)
        if control_entry is not None:
            return control_entry
        try:
            attr = self.fs.lookup(parent_inode, name)
        except FsError as error:
            if error.errno == errno.ENOENT:
                return no_entry()
            raise
        self.fs.hold(attr.ino)
        await self.hooks.before_attributes(ctx.pid, attr)
        return entry_of(attr)

    @unanswered
    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        """FORGET has no reply; control inodes are never counted."""
        for ino, count in inode_list:
            await self._forget_one(ino, count)

    @unanswered
    async def _forget_one(self, ino: int, count: int) -> None:
        if not self.control.owns(ino):
            await self._drop(ino, count)

    async def _drop(self, ino: int, count: int) -> None:
        with self.room.going(ino):
            await self.hooks.before_change(ino)
            self.fs.drop(ino, count)

    @handler
    @with_room
    async def mknod(
        self,
        parent_inode: pyfuse3.InodeT,
        name: bytes,
        mode: pyfuse3.ModeT,
        rdev: int,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """MKNOD."""
        self._refuse_reserved(parent_inode, name, errno.EEXIST)
        attr = self.fs.mknod(parent_inode, name, mode & ~ctx.umask, rdev, ctx.uid, ctx.gid)
        self.fs.hold(attr.ino)
        return entry_of(attr)

    @handler
    @with_room
    async def mkdir(
        self,
        parent_inode: pyfuse3.InodeT,
        name: bytes,
        mode: pyfuse3.ModeT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """MKDIR."""
        self._refuse_reserved(parent_inode, name, errno.EEXIST)
        attr = self.fs.mkdir(parent_inode, name, mode & ~ctx.umask, ctx.uid, ctx.gid)
        self.fs.hold(attr.ino)
        return entry_of(attr)

    @handler
    @with_room
    async def symlink(
        self,
        parent_inode: pyfuse3.InodeT,
        name: bytes,
        target: bytes,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """SYMLINK."""
        self._refuse_reserved(parent_inode, name, errno.EEXIST)
        attr = self.fs.symlink(parent_inode, name, target, ctx.uid, ctx.gid)
        self.fs.hold(attr.ino)
        return entry_of(attr)

    @handler
    @with_room
    async def link(
        self,
        inode: pyfuse3.InodeT,
        new_parent_inode: pyfuse3.InodeT,
        new_name: bytes,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """LINK."""
        self._refuse_reserved(new_parent_inode, new_name, errno.EEXIST)
        self._refuse_control(inode)
        attr = self.fs.link(inode, new_parent_inode, new_name)
        self.fs.hold(attr.ino)
        await self.hooks.before_attributes(ctx.pid, attr)
        return entry_of(attr)

    @handler
    async def unlink(
        self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        """UNLINK."""
        self._refuse_reserved(parent_inode, name, errno.EPERM)
        await self.hooks.before_name_change()
        self.fs.unlink(parent_inode, name)

    @handler
    async def rmdir(
        self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        """RMDIR."""
        self._refuse_reserved(parent_inode, name, errno.EPERM)
        self.fs.rmdir(parent_inode, name)

    @handler
    @with_room
    async def rename(
        self,
        parent_inode_old: pyfuse3.InodeT,
        name_old: bytes,
        parent_inode_new: pyfuse3.InodeT,
        name_new: bytes,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        """RENAME and RENAME2 (NOREPLACE, EXCHANGE)."""
        self._refuse_reserved(parent_inode_old, name_old, errno.EPERM)
        self._refuse_reserved(parent_inode_new, name_new, errno.EPERM)
        await self.hooks.before_name_change()
        self.fs.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags)

    @handler
    async def readlink(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> bytes:
        """READLINK."""
        target = self.fs.readlink(inode)
        self._accessed(inode)
        return target

    # Attributes

    @handler
    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """GETATTR."""
        if self.control.owns(inode):
            return self.control.getattr(inode)
        now = self.fs.getattr(inode)
        await self.hooks.before_attributes(ctx.pid, now)
        return entry_of(now)

    @handler
    @with_room
    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """SETATTR: chmod, chown, truncate, utimens."""
        if self.control.owns(inode):
            # Opening with O_TRUNC, as the shell's > does, is harmless on a control file.
            if fields.update_size and not (fields.update_mode or fields.update_uid):
                return self.control.getattr(inode)
            raise FsError(errno.EPERM)
        if fields.update_size:
            await self.hooks.before_change(inode, attr.st_size)
        mode = attr.st_mode if fields.update_mode else None
        empty = not (
            fields.update_mode or fields.update_size or fields.update_uid or fields.update_gid
        )
        if not empty or not (fields.update_atime or fields.update_mtime):
            mode = mode_after_setattr(self.fs.getattr(inode), mode, ctx, empty=empty)
        changed = self.fs.setattr(
            inode,
            mode=mode,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size_bytes=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        await self.hooks.before_attributes(ctx.pid, changed)
        return entry_of(changed)

    @handler
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """STATFS, in blocks of one page."""
        figures = self.fs.statfs()
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = figures.block_size
        answer.f_blocks = figures.blocks_total
        answer.f_bfree = answer.f_bavail = figures.blocks_free
        answer.f_files = figures.inodes_total
        answer.f_ffree = answer.f_favail = figures.inodes_free
        answer.f_namemax = figures.name_max
        return answer

    @handler
    async def getxattr(
        self, inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> bytes:
        """GETXATTR."""
        if self.control.owns(inode):
            raise FsError(errno.ENODATA)
        return self.fs.getxattr(inode, name)

    @handler
    @with_room
    async def setxattr(
        self, inode: pyfuse3.InodeT, name: bytes, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        """SETXATTR."""
        self._refuse_control(inode)
        self.fs.setxattr(inode, name, value)

    @handler
    async def listxattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> Sequence[bytes]:
        """LISTXATTR."""
        if self.control.owns(inode):
            return []
        names = self.fs.listxattr(inode)
        # Who may not read trusted attributes does not see them; the kernel leaves that to us.
        return names if ctx.uid == 0 else [n for n in names if not n.startswith(b"trusted.")]

    @handler
    async def removexattr(
        self, inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        """REMOVEXATTR."""
        self._refuse_control(inode)
        self.fs.removexattr(inode, name)
