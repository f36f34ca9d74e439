"""What ``-o`` understands at mount, in one place: names, values, defaults.

An unknown option is an error, never ignored: a misspelt ``ram=`` would otherwise give figures
for a machine that nobody asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal

from xipfs.errors import UsageError
from xipfs.memory.frames import STRUCT_PAGE_SIZES
from xipfs.memory.profiles import load_profile
from xipfs.units import PAGE_SIZE, format_size, parse_size

Observe = Literal["auto", "tracefs", "requests", "off"]
OBSERVE_MODES: Final[tuple[Observe, ...]] = ("auto", "tracefs", "requests", "off")

#: One line of help for each option, in the order in which they are shown.
HELP: Final[dict[str, str]] = {
    "ro": "mount read-only; nothing is written to the image",
    "rw": "mount read-write (default)",
    "noatime": "reading changes no access time",
    "relatime": "reading changes it if it is older than the last change, or a day old (default)",
    "noexec": "no program of the mount can be run",
    "exec": "programs can be run (default)",
    "sync": "wait for the host's disk whenever something becomes durable, not at fsync only",
    "ram=SIZE": "page-cache RAM of the modelled machine, rounded down to whole pages (default 64M)",
    "dirty_background_ratio=PERCENT": "of ram=: dirty pages above it go home (default 10)",
    "dirty_ratio=PERCENT": "of ram=: above it writers wait for them to go home (default 20)",
    "dirty_expire_ms=MS": "a page dirty for so long goes home in any case (default 30000)",
    "dirty_writeback_ms=MS": "how often that is looked at (default 5000)",
    "struct_page=N": "bytes of one struct page: 32, 56 or 64 (default 64)",
    "medium=NAME|FILE:TABLE": "estimate costs on nor, pcm, optane, dram, cxl (default none)",
    "rules=NAME": "rule set that faults are charged by (default 6.1)",
    "observe=MODE": "auto, tracefs, requests or off (default auto)",
    "hint=PAGES_PER_S": "take so many mapped pages away a second, to see what is touched again",
    "readahead=off|KIB": "kernel read-ahead (default off under tracefs, else the kernel's 128)",
    "policy=NAME,KEY=VALUE": "move pages by a policy of `xipfs policy list` (default off)",
    "dry": "with policy=: count what the policy would move, and move nothing",
    "allow_other": "let other users in (permissions are always checked)",
}

#: Words that say a default, and the field that they take back.
_OPPOSITES: Final = {"rw": "ro", "relatime": "noatime", "exec": "noexec"}


@dataclass(frozen=True)
class MountOptions:
    """The parsed options of one mount; sizes in bytes, read-ahead in KiB (None: by observer)."""

    ro: bool = False
    noatime: bool = False
    noexec: bool = False
    sync: bool = False
    ram_bytes: int = 64 << 20
    dirty_background_ratio: int = 10
    dirty_ratio: int = 20
    dirty_expire_ms: int = 30_000
    dirty_writeback_ms: int = 5000
    struct_page_bytes: int = 64
    medium: str | None = None
    rules: str = "6.1"
    observe: Observe = "auto"
    hint_pages_per_s: int = 0
    readahead_kib: int | None = None
    policy: str = "off"
    policy_values: tuple[tuple[str, int | str], ...] = ()
    dry: bool = False
    allow_other: bool = False

    def describe(self) -> dict[str, object]:
        """Return the options as JSON-ready names and values."""
        shown = {field.name: getattr(self, field.name) for field in fields(self)}
        return shown | {"policy_values": dict(self.policy_values)}


def parse_options(words: Iterable[str]) -> MountOptions:
    """Return the options of ``words``, each a comma-separated list as after ``-o``.

    >>> parse_options(["ram=16M,ro", "policy=threshold,promote=3"]).policy_values
    (('promote', 3),)
    """
    options = MountOptions()
    for word in ",".join(words).split(","):
        if word:
            name, equals, value = word.partition("=")
            options = _apply(options, name, value if equals else None)
    return _check(options)


def _apply(options: MountOptions, name: str, value: str | None) -> MountOptions:
    if name in HELP:
        if value is not None:
            raise UsageError(f"mount option {name!r} takes no value, got {value!r}")
        flag: dict[str, Any] = {_OPPOSITES.get(name, name): name not in _OPPOSITES}
        return replace(options, **flag)
    if value is None and name in _VALUED:
        raise UsageError(f"mount option {name!r} has no value", expected=f"{name}=VALUE")
    if name not in _VALUED and options.policy != "off" and value is not None:
        # The policy itself refuses a parameter that it does not have.
        values = dict(options.policy_values) | {name: policy_value(name, value)}
        return replace(options, policy_values=tuple(values.items()))
    if name not in _VALUED:
        raise UsageError(
            f"unknown mount option {name!r}", expected="one of " + ", ".join(sorted(HELP))
        )
    assert value is not None
    if name == "ram":
        ram = parse_size(value)
        if ram < PAGE_SIZE:
            raise UsageError(f"ram={value} is less than one page", expected=f"{PAGE_SIZE} or more")
        return replace(options, ram_bytes=ram // PAGE_SIZE * PAGE_SIZE)
    if name.startswith("dirty_"):
        changed: dict[str, Any] = {name: _integer(name, value, int("background" not in name))}
        return replace(options, **changed)
    if name == "struct_page":
        return replace(options, struct_page_bytes=_integer(name, value, 1))
    if name == "observe":
        if value not in OBSERVE_MODES:
            raise UsageError(f"observe={value}", expected="one of " + ", ".join(OBSERVE_MODES))
        return replace(options, observe=value)
    if name == "readahead":
        kib = 0 if value == "off" else _integer(name, value, 0)
        return replace(options, readahead_kib=kib)
    if name == "medium":
        load_profile(value)  # a mistake is told now, not when the first figures are asked for
        return replace(options, medium=value)
    if name == "hint":
        return replace(options, hint_pages_per_s=_integer(name, value, 0))
    if name == "policy":
        if value.endswith(".py") and not value.startswith("/"):
            raise UsageError(f"policy={value} is not absolute", expected="policy=/PATH/FILE.py")
        return replace(options, policy=value)
    return replace(options, rules=value)


def policy_value(name: str, value: str) -> int | str:
    """Return the value of a policy's parameter: a whole number if it is one, else text."""
    if not value:
        raise UsageError(f"{name}= has no value", expected=f"{name}=VALUE")
    if value.isascii() and value.isdigit():
        return int(value)
    return value


