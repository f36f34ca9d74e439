"""Where each field of a tracepoint lies, read from the running kernel.

A tracepoint's binary layout is the kernel build's own business; the only honest source is its
``events/SYSTEM/NAME/format`` file. Nothing here asks for the kernel's version: an event is usable
when it exists and has the fields that are read from it, and otherwise the reason is kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xipfs.errors import ObserverError

_FIELD_RE: Final = re.compile(
    r"\tfield:(?P<type>[^;]*?)\b(?P<name>\w+)(?:\[\d*\])?;"
    r"\toffset:(?P<offset>\d+);\tsize:(?P<size>\d+);(?:\tsigned:(?P<signed>[01]);)?"
)
_ID_RE: Final = re.compile(r"^ID: (\d+)$", re.MULTILINE)
_HEADER_FIELD_RE: Final = re.compile(r"field:[^;]*?\b(\w+);\toffset:(\d+);\tsize:(\d+);")


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a record: byte offset from the record's start, size in bytes, signedness."""

    offset: int
    size: int
    signed: bool


@dataclass(frozen=True, slots=True)
class EventFormat:
    """One tracepoint: the id its records start with, and its fields by name."""

    id: int
    fields: dict[str, Field]


@dataclass(frozen=True, slots=True)
class PageFormat:
    """One ring sub-buffer: where its commit word and its records are, in bytes."""

    commit_offset: int
    data_offset: int
    size: int


def parse_event(text: str) -> EventFormat:
    """Return the format in ``text``, the contents of an event's ``format`` file."""
    number = _ID_RE.search(text)
    fields = {
        match["name"]: Field(int(match["offset"]), int(match["size"]), match["signed"] == "1")
        for match in _FIELD_RE.finditer(text)
    }
    if number is None or "common_pid" not in fields or "common_type" not in fields:
        raise ObserverError(
            "an event's format file cannot be read",
            expected="an ID line and the fields common_type and common_pid",
        )
    return EventFormat(int(number[1]), fields)


def parse_page(text: str) -> PageFormat:
    """Return the layout in ``text``, the contents of ``events/header_page``."""
    found = {
        name: (int(offset), int(size)) for name, offset, size in _HEADER_FIELD_RE.findall(text)
    }
    if not {"timestamp", "commit", "data"} <= found.keys() or found["timestamp"] != (0, 8):
        raise ObserverError(
            "tracefs describes its sub-buffers in an unknown way",
            expected="timestamp (8 bytes at 0), commit and data in events/header_page",
        )
    data_offset, data_size = found["data"]
    return PageFormat(found["commit"][0], data_offset, data_offset + data_size)


def read_event(tracing: Path, name: str, needed: tuple[str, ...]) -> EventFormat | str:
    """Return the format of event ``name`` ("system/event"), or why it cannot be used.

    ``needed`` names the fields that are going to be read.
    """
    try:
        text = (tracing / "events" / name / "format").read_text()
    except OSError as error:
        return f"{name}: {error.strerror}"
    try:
        found = parse_event(text)
    except ObserverError as error:
        return f"{name}: {error}"
    absent = [field for field in needed if field not in found.fields]
    if absent:
        return f"{name}: no field {', '.join(absent)}"
    return found
