"""Tables of faults, of rows written by hand."""

from __future__ import annotations

from typing import Any

from xipfs.cli.fault_table import FaultTable
from xipfs.stats.trace_columns import COLUMNS
from xipfs.stats.trace_items import row

LIB = {"ino": 4, "path": "lib/libc.so.6"}


def fault(page: int, charged: str = "xip", pte_made: str = "own", **values: Any) -> dict[str, Any]:
    told = {"item": "fault", "pid": 20, "comm": "sh", "page": page, "charged": charged, "major": 0}
    told |= {"extra": 0, "handled": "mapped", "pte_made": pte_made} | LIB
    return dict.fromkeys(COLUMNS) | told | values


def item(name: str, **values: Any) -> dict[str, Any]:
    made = row(name, {"pid": 20, **LIB, **values})
    return dict.fromkeys(COLUMNS) | {"comm": "sh"} | made


ROWS = [
    item("map", start=0, end=9),
    item("unplaced", pid=22, ino=None, page=5, access="read", mode="user") | {"comm": "bus"},
    item("mapped", pages=3, mapped=[[9, 2]], unsure=[[12, 1]]),
    fault(0),
    item("around", page=0, pages=4, mapped=[[1, 3]], unsure=[[5, 1]], last=7),
    fault(1, "cow", "before", handled="cow", extra=1),
    fault(8, "pagecache", major=1),
    fault(9, "hint", "own"),
    fault(10, pte_made="unknown"),
    fault(0, "sigbus", handled="sigbus", ino=5, path="", pid=21, comm="touch"),
]


def table(by: str, *parts: list[dict[str, Any]]) -> FaultTable:
    made = FaultTable(by)
    for part in parts or (ROWS[:4], ROWS[4:]):
        made.add({name: [each[name] for each in part] for name in COLUMNS})
    return made


def test_by_process() -> None:
    head, *lines = [line.split() for line in table("process").as_text()]
    counts = "faults major xip cached cow sigbus hint extra own around before unsure unplaced"
    assert head == ["pid", "comm", *counts.split()]
    assert lines == [
        ["20", "sh", "4", "1", "2", "1", "1", "0", "1", "1", "3", "3", "2", "3", "0"],
        ["21", "touch", "1", "0", "0", "0", "0", "1", "0", "0", "0", "0", "0", "0", "0"],
        ["22", "bus", "0", "0", "0", "0", "0", "0", "0", "0", "0", "0", "0", "0", "1"],
    ]


def test_by_file_as_json_and_for_people() -> None:
    lines = table("file").lines()
    assert [(line["ino"], line["path"]) for line in lines] == [(4, "lib/libc.so.6"), (5, "")]
    assert {name: lines[0][name] for name in ("own", "around", "before", "unsure")} == {
        "own": 3,
        "around": 3,
        "before": 2,
        "unsure": 3,
    }
    assert table("file").as_text(1)[1].endswith("  lib/libc.so.6")
    assert table("file").as_text()[2].endswith("  inode 5")


def test_by_page() -> None:
    told = {
        (line["ino"], line["page"]): (line["faults"], line["own"], line["around"], line["before"],
                                      line["unsure"])
        for line in table("page").lines()
    }  # fmt: skip
    assert told == {
        (4, 0): (1, 1, 0, 0, 0),
        (4, 1): (1, 0, 1, 0, 0),
        (4, 2): (0, 0, 1, 0, 0),
        (4, 3): (0, 0, 1, 0, 0),
        (4, 5): (0, 0, 0, 0, 1),
        (4, 8): (1, 1, 0, 0, 0),
        (4, 9): (0, 1, 0, 1, 0),
        (4, 10): (1, 0, 0, 1, 1),
        (4, 12): (0, 0, 0, 0, 1),
        (5, 0): (1, 0, 0, 0, 0),
    }


def test_rare_columns_are_left_out_where_they_are_empty() -> None:
    made = FaultTable("process")
    made.add({name: [each[name] for each in (fault(0), fault(1))] for name in COLUMNS})
    assert made.as_text() == [
        "    pid comm            faults  major    xip cached    cow    own around",
        "     20 sh                   2      0      2      0      0      2      0",
    ]


def test_processes_that_records_were_lost_of_are_marked() -> None:
    """Whether their rows came before or after, under another name, or not at all."""
    before = [fault(0, mm=1), fault(0, mm=2, pid=21), fault(1, mm=3, pid=22, comm="a")]
    lost = [item("lost", records=9), item("incomplete", mm=1), item("incomplete", mm=4, pid=23)]
    lost.append(item("incomplete", mm=3, pid=22) | {"comm": "a"})
    after = [fault(2, mm=3, pid=22, comm="b"), fault(2, mm=5, pid=20, comm="new")]
    made = table("process", before, [*lost, *after])
    assert {(line["pid"], line["comm"]): line["incomplete"] for line in made.lines()} == {
        (20, "sh"): True,
        (20, "new"): False,
        (21, "sh"): False,
        (22, "a"): True,
        (22, "b"): True,
        (23, "sh"): True,
    }
    explained = "* records were lost while it ran: its figures may be too low"
    assert [line[:12] for line in made.as_text()] == [
        "    pid comm",
        "     20 new ",
        "     20*sh  ",
        "     21 sh  ",
        "     22*a   ",
        "     22*b   ",
        "     23*sh  ",
        explained[:12],
    ]
    assert made.as_text()[-1] == explained
    assert made.as_text(1)[-1] != explained
    assert "incomplete" not in table("file", before, lost).lines()[0]
