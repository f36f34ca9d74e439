"""Ring sub-buffers to rows: recorded ones against the kernel's own text, hand-made ones by hand."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from xipfs.errors import ObserverError
from xipfs.trace import records
from xipfs.trace.compiled import CompiledDecoder
from xipfs.trace.formats import EventFormat, Field, PageFormat, parse_event, parse_page
from xipfs.trace.records import SYSTEM_CALLS, TABLE, Tracepoint
from xipfs.trace.ring import Decoder, PlainDecoder, Plan, sorted_rows

DATA = Path(__file__).parent / "data" / "ring"
FORMATS = json.loads((DATA / "formats.json").read_text())
PLAN = Plan(
    [(p, parse_event(FORMATS["events"][p.name])) for p in TABLE if p.name in FORMATS["events"]],
    parse_page(FORMATS["header_page"]),
)
PAGES = np.fromfile(DATA / "pages.bin", np.uint8).reshape(-1, 4096)
Pages = npt.NDArray[np.uint8]


@pytest.fixture(params=["plain", "compiled"])
def make(request: pytest.FixtureRequest) -> Callable[[Plan], Decoder]:
    if request.param == "compiled":
        pytest.importorskip("numba", reason="the compiled decoder needs numba")
        return CompiledDecoder
    return PlainDecoder


def expected_rows() -> list[tuple[int, int, int, list[int | None]]]:
    """Return (time in us, tid, kind, arguments) of the text's lines; None: the text hides it."""
    rows = []
    for line in (DATA / "trace.txt").read_text().splitlines():
        head = re.match(r"\s*\S+-(\d+)\s+\[\d+\] \S+\s+(\d+)\.(\d{6}): (.*)", line)
        assert head is not None, line
        tid, time_us, text = int(head[1]), int(head[2]) * 10**6 + int(head[3]), head[4]
        rows.append((time_us, tid, *arguments(text)))
    return rows


