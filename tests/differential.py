"""The same calls on an xipfs mount and on one of the kernel's own filesystems, compared.

Random calls that take names, by three users, on a handful of names in a few directories: what each
returns or fails with, and what lstat then says of everything that is there, must be the same, times
included (which of them moved). The kernel's filesystem (that of the temporary directory, or tmpfs)
is the oracle: it passes the POSIX suites that a FUSE filesystem is judged by. What legitimately
differs is left out: the sizes of directories, inode numbers, access times that a read moved.
"""

from __future__ import annotations

import contextlib
import os
import random
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from acting import ALICE, BOB, SHARED_GROUP, USERS, UTIME_NOW, UTIME_OMIT, Call, Worker

DIRECTORY_MODES = [0o755, 0o777, 0o1777, 0o2777, 0o3775, 0o700, 0o555, 0o711]
FILE_MODES = [0o644, 0o666, 0o2666, 0o6644, 0o4755, 0o2755, 0o6777, 0o600, 0o000, 0o777, 0o1666]
OPEN_FLAGS = [os.O_RDONLY, os.O_WRONLY, os.O_RDWR]
MORE_FLAGS = [0, os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_TRUNC, os.O_CREAT | os.O_TRUNC]
MORE_FLAGS += [os.O_DIRECTORY, os.O_NOFOLLOW, os.O_APPEND, os.O_CREAT | os.O_DIRECTORY]
TIMES_NS = [
    0,
    1,
    999_999_999,
    -1,
    -(1 << 31) * 10**9,
    1 << 62,
    2**31 * 10**9,
    4_294_967_296_123_456_789,
]
NAME_MAX, PATH_MAX = 255, 4096
HELD_MAX = 4


# What is there


@dataclass(frozen=True)
class Seen:
    """What lstat says of one name, but for what may differ."""

    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    rdev: int
    target: str
    times: tuple[int, int, int]


def look(directory: Path) -> dict[str, Seen]:
    """Return everything below ``directory``, and itself."""
    found: dict[str, Seen] = {}
    pending = ["."]
    while pending:
        name = pending.pop()
        path = os.path.join(directory, name)
        status = os.lstat(path)
        is_directory = stat.S_ISDIR(status.st_mode)
        found[name] = Seen(
            status.st_mode,
            status.st_nlink,
            status.st_uid,
            status.st_gid,
            0 if is_directory else status.st_size,
            status.st_rdev,
            os.readlink(path) if stat.S_ISLNK(status.st_mode) else "",
            (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns),
        )
        if is_directory:
            pending += [os.path.join(name, each) for each in os.listdir(path)]
    return found


# The choice


