"""A recorded stream to be replayed: what its file says of the mount, and its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from xipfs.stats.trace_columns import TraceError
from xipfs.stats.trace_file import TraceReader
from xipfs.stats.trace_items import values_of
from xipfs.trace.events import MAJOR
from xipfs.units import PAGE_SHIFT

#: Rows between two calls of a progress function.
PROGRESS_ROWS: Final = 20_000

Page = tuple[int, int]
"""Inode number and page index."""

Progress = Callable[[int, int], None]
"""Told (rows done, rows in all)."""


@dataclass(frozen=True)
class Recorded:
    """The mount that was recorded; sizes in bytes. ``lost`` says what the trace lacks."""

    policy: str
    values: Mapping[str, Any]
    files_sha256: str
    dry: bool
    ram_bytes: int
    nvram_bytes: int
    struct_page_bytes: int
    rules: str
    medium: str | None
    readahead: bool
    lost: Mapping[str, int]

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing, so that the same policy must make the same moves."""
        return not any(self.lost.values())


def recorded(trace: TraceReader, path: Path) -> Recorded:
    """Return what the trace says of its mount; raise TraceError if that is not enough."""
    told = trace.metadata
    try:
        mount, memory, losses = told["mount"], told["memory"], told["losses"]
        options, observer = mount["options"], told["observer"]["mode"]
        first = first_rows(trace)
        start, policy = first["start"], first["policy"]
        return Recorded(
            policy=policy["policy"],
            values=policy["parameters"],
            # Not told by an earlier version: then only xipfs's own policies are known again.
            files_sha256=policy.get("files_sha256", ""),
            dry=policy["dry"],
            ram_bytes=memory["ram_bytes"],
            nvram_bytes=memory["nvram_bytes"],
            struct_page_bytes=memory["struct_page_bytes"],
            rules=mount["rules"],
            medium=options["medium"],
            readahead=options["readahead_kib"] != 0 and observer != "tracefs",
            lost={
                "events_lost": losses["events_lost"],
                "faults_missed": losses["faults_missed"],
                "items_missed": losses["items_missed"],
                "faults_before_start": start["faults"],
                "ptes_before_start": start["ptes"],
                # A policy chosen anew later knows nothing of these, but what it replaced did.
                "signals_before_start": start["signals"],
                "plans_before_start": start["planned"],
                "cut_off": int("unfinished" in told),
            },
        )
    except (KeyError, TypeError) as missing:
        raise TraceError(
            f"{path} cannot be replayed: it lacks {missing}",
            expected="a whole recording of `xipfs record`",
        ) from None


def first_rows(trace: TraceReader) -> dict[str, dict[str, Any]]:
    """Return the values of the rows with which a recording begins."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows_of(trace):
        if row["item"] in ("start", "policy"):
            found[row["item"]] = values_of(row)
        if "policy" in found:
            break
    return found


def rows_of(trace: TraceReader, progress: Progress | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows in the order in which they took effect, each as values by column."""
    done = 0
    for batch in trace.batches():
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(names, values, strict=True))
            done += 1
            if progress is not None and done % PROGRESS_ROWS == 0:
                progress(done, trace.rows)
    if progress is not None:
        progress(trace.rows, trace.rows)


def touched(row: Mapping[str, Any]) -> tuple[int, range] | None:
    """Return the inode and pages of an access that the row shows, None if it shows none.

    A fault for which the kernel read its page is told by that READ already; a WRITE that xipfs
    caused is the kernel's.
    """
    if row["item"] == "fault":
        if row["verdict"] == MAJOR:
            return None
        return row["ino"], range(row["page"], row["page"] + 1)
    if row["item"] == "read" or (row["item"] == "write" and not row["cause"]):
        return row["ino"], request_of(row)[2]
    return None


def request_of(row: Mapping[str, Any]) -> tuple[int, int, range]:
    """Return offset and size in bytes, and the pages, of a row's READ or WRITE request."""
    told = values_of(row)
    offset, size = told["offset"], told["size"]
    return offset, size, range(offset >> PAGE_SHIFT, ((offset + size - 1) >> PAGE_SHIFT) + 1)


def touches_of(trace: TraceReader) -> Iterator[tuple[int, Page]]:
    """Yield every touch that the trace shows, as (time in ns, page)."""
    for row in rows_of(trace):
        found = touched(row)
        if found is not None:
            for index in found[1]:
                yield row["time_ns"], (found[0], index)
