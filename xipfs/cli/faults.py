"""``xipfs faults FILE``: what a trace file holds, by process, file or page."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from xipfs.stats.trace_file import TraceReader

KEYS = {"process": ("pid", "comm"), "file": ("ino",), "page": ("ino", "page")}
COUNTS = ("faults", "major", "xip", "pagecache", "cow", "sigbus", "hint", "extra")
#: Headings that differ from the counts' names, to keep lines below 80 columns.
HEADS = {"pagecache": "cached"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    parser.add_argument("file", type=Path, metavar="FILE", help="a file of `xipfs record`")
    parser.add_argument("--by", choices=KEYS, default="process", help="default: process")
    parser.add_argument("--json", action="store_true", help="metadata and lines as one object")


def run(args: argparse.Namespace) -> int:
    """Print the table, lines with most faults first."""
    keys = KEYS[args.by]
    with TraceReader(args.file) as trace:
        lines = count(trace, keys)
        metadata = trace.metadata
    if args.json:
        print(json.dumps({"metadata": metadata, "by": args.by, "lines": lines}, indent=2))
        return 0
    losses = metadata["losses"]
    print(
        f"{losses['faults']} faults, {losses['faults_missed']} missed, "
        f"{losses['events_lost']} events lost; observer {metadata['observer']['mode']}"
    )
    widths = [8, 15][: len(keys)]
    heads = [f"{key:>{width}}" for key, width in zip(keys, widths, strict=True)]
    print(*heads, *(f"{HEADS.get(name, name):>6}" for name in COUNTS))
    for line in lines:
        cells = [
            f"{str(line[key])[:width]:>{width}}" for key, width in zip(keys, widths, strict=True)
        ]
        print(*cells, *(f"{line[name]:>6}" for name in COUNTS))
    return 0


def count(trace: TraceReader, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return one line for each value of ``keys``; a hint fault counts in ``hint`` only."""
    counters: dict[tuple[Any, ...], Counter[str]] = {}
    for batch in trace.batches():
        names = zip(*(batch[key] for key in keys), strict=True)
        figures = (batch[column] for column in ("item", "charged", "major", "extra"))
        for name, item, charged, major, extra in zip(names, *figures, strict=True):
            if item != "fault":
                continue
            counter = counters.setdefault(name, Counter())
            counter[charged] += 1
            if charged != "hint":
                counter.update(faults=1, major=major, extra=extra)
    lines = [
        dict(zip(keys, name, strict=True)) | {what: counter[what] for what in COUNTS}
        for name, counter in counters.items()
    ]
    return sorted(lines, key=lambda line: (-line["faults"], *(line[key] for key in keys)))
