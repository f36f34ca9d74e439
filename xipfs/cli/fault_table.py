"""Faults counted by process, file or page: the same tables for a trace file and a live mount."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from xipfs.cli.client import Json

KEYS: Final = {
    "process": ("pid", "comm"),
    "file": ("ino", "path"),
    "page": ("ino", "path", "page"),
}
#: Faults by what they were charged, then pages by what the kernel mapped them with.
COUNTS: Final = (
    "faults", "major", "xip", "pagecache", "cow", "sigbus", "hint", "extra",
    "own", "around", "before", "unsure", "unplaced",
)  # fmt: skip
#: Headings that differ from the counts' names, to keep lines below 80 columns.
HEADS: Final = {"pagecache": "cached"}
#: Columns that are not printed where all of it is 0.
_RARE: Final = frozenset(("sigbus", "hint", "extra", "before", "unsure", "unplaced"))
#: Columns of rows that each row counted has.
_FIGURES: Final = ("item", "charged", "major", "extra", "handled", "pte_made", "page", "detail")

_OF_A_PROCESS: Final = ("item", "mm", "pid", "comm")
#: What * behind a process's number means.
INCOMPLETE: Final = "* records were lost while it ran: its figures may be too low"

Batch = Mapping[str, Sequence[Any]]
"""Rows of a trace as columns."""


class FaultTable:
    """One line for each value of the keys of ``by``.

    A hint fault counts in ``hint`` and of the charges nowhere else. Of the pages that the kernel
    mapped ``own`` came by a fault of their own, ``around`` without one, ``before`` before the
    recording began; of ``unsure`` the events do not tell which, or if at all. A process is
    ``incomplete`` if records were lost while it ran; ``unplaced`` are its accesses past the end of
    files that nobody could name, of the mount or not.
    """

    def __init__(self, by: str) -> None:
        self.by = by
        self._keys = KEYS[by]
        self._names = tuple(key for key in self._keys if key != "page")
        self._counters: dict[tuple[Any, ...], Counter[str]] = {}
        #: Address spaces that records were lost of, and the lines of their processes.
        self._incomplete_mms: set[int] = set()
        self._incomplete: set[tuple[Any, ...]] = set()

    def add(self, batch: Batch) -> None:
        """Count a batch's faults, and the pages that came without one."""
        names = zip(*(batch[key] for key in self._names), strict=True)
        figures = zip(*(batch[column] for column in _FIGURES), strict=True)
        for name, (item, *told, page, detail) in zip(names, figures, strict=True):
            if item == "fault":
                self._add_fault(self._counter(name, page), *told)
            elif item in ("around", "mapped"):
                pages = json.loads(detail)
                self._add_pages(name, pages["mapped"], "around" if item == "around" else "before")
                self._add_pages(name, pages["unsure"], "unsure")
            elif item == "unplaced" and self.by == "process":
                self._counter(name, page)["unplaced"] += 1
        if self.by == "process":
            self._mark(batch)

    def _mark(self, batch: Batch) -> None:
        """Find the processes whose figures may be too low, which may have no other row."""
        for item, mm, *name in zip(*(batch[key] for key in _OF_A_PROCESS), strict=True):
            if item == "incomplete":
                self._incomplete_mms.add(mm)
            if item in ("fault", "around", "incomplete") and mm in self._incomplete_mms:
                self._counters.setdefault(tuple(name), Counter())
                self._incomplete.add(tuple(name))

    def _counter(self, name: tuple[Any, ...], page: int) -> Counter[str]:
        key = (*name, page) if self.by == "page" else name
        return self._counters.setdefault(key, Counter())

    @staticmethod
    def _add_fault(
        counter: Counter[str], charged: str, major: int, extra: int, handled: str, pte_made: str
    ) -> None:
        counter[charged] += 1
        if charged != "hint":
            counter.update(faults=1, major=major, extra=extra)
        if handled != "sigbus" and pte_made != "before":
            counter["own" if pte_made == "own" else "unsure"] += 1

    def _add_pages(self, name: tuple[Any, ...], runs: Sequence[Sequence[int]], how: str) -> None:
        for first, count in runs:
            if self.by == "page":
                for page in range(first, first + count):
                    self._counter(name, page)[how] += 1
            else:
                self._counter(name, first)[how] += count

    def lines(self) -> list[Json]:
        """Return the lines, those with most faults first."""
        lines = [
            dict(zip(self._keys, name, strict=True)) | {what: counter[what] for what in COUNTS}
            for name, counter in self._counters.items()
        ]
        if self.by == "process":
            for name, line in zip(self._counters, lines, strict=True):
                line["incomplete"] = name in self._incomplete
        return sorted(lines, key=lambda line: (-line["faults"], *(line[key] for key in self._keys)))

    def as_text(self, most: int | None = None) -> list[str]:
        """Return the table for people, of up to ``most`` lines; a path is last, for its length."""
        lines = self.lines()
        counts = [what for what in COUNTS if what not in _RARE or any(x[what] for x in lines)]
        heads = {what: HEADS.get(what, what) for what in counts}
        text = [self._line({"pid": "pid", "comm": "comm", "page": "page", **heads}, counts, "file")]
        for line in lines[:most]:
            text.append(self._line(line, counts, file_name(line) if "ino" in line else ""))
        return text + incomplete_lines(lines[:most])

    def _line(self, line: Json, counts: Sequence[str], name: str) -> str:
        mark = "*" if line.get("incomplete") else " "
        cells = [f"{line['pid']:>7}{mark}{line['comm'][:15]:15}"] if self.by == "process" else []
        cells += [f"{line['page']:>7}"] if self.by == "page" else []
        cells += [f"{line[what]:>6}" for what in counts]
        return " ".join([*cells, *([] if self.by == "process" else [f" {name}"])])


def incomplete_lines(lines: Sequence[Json]) -> list[str]:
    """Return what the mark of a process's line means, if any line has it."""
    return [INCOMPLETE] if any(line.get("incomplete") for line in lines) else []


def file_name(told: Json) -> str:
    """Return how to call the file of a line or of a fault."""
    return told["path"] or f"inode {told['ino']}"


def totals(losses: Json) -> str:
    """Return what came and what did not, on one line."""
    others = losses["items_missed"]
    return (
        f"{losses['faults']} faults, {losses['faults_missed']} missed, "
        + (f"{others} other items missed, " if others else "")
        + f"{losses['events_lost']} events lost"
    )
