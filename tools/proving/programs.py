"""Random programs in the words of touch.c: whatever a seed gives runs without an error of its own.

The generator keeps, page by page, what a program may touch, so that every access is allowed and
every call succeeds; what the kernel makes of it is left to the kernel. Pauses are where the tester
looks, and acts from outside: other processes' truncations, migrations.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

#: Pages of each file that programs map.
FILE_PAGES = 37
MAX_MAPPINGS = 10
ANY, READ_ONLY, NO_ACCESS, GONE = "w", "r", "-", "."


@dataclass
class Mapping:
    """What the program may do to each page of one mapping, a letter a page."""

    pages: list[str]
    may_write: bool
    whole: bool = True
    """One mapping to the kernel still: mremap takes it."""
    dontfork: set[int] = field(default_factory=set)
    locked: set[int] = field(default_factory=set)


class Program:
    """Grows a program by random commands; ``words`` is its command line.

    ``brackets`` are the numbers of the pauses after which the program counts its own faults, with
    getrusage(2), until the next one.

    ``binary`` is a program on the mount that it may run, "" for none. ``direct`` is a file to be
    read with O_DIRECT; one who has it is unruly: it has threads too, that fault side by side.
    """

    def __init__(
        self, rng: random.Random, files: list[str], binary: str = "", direct: str = ""
    ) -> None:
        self._rng = rng
        self._files = files
        self._binary = binary
        self._direct = direct
        self._mappings: list[Mapping] = []
        self._current = -1
        self._depth = 0
        self.words: list[str] = []
        self.pauses = 0
        self.brackets: set[int] = set()

    def grow(self, commands: int) -> Program:
        """Add about ``commands`` commands and a pause at the end.

        Some replace themselves half way by a new program, which starts with no mapping.
        """
        if self._binary and self._rng.random() < 0.2:
            self._grow_by(commands // 2)
            self._say("become", self._binary)
            self._mappings = []
        self._grow_by(commands)
        return self

    def _grow_by(self, commands: int) -> None:
        self._map()
        for _ in range(commands):
            self._step()
        self._pause()

    def _step(self) -> None:
        steps = (
            (2, self._map), (9, self._read), (9, self._write), (2, self._unmap),
            (3, self._protect), (2, self._remap), (6, self._advise), (2, self._lock),
            (2, self._fork), (3, self._use), (3, self._pause), (1, self._exec),
            (2, self._bracket),
            *(((4, self._threads), (3, self._read_directly)) if self._direct else ()),
        )  # fmt: skip
        self._choose(steps)

    def _choose(self, steps: tuple[tuple[int, Callable[[], None]], ...]) -> None:
        self._rng.choices([step for _, step in steps], [weight for weight, _ in steps])[0]()

    def _say(self, *words: object) -> None:
        self.words += map(str, words)

    def _run_of(self, allowed: str) -> tuple[int, int] | None:
        """Return a random range of pages of the current mapping that are all ``allowed``."""
        pages = self._mappings[self._current].pages
        starts = [at for at, letter in enumerate(pages) if letter in allowed]
        if not starts:
            return None
        first = last = self._rng.choice(starts)
        longest = self._rng.choice((1, 3, 9, len(pages)))
        while last + 1 < len(pages) and pages[last + 1] in allowed and last - first + 1 < longest:
            last += 1
        return first, last

    def _map(self) -> None:
        if len(self._mappings) == MAX_MAPPINGS:
            return
        rng = self._rng
        private, writable = rng.random() < 0.6, rng.random() < 0.7
        kind, prot = "private" if private else "shared", "rw" if writable else "r"
        name = rng.choice(self._files)
        pages = FILE_PAGES
        if rng.random() < 0.3:
            offset = rng.randrange(FILE_PAGES)
            pages = rng.randint(1, FILE_PAGES - offset)
            self._say("part", name, kind, prot, offset, pages)
        else:
            self._say("map", name, kind, prot, *(["populate"] if rng.random() < 0.2 else []))
        letter = ANY if writable else READ_ONLY
        self._mappings.append(Mapping([letter] * pages, private or writable))
        self._current = len(self._mappings) - 1

    def _use(self) -> None:
        self._current = self._rng.randrange(len(self._mappings))
        self._say("use", self._current)

    def _read(self) -> None:
        if run := self._run_of(ANY + READ_ONLY):
            self._say("read", f"{run[0]}-{run[1]}")

    def _write(self) -> None:
        if run := self._run_of(ANY):
            self._say("write", f"{run[0]}-{run[1]}")

    def _change(self, run: tuple[int, int], letter: str) -> None:
        mapping = self._mappings[self._current]
        mapping.whole = False
        mapping.pages[run[0] : run[1] + 1] = [letter] * (run[1] - run[0] + 1)

    def _unmap(self) -> None:
        if run := self._run_of(ANY + READ_ONLY + NO_ACCESS):
            self._say("unmap", f"{run[0]}-{run[1]}")
            self._change(run, GONE)

    def _protect(self) -> None:
        mapping = self._mappings[self._current]
        if run := self._run_of(ANY + READ_ONLY + NO_ACCESS):
            prot = self._rng.choice(("rw", "r", "none") if mapping.may_write else ("r", "none"))
            self._say("protect", f"{run[0]}-{run[1]}", prot)
            self._change(run, {"rw": ANY, "r": READ_ONLY, "none": NO_ACCESS}[prot])

    def _remap(self) -> None:
        mapping = self._mappings[self._current]
        pages = self._rng.randint(1, len(mapping.pages))
        if mapping.whole:
            self._say("remap", pages)
            del mapping.pages[pages:]

    def _advise(self) -> None:
        self._advise_one_of(
            ("dontneed", "dontneed", "random", "populate_read", "populate_write", "dontfork")
        )

    def _advise_one_of(self, choices: tuple[str, ...]) -> None:
        advice = self._rng.choice(choices)
        allowed = ANY if advice == "populate_write" else ANY + READ_ONLY
        mapping = self._mappings[self._current]
        run = self._run_of(allowed)
        if run and not (advice == "dontneed" and mapping.locked & set(range(run[0], run[1] + 1))):
            self._say("advise", f"{run[0]}-{run[1]}", advice)
            if advice in ("random", "dontfork"):
                mapping.whole = False
            if advice == "dontfork":
                mapping.dontfork |= set(range(run[0], run[1] + 1))

    def _lock(self) -> None:
        if run := self._run_of(ANY + READ_ONLY):
            self._say("lock", f"{run[0]}-{run[1]}")
            mapping = self._mappings[self._current]
            mapping.whole = False
            mapping.locked |= set(range(run[0], run[1] + 1))

    def _fork(self) -> None:
        """A child does some of the same; what it does to its mappings stays its own."""
        if self._depth == 2:
            return
        kept, current = self._mappings, self._current
        self._mappings = [
            replace(
                mapping,
                pages=[GONE if at in mapping.dontfork else p for at, p in enumerate(mapping.pages)],
                dontfork=set(),
            )
            for mapping in kept
        ]
        self._depth += 1
        self._say("fork", "{")
        for _ in range(self._rng.randint(1, 6)):
            self._step()
        self._say("}")
        self._depth -= 1
        self._mappings, self._current = kept, current

    def _bracket(self) -> None:
        if self._depth:
            return
        # Whatever of the program itself that takes has been touched when it counts.
        self._read()
        self._write()
        self._say("mark", "rehearsal", "mark", "rehearsal")
        self.brackets.add(self.pauses)
        self._pause()
        self._say("mark", "before")
        for _ in range(self._rng.randint(1, 4)):
            self._choose(((1, self._read), (1, self._write)))
        self._say("mark", "bracket")
        self._pause()

    def _exec(self) -> None:
        """A child runs a program from the mount: its mappings are exec's, and it ends at once."""
        if self._binary:
            self._say("exec", self._binary)

    def _threads(self) -> None:
        """One to three threads beside the first fault on the same pages, drop and populate them."""
        steps = ((6, self._read), (6, self._write), (3, self._drop_or_populate))
        for _ in range(self._rng.randint(1, 3)):
            self._say("thread", "{")
            for _ in range(self._rng.randint(1, 6)):
                self._choose(steps)
            self._say("}")
        for _ in range(self._rng.randint(1, 6)):
            self._choose(steps)
        self._say("join")

    def _drop_or_populate(self) -> None:
        self._advise_one_of(("dontneed", "dontneed", "populate_read", "populate_write"))

    def _read_directly(self) -> None:
        if run := self._run_of(ANY):
            self._say("direct", f"{run[0]}-{run[1]}", self._direct)

    def _pause(self) -> None:
        self._say("pause")
        self.pauses += 1
