"""Mutants: the filesystem with one flush, one fence or one order of stores taken out.

Every call of flush and fence below xipfs/image and xipfs/fs is found in the sources; each mutant
is the function it stands in, compiled without it. Two more kinds are found in the journal: commit
with two neighbouring steps that store swapped, and loops that store walked backwards. A mutant is
caught if the explorer finds a violation that is not there without it; the workloads tried are those
that come by the changed line.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import itertools
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Final

from proving.crash.explorer import CLOSE, Explorer, World
from proving.crash.making import explore_mkfs
from proving.crash.medium import Settled
from proving.crash.repairing import explore_repairs
from proving.crash.workloads import base_image, workloads

ROOT: Final = Path(__file__).resolve().parents[3]
SEARCHED: Final = ("xipfs/image", "xipfs/fs")
#: Workloads of two operations that are looked at for one that comes by a changed line.
_TRACED_MAX: Final = 2000
#: A violation shows in few states or in none.
_QUICK_STATES: Final = 200
#: What only fsck comes by.
_FSCK: Final = ("xipfs.image.repair", "xipfs.image.mending")
#: Mutants that nothing can catch; DESIGN.md argues why, under these names.
REDUNDANT: Final = (
    "image/journal.py commit: store 1 and store 2 swapped",
    "image/journal.py _apply: stores in reverse",
)


@dataclass(frozen=True)
class Mutant:
    """A function compiled with one change at ``line``; ``is_call``: a flush or fence taken out."""

    name: str
    module: str
    qualname: str
    line: int
    is_call: bool
    code: CodeType

    @property
    def redundant(self) -> bool:
        """Whether it is argued that this change loses nothing."""
        return self.name in REDUNDANT

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Run with the change."""
        function = self._function()
        original = function.__code__
        function.__code__ = self.code
        try:
            yield
        finally:
            function.__code__ = original

    def original(self) -> CodeType:
        """Return the function's code as it is in the source."""
        return self._function().__code__

    def _function(self) -> FunctionType:
        found: object = importlib.import_module(self.module)
        for name in self.qualname.split("."):
            found = getattr(found, name)
        function = getattr(found, "__wrapped__", found)
        assert isinstance(function, FunctionType), self.name
        return function


def all_mutants() -> list[Mutant]:
    """Return every mutant, in the order of the sources."""
    found: list[Mutant] = []
    for directory in SEARCHED:
        for path in sorted((ROOT / directory).glob("*.py")):
            found += _of_file(path)
    return found


def _of_file(path: Path) -> Iterator[Mutant]:
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    for qualname, function in _functions(tree):
        where = f"{path.relative_to(ROOT / 'xipfs').as_posix()} {function.name}"
        counts = {"flush": 0, "fence": 0}
        for body, at in _statements(function):
            call = _medium_call(body[at])
            if call not in counts:
                continue
            counts[call] += 1
            line, kept = body[at].lineno, body[at]
            body[at] = ast.copy_location(ast.Pass(), kept)
            title = f"{where}: without {call} {counts[call]}"
            yield _compiled(title, path, tree, qualname, line)
            body[at] = kept
        if path.name == "journal.py":
            yield from _orders(path, tree, qualname, function, where)


def _orders(
    path: Path, tree: ast.Module, qualname: str, function: ast.FunctionDef, where: str
) -> Iterator[Mutant]:
    """Yield the mutants in which neighbouring stores of one function change places."""
    stores = [at for at, step in enumerate(function.body) if _stores(step, tree)]
    body = function.body
    for number, (first, second) in enumerate(itertools.pairwise(stores), 1):
        body[first], body[second] = body[second], body[first]
        title = f"{where}: store {number} and store {number + 1} swapped"
        yield _compiled(title, path, tree, qualname, body[first].lineno)
        body[first], body[second] = body[second], body[first]
    for at in stores:
        loop = body[at]
        if isinstance(loop, ast.For):
            kept = loop.iter
            loop.iter = ast.Call(ast.Name("reversed", ast.Load()), [kept], [])
            ast.copy_location(loop.iter, kept)
            ast.fix_missing_locations(loop)
            yield _compiled(f"{where}: stores in reverse", path, tree, qualname, loop.lineno)
            loop.iter = kept


