"""kill -9 of the daemon at random moments under load; ``tools/kill`` does the same for longer."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import killpoints
import kills
import pytest
from conftest import needs
from forked import Forker
from live import Mounts

from xipfs.fs import moving
from xipfs.fs.types import PageKind
from xipfs.fuse import migration
from xipfs.memory import region

pytestmark = [needs("root", "fuse")]


@pytest.mark.timeout(600)  # ten mounts; the default is too short for it on a busy machine
@pytest.mark.parametrize("observe", ["off", pytest.param("tracefs", marks=needs("tracefs"))])
def test_what_was_promised_survives_the_daemon(tmp_path: Path, observe: str) -> None:
    seed = int(os.environ.get("XIPFS_SEED", "7"))
    print(f"replay (the moments differ): XIPFS_SEED={seed} pytest {__file__}")
    seen: list[int] = []
    options = [f"observe={observe}", "ram=128K"]
    outcome = kills.run(tmp_path, 10, seed, options, progress=seen.append)
    assert outcome.kills == len(seen) == 10
    assert outcome.operations > 20


@pytest.mark.parametrize("to", [PageKind.PAGECACHE, PageKind.XIP], ids=lambda to: str(to.value))
def test_a_kill_at_a_step_of_a_migration(tmp_path: Path, to: PageKind) -> None:
    """Every ninth step, and those that a dirty page's way home takes: there the mount got stuck.

    ``tools/kill`` goes through all of them.
    """
    seed = int(os.environ.get("XIPFS_SEED", "7"))
    print(f"replay: XIPFS_SEED={seed} pytest {__file__}")
    seen: list[killpoints.Point] = []
    steps = sorted({4, 5, 6} | set(range(1 + seed % 9, 300, 9)))
    killpoints.run(tmp_path, to, iter(steps), seen.append)
    assert seen[-1].what is None, "the migration has more steps than were looked at"
    assert len(seen) > 8, seen


def awaited(function: ast.AsyncFunctionDef) -> Iterator[str]:
    """The names of what a coroutine waits for."""
    for node in ast.walk(function):
        if isinstance(node, ast.Await):
            assert isinstance(node.value, ast.Call), ast.unparse(node)
            yield ast.unparse(node.value.func)


def methods(module: ModuleType, name: str) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    """The methods of a class, as they are in the source."""
    tree = ast.parse(Path(str(module.__file__)).read_text())
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name: node for node in found.body if isinstance(node, functions)}


def test_all_that_a_migration_waits_for_is_a_kill_point() -> None:
    """Where the mount may end between two steps, because others run meanwhile."""
    coroutines = {
        name: node
        for name, node in methods(migration, "Migrator").items()
        if isinstance(node, ast.AsyncFunctionDef)
    }
    # The two that are not wrapped are a generator, which is, and a loop over it.
    assert set(coroutines) == {*killpoints.MIGRATOR_PARTS, "migrate", "move_all"}
    wrapped = {f"self.{name}" for name in killpoints.MIGRATOR_PARTS}
    wrapped |= {f"self._notifier.{name}" for name in killpoints.NOTIFIER_PARTS}
    waits = {"trio.sleep", "trio.lowlevel.checkpoint"}
    for name, node in coroutines.items():
        assert set(awaited(node)) <= wrapped | waits | {"self._drain"}, name


def test_all_that_changes_the_region_is_a_kill_point() -> None:
    """Writable views stay within the region; what stores through them is wrapped.

    ``_reserved`` is no view of it: which of the file's holes have room changes no byte.
    """
    changing = {
        name
        for name, node in methods(region, "Region").items()
        for each in ast.walk(node)
        if (
            isinstance(each, ast.Subscript)
            and isinstance(each.ctx, ast.Store)
            and ast.unparse(each.value) != "self._reserved"
        )
        or (isinstance(each, ast.Call) and ast.unparse(each.func) == "self._mmap.flush")
    }
    # Opening comes before any migration; a flush is a step though it changes nothing by itself.
    assert changing | {"flush"} == {*killpoints.REGION_CALLS, "__init__"}


def laps_of_a_move() -> set[str]:
    return set(re.findall(r'\.lap\("(\w+)"\)', Path(str(moving.__file__)).read_text()))


def test_every_part_of_a_move_is_timed_by_a_lap_which_is_a_kill_point() -> None:
    """The parts that the statistics tell of, each ended by a lap."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (parts,) = re.findall(r"`move` with its parts (`[^)]+?`);", readme)
    assert laps_of_a_move() == set(re.findall(r"\w+", parts))


def test_every_kill_point_is_met(tmp_path: Path) -> None:
    """What is wrapped is called while pages move: none of it has another name by now."""
    met = set()
    with Forker() as forker:
        for to in (PageKind.PAGECACHE, PageKind.XIP):
            met |= set(killpoints.KillPoints(tmp_path, to, forker).steps())
    around = (*killpoints.MIGRATOR_PARTS, *killpoints.NOTIFIER_PARTS, "drain_for_move")
    wanted = {f"{when} {name}" for name in around for when in ("before", "after")}
    # A sync is the host's disk's, at fsync and unmount.
    wanted |= {f"before {name}" for name in killpoints.REGION_CALLS if name != "sync"}
    wanted |= {f"before lap {part}" for part in laps_of_a_move()}
    assert wanted | {"migrate yields"} <= met


def test_the_guard_ends_with_the_mount(live: Mounts) -> None:
    mnt = live.mount()
    children = Path(f"/proc/{mnt.pid}/task/{mnt.pid}/children").read_text().split()
    (guard,) = [pid for pid in children if "abort" in Path(f"/proc/{pid}/cmdline").read_text()]
    mnt.umount()
    assert not Path(f"/proc/{guard}").exists()


def test_the_judge_knows_what_was_not_promised() -> None:
    old = {"a": b"x" * 32, "b": b"keep"}
    write = ["write", "a", 8, 16, 1, "fsync"]
    new = bytes_after = kills.applied(old, write)["a"]
    assert kills.violation(old, old, write) == ""
    assert kills.violation({"a": new, "b": b"keep"}, old, write) == ""
    torn = {"a": old["a"][:16] + new[16:], "b": b"keep"}
    assert kills.violation(torn, old, write) == ""
    foreign = {"a": bytes_after[:8] + b"????????" + bytes_after[16:], "b": b"keep"}
    assert "foreign bytes at 8" in kills.violation(foreign, old, write)
    assert "b differs" in kills.violation({"a": old["a"], "b": b"lost"}, old, None)
    assert "names ['b']" in kills.violation({"b": b"keep"}, old, ["truncate", "a", 1])
    assert kills.violation({"c": old["a"], "b": b"keep"}, old, ["rename", "a", "c"]) == ""
    assert "beside the file" in kills.violation({"a": new, "b": b""}, old, write)