#: The names that HELP gives a value.
_VALUED: Final = frozenset(shown.partition("=")[0] for shown in HELP if "=" in shown)


def _integer(name: str, value: str, least: int) -> int:
    if not value.isascii() or not value.isdigit() or int(value) < least:
        raise UsageError(f"{name}={value}", expected=f"a whole number of {least} or more")
    return int(value)


def _check(options: MountOptions) -> MountOptions:
    if options.struct_page_bytes not in STRUCT_PAGE_SIZES:
        sizes = ", ".join(map(str, STRUCT_PAGE_SIZES))
        raise UsageError(f"struct_page={options.struct_page_bytes}", expected=f"one of {sizes}")
    if not options.dirty_background_ratio < options.dirty_ratio <= 100:
        raise UsageError(
            f"dirty_background_ratio={options.dirty_background_ratio} with "
            f"dirty_ratio={options.dirty_ratio}",
            expected="percent of RAM, the first less than the second",
        )
    if options.hint_pages_per_s and options.observe in ("requests", "off"):
        raise UsageError(
            f"hint= with observe={options.observe}", expected="observe=tracefs, which sees faults"
        )
    if options.dry and options.policy == "off":
        raise UsageError("dry without a policy", expected="policy=NAME,dry")
    if options.ram_bytes > 1 << 40:
        raise UsageError(f"ram={format_size(options.ram_bytes)}", expected="at most 1T")
    return options
