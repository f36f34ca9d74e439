"""The Filesystem against a dictionary: hypothesis looks for calls that tell them apart.

RAM holds six pages, so that pages are evicted all the time; the image is remounted now and then and
checked block by block at the end. A failure prints the calls; hypothesis replays it by itself.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from imagecheck import check
from media import RecordingMedium, new_medium, open_medium

from xipfs.errors import FsError
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import PageKind

PAGE = 4096
ROOT = 1
MAX_PAGES = 600  # the map has two levels from page 512 on


@dataclass
class File:
    """What a regular file should hold: written ranges over zeros, and which pages exist."""

    size: int = 0
    pages: dict[int, bytearray] = field(default_factory=dict)
    kinds: dict[int, PageKind] = field(default_factory=dict)
    default: PageKind = PageKind.XIP
    names: int = 1
    held: int = 0

    def write(self, offset: int, data: bytes) -> None:
        for at, byte_run in pieces(offset, data):
            page = self.pages.setdefault(at // PAGE, bytearray(PAGE))
            page[at % PAGE : at % PAGE + len(byte_run)] = byte_run
            self.kinds.setdefault(at // PAGE, self.default)
        self.size = max(self.size, offset + len(data))

    def resize(self, size: int) -> None:
        if size < self.size:
            last = -(-size // PAGE)
            self.pages = {index: page for index, page in self.pages.items() if index < last}
            self.kinds = {index: kind for index, kind in self.kinds.items() if index < last}
            if size % PAGE and size // PAGE in self.pages:
                self.pages[size // PAGE][size % PAGE :] = bytes(PAGE - size % PAGE)
        self.size = size

    def read(self, offset: int, size: int) -> bytes:
        end = min(offset + size, self.size)
        found = bytearray(max(end - offset, 0))
        for at, run in pieces(offset, found):
            if at // PAGE in self.pages:
                page = self.pages[at // PAGE]
                found[at - offset : at - offset + len(run)] = page[at % PAGE :][: len(run)]
        return bytes(found)


def pieces(offset: int, data: bytes | bytearray) -> list[tuple[int, bytes]]:
    cut, at = [], offset
    while at < offset + len(data):
        stop = min((at // PAGE + 1) * PAGE, offset + len(data))
        cut.append((at, bytes(data[at - offset : stop - offset])))
        at = stop
    return cut


names = st.sampled_from([b"a", b"b", b"c", b"long-" + b"n" * 200, b"d"])
offsets = st.one_of(
    st.integers(0, 3 * PAGE),
    st.sampled_from([511 * PAGE, 512 * PAGE - 1, 512 * PAGE, (MAX_PAGES - 4) * PAGE]),
)
sizes = st.sampled_from([1, 100, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 3 * PAGE + 7])
ends = st.one_of(offsets, st.sampled_from([0, 1, PAGE - 1, PAGE, PAGE + 1]))
choice = st.integers(0, 1 << 30)


class Machine(RuleBasedStateMachine):
    """The calls, and what they should do."""

    def __init__(self) -> None:
        super().__init__()
        self.medium: RecordingMedium = new_medium(400)
        self.fs: Filesystem = open_medium(self.medium, ram_pages=6)
        self.files: dict[int, File] = {}
        self.dirs: dict[int, dict[bytes, int]] = {ROOT: {}}
        self.serial = 0

    def pick_dir(self, number: int) -> int:
        return sorted(self.dirs)[number % len(self.dirs)]

    def pick_file(self, number: int) -> int:
        return sorted(self.files)[number % len(self.files)]

    def fails(self, code: int, call: object, *args: object) -> None:
        assert callable(call)
        with pytest.raises(FsError) as caught:
            call(*args)
        assert caught.value.errno == code, os.strerror(caught.value.errno)

    def unname(self, ino: int) -> None:
        if ino in self.dirs:
            del self.dirs[ino]
            return
        file = self.files[ino]
        file.names -= 1
        if not file.names and not file.held:
            del self.files[ino]

    @rule(where=choice, name=names, cached=st.booleans())
    def create(self, where: int, name: bytes, cached: bool) -> None:
        parent = self.pick_dir(where)
        if name in self.dirs[parent]:
            self.fails(errno.EEXIST, self.fs.mknod, parent, name, 0o100644, 0, 0, 0)
            return
        ino = self.fs.mknod(parent, name, 0o100644, 0, 0, 0).ino
        kind = PageKind.PAGECACHE if cached else PageKind.XIP
        self.fs.set_default_kind(ino, kind)
        assert ino not in self.files
        assert ino not in self.dirs
        self.dirs[parent][name] = ino
        self.files[ino] = File(default=kind)

    @rule(where=choice, name=names)
    def mkdir(self, where: int, name: bytes) -> None:
        parent = self.pick_dir(where)
        if name in self.dirs[parent]:
            self.fails(errno.EEXIST, self.fs.mkdir, parent, name, 0o755, 0, 0)
            return
        ino = self.fs.mkdir(parent, name, 0o755, 0, 0).ino
        self.dirs[parent][name] = ino
        self.dirs[ino] = {}

    @precondition(lambda self: self.files)
    @rule(which=choice, offset=offsets, size=sizes)
    def write(self, which: int, offset: int, size: int) -> None:
        ino = self.pick_file(which)
        self.serial += 1
        data = (b"%06d." % self.serial * (size // 7 + 1))[:size]
        assert self.fs.write(ino, offset, data) == size
        self.files[ino].write(offset, data)

    @precondition(lambda self: self.files)
    @rule(which=choice, size=ends)
    def truncate(self, which: int, size: int) -> None:
        ino = self.pick_file(which)
        assert self.fs.setattr(ino, size_bytes=size).size_bytes == size
        self.files[ino].resize(size)

    @precondition(lambda self: self.files)
    @rule(which=choice, offset=offsets, size=sizes)
    def read(self, which: int, offset: int, size: int) -> None:
        ino = self.pick_file(which)
        assert bytes(self.fs.read(ino, offset, size)) == self.files[ino].read(offset, size)

    @precondition(lambda self: self.files)
    @rule(which=choice, page=st.sampled_from([0, 1, 2, 3, 511, 512]), up=st.booleans())
    def migrate(self, which: int, page: int, up: bool) -> None:
        ino = self.pick_file(which)
        file = self.files[ino]
        target = PageKind.PAGECACHE if up else PageKind.XIP
        moved = (self.fs.promote if up else self.fs.demote)(ino, page)
        assert moved == (page in file.kinds and file.kinds[page] is not target)
        if moved:
            file.kinds[page] = target

    @precondition(lambda self: self.files)
    @rule(which=choice, page=st.sampled_from([0, 1, 2, 511, 512]))
    def fault(self, which: int, page: int) -> None:
        ino = self.pick_file(which)
        file = self.files[ino]
        if page * PAGE >= file.size:
            self.fails(errno.ENXIO, self.fs.fault_in, ino, page)
            return
        kind = file.kinds.get(page)
        got = self.fs.fault_in(ino, page)
        assert (got is None) == (kind is None)
        if got is not None:
            assert self.fs.memory.is_nvram(got[0]) == (kind is PageKind.XIP)

    @precondition(lambda self: self.files)
    @rule(which=choice, where=choice, name=names)
    def link(self, which: int, where: int, name: bytes) -> None:
        ino, parent = self.pick_file(which), self.pick_dir(where)
        if not self.files[ino].names:
            self.fails(errno.ENOENT, self.fs.link, ino, parent, name)
        elif name in self.dirs[parent]:
            self.fails(errno.EEXIST, self.fs.link, ino, parent, name)
        else:
            self.fs.link(ino, parent, name)
            self.dirs[parent][name] = ino
            self.files[ino].names += 1

    @rule(where=choice, name=names)
    def remove(self, where: int, name: bytes) -> None:
        parent = self.pick_dir(where)
        ino = self.dirs[parent].get(name)
        if ino is None:
            self.fails(errno.ENOENT, self.fs.unlink, parent, name)
            self.fails(errno.ENOENT, self.fs.rmdir, parent, name)
        elif ino in self.files:
            self.fails(errno.ENOTDIR, self.fs.rmdir, parent, name)
            self.fs.unlink(parent, name)
            del self.dirs[parent][name]
            self.unname(ino)
        elif self.dirs[ino]:
            self.fails(errno.ENOTEMPTY, self.fs.rmdir, parent, name)
        else:
            self.fails(errno.EISDIR, self.fs.unlink, parent, name)
            self.fs.rmdir(parent, name)
            del self.dirs[parent][name]
            self.unname(ino)

    def _above(self, ino: int, other: int) -> bool:
        """Return whether directory ``ino`` is ``other`` or lies above it."""
        return ino == other or any(
            child in self.dirs and self._above(child, other) for child in self.dirs[ino].values()
        )

    def rename_error(self, old: int, name: bytes, new: int, new_name: bytes, flags: int) -> int:
        ino, target = self.dirs[old].get(name), self.dirs[new].get(new_name)
        if ino is None:
            return errno.ENOENT
        if ino in self.dirs and self._above(ino, new):
            return errno.EINVAL
        if target is None:
            return errno.ENOENT if flags == 2 else 0
        if flags == 1:
            return errno.EEXIST
        if target == ino:
            return 0
        if flags == 2:
            return errno.EINVAL if target in self.dirs and self._above(target, old) else 0
        if target in self.dirs:
            if ino not in self.dirs:
                return errno.EISDIR
            return errno.ENOTEMPTY if self.dirs[target] else 0
        return errno.ENOTDIR if ino in self.dirs else 0

    @rule(a=choice, name=names, b=choice, new_name=names, flags=st.sampled_from([0, 0, 1, 2]))
    def rename(self, a: int, name: bytes, b: int, new_name: bytes, flags: int) -> None:
        old, new = self.pick_dir(a), self.pick_dir(b)
        code = self.rename_error(old, name, new, new_name, flags)
        if code:
            self.fails(code, self.fs.rename, old, name, new, new_name, flags)
            return
        self.fs.rename(old, name, new, new_name, flags)
        ino, target = self.dirs[old][name], self.dirs[new].get(new_name)
        if ino == target:
            return
        if flags == 2:
            assert target is not None
            self.dirs[old][name] = target
        else:
            del self.dirs[old][name]
        self.dirs[new][new_name] = ino
        if target is not None and flags != 2:
            self.unname(target)

    @precondition(lambda self: self.files)
    @rule(which=choice)
    def hold(self, which: int) -> None:
        ino = self.pick_file(which)
        self.fs.hold(ino)
        self.files[ino].held += 1

    @precondition(lambda self: any(file.held for file in self.files.values()))
    @rule(which=choice)
    def drop(self, which: int) -> None:
        held = sorted(ino for ino, file in self.files.items() if file.held)
        ino = held[which % len(held)]
        self.fs.drop(ino)
        file = self.files[ino]
        file.held -= 1
        if not file.held and not file.names:
            del self.files[ino]

    @rule()
    def remount(self) -> None:
        self.fs.close()
        check(bytes(self.medium.durable))
        for file in self.files.values():
            file.held = 0
        self.files = {ino: file for ino, file in self.files.items() if file.names}
        self.medium = RecordingMedium(self.medium.durable)
        self.fs = open_medium(self.medium, ram_pages=6)

    @invariant()
    def counts_agree(self) -> None:
        kinds = [kind for file in self.files.values() for kind in file.kinds.values()]
        assert self.fs.nr_xip_pages == kinds.count(PageKind.XIP)
        assert self.fs.nr_pagecache_pages == kinds.count(PageKind.PAGECACHE)
        assert self.fs.nr_resident_pages <= 6

    def teardown(self) -> None:
        for parent, entries in self.dirs.items():
            listed = {name: attr.ino for name, attr, _ in self.fs.readdir(parent, 0)}
            assert listed == entries
        for ino, file in self.files.items():
            attr = self.fs.getattr(ino)
            assert (attr.size_bytes, attr.nlink) == (file.size, file.names)
            for first in (0, 508 * PAGE):
                assert bytes(self.fs.read(ino, first, 8 * PAGE)) == file.read(first, 8 * PAGE)
            for index, kind in file.kinds.items():
                assert self.fs.page(ino, index).kind is kind
        self.fs.close()
        check(bytes(self.medium.durable))


TestFilesystem = Machine.TestCase
TestFilesystem.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
