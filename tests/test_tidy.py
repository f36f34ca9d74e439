"""The house rules that a machine can check: import direction, sizes, no stray words."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "xipfs"
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60

#: What each part may import. A part never imports one that is not listed, directly or lazily.
CORE = {"errors", "units", "clock"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "units": {"errors"},
    "clock": set(),
    "memory": CORE,
    "image": CORE | {"memory"},
    "fs": CORE | {"memory", "image"},
    "mm": CORE | {"memory"},
    "trace": CORE | {"memory"},
    "accounting": CORE | {"memory", "image", "fs", "mm", "trace"},
    "stats": CORE | {"memory", "image", "fs", "mm", "trace", "accounting"},
    "migrate": CORE | {"memory", "image", "fs", "mm", "trace", "accounting", "stats"},
}
ALLOWED["options"] = CORE | {"memory"}
ALLOWED["replay"] = ALLOWED["migrate"] | {"migrate"}
ALLOWED["fuse"] = ALLOWED["migrate"] | {"migrate", "options"}
ALLOWED["daemon"] = ALLOWED["fuse"] | {"fuse"}
ALLOWED["cli"] = ALLOWED["daemon"] | {"daemon", "replay"}

MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            names = [node.module or ""]
            if node.module == "xipfs":
                names = [f"xipfs.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("xipfs."):
                yield name.split(".")[1]


def test_the_package_was_found() -> None:
    assert len(MODULES) > 10


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    if part in ("__init__", "__main__"):
        return
    allowed = ALLOWED[part] | {part, "__version__"}
    wrong = set(imported_parts(ast.parse(path.read_text()))) - allowed
    assert not wrong, f"{part} may not import {sorted(wrong)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_MODULE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_promises_and_no_prints_in_the_core(path: Path) -> None:
    text = path.read_text()
    for word in ("TODO", "FIXME", "XXX", "NotImplementedError"):
        assert word not in text, word
    if part_of(path) != "cli":
        calls = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
        assert not any(isinstance(c.func, ast.Name) and c.func.id == "print" for c in calls)


@pytest.mark.parametrize("part", ["errors", "units", "clock", "memory", "image", "fs", "mm"])
def test_the_core_is_synchronous(part: str) -> None:
    for path in MODULES:
        if part_of(path) == part:
            assert not any(
                isinstance(node, ast.Await | ast.AsyncFunctionDef)
                for node in ast.walk(ast.parse(path.read_text()))
            ), path
