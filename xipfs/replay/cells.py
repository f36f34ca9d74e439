"""One cell of a sweep: a policy and a RAM, replayed; what comes out of it is one line of a table.

A cell is run in whatever process there is, here or on another machine: everything it needs is in
it, and its outcome is plain JSON.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import xipfs
from xipfs.errors import XipfsError
from xipfs.memory.profiles import load_profile
from xipfs.migrate.registry import make_policy
from xipfs.replay.choice import Choice
from xipfs.replay.outcome import outcome, replay_file
from xipfs.replay.simulate import most_hits
from xipfs.replay.trace import Page, first_rows, recorded, touches_of
from xipfs.stats.trace_columns import TraceError
from xipfs.stats.trace_file import TraceReader
from xipfs.units import PAGE_SHIFT

#: Stands for Belady's bound in place of a policy; no policy can be called so.
BOUND: Final = "(bound)"
_DIGEST_BYTES: Final = 1 << 20

Figures = dict[str, Any]
Key = tuple[str, str, int]
"""Policy with its parameters, SHA-256 of its files, RAM in bytes."""


@dataclass(frozen=True)
class Cell:
    """What to replay, and under which choice; sizes in bytes."""

    trace: str
    digest: str
    policy: str
    values: tuple[tuple[str, Any], ...]
    files_sha256: str
    ram_bytes: int
    medium: str | None
    delay_ns: int
    code_sha256: str

    @property
    def name(self) -> str:
        """The policy as one writes it."""
        return ",".join([self.policy, *(f"{key}={value}" for key, value in self.values)])

    @property
    def key(self) -> Key:
        """What tells the cells of one sweep apart."""
        return self.name, self.files_sha256, self.ram_bytes


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file; raise TraceError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_DIGEST_BYTES):
                digest.update(block)
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


@functools.cache
def code_digest() -> str:
    """Return the SHA-256 of xipfs's own code: model, replay and shipped policies decide figures."""
    package = Path(xipfs.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0{digest_of(path)}\n".encode())
    return digest.hexdigest()


def run_cell(cell: Cell) -> Figures:
    """Replay the cell and return its figures; raise XipfsError."""
    if code_digest() != cell.code_sha256:
        raise XipfsError(
            f"this xipfs ({xipfs.__version__}) has other code than the one that began the sweep",
            remedy="every machine of the sweep needs the same xipfs",
        )
    path = Path(cell.trace)
    if digest_of(path) != cell.digest:
        raise TraceError(
            f"{path} is not the trace that the sweep is about",
            remedy="every machine of the sweep needs the same file under the same path",
        )
    if cell.policy == BOUND:
        return bound(path, cell.ram_bytes)
    profile = None if cell.medium is None else load_profile(cell.medium)
    choice = Choice(cell.policy, dict(cell.values), cell.ram_bytes, profile, cell.delay_ns)
    decider = make_policy(cell.policy, cell.values, cell.ram_bytes >> PAGE_SHIFT)
    if decider.digest != cell.files_sha256:
        raise TraceError(
            f"the files of policy {cell.name} are not those that the sweep is about",
            remedy="every machine of the sweep needs the same files under the same paths",
        )
    return _figures(outcome(replay_file(path, choice)))


def bound(path: Path, ram_bytes: int) -> Figures:
    """Return how many touches of the trace can find their page in RAM, whatever the policy."""
    frames = ram_bytes >> PAGE_SHIFT
    with TraceReader(path) as trace:
        recorded(trace, path)
        start = first_rows(trace)["start"]
        resident: list[Page] = [(ino, index) for ino, index, _ in start["resident"][-frames:]]
        pages = [page for _, page in touches_of(trace)]
    return {"touches": len(pages), "touches_in_ram": most_hits(pages, frames, resident)}


_REPLAYED: Final = ("touches", "touches_in_ram")
_VMSTAT: Final = (
    "pgfault", "pgmajfault", "pgpromote_success", "pgdemote_success", "pgmigrate_fail", "pgevict",
)  # fmt: skip
_MIGRATION: Final = ("refaults", "pingpong")
_ESTIMATED: Final = ("read_ns_estimated", "write_ns_estimated")
_FLAGS: Final = ("as_recorded", "exact")
#: What the estimated times are, and of what.
_LABELS: Final = ("modelled", "medium")
_BOOLEAN: Final = (*_FLAGS, "modelled")


def _figures(answer: Mapping[str, Any]) -> Figures:
    vmstat, cost, migration = answer["vmstat"], answer["cost"], answer["migration"]
    if migration["failure"]:
        raise XipfsError(f"the policy failed: {migration['failure']}")
    figures = {name: answer["replay"][name] for name in _REPLAYED}
    figures |= {name: vmstat[name] for name in _VMSTAT}
    figures |= {name: migration[name] for name in _MIGRATION}
    figures |= {name: cost[name] for name in _LABELS}
    figures |= {
        name: value
        for name, value in cost.items()
        if name.startswith("nvram_") or name.endswith(("_estimated", "_seconds"))
    }
    figures |= {name: answer["replay"][name] for name in (*_FLAGS, "ptes_taken")}
    return figures


def wrong_in(policy: str, figures: object, *, estimated: bool) -> str:
    """Return what is wrong with figures that were read from a file; "" if nothing is."""
    if not isinstance(figures, dict):
        return f"its figures are {figures!r:.40}, not an object"
    names: tuple[str, ...] = _REPLAYED
    if policy != BOUND:
        names += (*_VMSTAT, *_MIGRATION, *_FLAGS, *_LABELS, *(_ESTIMATED if estimated else ()))
    for name in names:
        if name not in figures:
            return f"its figures lack {name}"
    for name, value in figures.items():
        if name == "medium":
            right = value is None or isinstance(value, str)
        else:
            right = isinstance(value, bool) if name in _BOOLEAN else _is_figure(value)
        if not right:
            return f"its {name} is {value!r:.40}"
    return ""


def _is_figure(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < 1 << 63  # type: ignore[operator]
