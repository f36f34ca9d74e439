"""What a medium costs: latency, bandwidth, endurance; the shipped ones and a user's own.

The region is a file in the host's memory and costs what that costs. A profile says what the same
accesses would have cost on another medium. It is arithmetic on counts, changes nothing that
happens, and every figure made from it is labelled as modelled.

The latency is the time until an access has moved its first unit: what the source moved when it
measured it (a line of 64 bytes, the 512 bytes of NOR's write buffer). Bandwidth counts only for the
bytes beyond, so that no byte's time is counted twice, and one unit takes what the source says. Sums
know only how many accesses and bytes there were: what an access leaves of its unit is filled with
bytes of larger ones, so a sum over sizes on both sides of a unit comes out low.

A user's own profile is a table of a TOML file with the fields of ``media.toml``, named as
``FILE:TABLE``; the path is absolute, since a daemon has no directory of its user's.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from xipfs.errors import UsageError

SHIPPED: Final = Path(__file__).with_name("media.toml")


@dataclass(frozen=True, slots=True)
class Profile:
    """One medium; ``media.toml`` says what each field means."""

    name: str
    description: str
    source: str
    read_latency_ns: int
    read_unit_bytes: int
    write_latency_ns: int
    write_unit_bytes: int
    read_bytes_per_s: int
    write_bytes_per_s: int
    endurance_writes: int

    def read_ns(self, accesses: int, size_bytes: int) -> int:
        """Return the time of ``accesses`` reads of together ``size_bytes``, one after another.

        >>> load_profile("optane").read_ns(1, 4096)
        915
        """
        beyond_bytes = max(size_bytes - accesses * self.read_unit_bytes, 0)
        return accesses * self.read_latency_ns + beyond_bytes * 10**9 // self.read_bytes_per_s

    def write_ns(self, fences: int, size_bytes: int) -> int:
        """Return the time of ``fences`` that wait for together ``size_bytes`` flushed before them.

        >>> load_profile("nor").write_ns(1, 512)
        340000
        """
        beyond_bytes = max(size_bytes - fences * self.write_unit_bytes, 0)
        return fences * self.write_latency_ns + beyond_bytes * 10**9 // self.write_bytes_per_s


def shipped_names() -> list[str]:
    """Return the names of the shipped profiles."""
    return list(_tables(SHIPPED))


def load_profile(name: str) -> Profile:
    """Return the shipped profile ``name``, or table TABLE of a file for ``FILE:TABLE``.

    Raise UsageError for a name, a file or a field that is not right.
    """
    file, colon, table = name.rpartition(":")
    path = Path(file) if colon else SHIPPED
    if not path.is_absolute():
        raise UsageError(f"medium={name}: {file} is not absolute", expected="/path/to/FILE:TABLE")
    tables = _tables(path)
    if table not in tables:
        raise UsageError(
            f"medium={name}: no such medium in {path.name}",
            expected=", ".join(tables) or "a file with a table for each medium",
            remedy="for a medium of your own: medium=FILE:TABLE",
        )
    return _profile(name, tables[table])


def _tables(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"the file of media {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the file of media {path} is not TOML: {error}") from None
    return {name: table for name, table in content.items() if isinstance(table, dict)}


def _profile(name: str, table: dict[str, Any]) -> Profile:
    wanted = {field.name: field.type for field in fields(Profile) if field.name != "name"}
    if table.keys() != wanted.keys():
        differ = ", ".join(sorted(table.keys() ^ wanted.keys()))
        raise UsageError(
            f"medium={name}: missing or unknown fields: {differ}",
            expected="exactly " + ", ".join(wanted),
        )
    for field, kind in wanted.items():
        value = table[field]
        least = 1 if field.endswith("_per_s") else 0
        if kind == "str" and not isinstance(value, str):
            raise UsageError(f"medium={name}: {field} is {value!r}", expected="a text")
        if kind == "int" and (type(value) is not int or value < least):
            raise UsageError(
                f"medium={name}: {field} is {value!r}", expected=f"a whole number from {least}"
            )
    return Profile(name=name, **table)
