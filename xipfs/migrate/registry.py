"""Finding policies: the shipped ones, entry points of the group ``xipfs.policies``, or a file.

What makes a policy is told in ``migrate/policy.py``. A file's policy is what it calls ``POLICY``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import runpy
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final

from xipfs.errors import UsageError
from xipfs.migrate.decider import COMMON, Decider
from xipfs.migrate.policies.belady import Belady
from xipfs.migrate.policies.clock import Clock
from xipfs.migrate.policies.fifo import Fifo
from xipfs.migrate.policies.off import Off
from xipfs.migrate.policies.profile import Profile
from xipfs.migrate.policies.threshold import Threshold
from xipfs.migrate.policies.tpp import Tpp
from xipfs.migrate.policies.write_hot import WriteHot
from xipfs.migrate.policy import DONE, TOUCHES, Policy

BUILT_IN: Final[dict[str, Any]] = {
    "off": Off,
    "fifo": Fifo,
    "threshold": Threshold,
    "clock": Clock,
    "tpp": Tpp,
    "write-hot": WriteHot,
    "profile": Profile,
}

#: Policies that know the future, which only a replay does.
REPLAY_ONLY: Final[dict[str, Any]] = {"belady": Belady}


#: Characters of a policy's error that are told.
_SAID_MAX: Final = 500


class PolicyTimeout(BaseException):
    """Raised in a policy that does not return; no Exception, which it might catch and go on."""


def said_by(error: BaseException) -> str:
    """Return what a policy's error says of itself, in letters that every reader can take."""
    try:
        said = repr(error)
    except Exception:  # its text is the policy's code too
        said = type(error).__name__
    return said[:_SAID_MAX].encode(errors="backslashreplace").decode()


Value = int | str
"""A parameter's value: most are whole numbers."""


def policies() -> dict[str, str]:
    """Return the names of the policies that need no file, each with where it comes from."""
    found = {entry.name: entry.value for entry in entry_points(group="xipfs.policies")}
    shipped = dict.fromkeys(BUILT_IN, "built in") | dict.fromkeys(REPLAY_ONLY, "replays only")
    return shipped | {name: value for name, value in sorted(found.items()) if name not in shipped}


def find_policy(name: str) -> Any:
    """Return the policy class of ``name``: a listed one, or the path of a Python file."""
    if name in BUILT_IN or name in REPLAY_ONLY:
        return (BUILT_IN | REPLAY_ONLY)[name]
    try:
        if name.endswith(".py"):
            found = runpy.run_path(name).get("POLICY")
        else:
            entries = list(entry_points(group="xipfs.policies", name=name))
            found = entries[0].load() if entries else None
    except KeyboardInterrupt:
        raise  # Ctrl-C ends a command; on a mount it is the file's own, and steering.py's matter
    except BaseException as error:
        raise UsageError(f"policy {name} cannot be loaded: {said_by(error)}") from None
    if found is None:
        raise UsageError(
            f"policy={name}",
            expected=f"one of {', '.join(policies())}, or a .py file that defines POLICY",
        )
    if not dataclasses.is_dataclass(found) or not callable(getattr(found, "plan", None)):
        raise UsageError(f"policy {name}", expected="a dataclass with a method plan(signal, seen)")
    signals = getattr(found, "SIGNALS", None)
    if not isinstance(signals, frozenset) or not signals <= TOUCHES | DONE:
        raise UsageError(
            f"policy {name} has SIGNALS {signals!r}",
            expected="a frozenset of " + ", ".join(sorted(TOUCHES | DONE)),
        )
    return found


def about(policy: Any) -> str:
    """Return what the text at the head of the policy's file (or its class) says, without markup."""
    module = sys.modules.get(policy.__module__)
    # A file that was run by its path is no module any more; its functions still know its text.
    text = module.__doc__ if module else policy.plan.__globals__.get("__doc__")
    return (text or policy.__doc__ or "").strip().replace("``", "")


def digest_of_files(name: str, policy: Any, values: Iterable[object]) -> str:
    """Return the SHA-256 of the files that decide what a policy does; "" if xipfs alone does.

    These are the policy's own, unless it is a shipped one, and those that its parameters name.
    """
    paths = [value for value in values if isinstance(value, str) and Path(value).is_file()]
    if policy not in (BUILT_IN | REPLAY_ONLY).values():
        # A file that was run by its path is no module that could tell where its class is from.
        paths.insert(0, name if name.endswith(".py") else inspect.getfile(policy))
    if not paths:
        return ""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return digest.hexdigest()


def parameters(policy: Any) -> dict[str, Value | None]:
    """Return the parameters of a policy class with their defaults (None: it must be given)."""
    own = {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(policy)
        if field.init
    }
    return COMMON | own


def make_policy(name: str, values: Iterable[tuple[str, Value]], ram_pages: int) -> Decider:
    """Return a policy with these parameters, at work for a RAM of ``ram_pages`` frames."""
    policy, given = find_policy(name), dict(values)
    known = parameters(policy)
    for key in given:
        if key not in known:
            raise UsageError(
                f"policy {name} has no parameter {key!r}", expected="one of " + ", ".join(known)
            )
    for key, default in known.items():
        if default is None and key not in given:
            raise UsageError(f"policy={name} without {key}=", expected=f"{key}=VALUE")
    fields = {field.name: field for field in dataclasses.fields(policy)}
    for key, value in given.items():
        text = key in fields and fields[key].type in (str, "str")
        least = 0 if key in COMMON else 1
        if not text and value != known[key] and (not isinstance(value, int) or value < least):
            raise UsageError(f"{key}={value}", expected=f"a whole number of {least} or more")
        if text:
            given[key] = str(value)
    for key, shown in (("policy", name), *given.items()):
        if isinstance(shown, str) and not shown.isprintable():
            raise UsageError(f"{key}={shown!r}", expected="printable characters")
    values_of = {**known, **given}
    made: Policy = policy(**{key: values_of[key] for key, field in fields.items() if field.init})
    digest = digest_of_files(name, policy, values_of.values())
    return Decider(name, made, values_of, ram_pages, digest)
