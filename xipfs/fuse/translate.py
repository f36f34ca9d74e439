"""Between FUSE's types and the filesystem's, and what becomes of an exception on the way.

pyfuse3 answers a request with an errno only for FUSEError; any other exception leaves its nursery
and ends the mount for every user. So each handler is wrapped: an error of ours becomes its errno,
anything else becomes EIO and a traceback in the log.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import pyfuse3

from xipfs.errors import ImageError, XipfsError
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import Attr
from xipfs.units import PAGE_SIZE

log = logging.getLogger(__name__)

#: Names and attributes change only through this mount, so the kernel may keep them long.
CACHE_TIMEOUT_S: Final = 3600

_P = ParamSpec("_P")
_R = TypeVar("_R")
_S = TypeVar("_S")


def handler(
    method: Callable[Concatenate[_S, _P], Coroutine[Any, Any, _R]],
) -> Callable[Concatenate[_S, _P], Coroutine[Any, Any, _R]]:
    """Make every outcome of a request handler an answer: a result, or FUSEError with an errno."""

    @functools.wraps(method)
    async def answered(self: _S, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return await method(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except XipfsError as error:
            fs = getattr(self, "fs", None)
            if isinstance(error, ImageError) and isinstance(fs, Filesystem):
                tell_damage(fs, error)
            raise pyfuse3.FUSEError(error.errno) from None
        except Exception as error:
            log.exception("%s failed; answering EIO", method.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from error

    return answered  # type: ignore[return-value]  # wraps() hides that self stays first


def tell_damage(fs: Filesystem, error: ImageError) -> None:
    """Let the filesystem know that its image is damaged; log what is new. Raises nothing."""
    first = not fs.damage
    try:
        if fs.note_damage(error):
            log.error("%s is damaged: %s", fs.image_path, error)
    except Exception:
        log.exception("%s is damaged (%s), and not all pages went home", fs.image_path, error)
    if first:
        log.error("%s: nothing is changed any more; unmount it", fs.image_path)


def unanswered(
    method: Callable[Concatenate[_S, _P], Coroutine[Any, Any, None]],
) -> Callable[Concatenate[_S, _P], Coroutine[Any, Any, None]]:
    """Do the same for a request without a reply: an error is only logged, and nothing raised.

    pyfuse3 catches nothing at all around FORGET: even a FUSEError would end the mount.
    """
    answering = handler(method)

    @functools.wraps(method)
    async def silent(self: _S, *args: _P.args, **kwargs: _P.kwargs) -> None:
        with contextlib.suppress(pyfuse3.FUSEError):
            await answering(self, *args, **kwargs)

    return silent  # type: ignore[return-value]  # wraps() hides that self stays first


def entry_of(attr: Attr) -> pyfuse3.EntryAttributes:
    """Return the reply to LOOKUP, GETATTR and their like."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = pyfuse3.InodeT(attr.ino)
    entry.generation = attr.generation
    entry.entry_timeout = CACHE_TIMEOUT_S
    entry.attr_timeout = CACHE_TIMEOUT_S
    entry.st_mode = pyfuse3.ModeT(attr.mode)
    entry.st_nlink = attr.nlink
    entry.st_uid = attr.uid
    entry.st_gid = attr.gid
    entry.st_rdev = attr.rdev
    entry.st_size = attr.size_bytes
    entry.st_blksize = PAGE_SIZE
    entry.st_blocks = attr.blocks_512
    entry.st_atime_ns = attr.atime_ns
    entry.st_mtime_ns = attr.mtime_ns
    entry.st_ctime_ns = attr.ctime_ns
    return entry


def no_entry() -> pyfuse3.EntryAttributes:
    """Return the reply that lets the kernel remember that a name does not exist."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = pyfuse3.InodeT(0)
    entry.entry_timeout = CACHE_TIMEOUT_S
    return entry