def _stores(step: ast.stmt, tree: ast.Module) -> bool:
    """Whether a statement stores to the medium, itself or through a method of its module."""
    for node in ast.walk(step):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("store", "store_word"):
                return True
            called = [f for _, f in _functions(tree) if f.name == node.func.attr]
            if any(_stores(inner, tree) for f in called for inner in f.body):
                return True
    return False


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.{inner.name}", inner


def _statements(function: ast.FunctionDef) -> Iterator[tuple[list[ast.stmt], int]]:
    """Yield every statement, as its list and its place there, in the order of the source."""
    todo: list[list[ast.stmt]] = [function.body]
    while todo:
        body = todo.pop(0)
        for at, statement in enumerate(body):
            yield body, at
            inner = [getattr(statement, name, None) for name in ("body", "orelse", "finalbody")]
            inner += [handler.body for handler in getattr(statement, "handlers", ())]
            todo += [part for part in inner if part]


def _medium_call(statement: ast.stmt) -> str:
    """Return the name of the method that the statement calls, "" if it is not a call alone."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        function = statement.value.func
        if isinstance(function, ast.Attribute):
            return function.attr
    return ""


def calls_in_sources() -> int:
    """Return how often flush and fence are called in the searched sources, counted as text."""
    count = 0
    for directory in SEARCHED:
        for path in (ROOT / directory).glob("*.py"):
            text = path.read_text(encoding="utf-8")
            count += text.count(".flush(") + text.count(".fence(")
    return count


def _compiled(name: str, path: Path, tree: ast.Module, qualname: str, line: int) -> Mutant:
    module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    todo = [compile(tree, str(path), "exec")]
    while todo:
        code = todo.pop()
        if code.co_qualname == qualname:
            is_call = ": without " in name
            return Mutant(name, module, qualname, line, is_call, code)
        todo += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    raise AssertionError(f"{qualname} is not in {path}")


class Tracing(Settled):
    """A medium that notes which lines of which functions flush and fence."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.passed: set[tuple[CodeType, int]] = set()

    def flush(self, offset: int, size: int) -> None:
        """Note the caller."""
        super().flush(offset, size)
        self._note(sys._getframe(1))

    def fence(self) -> None:
        """Note the caller."""
        self._note(sys._getframe(1))

    def _note(self, frame: FrameType) -> None:
        self.passed.add((frame.f_code, frame.f_lineno))


class Hunt:
    """Tries to catch mutants with workloads drawn by ``seed``, those of one operation first."""

    def __init__(self, seed: int, *, tries: int = 400) -> None:
        self._tries = tries
        self._base = base_image()
        double = workloads(2)
        random.Random(seed).shuffle(double)
        self._order = [*workloads(1), *double[:_TRACED_MAX]]
        self._passed: list[set[tuple[CodeType, int]]] = []

    def caught_by(self, mutant: Mutant) -> str | None:
        """Return the first violation, of the first workload that shows one, or None."""
        original = mutant.original()
        explorer = Explorer(self._base, states_max=_QUICK_STATES, sample=False)
        with mutant.applied():
            whole = explore_mkfs()
            if mutant.module in _FSCK:
                whole = explore_repairs(self._base)
        if whole.violations or mutant.module in _FSCK:
            return next(iter(whole.violations), None)
        tried = 0
        for place, workload in enumerate(self._order):
            passed = self._passes(place)
            if not any(
                code is original and (line == mutant.line or not mutant.is_call)
                for code, line in passed
            ):
                continue
            with mutant.applied():
                explorer.explore(workload.name, *workload.steps())
            for violation in explorer.tally.violations:
                return violation
            tried += 1
            if tried == self._tries:
                break
        assert tried, f"no workload comes by {mutant.name}"
        return None

    def _passes(self, place: int) -> set[tuple[CodeType, int]]:
        """Return what the last operation of a workload, and the close after it, come by."""
        while len(self._passed) <= place:
            steps, first = self._order[len(self._passed)].steps()
            medium = Tracing(self._base)
            world = World(medium, ram_pages=2)
            for step in steps[:first]:
                world.run(step)
            medium.passed.clear()
            for step in [*steps[first:], CLOSE]:
                world.run(step)
            self._passed.append(medium.passed)
        return self._passed[place]
