"""The crash explorer: every state a cut can leave of an operation, recovered and judged.

At each fence of an operation, and at its end, some lines of the medium are uncertain. Recovery is
run on a medium that decides a line's content only when the line is first read, and is repeated for
every content that it could have had. So all states are covered, without running those that differ
in nothing that recovery, the check or a reader of the tree ever looks at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from imagecheck import check
from media import open_medium

from xipfs.errors import FsError
from xipfs.fs.filesystem import Filesystem
from xipfs.memory.emulated import STATES_MAX, EmulatedMedium, Pending
from xipfs.memory.region import LINE_SIZE, Buffer

ROOT = 1
WORD = 8
PAGE = 4096

Operation = Callable[[Filesystem], object]
Tree = dict[bytes, tuple[object, ...]]
Contents = dict[int, bytes]
"""A regular file's bytes by inode number."""


class Undecided(EmulatedMedium):
    """What a cut left; each uncertain line takes the next of ``choices`` when it is first read."""

    def __init__(self, durable: bytes, uncertain: Pending, choices: list[int]) -> None:
        super().__init__(durable)
        self._uncertain = dict(uncertain)
        self._choices = choices
        #: Of each line decided so far: how many contents it could have had.
        self.counts: list[int] = []

    def load(self, offset: int, size: int) -> memoryview:
        self._decide(offset, size)
        return super().load(offset, size)

    def store(self, offset: int, data: Buffer) -> None:
        end = offset + len(data)
        for line in {offset // LINE_SIZE, (end - 1) // LINE_SIZE}:
            if line * LINE_SIZE < offset or (line + 1) * LINE_SIZE > end:
                self._decide(line * LINE_SIZE, LINE_SIZE)
        # Lines that are overwritten whole: what the cut left in them matters to nobody.
        for line in [x for x in self._uncertain if offset <= x * LINE_SIZE < end]:
            del self._uncertain[line]
        super().store(offset, data)

    def __getitem__(self, at: slice) -> bytes:
        start, stop, _ = at.indices(self.size_bytes)
        return bytes(self.load(start, max(stop - start, 0)))

    def _decide(self, offset: int, size: int) -> None:
        if not self._uncertain:
            return
        first, last = offset // LINE_SIZE, (offset + size - 1) // LINE_SIZE
        for line in [line for line in self._uncertain if first <= line <= last]:
            contents = self._uncertain.pop(line)
            if len(self.counts) == len(self._choices):
                self._choices.append(0)
            content = contents[self._choices[len(self.counts)]]
            self.counts.append(len(contents))
            for bytes_ in (self.now, self.durable):
                bytes_[line * LINE_SIZE : (line + 1) * LINE_SIZE] = content


class Watched(EmulatedMedium):
    """Calls ``at_fence`` before each fence takes effect."""

    at_fence: Callable[[], None] | None = None

    def fence(self) -> None:
        if self.at_fence is not None:
            self.at_fence()
        super().fence()


def tree_of(fs: Filesystem, ino: int = ROOT, path: bytes = b"") -> tuple[Tree, Contents]:
    """Return all a program can see of names, attributes and placement; and the bytes apart."""
    tree: Tree = {}
    contents: Contents = {}
    for name, attr, _ in fs.readdir(ino, 0):
        facts: list[object] = [attr.ino, attr.mode, attr.nlink, attr.uid, attr.gid]
        facts.append([(x, fs.getxattr(attr.ino, x)) for x in fs.listxattr(attr.ino)])
        where = path + b"/" + name
        kind = attr.mode >> 12
        if kind == 4:
            below, bytes_below = tree_of(fs, attr.ino, where)
            tree |= below
            contents |= bytes_below
        elif kind == 8:
            facts.append(attr.size_bytes)
            pages = -(-attr.size_bytes // PAGE)
            facts.append([fs.page(attr.ino, page).kind for page in range(pages)])
            contents[attr.ino] = bytes(fs.read(attr.ino, 0, attr.size_bytes))
        else:
            facts.append(fs.readlink(attr.ino))
        tree[where] = tuple(facts)
    return tree, contents


@dataclass
class Explorer:
    """Judges the cuts of a workload's last operation; ``states`` were run at ``points``."""

    base: bytes
    ram_pages: int = 16
    points: int = 0
    exhaustive_points: int = 0
    states: int = 0
    violations: list[str] = field(default_factory=list)
    _known: set[str] = field(default_factory=set)

    def explore(self, name: str, operations: list[Operation], fsync_between: bool) -> None:
        """Run ``operations`` and close; cut the last of them and the close."""
        medium = Watched(self.base)
        fs = open_medium(medium, ram_pages=self.ram_pages)
        history: dict[int, list[bytes]] = {}
        _remember(history, tree_of(fs)[1])
        for operation in operations[:-1]:
            _run(operation, fs)
            _remember(history, tree_of(fs)[1])
            if fsync_between:
                fs.sync()
                history = {ino: [content] for ino, content in tree_of(fs)[1].items()}
        twin_medium = EmulatedMedium(self.base)
        twin = open_medium(twin_medium, ram_pages=self.ram_pages)
        for operation in operations:
            _run(operation, twin)
            if fsync_between and operation is not operations[-1]:
                twin.sync()
        before, after = tree_of(fs)[0], tree_of(twin)[0]
        # While a file is being cut its end may be there still; afterwards it never comes back.
        flying = {i: list(h) for i, h in history.items()}
        for ino, content in tree_of(twin)[1].items():
            flying.setdefault(ino, [b""]).append(content)
        _remember(allowed := history, tree_of(twin)[1])
        medium.at_fence = lambda: self._point(name, medium, (before, after), flying)
        _run(operations[-1], fs)
        medium.at_fence = lambda: self._point(name, medium, (after,), allowed)
        medium.at_fence()
        fs.close()
        final = {ino: [content] for ino, content in tree_of(twin)[1].items()}
        self._point(f"{name}, closed", medium, (after,), final)

    def _point(
        self,
        name: str,
        medium: EmulatedMedium,
        trees: tuple[Tree, ...],
        allowed: dict[int, list[bytes]],
    ) -> None:
        self.points += 1
        choices: list[int] = []
        for _ in range(STATES_MAX):
            state = Undecided(bytes(medium.durable), medium.pending(), choices)
            try:
                self._judge(state, trees, allowed)
            except Exception as error:
                self.violations.append(f"{name}: fence {medium.fences}, {choices}: {error!r}")
                return
            self.states += 1
            while choices and choices[-1] + 1 == state.counts[len(choices) - 1]:
                choices.pop()
            if not choices:
                self.exhaustive_points += 1
                return
            choices[-1] += 1

    def _judge(
        self, state: Undecided, trees: tuple[Tree, ...], allowed: dict[int, list[bytes]]
    ) -> None:
        fs = open_medium(state, ram_pages=self.ram_pages)
        tree, contents = tree_of(fs)
        assert tree in trees, f"a third tree: {tree}"
        for ino, content in contents.items():
            for at in range(0, len(content), WORD):
                word = content[at : at + WORD]
                olds = (old[at : at + WORD].ljust(len(word), b"\0") for old in allowed[ino])
                assert word in olds, f"inode {ino} at {at} holds {word!r}"
        check(state)
        known = repr((tree, contents))
        if known not in self._known:
            self._known.add(known)
            self._use(bytes(state.now))

    def _use(self, image: bytes) -> None:
        """Recovery again changes nothing; everything can be renamed, deleted, filled again."""
        medium = EmulatedMedium(image)
        fs = open_medium(medium)
        assert bytes(medium.now) == image, "recovery run twice changed the image"
        delete_all(fs)
        assert tree_of(fs)[0] == {}
        free = fs.statfs().blocks_free
        file = fs.mknod(ROOT, b"fill", 0o100600, 0, 0, 0).ino
        offset = 0
        try:
            while True:
                offset += fs.write(file, offset, b"f" * PAGE)
        except FsError:
            fs.unlink(ROOT, b"fill")
        assert offset >= (free - 4) * PAGE, "the free blocks cannot be filled"
        left = fs.statfs().blocks_free
        assert free - 1 <= left <= free, (free, left)
        check(bytes(medium.now))


def delete_all(fs: Filesystem, ino: int = ROOT) -> None:
    """Rename and delete every entry."""
    for name, attr, _ in list(fs.readdir(ino, 0)):
        fs.rename(ino, name, ino, name + b".moved")
        if attr.mode >> 12 == 4:
            delete_all(fs, attr.ino)
            fs.rmdir(ino, name + b".moved")
        else:
            fs.unlink(ino, name + b".moved")


def _run(operation: Operation, fs: Filesystem) -> None:
    # An operation that the one before made impossible fails; then nothing may change.
    with contextlib.suppress(FsError):
        operation(fs)


def _remember(history: dict[int, list[bytes]], contents: Contents) -> None:
    for ino, content in contents.items():
        cut = [old[: len(content)] for old in history.get(ino, [b""])]
        history[ino] = [*cut, content]