@dataclass
class Chooser:
    """Chooses calls, of the names that it may use."""

    rng: random.Random
    held: set[tuple[str, int]] = field(default_factory=set)

    def name(self) -> str:
        """Return a path: mostly a short one, now and then one that is wrong in some way."""
        rng = self.rng
        parts = [rng.choice(["a", "b", "c", "d", "e", "f", "s"])]
        while rng.random() < 0.45 and len(parts) < 4:
            parts.insert(0, rng.choice("def" if rng.random() < 0.8 else "abs"))
        path = "/".join(parts)
        odd = rng.random()
        if odd < 0.03:
            return path + "/"
        if odd < 0.05:
            return path + rng.choice(["/.", "/..", "/../" + parts[-1]])
        if odd < 0.06:
            return rng.choice(["", ".", "..", "d//a", "./a"])
        if odd < 0.08:
            return path + "/" + "x" * rng.choice([NAME_MAX, NAME_MAX + 1])
        if odd < 0.085:
            return "d/" * ((PATH_MAX - 2) // 2) + rng.choice(["a", "bb"])
        return path

    def call(self, user: str) -> Call:
        """Return a random call for ``user``."""
        rng, name = self.rng, self.name
        mine = sorted(slot for whose, slot in self.held if whose == user)
        if mine and rng.random() < 0.15:
            return self._with_held(rng.choice(mine))
        uid, gid = self._owner()
        file_mode, directory_mode = rng.choice(FILE_MODES), rng.choice(DIRECTORY_MODES)
        both = rng.choice([file_mode, directory_mode])
        flags = rng.choice(OPEN_FLAGS) | rng.choice(MORE_FLAGS)
        device = os.makedev(1, rng.choice([3, 5]))
        kind = rng.choice([stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK])
        attribute = rng.choice(["user.a", "user.b", "trusted.c", "bad", "user."])
        choices: list[tuple[int, Callable[[], Call]]] = [
            (8, lambda: ("open", name(), flags, file_mode)),
            (4, lambda: ("write", name(), rng.choice([0, os.O_APPEND, os.O_TRUNC]), b"data")),
            (2, lambda: ("read", name())),
            (6, lambda: ("mkdir", name(), directory_mode)),
            (2, lambda: ("mkfifo", name(), file_mode)),
            (3, lambda: ("mknod", name(), kind | file_mode, device)),
            (4, lambda: ("symlink", rng.choice(["a", "d", "d/a", "s", "../a", "x" * 300]), name())),
            (4, lambda: ("link", name(), name(), rng.random() < 0.3)),
            (8, lambda: ("rename", name(), name())),
            (3, lambda: ("renameat2", name(), name(), rng.choice([1, 2, 3, 0]))),
            (4, lambda: ("unlink", name())),
            (3, lambda: ("rmdir", name())),
            (8, lambda: ("chmod", name(), both)),
            (6, lambda: ("chown", name(), uid, gid)),
            (3, lambda: ("lchown", name(), uid, gid)),
            (3, lambda: ("truncate", name(), rng.choice([rng.randrange(9000), -1, 1 << 40]))),
            (4, lambda: ("utimensat", name(), self._times(), rng.choice([0, 0, 256]))),
            (2, lambda: ("access", name(), rng.randrange(8))),
            (1, lambda: ("readlink", name())),
            (1, lambda: ("listdir", name())),
            (2, lambda: ("setxattr", name(), attribute, b"value", rng.choice([0, 1, 2]))),
            (1, lambda: ("getxattr", name(), attribute)),
            (1, lambda: ("removexattr", name(), attribute)),
            (1, lambda: ("listxattr", name())),
            (1, lambda: ("umask", rng.choice([0, 0o022, 0o077]))),
        ]
        if len(mine) < HELD_MAX and rng.random() < 0.05:
            free = min(set(range(HELD_MAX)) - set(mine))
            return "hold", free, name(), rng.choice(OPEN_FLAGS) | rng.choice([0, os.O_CREAT])
        weights = [weight for weight, _ in choices]
        return rng.choices(choices, weights)[0][1]()

    def _owner(self) -> tuple[int, int]:
        """Return a uid and a gid, not both -1: the kernel tells FUSE nothing of such a chown."""
        uid, gid = self.rng.choice([0, ALICE, BOB, -1]), self.rng.choice([0, ALICE, SHARED_GROUP])
        return uid, self.rng.choice([gid, BOB, -1 if uid != -1 else gid])

    def _times(self) -> list[tuple[int, int]] | None:
        rng = self.rng
        if rng.random() < 0.2:
            return None
        special = [(0, UTIME_NOW), (0, UTIME_OMIT), (5, 1_000_000_000), (5, -1)]
        normal = [divmod(time_ns, 10**9) for time_ns in TIMES_NS]
        return [rng.choice(special if rng.random() < 0.4 else normal) for _ in range(2)]

    def _with_held(self, slot: int) -> Call:
        rng = self.rng
        uid, gid = self._owner()
        return rng.choice(
            [
                ("let_go", slot),
                ("with_held", slot, "fstat"),
                ("with_held", slot, "write", b"more data"),
                ("with_held", slot, "ftruncate", rng.randrange(9000)),
                ("with_held", slot, "fchmod", rng.choice(FILE_MODES)),
                ("with_held", slot, "fchown", uid, gid),
                ("with_held", slot, "fsync"),
                ("with_held", slot, "lseek", rng.choice([0, 5, 100]), rng.choice([0, 1, 2])),
            ]
        )


# The comparison


class DifferenceError(AssertionError):
    """xipfs and the oracle do not agree; the message shows how it came to that."""


class Pair:
    """Two directories that must stay equal, and the users that work in them."""

    def __init__(self, ours: Path, oracle: Path, seed: int) -> None:
        self._sides = (ours, oracle)
        self._chooser = Chooser(random.Random(seed))
        for side in self._sides:
            # One deeper than what is compared: ".." is fair game too.
            os.chmod(side, 0o777)
            (side / "work").mkdir()
            os.chmod(side / "work", 0o777)
        self._workers = {
            user: tuple(Worker(side / "work", user) for side in self._sides) for user in USERS
        }
        self._before = [look(side) for side in self._sides]
        self.history: list[str] = []

    def end(self) -> None:
        """End all workers."""
        for pair in self._workers.values():
            for worker in pair:
                worker.end()

    def step(self, *, quiet: bool) -> None:
        """Do one call on both; ``quiet`` compares its result only."""
        chooser = self._chooser
        user = chooser.rng.choice(["root", "alice", "alice", "bob"])
        call = chooser.call(user)
        ours, oracle = (worker.do(call) for worker in self._workers[user])
        self.history.append(f"{user} {call} -> {oracle}")
        if ours != oracle:
            raise DifferenceError(self._story(f"xipfs: {ours}\noracle: {oracle}"))
        if call[0] == "hold" and oracle is None:
            chooser.held.add((user, call[1]))
        if call[0] == "let_go":
            chooser.held.discard((user, call[1]))
        times_set = call[0] == "utimensat" and oracle is None
        if not quiet or times_set:
            self._compare(f"./work/{call[1]}" if times_set else "")

    def _compare(self, set_by_hand: str) -> None:
        now = [look(side) for side in self._sides]
        told = [
            {
                name: _without_clock(seen, before.get(name), name == set_by_hand)
                for name, seen in side.items()
            }
            for side, before in zip(now, self._before, strict=True)
        ]
        if told[0] != told[1]:
            names = sorted(set(told[0]) | set(told[1]))
            wrong = [
                f"{name}:\n  xipfs  {told[0].get(name)}\n  oracle {told[1].get(name)}"
                for name in names
                if told[0].get(name) != told[1].get(name)
            ]
            raise DifferenceError(self._story("\n".join(wrong)))
        self._before = now

    def _story(self, what: str) -> str:
        return "\n".join([*self.history[-12:], what])


def _without_clock(seen: Seen, before: Seen | None, atime: bool) -> Seen:
    """Return ``seen`` with times that a clock gave replaced by whether they moved.

    The access time counts only when it was set by hand: reads reach the daemon as the page cache
    lets them.
    """
    by_hand = [value in TIMES_NS for value in seen.times]
    moved = [before is None or before.times[place] != seen.times[place] for place in range(3)]
    return replace(
        seen,
        times=(
            seen.times[0] if atime and by_hand[0] else -9,
            seen.times[1] if by_hand[1] else -7 if moved[1] else -8,
            -7 if moved[2] else -8,
        ),
    )


@contextlib.contextmanager
def pair(ours: Path, oracle: Path, seed: int) -> Iterator[Pair]:
    """Yield the pair and end its workers."""
    made = Pair(ours, oracle, seed)
    try:
        yield made
    finally:
        made.end()


def run(ours: Path, oracle: Path, seed: int, calls: int) -> None:
    """Do so many calls; raises DifferenceError at the first that differs."""
    with pair(ours, oracle, seed) as both:
        quiet = random.Random(seed)
        for _ in range(calls):
            both.step(quiet=quiet.random() < 0.5)
