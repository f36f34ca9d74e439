"""What a trace has of each fault, and of each other item of the stream: its columns.

One row is one real fault, or another item (``item`` tells; see trace_items.py), in the order in
which they took effect. Each column carries its unit and meaning as field metadata of the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from xipfs.errors import EXIT_FAILURE, EXIT_USAGE, XipfsError
from xipfs.stats.trace_items import MEANINGS

SCHEMA: Final = 5
#: Rows of one group; readers hold one group at a time.
GROUP_ROWS: Final = 1 << 16
_PREFIX: Final = "xipfs."

#: column: (Arrow type, unit, meaning).
COLUMNS: Final[dict[str, tuple[str, str, str]]] = {
    "time_ns": ("int64", "ns", "tracefs clock (mono) when the fault began"),
    "mm": ("int64", "number", "address space, as numbered by the observer"),
    "pid": ("int32", "number", "process (thread group)"),
    "tid": ("int32", "number", "thread"),
    "comm": ("string", "name", "the process's name"),
    "address": ("uint64", "byte", "faulting virtual address"),
    "ino": ("int64", "number", "inode of the file"),
    "path": (
        "string",
        "name",
        (
            "the file's path below the mount point at that time, by the name it was reached by "
            "last, with (deleted) if that is gone; empty if unknown"
        ),
    ),
    "page": ("int64", "page of 4096 bytes", "page of the file"),
    "access": ("string", "name", "read, write or exec"),
    "mode": ("string", "name", "user, or kernel: it faulted on the program's behalf"),
    "protection": ("int8", "0 or 1", "the page was mapped, but not for this access"),
    "verdict": ("string", "name", "the real kernel's outcome: major, minor, sigbus"),
    "origin": ("string", "name", "trap, populate, gup or untraced"),
    "charged": (
        "string",
        "name",
        (
            "what VM_MIXEDMAP's PTE maps: xip (special, no page counted), pagecache (counted: "
            "refcount, mapcount, rss of files +1), cow (anonymous), sigbus (nothing), or hint "
            "(xipfs's own doing, not charged)"
        ),
    ),
    "major": ("int8", "0 or 1", "VM_MIXEDMAP would have read the page from storage"),
    "extra": ("int32", "fault", "further faults that VM_MIXEDMAP would have taken"),
    "cause": ("string", "name", "move, evict or hint if xipfs itself had taken the page away"),
    "handled": (
        "string",
        "name",
        (
            "what the real kernel did: mapped, cow (a private copy), mkwrite (a shared page made "
            "writable), protection (another access that the PTE refused), or sigbus (nothing)"
        ),
    ),
    "pte_made": (
        "string",
        "name",
        (
            "own: this fault made the kernel's PTE; before: it was there, by an earlier fault, a "
            "fault-around (rows of item around) or since before the recording (item mapped); none: "
            "nothing is mapped; or unknown"
        ),
    ),
    "pte": ("string", "name", "VM_MIXEDMAP's PTE: special (counts no page), counted, or none"),
    "ref_change": (
        "int32",
        "reference",
        (
            "of the refcount of the counted page that VM_MIXEDMAP's PTE maps now; 2 where the "
            "page cache took the page in as well; 0 for a special PTE"
        ),
    ),
    "map_change": ("int32", "PTE", "of that page's mapcount"),
    "rss_file_change": ("int32", "page of 4096 bytes", "of the address space's rss, file pages"),
    "rss_anon_change": ("int32", "page of 4096 bytes", "of its rss, anonymous pages"),
    "item": ("string", "name", "what the row is: fault, or one that metadata key items explains"),
    "pages": ("int64", "page of 4096 bytes", "number of pages; null for a fault"),
    "detail": ("string", "JSON", "further members of an item, explained in the same place"),
}
#: What a fault has; an item has those of trace_items.ITEM_COLUMNS.
FAULT_COLUMNS: Final = [name for name in COLUMNS if name not in ("item", "pages", "detail")]
_DEFAULTS: Final = {"item": "fault", "cause": ""}
_TEXT: Final = {name for name, (kind, _, _) in COLUMNS.items() if kind == "string"}


class TraceError(XipfsError):
    """A trace file cannot be read: as an input it is wrong."""

    exit_code = EXIT_USAGE


class TraceWriteError(TraceError):
    """A trace file cannot be written."""

    exit_code = EXIT_FAILURE


def arrow() -> Any:
    """Return pyarrow with the parts that trace files need."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise TraceError(
            "trace files need pyarrow",
            remedy="in xipfs's source tree: tools/setup, or pip install '.[trace]'",
        ) from None
    return pyarrow


def arrow_schema(metadata: Mapping[str, Any]) -> Any:
    """Return the pyarrow schema of a trace, with metadata of the whole file."""
    pa = arrow()
    fields = [
        pa.field(name, getattr(pa, kind)(), metadata={"unit": unit, "meaning": meaning})
        for name, (kind, unit, meaning) in COLUMNS.items()
    ]
    return pa.schema(fields, metadata=packed(metadata))


def packed(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return metadata as a file has it: keys ``xipfs.*``, values JSON."""
    told = {"schema": SCHEMA, "record": "stream", "items": MEANINGS, **metadata}
    return {_PREFIX + key: json.dumps(value) for key, value in told.items()}


def unpacked(raw: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """Return the metadata of a file; raise ValueError for what we have not written."""
    return {
        key.decode().removeprefix(_PREFIX): json.loads(value)
        for key, value in (raw or {}).items()
        if key.startswith(_PREFIX.encode())
    }


def checked(path: Path, told: dict[str, Any], schema: Any) -> dict[str, Any]:
    """Return a file's metadata if it, of that pyarrow schema, is a trace that we can read.

    Else raise TraceError.
    """
    number = told.get("schema")
    if number != SCHEMA:
        found = "not a trace of xipfs" if number is None else f"of trace schema {number}"
        raise TraceError(
            f"{path} is {found}",
            expected=f"trace schema {SCHEMA}",
            remedy="record it again with this version of xipfs",
        )
    if schema.names != list(COLUMNS):
        raise TraceError(f"{path} has other columns than a trace", expected=", ".join(COLUMNS))
    for found, wanted in zip(schema, arrow_schema({}), strict=True):
        if found.type != wanted.type:
            raise TraceError(
                f"{path} is damaged: its column {found.name} holds {found.type}",
                expected=str(wanted.type),
            )
    return told


def printable(name: bytes) -> str:
    r"""Return a name as text of one line, whatever bytes it has.

    >>> printable(b"a\tb\\\xff")
    'a\\tb\\\\\\xff'
    """
    text = name.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def parse_rows(text: str, columns: Sequence[str]) -> list[list[Any]]:
    """Return the rows of a daemon's tab-separated answer; what it does not tell is null."""
    rows = []
    for line in text.splitlines():
        told = dict(zip(columns, line.split("\t"), strict=True))
        rows.append([_value(name, told.get(name)) for name in COLUMNS])
    return rows


def _value(name: str, word: str | None) -> Any:
    if word is None:
        return _DEFAULTS.get(name)
    if name in _TEXT:
        return word
    return int(word) if word else None
