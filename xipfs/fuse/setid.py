"""The set-id bits that a change takes from a file, as far as the kernel leaves that to the daemon.

Mostly it does not: before a write, with a chown or a truncate it asks for the new mode itself. But
open(O_TRUNC) is one OPEN and says nothing of the mode. And the set-group-ID bit without group
execution, which falls if the caller is not in the file's group (setattr_should_drop_sgid(), 6.2),
is overlooked by fuse_setattr(): the SETATTR has only the size or the owner, and before a write only
the mode without the set-user-ID bit or, of a file without that, no field at all.
"""

from __future__ import annotations

import stat

import pyfuse3

from xipfs.fs.types import Attr


def mode_after_emptying(attr: Attr, ctx: pyfuse3.RequestContext) -> int | None:
    """Return the permission bits after open(O_TRUNC); None: as they are."""
    if ctx.uid == 0:
        return None
    left = stat.S_IMODE(attr.mode) & ~stat.S_ISUID
    return left & ~stat.S_ISGID if left & stat.S_IXGRP or loses_setgid(attr, ctx) else left


def mode_after_setattr(
    attr: Attr, mode: int | None, ctx: pyfuse3.RequestContext, *, empty: bool
) -> int | None:
    """Return the permission bits after a SETATTR that asks for ``mode``; None: as they are.

    One that is ``empty`` comes before a write, but also of chown(-1, -1): that takes the bit from a
    file only if the caller might have written to it.
    """
    may_write = not empty or ctx.uid == attr.uid or attr.mode & stat.S_IWOTH
    if may_write and loses_setgid(attr, ctx):
        return (attr.mode if mode is None else mode) & ~stat.S_ISGID
    return mode


def loses_setgid(attr: Attr, ctx: pyfuse3.RequestContext) -> bool:
    """Return whether the bit is there without group execution and the caller not in the group."""
    bits = attr.mode & (stat.S_ISGID | stat.S_IXGRP)
    if bits != stat.S_ISGID or stat.S_ISDIR(attr.mode) or ctx.uid == 0 or ctx.gid == attr.gid:
        return False
    try:
        return attr.gid not in pyfuse3.get_sup_groups(ctx.pid)
    except OSError:
        return True  # of a process that is gone, or outside our pid namespace, nothing is known
