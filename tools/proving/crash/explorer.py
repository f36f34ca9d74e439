"""The crash explorer: at every fence of an operation, and at its end, every state is judged.

A workload is a list of steps, each one call of the filesystem; it is run once on an emulated
medium. At each fence of the steps under trial the power is cut in every way it can be. Recovery of
what is left must end in the tree before the step or the one after it, whole by fsck, with no word
that the file did not hold. The recovery is cut at its own fences too, and must end in the same
tree; and once for each distinct tree everything in it is used, and the image filled.

Nothing is sampled as long as the states that differ in lines which recovery, fsck or a reader of
the tree look at are at most STATES_MAX at a point. Beyond that those of few stores and a seeded
sample are taken, and the point does not count as exhaustive.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from proving.crash.medium import Point, Settled, Undecided, Unknown, Watched, next_choices
from proving.crash.tree import (
    Allowed,
    Contents,
    Tree,
    contents_of,
    judge_contents,
    judge_structure,
    open_medium,
    tree_of,
    use,
    without_times,
)
from xipfs.clock import ManualClock
from xipfs.errors import FsError
from xipfs.fs.filesystem import Filesystem
from xipfs.image import layout
from xipfs.memory.emulated import STATES_MAX, EmulatedMedium, choices_beyond

ALL: Final = b"*"
_TICK_NS: Final = 1_000_000_000
_TWINS_MAX: Final = 2048
_SOUND_MAX: Final = 1 << 16


class World:
    """One open image and the descriptors that a workload holds."""

    def __init__(self, medium: EmulatedMedium, ram_pages: int) -> None:
        self.clock = ManualClock()
        self.fs = open_medium(medium, ram_pages=ram_pages, clock=self.clock)
        self.held: list[int] = []

    def ino(self, path: bytes) -> int:
        """Return the inode number of a path; raise FsError."""
        at = layout.ROOT_INO
        for name in path.split(b"/"):
            if name:
                at = self.fs.lookup(at, name).ino
        return at

    def run(self, step: Step) -> None:
        """Make one call; one that an earlier step made impossible fails and changes nothing.

        Time passes with calls that can change something, so that workloads which differ only in
        calls that did nothing come by equal points, and those are judged once.
        """
        self.clock.now_ns += 0 if step.syncs else _TICK_NS
        try:
            step.call(self)
        except (FsError, IndexError):
            self.clock.now_ns -= 0 if step.syncs else _TICK_NS


@dataclass(frozen=True, eq=False)
class Step:
    """One call. ``syncs``: the path whose bytes are durable when it returns, or ALL."""

    name: str
    call: Callable[[World], object]
    syncs: bytes | None = None


CLOSE: Final = Step("close", lambda world: world.fs.close(), ALL)


@dataclass(frozen=True)
class Expected:
    """What recovery may find: trees, words of files, and the mount flag."""

    trees: tuple[Tree, ...]
    allowed: Allowed
    flags: tuple[int, ...] = (layout.STATE_MOUNTED,)
    #: The words if the flag says that the image was closed; None: no others.
    closed: Allowed | None = None

    @functools.cached_property
    def key(self) -> int:
        """A number that is the same for equal expectations."""
        return hash(repr((self.trees, self.allowed, self.flags, self.closed)))


@dataclass
class Tally:
    """What was explored. ``media_states`` counts images, ``runs`` those that anybody told apart."""

    workloads: int = 0
    points: int = 0
    exhaustive_points: int = 0
    repeated_points: int = 0
    media_states: int = 0
    runs: int = 0
    recovery_points: int = 0
    trees_used: int = 0
    violations: list[str] = field(default_factory=list)


@dataclass
class Explorer:
    """Explores workloads on one image; what equal points led to is remembered between them."""

    base: bytes
    ram_pages: int = 2
    seed: int = 1
    states_max: int = STATES_MAX
    #: Whether points of more states are sampled, or left once that many were run.
    sample: bool = True
    tally: Tally = field(default_factory=Tally)
    _judged: set[tuple[int, int]] = field(default_factory=set)
    _sound: dict[int, Tree] = field(default_factory=dict)
    _used: set[int] = field(default_factory=set)
    _twins: dict[tuple[Step, ...], tuple[Tree, Contents]] = field(default_factory=dict)

    def explore(self, name: str, steps: Sequence[Step], first: int = 0) -> None:
        """Run ``steps`` and close; cut from step ``first`` on (0: from the mount on)."""
        self.tally.workloads += 1
        medium = Watched(self.base)
        tree, contents = self._twin(())
        history: Allowed = {ino: [content] for ino, content in contents.items()}
        if first == 0:
            both = (layout.STATE_CLEAN, layout.STATE_MOUNTED)
            self._watch(medium, f"{name}: mount", Expected((tree,), history, both))
        world = World(medium, self.ram_pages)
        for place, step in enumerate([*steps, CLOSE]):
            before = tree
            closing = step is CLOSE
            if not closing:
                tree, contents = self._twin(tuple(steps[: place + 1]))
            flying = {ino: list(olds) for ino, olds in history.items()}
            for ino, content in contents.items():
                flying.setdefault(ino, [b""]).append(content)
            history = _remembered(history, contents, _synced(step, tree))
            trees = (tree,) if before == tree else (before, tree)
            where = f"{name}: {step.name}"
            flags: tuple[int, ...] = (layout.STATE_MOUNTED,)
            if place >= first:
                expected = Expected(trees, flying, flags)
                if closing:
                    flags = (layout.STATE_CLEAN,)
                    expected = Expected(trees, flying, (layout.STATE_MOUNTED, *flags), history)
                self._watch(medium, where, expected)
            world.run(step)
            medium.at_fence = None
            if place >= first:
                self.judge(f"{where}, done", Point.of(medium), Expected((tree,), history, flags))

    def judge(self, where: str, point: Point, expected: Expected, *, nested: bool = False) -> None:
        """Judge every state of a point; note the first violation."""
        tally = self.tally
        key = (point.key(), expected.key)
        if key in self._judged:
            tally.repeated_points += not nested
            return
        self._judged.add(key)
        tally.points += not nested
        tally.recovery_points += nested
        tally.media_states += point.states
        choices: list[int] = []
        for _ in range(self.states_max):
            state = Undecided(point, choices)
            if not self._run(where, state, choices, expected, nested=nested):
                return
            if not next_choices(choices, state.counts):
                tally.exhaustive_points += not nested
                return
        lines = sorted(point.unknown) if self.sample else []
        for chosen in choices_beyond([len(point.unknown[x]) for x in lines], self.seed):
            fixed: Unknown = {
                x: (point.unknown[x][at],) for x, at in zip(lines, chosen, strict=True)
            }
            state = Undecided(Point(point.durable, fixed), [])
            if not self._run(where, state, list(chosen), expected, nested=nested):
                return

    def _run(
        self, where: str, state: Undecided, choices: list[int], expected: Expected, *, nested: bool
    ) -> bool:
        self.tally.runs += 1
        try:
            self._recover(where, state, expected, nested=nested)
        except Exception as error:  # whatever recovery raises is a violation
            what = "cut again in recovery, " if nested else ""
            self.tally.violations.append(f"{where}: {what}{choices}: {error!r}")
            return False
        return True

    def _recover(self, where: str, state: Undecided, expected: Expected, *, nested: bool) -> None:
        cuts: list[Point] = []
        at = layout.STATE_BLOCK << layout.BLOCK_SHIFT
        flag = int.from_bytes(state.load(at, 8), "little")
        assert flag in expected.flags, f"the mount flag is {flag:#x}"
        state.at_fence = lambda: cuts.append(state.cut())
        fs = open_medium(state, ram_pages=1)
        state.at_fence = None
        tree = self._sound_tree(state, fs)
        assert tree in expected.trees, f"a third tree: {tree}"
        allowed = expected.allowed
        if flag == layout.STATE_CLEAN and expected.closed is not None:
            allowed = expected.closed
        contents = judge_contents(state, tree, allowed)
        if nested:
            return
        used = hash(repr((without_times(tree), contents)))
        if used not in self._used:
            self._used.add(used)
            self.tally.trees_used += 1
            use(bytes(state.now), contents)
        flags = (layout.STATE_CLEAN, layout.STATE_MOUNTED)
        again = Expected((tree,), expected.allowed, flags)
        for cut in [*cuts, state.cut()]:
            self.judge(where, cut, again, nested=True)

    def _sound_tree(self, state: Undecided, fs: Filesystem) -> Tree:
        """Return the tree of what recovery left, once fsck has found nothing wrong with it.

        Many states recover to the same image; the answer is remembered if it took no decision.
        """
        image, decided = state.cut().key(), len(state.counts)
        tree = self._sound.get(image)
        if tree is None:
            tree = tree_of(fs)
            judge_structure(state)
            if len(state.counts) == decided and len(self._sound) < _SOUND_MAX:
                self._sound[image] = tree
        return tree

    def _watch(self, medium: Watched, where: str, expected: Expected) -> None:
        def cut() -> None:
            self.judge(f"{where}, fence {medium.fences + 1}", Point.of(medium), expected)

        medium.at_fence = cut

    def _twin(self, steps: tuple[Step, ...]) -> tuple[Tree, Contents]:
        """Return what a program sees after ``steps`` that nothing interrupts."""
        found = self._twins.get(steps)
        if found is None:
            world = World(Settled(self.base), self.ram_pages)
            for step in steps:
                world.run(step)
            tree = tree_of(world.fs)
            if len(self._twins) >= _TWINS_MAX:
                self._twins.clear()
            found = self._twins[steps] = (tree, contents_of(world.fs, tree))
        return found


def judge_states(
    tally: Tally, medium: EmulatedMedium, where: str, judge: Callable[[Undecided], None]
) -> None:
    """Have every state of a cut of ``medium`` now judged; note the first that ``judge`` refuses."""
    point = Point.of(medium)
    tally.points += 1
    tally.media_states += point.states
    choices: list[int] = []
    while True:
        state = Undecided(point, choices)
        tally.runs += 1
        try:
            judge(state)
        except Exception as error:  # whatever it raises is a violation
            tally.violations.append(f"{where}: {choices}: {error!r}")
            return
        if not next_choices(choices, state.counts):
            tally.exhaustive_points += 1
            return


def _synced(step: Step, tree: Tree) -> set[int] | None:
    """Return the inodes whose bytes ``step`` made durable; None for all."""
    if step.syncs == ALL:
        return None
    facts = tree.get(b"/" + step.syncs) if step.syncs else None
    return {int(str(facts[0]))} if facts else set()


def _remembered(history: Allowed, contents: Contents, synced: set[int] | None) -> Allowed:
    """Return what words may be once a step is over; what was cut off never comes back."""
    left: Allowed = {}
    for ino, content in contents.items():
        olds = [old[: len(content)] for old in history.get(ino, [b""])]
        durable = synced is None or ino in synced
        left[ino] = [content] if durable else list(dict.fromkeys([*olds, content]))
    return left
