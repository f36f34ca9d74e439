"""Random operations on a mount beside a model in memory: one file's bytes, and a tree of names.

Each run prints its seed; ``XIPFS_SEED=N pytest tests/t4_random.py`` replays that one alone.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import random
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
from conftest import needs
from live import PAGE, LiveMount, Mounts

pytestmark = [needs("root", "fuse")]

SEEDS = [int(os.environ["XIPFS_SEED"])] if "XIPFS_SEED" in os.environ else [1, 2]
FILE_OPERATIONS, TREE_OPERATIONS = 1200, 3000
MAX_BYTES = 50 * PAGE
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]


def migrate(mount: LiveMount, path: Path, first: int, count: int, to: str) -> dict[str, Any]:
    """Ask the control file, which is much faster than the command; return the result."""
    request = {"op": "migrate", "ino": path.stat().st_ino, "ranges": [[first, count]], "to": to}
    descriptor = os.open(mount / ".xipfs" / "control", os.O_RDWR)
    try:
        os.write(descriptor, json.dumps(request).encode())
        lines = b""
        while part := os.read(descriptor, 1 << 16):
            lines += part
    finally:
        os.close(descriptor)
    answer: dict[str, Any] = json.loads(lines.splitlines()[-1])
    assert "result" in answer, answer
    result: dict[str, Any] = answer["result"]
    return result


class FileChecker:
    """One file and what it must hold; every method but ``check`` is an operation."""

    def __init__(self, mount: LiveMount, rng: random.Random) -> None:
        self.mount, self.rng = mount, rng
        self.path = mount / "file"
        self.model = bytearray()
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT)

    def _span(self) -> tuple[int, int]:
        """Return offset and size of a piece, often at page boundaries."""
        offset = self.rng.randrange(MAX_BYTES)
        if self.rng.random() < 0.3:
            offset = offset // PAGE * PAGE
        size = self.rng.choice([1, 7, 512, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 9 * PAGE])
        return offset, min(size, MAX_BYTES - offset)

    def write(self) -> None:
        offset, size = self._span()
        data = self.rng.randbytes(size)
        assert os.pwrite(self.descriptor, data, offset) == size
        if len(self.model) < offset:
            self.model.extend(bytes(offset - len(self.model)))
        self.model[offset : offset + size] = data

    def append(self) -> None:
        data = self.rng.randbytes(self.rng.randrange(1, 2000))
        if len(self.model) + len(data) <= MAX_BYTES:
            with open(self.path, "ab", buffering=0) as file:
                assert file.write(data) == len(data)
            self.model += data

    def read(self) -> None:
        offset, size = self._span()
        assert os.pread(self.descriptor, size, offset) == self.model[offset : offset + size]

    def truncate(self) -> None:
        size = self.rng.randrange(MAX_BYTES)
        if self.rng.random() < 0.5:
            size = min(len(self.model) + self.rng.randrange(-5000, 5000), MAX_BYTES)
        size = max(size, 0)
        if self.rng.random() < 0.5:
            os.ftruncate(self.descriptor, size)
        else:
            os.truncate(self.path, size)
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))

    def mapped_write(self) -> None:
        offset, size = self._span()
        size = min(size, len(self.model) - offset)
        if size > 0:
            data = self.rng.randbytes(size)
            with mmap.mmap(self.descriptor, len(self.model)) as mapped:
                mapped[offset : offset + size] = data
                if self.rng.random() < 0.5:
                    mapped.flush()
            self.model[offset : offset + size] = data

    def mapped_read(self) -> None:
        if self.model:
            with mmap.mmap(self.descriptor, len(self.model), prot=mmap.PROT_READ) as mapped:
                offset, size = self._span()
                assert mapped[offset : offset + size] == self.model[offset : offset + size]

    def mapped_write_behind_the_end(self) -> None:
        """Bytes stored behind the end, in its page, are nobody's: they may never show."""
        used = len(self.model) % PAGE
        if used:
            # Python's own mmap does not let anyone store there.
            start = len(self.model) - used
            address = LIBC.mmap(None, PAGE, 3, mmap.MAP_SHARED, self.descriptor, start)
            ctypes.memset(address + used, 0xEE, PAGE - used)
            assert LIBC.munmap(ctypes.c_void_p(address), PAGE) == 0

    def sync(self) -> None:
        self.rng.choice([os.fsync, os.fdatasync])(self.descriptor)

    def forget(self) -> None:
        os.fsync(self.descriptor)
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def reopen(self) -> None:
        os.close(self.descriptor)
        self.descriptor = os.open(self.path, os.O_RDWR)

    def migrate(self) -> None:
        pages = -(-len(self.model) // PAGE)
        if pages:
            first = self.rng.randrange(pages)
            count = self.rng.randrange(1, pages - first + 1)
            migrate(self.mount, self.path, first, count, self.rng.choice(["xip", "pagecache"]))

    def remount(self, live: Mounts) -> None:
        os.close(self.descriptor)
        self.mount = live.remount(self.mount, "ram=128K")
        self.path = self.mount / "file"
        self.descriptor = os.open(self.path, os.O_RDWR)

    def check(self) -> None:
        assert os.fstat(self.descriptor).st_size == len(self.model)
        assert os.pread(self.descriptor, MAX_BYTES + 1, 0) == self.model


@pytest.mark.parametrize("seed", SEEDS)
def test_the_bytes_of_one_file(live: Mounts, seed: int) -> None:
    print(f"replay: XIPFS_SEED={seed} pytest {__file__}")
    rng = random.Random(seed)
    mount = live.mount(live.image(pagecache=seed % 2 == 0), "ram=128K")
    checker = FileChecker(mount, rng)
    operations: dict[Callable[[], None], int] = {
        checker.write: 20,
        checker.append: 4,
        checker.read: 20,
        checker.truncate: 8,
        checker.mapped_write: 15,
        checker.mapped_read: 12,
        checker.mapped_write_behind_the_end: 3,
        checker.sync: 2,
        checker.forget: 4,
        checker.reopen: 2,
        checker.migrate: 8,
    }
    names = []
    for number in range(FILE_OPERATIONS):
        operation = rng.choices(list(operations), list(operations.values()))[0]
        names.append(operation.__name__)
        operation()
        try:
            if number % 10 == 0:
                checker.check()
        except AssertionError:
            print(f"operation {number}; the last ones: {names[-12:]}")
            raise
        if number % 400 == 399:
            checker.remount(live)
    checker.check()
    os.close(checker.descriptor)


@dataclass
class Node:
    """A file, directory or symbolic link of the model."""

    kind: int
    mode: int = 0o644
    names: int = 0
    data: bytearray = field(default_factory=bytearray)
    target: str = ""
    children: dict[str, Node] = field(default_factory=dict)
    xattrs: dict[str, bytes] = field(default_factory=dict)

    def nlink(self) -> int:
        if self.kind != stat.S_IFDIR:
            return self.names
        return 2 + sum(child.kind == stat.S_IFDIR for child in self.children.values())


class RefusedError(Exception):
    """The model's operation fails with this errno."""


class Tree:
    """The model of a directory tree: each operation as its manual page has it, or RefusedError."""

    def __init__(self) -> None:
        self.root = Node(stat.S_IFDIR, 0o755)

    def _directory(self, path: str) -> tuple[Node, str]:
        """Return the directory that holds the last name of ``path``, and that name."""
        *above, name = path.split("/")
        node = self.root
        for part in above:
            node = self.find(node, part)
            if node.kind != stat.S_IFDIR:
                raise RefusedError(errno.ENOTDIR)
        return node, name

    @staticmethod
    def find(directory: Node, name: str) -> Node:
        if directory.kind != stat.S_IFDIR:
            raise RefusedError(errno.ENOTDIR)
        if name not in directory.children:
            raise RefusedError(errno.ENOENT)
        return directory.children[name]

    def node(self, path: str) -> Node:
        return self.find(*self._directory(path))

    def make(self, path: str, node: Node) -> None:
        directory, name = self._directory(path)
        if name in directory.children:
            raise RefusedError(errno.EEXIST)
        directory.children[name] = node
        node.names += 1

    def link(self, old: str, new: str) -> None:
        node = self.node(old)
        directory, name = self._directory(new)
        if name in directory.children:
            raise RefusedError(errno.EEXIST)
        if node.kind == stat.S_IFDIR:
            raise RefusedError(errno.EPERM)
        directory.children[name] = node
        node.names += 1

    def unlink(self, path: str) -> None:
        directory, name = self._directory(path)
        if self.find(directory, name).kind == stat.S_IFDIR:
            raise RefusedError(errno.EISDIR)
        directory.children.pop(name).names -= 1

    def rmdir(self, path: str) -> None:
        directory, name = self._directory(path)
        node = self.find(directory, name)
        if node.kind != stat.S_IFDIR:
            raise RefusedError(errno.ENOTDIR)
        if node.children:
            raise RefusedError(errno.ENOTEMPTY)
        del directory.children[name]

    def rename(self, old: str, new: str, flags: int) -> None:
        # The kernel finds both directories before it looks at either name.
        source, old_name = self._directory(old)
        target, new_name = self._directory(new)
        moved = self.find(source, old_name)
        other = target.children.get(new_name)
        if flags == 1 and other is not None:
            raise RefusedError(errno.EEXIST)
        if flags == 2 and other is None:
            raise RefusedError(errno.ENOENT)
        if new.startswith(old + "/"):
            raise RefusedError(errno.EINVAL)
        if old.startswith(new + "/"):
            raise RefusedError(errno.EINVAL if flags == 2 else errno.ENOTEMPTY)
        if flags == 2:
            assert other is not None
            source.children[old_name], target.children[new_name] = other, moved
            return
        if other is moved:
            return
        if other is not None:
            self._refuse_replacing(moved, other)
            other.names -= 1
        del source.children[old_name]
        target.children[new_name] = moved

    @staticmethod
    def _refuse_replacing(moved: Node, other: Node) -> None:
        if moved.kind == stat.S_IFDIR and other.kind != stat.S_IFDIR:
            raise RefusedError(errno.ENOTDIR)
        if other.kind == stat.S_IFDIR and moved.kind != stat.S_IFDIR:
            raise RefusedError(errno.EISDIR)
        if other.children:
            raise RefusedError(errno.ENOTEMPTY)

    def write(self, path: str, offset: int, data: bytes) -> None:
        node = self.node(path)
        if node.kind == stat.S_IFDIR:
            raise RefusedError(errno.EISDIR)
        if node.kind == stat.S_IFLNK:
            raise RefusedError(errno.ELOOP)
        node.data.extend(bytes(max(offset - len(node.data), 0)))
        node.data[offset : offset + len(data)] = data

    def set_xattr(self, path: str, value: bytes) -> None:
        node = self.node(path)
        if node.kind == stat.S_IFLNK:
            raise RefusedError(errno.EPERM)
        node.xattrs["user.x"] = value

    def chmod(self, path: str, mode: int) -> None:
        node = self.node(path)
        if node.kind != stat.S_IFLNK:
            node.mode = mode


def _write(path: str, offset: int, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        os.pwrite(descriptor, data, offset)
    finally:
        os.close(descriptor)


def _rename(old: str, new: str, flags: int) -> None:
    if LIBC.renameat2(-100, old.encode(), -100, new.encode(), flags):
        raise OSError(ctypes.get_errno(), "renameat2")


def _chmod(path: str, mode: int) -> None:
    if not os.path.islink(path):
        os.chmod(path, mode)


#: How often each operation is chosen.
_WEIGHTS: Final = {
    "create": 2,
    "mkdir": 2,
    "symlink": 1,
    "link": 2,
    "unlink": 1,
    "rmdir": 1,
    "rename": 3,
    "write": 3,
    "xattr": 1,
    "chmod": 1,
}


def _pair(
    rng: random.Random, tree: Tree, path: str, other: str
) -> tuple[str, Callable[[], object], Callable[[], object]]:
    """Return one random operation: its name, on the mount and on the model."""
    what = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
    data, offset = rng.randbytes(rng.randrange(1, 6000)), rng.randrange(20_000)
    flags, mode = rng.choice([0, 0, 1, 2]), rng.randrange(0o10000) & ~0o2000
    made = {
        "create": Node(stat.S_IFREG, 0o644),
        "mkdir": Node(stat.S_IFDIR, 0o755),
        "symlink": Node(stat.S_IFLNK, 0o777, target=other),
    }
    real: dict[str, Callable[[], object]] = {
        "create": lambda: os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o644)),
        "mkdir": lambda: os.mkdir(path, 0o755),
        "symlink": lambda: os.symlink(other, path),
        "link": lambda: os.link(path, other, follow_symlinks=False),
        "unlink": lambda: os.unlink(path),
        "rmdir": lambda: os.rmdir(path),
        "rename": lambda: _rename(path, other, flags),
        "write": lambda: _write(path, offset, data),
        "xattr": lambda: os.setxattr(path, "user.x", data[:100], follow_symlinks=False),
        "chmod": lambda: _chmod(path, mode),
    }
    model: dict[str, Callable[[], object]] = {
        "link": lambda: tree.link(path, other),
        "unlink": lambda: tree.unlink(path),
        "rmdir": lambda: tree.rmdir(path),
        "rename": lambda: tree.rename(path, other, flags),
        "write": lambda: tree.write(path, offset, data),
        "xattr": lambda: tree.set_xattr(path, data[:100]),
        "chmod": lambda: tree.chmod(path, mode),
    }
    modelled = model.get(what, lambda: tree.make(path, made[what]))
    return f"{what} {path} {other} {flags}", real[what], modelled


def outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except RefusedError as refused:
        return errno.errorcode[refused.args[0]]
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


def compare(path: Path, node: Node) -> None:
    """Compare all that is below ``path`` with the model."""
    status = os.lstat(path)
    assert stat.S_IFMT(status.st_mode) == node.kind, path
    assert status.st_nlink == node.nlink(), path
    assert stat.S_IMODE(status.st_mode) == node.mode, path
    names = os.listxattr(path, follow_symlinks=False)
    assert {name: os.getxattr(path, name) for name in names} == node.xattrs, path
    if node.kind == stat.S_IFREG:
        assert path.read_bytes() == node.data, path
    elif node.kind == stat.S_IFLNK:
        assert os.readlink(path) == node.target, path
    else:
        assert sorted(os.listdir(path)) == sorted(node.children), path
        for name, child in node.children.items():
            compare(path / name, child)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_tree_of_names(live: Mounts, seed: int) -> None:
    print(f"replay: XIPFS_SEED={seed} pytest {__file__}")
    rng = random.Random(seed)
    mount = live.mount(live.image(size_bytes=64 << 20))
    tree, home = Tree(), os.getcwd()
    log = []

    def path() -> str:
        return "/".join(rng.choice("abcd") for _ in range(rng.choice([1, 1, 2, 2, 3])))

    for number in range(TREE_OPERATIONS):
        if number % 1000 == 0:
            os.chdir(home)
            mount = live.remount(mount)
            compare(mount.directory, tree.root)
            os.chdir(mount.directory)
        name, real, modelled = _pair(rng, tree, path(), path())
        through_link = any("/" in word and _crosses(tree, word) for word in name.split()[1:3])
        if through_link:
            continue
        expected, got = outcome(modelled), outcome(real)
        log.append(f"{name}: {got}")
        if expected != got:
            os.chdir(home)
            pytest.fail(f"operation {number}, {name}: {got}, expected {expected}; {log[-10:]}")
    os.chdir(home)
    compare(mount.directory, tree.root)
    compare(live.remount(mount, "ro").directory, tree.root)


def _crosses(tree: Tree, path: str) -> bool:
    """Return whether a symbolic link lies on the way, which the model does not follow."""
    node = tree.root
    for part in path.split("/")[:-1]:
        node = node.children.get(part, tree.root)
        if node.kind == stat.S_IFLNK:
            return True
    return False
