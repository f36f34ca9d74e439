"""Faults counted by process, file or page: the same tables for a trace file and a live mount."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from xipfs.cli.client import Json

KEYS: Final = {"process": ("pid", "comm"), "file": ("ino",), "page": ("ino", "page")}
COUNTS: Final = ("faults", "major", "xip", "pagecache", "cow", "sigbus", "hint", "extra")
#: Headings that differ from the counts' names, to keep lines below 80 columns.
HEADS: Final = {"pagecache": "cached"}

Batch = Mapping[str, Sequence[Any]]
"""Rows of a trace as columns."""


class FaultTable:
    """One line for each value of the keys of ``by``; a hint fault counts in ``hint`` only."""

    def __init__(self, by: str) -> None:
        self.by = by
        self._keys = KEYS[by]
        self._counters: dict[tuple[Any, ...], Counter[str]] = {}

    def add(self, batch: Batch) -> None:
        """Count a batch's faults."""
        names = zip(*(batch[key] for key in self._keys), strict=True)
        figures = (batch[column] for column in ("item", "charged", "major", "extra"))
        for name, item, charged, major, extra in zip(names, *figures, strict=True):
            if item != "fault":
                continue
            counter = self._counters.setdefault(name, Counter())
            counter[charged] += 1
            if charged != "hint":
                counter.update(faults=1, major=major, extra=extra)

    def lines(self) -> list[Json]:
        """Return the lines, those with most faults first."""
        lines = [
            dict(zip(self._keys, name, strict=True)) | {what: counter[what] for what in COUNTS}
            for name, counter in self._counters.items()
        ]
        return sorted(lines, key=lambda line: (-line["faults"], *(line[key] for key in self._keys)))

    def as_text(self, most: int | None = None) -> list[str]:
        """Return the table for people, of up to ``most`` lines."""
        widths = [8, 15][: len(self._keys)]
        heads = [f"{key:>{width}}" for key, width in zip(self._keys, widths, strict=True)]
        text = [" ".join([*heads, *(f"{HEADS.get(name, name):>6}" for name in COUNTS)])]
        for line in self.lines()[:most]:
            keys = zip(self._keys, widths, strict=True)
            cells = [f"{str(line[key])[:width]:>{width}}" for key, width in keys]
            text.append(" ".join([*cells, *(f"{line[name]:>6}" for name in COUNTS)]))
        return text


def totals(losses: Json) -> str:
    """Return what came and what did not, on one line."""
    return (
        f"{losses['faults']} faults, {losses['faults_missed']} missed, "
        f"{losses['events_lost']} events lost"
    )
