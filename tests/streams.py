"""Small recorded streams written by hand, and trace files of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xipfs.stats.trace_columns import COLUMNS
from xipfs.stats.trace_items import row
from xipfs.stats.trace_writer import TraceWriter

MS = 1_000_000
INO, MM = 7, 1
START = 0x10000


def line(item: str, time_ms: int, **values: Any) -> dict[str, Any]:
    made = row(item, {"time_ns": time_ms * MS, **values})
    return dict.fromkeys(COLUMNS) | {"cause": ""} | made


def fault(time_ms: int, page: int, *, write: bool = False, cause: str = "") -> dict[str, Any]:
    told = {
        "mm": MM, "pid": 20, "tid": 20, "comm": "program", "address": START + page * 4096,
        "ino": INO, "page": page, "access": "write" if write else "read", "mode": "user",
        "protection": 0, "verdict": "minor", "origin": "trap", "cause": cause,
    }  # fmt: skip
    return dict.fromkeys(COLUMNS) | {"item": "fault", "time_ns": time_ms * MS} | told


FILE = line("file", 0, ino=INO, size_bytes=8 * 4096, pagecache=False, runs=[[0, 8, "xip"]])
MAP = line(
    "map", 0, mm=MM, pid=20, start=START, end=START + 8 * 4096, ino=INO, pgoff=0, prot=3,
    shared=True, prot_known=True, fresh=True,
)  # fmt: skip


def moved(time_ms: int, page: int, *, by: str = "policy") -> dict[str, Any]:
    return line(
        "move", time_ms, ino=INO, page=page, pages=1, to="pagecache", by=by, reason="first fault",
        moved=[[page, 1]], refused={},
    )  # fmt: skip


#: Page 0 faults, is promoted by fifo, faults again because of that; a second process's page 1.
STREAM = [
    FILE,
    MAP,
    fault(1, 0),
    line("decide", 2),
    line("turn", 3),
    moved(7, 0),
    fault(8, 0, cause="move"),
    fault(9, 1),
    line("decide", 10),
    line("turn", 11),
    moved(15, 1),
]

POLICY = {
    "policy": "fifo",
    "parameters": {"pages_per_s": 0, "stay_ms": 0},
    "files_sha256": "",
    "dry": False,
}


def write_trace(
    path: Path,
    rows: list[dict[str, Any]],
    *,
    lost: int = 0,
    resident: Sequence[tuple[int, int, int]] = (),
    before: Mapping[str, int] | None = None,
) -> Path:
    """Write ``rows`` as a whole recording of a mount with policy fifo and 16 pages of RAM.

    ``resident`` are (inode, page, dirty) in RAM when it began; ``before``: what else of item start.
    """
    known = {"signals": 0, "planned": 0, "heard_ns": 0, **(before or {})}
    start = [
        line("start", 0, resident=resident, faults=0, ptes=0, **known),
        line("policy", 0, **POLICY),
    ]
    writer = TraceWriter(path)
    writer.append([[each[name] for name in COLUMNS] for each in [*start, *rows]])
    options = {"medium": None, "readahead_kib": None}
    writer.close(
        {
            "mount": {"options": options, "rules": "6.1"},
            "memory": {"ram_bytes": 16 * 4096, "nvram_bytes": 4 << 20, "struct_page_bytes": 64},
            "observer": {"mode": "tracefs"},
            "losses": {"events_lost": lost, "faults_missed": 0, "items_missed": 0},
        }
    )
    return path
