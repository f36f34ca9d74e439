"""Finding policies: the built-in ones, entry points of the group ``xipfs.policies``, or a file.

A policy is a dataclass whose fields are its parameters (whole numbers) and whose ``plan`` turns
charges into moves. A file's policy is what it calls ``POLICY``.
"""

from __future__ import annotations

import dataclasses
import runpy
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import Any, Final, Protocol

from xipfs.accounting.charges import Charge
from xipfs.errors import UsageError
from xipfs.migrate.engine import Move
from xipfs.migrate.policies.fifo import Fifo
from xipfs.migrate.policies.threshold import Threshold
from xipfs.migrate.policies.tpp import Tpp
from xipfs.migrate.policies.write_hot import WriteHot


class Policy(Protocol):
    """Decides on moves; sees charges only, and their time stamps are its only clock."""

    def plan(self, charges: Iterable[Charge]) -> list[Move]:
        """Return the moves that these charges, in time order, have earned."""


BUILT_IN: Final[dict[str, Callable[..., Policy]]] = {
    "fifo": Fifo,
    "threshold": Threshold,
    "tpp": Tpp,
    "write-hot": WriteHot,
}


def policies() -> dict[str, str]:
    """Return the names of the policies that need no file, each with where it comes from."""
    found = {entry.name: entry.value for entry in entry_points(group="xipfs.policies")}
    return found | dict.fromkeys(BUILT_IN, "built in")


def find_policy(name: str) -> Any:
    """Return the policy class of ``name``: a listed one, or the path of a Python file."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    try:
        if name.endswith(".py"):
            found = runpy.run_path(name).get("POLICY")
        else:
            entries = list(entry_points(group="xipfs.policies", name=name))
            found = entries[0].load() if entries else None
    except Exception as error:
        raise UsageError(f"policy {name} cannot be loaded: {error!r}") from None
    if found is None:
        names = ", ".join(["off", *sorted(policies())])
        raise UsageError(
            f"policy={name}", expected=f"one of {names}, or a .py file that defines POLICY"
        )
    if not dataclasses.is_dataclass(found) or not callable(getattr(found, "plan", None)):
        raise UsageError(f"policy {name}", expected="a dataclass with a method plan(charges)")
    return found


def parameters(policy: Any) -> dict[str, int | None]:
    """Return the parameters of a policy class with their defaults (None: it must be given)."""
    return {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(policy)
        if field.init
    }


def make_policy(name: str, values: Iterable[tuple[str, int]]) -> Policy:
    """Return a new policy with these parameters."""
    policy, given = find_policy(name), dict(values)
    known = parameters(policy)
    for key in given:
        if key not in known:
            raise UsageError(
                f"policy {name} has no parameter {key!r}",
                expected="one of " + ", ".join(known) if known else "none",
            )
    for key, default in known.items():
        if default is None and key not in given:
            raise UsageError(f"policy={name} without {key}=N", expected=f"{key}=N")
    made: Policy = policy(**given)
    return made
