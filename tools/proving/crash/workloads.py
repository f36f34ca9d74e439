"""What is explored: every operation on a small tree, alone and after every other one.

The image holds two files of two pages (``a`` of kind XIP, ``b`` of kind pagecache), an empty file,
a directory with an empty one below, a symbolic link, a second name, an attribute. All its free
blocks hold the bytes of a deleted file, so whatever was not written before it was linked shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from proving.crash.explorer import ALL, Step, World
from proving.crash.medium import Settled
from proving.crash.tree import ROOT, open_medium
from xipfs.clock import ManualClock
from xipfs.fs.build import make_image
from xipfs.fs.types import PageKind
from xipfs.image.superblock import geometry
from xipfs.memory.region import Medium
from xipfs.units import PAGE_SIZE

REGULAR: Final = 0o100644
#: 128 KiB, the smallest image there is.
BLOCKS: Final = 32
NOREPLACE, EXCHANGE = 1, 2
_TAIL: Final = 100


@dataclass(frozen=True)
class Operation:
    """Steps that belong together, and the paths that one would fsync after them."""

    steps: tuple[Step, ...]
    touched: tuple[bytes, ...]


def make_medium(medium: Medium) -> None:
    """Make an empty image; the same bytes each time."""
    superblock = geometry(
        medium.size_bytes,
        uuid=bytes(range(16)),
        hash_key=bytes(range(16, 32)),
        created_ns=1_000_000_000,
        default_pagecache=False,
        label="crash",
    )
    make_image(medium, superblock, ManualClock())


def base_image() -> bytes:
    """Return the image that every workload starts from, cleanly closed."""
    medium = Settled(bytes(BLOCKS * PAGE_SIZE))
    make_medium(medium)
    fs = open_medium(medium, ram_pages=16)
    waste = fs.mknod(ROOT, b"waste", REGULAR, 0, 0, 0).ino
    for page in range(fs.statfs().blocks_free - 2):
        fs.write(waste, page * PAGE_SIZE, b"Foreign!" * (PAGE_SIZE // 8))
    fs.unlink(ROOT, b"waste")
    a = fs.mknod(ROOT, b"a", REGULAR, 0, 0, 0).ino
    fs.write(a, 0, b"a" * (PAGE_SIZE + _TAIL))
    fs.setxattr(a, b"user.old", b"1")
    b = fs.mknod(ROOT, b"b", REGULAR, 0, 0, 0).ino
    fs.set_default_kind(b, PageKind.PAGECACHE)
    fs.write(b, 0, b"b" * (PAGE_SIZE + _TAIL))
    d = fs.mkdir(ROOT, b"d", 0o755, 0, 0).ino
    fs.mkdir(d, b"empty", 0o755, 0, 0)
    fs.mknod(d, b"e", REGULAR, 0, 0, 0)
    fs.link(b, d, b"b2")
    fs.symlink(ROOT, b"s", b"a", 0, 0)
    fs.close()
    return bytes(medium.now)


def _op(name: str, call: object, *touched: bytes) -> tuple[str, Operation]:
    assert callable(call)
    return name, Operation((Step(name, call),), touched)


def _write(path: bytes, offset: int, data: bytes) -> Step:
    return Step(
        f"write {path.decode()}", lambda world: world.fs.write(world.ino(path), offset, data)
    )


def fsync(path: bytes) -> Step:
    """Return the step that fsyncs a file or a directory."""
    return Step(f"fsync {path.decode()}", lambda world: world.fs.fsync(world.ino(path)), path)


SYNC: Final = Step("sync", lambda world: world.fs.sync(), ALL)


def _map_store(path: bytes, offset: int, data: bytes) -> Step:
    """Store through a mapping, as it arrives: the page is faulted in and written back whole."""

    def call(world: World) -> None:
        ino = world.ino(path)
        index = offset // PAGE_SIZE
        world.fs.fault_in(ino, index)
        page = bytearray(world.fs.read(ino, index * PAGE_SIZE, PAGE_SIZE))
        at = offset % PAGE_SIZE
        page[at : at + len(data)] = data
        world.fs.write(ino, index * PAGE_SIZE, page)

    return Step(f"store to {path.decode()}", call)


def _open(path: bytes) -> Step:
    def call(world: World) -> None:
        ino = world.ino(path)
        world.fs.hold(ino)
        world.held.append(ino)

    return Step(f"open {path.decode()}", call)


_CLOSE_DESCRIPTOR: Final = Step("close", lambda world: world.fs.drop(world.held.pop()))


def _write_held(offset: int, data: bytes) -> Step:
    return Step("write", lambda world: world.fs.write(world.held[-1], offset, data))


def _unlink(parent: bytes, name: bytes) -> Step:
    return Step(f"unlink {name.decode()}", lambda world: world.fs.unlink(world.ino(parent), name))


def _two_descriptors(path: bytes) -> Operation:
    """Two descriptors write over each other; one is closed, the other fsynced."""
    steps = (
        _open(path),
        _open(path),
        _write_held(48, b"1" * 32),
        _write_held(60, b"2" * 8),
        _CLOSE_DESCRIPTOR,
        fsync(path),
        _CLOSE_DESCRIPTOR,
    )
    return Operation(steps, (path,))


def _unlink_open(path: bytes) -> Operation:
    steps = (
        _open(path),
        _unlink(b"", path),
        _write_held(PAGE_SIZE + _TAIL, b"o" * 16),
        _CLOSE_DESCRIPTOR,
    )
    return Operation(steps, (b"",))


def _rename(old: bytes, new: bytes, flags: int = 0) -> object:
    old_parent, old_name = _split(old)
    new_parent, new_name = _split(new)

    def call(world: World) -> None:
        parents = world.ino(old_parent), world.ino(new_parent)
        world.fs.rename(parents[0], old_name, parents[1], new_name, flags)

    return call


def _split(path: bytes) -> tuple[bytes, bytes]:
    parent, _, name = path.rpartition(b"/")
    return parent, name


def _names() -> Iterator[tuple[str, Operation]]:
    yield _op("create", lambda w: w.fs.mknod(ROOT, b"new", REGULAR, 0, 0, 0), b"", b"new")
    yield _op(
        "create below",
        lambda w: w.fs.mknod(w.ino(b"d/empty"), b"new", REGULAR, 0, 0, 0),
        b"d/empty",
        b"d/empty/new",
    )
    yield _op("mkdir", lambda w: w.fs.mkdir(ROOT, b"new", 0o700, 0, 0), b"", b"new")
    yield _op("mkdir below", lambda w: w.fs.mkdir(w.ino(b"d"), b"new", 0o700, 0, 0), b"d")
    yield _op("link", lambda w: w.fs.link(w.ino(b"a"), w.ino(b"d"), b"hard"), b"d", b"a")
    yield _op("link new", lambda w: w.fs.link(w.ino(b"d/e"), ROOT, b"new"), b"", b"d/e")
    yield _op("symlink", lambda w: w.fs.symlink(ROOT, b"new", b"to/b", 0, 0), b"")
    for path in (b"a", b"b", b"d/b2", b"d/e", b"s", b"new"):
        parent, name = _split(path)
        yield f"unlink {path.decode()}", Operation((_unlink(parent, name),), (parent,))
    yield _op("rmdir", lambda w: w.fs.rmdir(w.ino(b"d"), b"empty"), b"d")
    yield _op("rmdir new", lambda w: w.fs.rmdir(ROOT, b"new"), b"")
    for old, new, flags in (
        (b"a", b"new", 0),
        (b"a", b"d/moved", 0),
        (b"a", b"b", 0),
        (b"d/e", b"a", 0),
        (b"d/b2", b"b", 0),
        (b"d/empty", b"new", 0),
        (b"d", b"new", 0),
        (b"b", b"new", NOREPLACE),
        (b"a", b"b", NOREPLACE),
        (b"a", b"b", EXCHANGE),
        (b"d", b"a", EXCHANGE),
        (b"d/empty", b"s", EXCHANGE),
    ):
        how = {0: "", NOREPLACE: " noreplace", EXCHANGE: " exchange"}[flags]
        title = f"rename {old.decode()} {new.decode()}{how}"
        yield _op(title, _rename(old, new, flags), _split(old)[0], _split(new)[0])


def _bytes() -> Iterator[tuple[str, Operation]]:
    def size(path: bytes, size_bytes: int) -> tuple[str, Operation]:
        return _op(
            f"truncate {path.decode()} {size_bytes}",
            lambda w: w.fs.setattr(w.ino(path), size_bytes=size_bytes),
            path,
        )

    yield from (size(b"a", 9), size(b"a", 0), size(b"a", 3 * PAGE_SIZE), size(b"a", PAGE_SIZE))
    yield from (size(b"b", 9), size(b"b", PAGE_SIZE + 300), size(b"d/e", 50))
    end = PAGE_SIZE + _TAIL
    for name, path, offset, data in (
        ("write aligned", b"a", 64, b"n" * 16),
        ("write unaligned", b"a", 60, b"u" * 13),
        ("write over both pages", b"a", PAGE_SIZE - 20, b"v" * 40),
        ("append", b"a", end, b"p" * 30),
        ("append over the page", b"a", end, b"q" * PAGE_SIZE),
        ("write behind a hole", b"a", 4 * PAGE_SIZE + 8, b"h" * 8),
        ("first page", b"d/e", 0, b"e" * PAGE_SIZE),
        ("second page", b"d/e", PAGE_SIZE + 8, b"E" * 16),
        ("write b aligned", b"b", 64, b"m" * 16),
        ("write b unaligned", b"b", 123, b"w" * 13),
        ("append b", b"b", end, b"x" * 30),
        ("append b over the page", b"b", end, b"y" * PAGE_SIZE),
        ("write new", b"new", 0, b"z" * 70),
    ):
        yield name, Operation((_write(path, offset, data),), (path,))
    overlapping = (_write(b"a", 40, b"1" * 40), _write(b"a", 56, b"2" * 40))
    yield "write overlapping", Operation(overlapping, (b"a",))
    yield "store and msync a", Operation((_map_store(b"a", 200, b"s" * 24), fsync(b"a")), (b"a",))
    yield "store and msync b", Operation((_map_store(b"b", 200, b"t" * 24), fsync(b"b")), (b"b",))
    yield "store behind the end of b", Operation((_map_store(b"b", PAGE_SIZE, b"u" * 24),), (b"b",))
    yield "fsync a", Operation((fsync(b"a"),), ())
    yield "fsync b", Operation((fsync(b"b"),), ())
    yield "fsync d", Operation((fsync(b"d"),), ())
    yield "two descriptors on a", _two_descriptors(b"a")
    yield "two descriptors on b", _two_descriptors(b"b")
    yield "unlink open a", _unlink_open(b"a")
    yield "unlink open b", _unlink_open(b"b")
    yield "leave a open", Operation((_open(b"a"), _unlink(b"", b"a")), (b"",))


def _attributes_and_placement() -> Iterator[tuple[str, Operation]]:
    yield _op("setxattr", lambda w: w.fs.setxattr(w.ino(b"a"), b"user.new", b"2" * 70), b"a")
    yield _op("replace xattr", lambda w: w.fs.setxattr(w.ino(b"a"), b"user.old", b"3"), b"a")
    yield _op("first setxattr", lambda w: w.fs.setxattr(w.ino(b"d"), b"user.new", b"2"), b"d")
    yield _op("removexattr", lambda w: w.fs.removexattr(w.ino(b"a"), b"user.old"), b"a")
    yield _op("chmod", lambda w: w.fs.setattr(w.ino(b"b"), mode=0o600, uid=5), b"b")
    for path, to, pages in (
        (b"a", PageKind.PAGECACHE, range(1)),
        (b"a", PageKind.PAGECACHE, range(2)),
        (b"b", PageKind.XIP, range(1)),
        (b"b", PageKind.XIP, range(2)),
        (b"d/e", PageKind.PAGECACHE, range(1)),
    ):
        verb = "promote" if to is PageKind.PAGECACHE else "demote"

        def call(world: World, path: bytes = path, to: PageKind = to, at: range = pages) -> None:
            world.fs.move(world.ino(path), at, to)

        yield _op(f"{verb} {path.decode()} {len(pages)}", call, path)


OPERATIONS: Final[dict[str, Operation]] = dict(
    itertools.chain(_names(), _bytes(), _attributes_and_placement())
)


PERSISTENCE: Final = ("none", "fsync", "sync")
"""What follows each operation of a workload: nothing, an fsync of each thing touched, or sync."""


@dataclass(frozen=True)
class Workload:
    """Operations by name, each followed by ``persistence``."""

    operations: tuple[str, ...]
    persistence: str

    @property
    def name(self) -> str:
        """What the command line calls it."""
        return f"{' + '.join(self.operations)} / {self.persistence}"

    def steps(self) -> tuple[list[Step], int]:
        """Return all steps, and the place of the last operation's first one."""
        steps: list[Step] = []
        first = 0
        for name in self.operations:
            first = len(steps)
            steps += OPERATIONS[name].steps
            if self.persistence == "sync":
                steps.append(SYNC)
            elif self.persistence == "fsync":
                steps += [_FSYNCS[path] for path in OPERATIONS[name].touched]
        return steps, first


_FSYNCS: Final = {
    path: fsync(path) for operation in OPERATIONS.values() for path in operation.touched
}


def workloads(length: int) -> list[Workload]:
    """Return all sequences of ``length`` operations with each persistence."""
    return [
        Workload(names, persistence)
        for names in itertools.product(OPERATIONS, repeat=length)
        for persistence in PERSISTENCE
    ]