def number(text: str, pattern: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, (text, pattern)
    return int(match[1], 0)


def device(text: str) -> int:
    match = re.search(r"dev[ =](\d+):(\d+)", text)
    assert match is not None
    return int(match[1]) << 20 | int(match[2])


def arguments(text: str) -> tuple[int, list[int | None]]:
    name = text.split(":")[0].split("(")[0].split(" ")[0]
    if name.startswith("page_fault"):
        kind = records.PF_USER if name.endswith("user") else records.PF_KERNEL
        return kind, [number(text, r"address=(0x\w+)"), number(text, r"error_code=(0x\w+)")]
    if name.startswith("mm_filemap"):
        place = [device(text), int(re.findall(r"ino[ =](\w+)", text)[0], 16)]
        return filemap(name, text, place)
    if name == "ma_write":
        low, high = map(int, re.findall(r"range:(\d+)-(\d+)", text)[0])
        # The text shows pointers hashed: only whether there is one can be compared.
        return records.MA_WRITE, [low, high, None]
    if name == "task_newtask":
        flags = int(re.findall(r"clone_flags=(\w+)", text)[0], 16)
        return records.NEWTASK, [number(text, r"pid=(\d+)"), flags, *comm("touch")]
    if name == "sched_process_exit":
        return records.EXIT, [number(text, r"pid=(\d+)")]
    assert name.startswith("sys_"), text
    call = SYSTEM_CALLS.index(name.removeprefix("sys_"))
    if "->" in text:
        return records.SYS_EXIT, [call, number(text, r"-> (0x\w+)")]
    values = {key: int(value, 0) for key, value in re.findall(r"(\w+): (\w+)", text)}
    wanted = {"mmap": "addr len flags off prot", "munmap": "addr len"}.get(
        name.removeprefix("sys_"), "start len_in behavior"
    )
    return records.SYS_ENTER, [call, *(values[word] for word in wanted.split())]


def filemap(name: str, text: str, place: list[int]) -> tuple[int, list[int | None]]:
    if name == "mm_filemap_map_pages":
        first, last = map(int, re.findall(r"ofs=(\d+)-(\d+)", text)[0])
        return records.MAP_PAGES, [*place, first // 4096, last // 4096]
    index = number(text, r"ofs=(\d+)") // 4096
    if name == "mm_filemap_fault":
        return records.FAULT, [*place, index]
    kind = records.CACHE_ADD if "add_to" in name else records.CACHE_DELETE
    return kind, [*place, index, number(text, r"order=(\d+)")]


def comm(name: str) -> list[int]:
    raw = name.encode().ljust(16, b"\0")
    return [int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")]


def test_recorded_rows_are_what_the_kernel_s_text_says(make: Callable[[Plan], Decoder]) -> None:
    rows = make(PLAN).decode(PAGES).tolist()
    expected = expected_rows()
    assert len(rows) == len(expected) == 201
    seen = set()
    for row, (time_us, tid, kind, wanted) in zip(rows, expected, strict=True):
        assert abs(row[0] / 1000 - time_us) <= 1, row
        assert (row[1] & 0xFFFFFFFF, row[1] >> 32) == (kind, tid)
        values = row[2 : 2 + len(wanted)]
        assert [v for v, w in zip(values, wanted, strict=True) if w is not None] == [
            w for w in wanted if w is not None
        ]
        assert row[2 + len(wanted) :] == [0] * (6 - len(wanted))
        seen.add(kind)
    assert len(seen) == 11


def test_both_decoders_give_the_same_rows_for_any_cut_of_the_pages() -> None:
    pytest.importorskip("numba", reason="the compiled decoder needs numba")
    plain, compiled = PlainDecoder(PLAN), CompiledDecoder(PLAN)
    for pages in (PAGES, PAGES[:1], PAGES[1:], PAGES[:0], np.tile(PAGES, (21, 1))):
        rows = plain.decode(pages)
        assert np.array_equal(rows, compiled.decode(pages))
        rings = np.concatenate([rows[len(rows) // 2 :], rows[: len(rows) // 2]])
        assert np.array_equal(sorted_rows(rings), compiled.merge(rings))
    # A call with other types than when it was made would be compiled while records wait.
    calls: Any = compiled._decode, compiled._merge
    for code in calls:
        assert len(code.signatures) == 1


# Pages made by hand: one event type, 9, with fields of every size.

EVENT = EventFormat(
    9,
    {
        "common_type": Field(0, 2, False),
        "common_pid": Field(4, 4, True),
        "byte": Field(8, 1, False),
        "half": Field(10, 2, False),
        "word": Field(12, 4, False),
        "long": Field(16, 8, False),
    },
)
POINT = Tracepoint("test/event", 77, ("long", "byte", "half", "word"))
HAND = Plan([(POINT, EVENT)], PageFormat(8, 16, 4096))
KIND = 77


def record(delta: int, tid: int, long: int, type_: int = 9) -> bytes:
    body = struct.pack("<HHIBxHIQ", type_, 0, tid, 0xAB, 0xCDEF, 0x89ABCDEF, long)
    return struct.pack("<I", delta << 5 | len(body) // 4) + body


def big_record(delta: int, tid: int, long: int) -> bytes:
    """A record whose length does not fit five bits: code 0, the length in a word of its own."""
    body = struct.pack("<HHIBxHIQ", 9, 0, tid, 0xAB, 0xCDEF, 0x89ABCDEF, long) + bytes(120)
    return struct.pack("<II", delta << 5, len(body) + 4) + body


def extend(delta: int) -> bytes:
    return struct.pack("<II", (delta & (1 << 27) - 1) << 5 | 30, delta >> 27)


def stamp(time_ns: int) -> bytes:
    return struct.pack("<II", (time_ns & (1 << 27) - 1) << 5 | 31, time_ns >> 27 & 0xFFFFFFFF)


def discarded(size: int, delta: int = 1) -> bytes:
    return struct.pack("<II", delta << 5 | 29, size - 4) + bytes(size - 8)


def page(time_ns: int, body: bytes, flags: int = 0, tail: bytes = b"") -> Pages:
    raw = struct.pack("<QQ", time_ns, len(body) | flags) + body + tail
    return np.frombuffer(raw.ljust(4096, b"\xee"), np.uint8)


def row(time_ns: int, tid: int, long: int) -> list[int]:
    return [time_ns, KIND | tid << 32, long, 0xAB, 0xCDEF, 0x89ABCDEF, 0, 0]


def lost(time_ns: int, count: int) -> list[int]:
    return [time_ns, records.LOST, count, 0, 0, 0, 0, 0]


BASE = 5 << 40


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (page(BASE, b""), []),
        (page(BASE, record(0, 1, 2)), [row(BASE, 1, 2)]),
        (
            page(BASE, record(3, 1, 1 << 63) + record(4, (1 << 22) - 1, (1 << 64) - 1)),
            [row(BASE + 3, 1, 1 << 63), row(BASE + 7, (1 << 22) - 1, (1 << 64) - 1)],
        ),
        (
            page(BASE, big_record(5, 6, 7) + record(1, 6, 8)),
            [row(BASE + 5, 6, 7), row(BASE + 6, 6, 8)],
        ),
        # The largest delta, then one that needs a time extension.
        (
            page(BASE, record((1 << 27) - 1, 1, 1) + extend(1 << 40) + record(2, 1, 2)),
            [row(BASE + (1 << 27) - 1, 1, 1), row(BASE + (1 << 27) + (1 << 40) + 1, 1, 2)],
        ),
        # An absolute stamp replaces the lower 59 bits and keeps the upper ones.
        (
            page(3 << 60, stamp((1 << 59) - 10) + record(1, 1, 1)),
            [row((3 << 60) + (1 << 59) - 9, 1, 1)],
        ),
        # A discarded record moves no time; one of zero length ends the page.
        (page(BASE, discarded(40, 99) + record(1, 1, 1)), [row(BASE + 1, 1, 1)]),
        (page(BASE, record(1, 1, 1) + struct.pack("<I", 29) + bytes(40)), [row(BASE + 1, 1, 1)]),
        # Other types of record are passed over, and their time counts.
        (
            page(BASE, record(1, 1, 1, 8) + record(1, 1, 2, 500) + record(1, 1, 3)),
            [row(BASE + 3, 1, 3)],
        ),
        # Overwritten records: how many is not told, or stored behind the last record.
        (page(BASE, record(1, 1, 1), 1 << 31), [lost(BASE, 1), row(BASE + 1, 1, 1)]),
        (
            page(BASE, record(1, 1, 1), 3 << 30, struct.pack("<Q", 1 << 33)),
            [lost(BASE, 1 << 33), row(BASE + 1, 1, 1)],
        ),
    ],
    ids=[
        "empty", "one", "extremes", "long", "extend", "stamp", "discarded", "padding", "others",
        "missed", "missed and counted",
    ],
)  # fmt: skip
def test_a_page_made_by_hand(
    make: Callable[[Plan], Decoder], made: Pages, expected: list[list[int]]
) -> None:
    pages = np.stack([made, page(BASE + 10**15, record(0, 2, 3))])
    rows = make(HAND).decode(pages).tolist()
    assert rows == [*expected, row(BASE + 10**15, 2, 3)]


def test_a_plan_refuses_records_that_are_laid_out_differently() -> None:
    moved = EventFormat(9, {**EVENT.fields, "common_pid": Field(8, 4, True)})
    with pytest.raises(ObserverError, match="test/event: common_pid is not at 4"):
        Plan([(POINT, moved)], PageFormat(8, 16, 4096))


def test_a_constant_is_the_first_argument() -> None:
    point = Tracepoint("test/event", KIND, ("word",), constant=5)
    plan = Plan([(point, EVENT)], PageFormat(8, 16, 4096))
    rows = PlainDecoder(plan).decode(page(BASE, record(0, 1, 2))[None]).tolist()
    assert rows == [[BASE, KIND | 1 << 32, 5, 0x89ABCDEF, 0, 0, 0, 0]]


@pytest.mark.parametrize("runs", [1, 2, 5, 40])
def test_rows_of_several_rings_come_in_one_order(
    make: Callable[[Plan], Decoder], runs: int
) -> None:
    # (time, run, place in its run): among equal times the earlier run's come first, in their order.
    choose = random.Random(runs)
    rows: list[list[int]] = []
    for run in range(runs):
        times = sorted(choose.choices([1, 2, 3, 5, 1 << 63], k=choose.randrange(30)))
        rows += [[time_ns, run, place, 0, 0, 0, 0, 9] for place, time_ns in enumerate(times)]
    merged = make(PLAN).merge(np.array(rows, np.uint64).reshape(-1, records.COLUMNS))
    assert merged.tolist() == sorted(rows)
