"""The trace file: a recorded stream in Parquet, described by the file itself.

One row is one real fault, or another item of the stream (``item`` tells; see trace_items.py), in
the order in which they took effect. Each column carries its unit and meaning as Parquet field
metadata. The file's own metadata (keys ``xipfs.*``, JSON) tells schema version, the meaning of
each item, host, mount and losses. Rows are written in groups, so that memory stays bounded.
Parquet's footer is written last: a file without it was cut off while it was recorded, and is
refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Final

from xipfs.errors import UsageError, XipfsError
from xipfs.stats.trace_items import MEANINGS

SCHEMA: Final = 3
GROUP_ROWS: Final = 1 << 16
_MAGIC: Final = b"PAR1"
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
            "own: this fault made the kernel's PTE; before: it was there, by an earlier fault or "
            "by a fault-around (rows of item around); or unknown"
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
    """A trace file cannot be read or written."""


def _pyarrow() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise TraceError(
            "trace files need pyarrow", remedy="install it with: pip install 'xipfs[trace]'"
        ) from None
    return pyarrow, pyarrow.parquet


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


class TraceWriter:
    """Appends faults to a new file, readable by its owner only."""

    def __init__(self, path: Path, *, force: bool = False) -> None:
        arrow, parquet = _pyarrow()
        self._arrow = arrow
        # Always a new file: one that is there may be another user's, or lead elsewhere.
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_EXCL
        try:
            if force:
                _remove(path)
            self._file = open(os.open(path, flags, 0o600), "wb")  # noqa: SIM115
        except FileExistsError:
            raise UsageError(f"{path} exists", remedy="--force overwrites it") from None
        except OSError as error:
            raise TraceError(f"{path} cannot be written: {error.strerror}") from None
        os.fchmod(self._file.fileno(), 0o600)
        self._schema = arrow.schema(
            [
                arrow.field(
                    name,
                    getattr(arrow, kind)(),
                    metadata={"unit": unit, "meaning": meaning},
                )
                for name, (kind, unit, meaning) in COLUMNS.items()
            ]
        )
        self._writer = parquet.ParquetWriter(self._file, self._schema)
        self._rows: list[list[Any]] = []
        self.rows = 0

    def append(self, rows: list[list[Any]]) -> None:
        """Add rows, each in the order of ``COLUMNS``."""
        self._rows += rows
        self.rows += len(rows)
        if len(self._rows) >= GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            columns = [
                self._arrow.array(values, type=field.type)
                for values, field in zip(zip(*self._rows, strict=True), self._schema, strict=True)
            ]
            self._writer.write_table(self._arrow.Table.from_arrays(columns, schema=self._schema))
            self._rows = []

    def close(self, metadata: Mapping[str, Any]) -> None:
        """Write what is left, then ``metadata`` and the footer, and wait for the storage."""
        self._flush()
        told = {"schema": SCHEMA, "record": "stream", "items": MEANINGS, **metadata}
        self._writer.add_key_value_metadata(
            {_PREFIX + key: json.dumps(value) for key, value in told.items()}
        )
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class TraceReader:
    """An open trace file: ``metadata``, ``rows`` (their number) and ``batches``."""

    def __init__(self, path: Path) -> None:
        arrow, parquet = _pyarrow()
        _check_magic(path)
        try:
            self._file = parquet.ParquetFile(path)
        except (arrow.ArrowInvalid, OSError) as error:
            raise TraceError(f"{path} is damaged: {error}") from None
        raw = self._file.metadata.metadata or {}
        self.metadata: dict[str, Any] = {
            key.decode().removeprefix(_PREFIX): json.loads(value)
            for key, value in raw.items()
            if key.startswith(_PREFIX.encode())
        }
        schema = self.metadata.get("schema")
        if schema != SCHEMA:
            found = "not a trace of xipfs" if schema is None else f"of trace schema {schema}"
            raise TraceError(
                f"{path} is {found}",
                expected=f"trace schema {SCHEMA}",
                remedy="record it again with this version of xipfs",
            )
        self.rows = int(self._file.metadata.num_rows)

    def __enter__(self) -> TraceReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._file.close()

    def batches(self) -> Iterator[dict[str, list[Any]]]:
        """Yield the rows in order, as lists by column; a batch is at most ``GROUP_ROWS`` long."""
        for batch in self._file.iter_batches(GROUP_ROWS):
            yield batch.to_pydict()


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        kind = path.lstat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISLNK(kind)):
            raise UsageError(f"{path} is not a regular file", expected="one, or none yet")
        path.unlink()


def _check_magic(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(4)
            file.seek(max(file.seek(0, os.SEEK_END) - 4, 0))
            end = file.read(4)
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}") from None
    if start != _MAGIC:
        raise TraceError(f"{path} is not a trace file", expected="a file of `xipfs record`")
    if end != _MAGIC:
        raise TraceError(
            f"{path} has no end: its recording was cut off, or the file was truncated",
            remedy="record again, and end it with Ctrl-C or SIGTERM",
        )
