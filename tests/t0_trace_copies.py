"""Growths of the anonymous Rss: which of them a page fault explains, and what the others mean."""

from __future__ import annotations

import numpy as np
import pytest
from t0_trace_grammar import BASE, DEFAULT, PAGE, PID, PRESENT, SHARED, USER, WRITE, Script, only

from xipfs.trace import events, records
from xipfs.trace.copies import without_explained

PF, GREW, FAULT = records.PF_USER, records.RSS_ANON, records.FAULT
CALL, ADD = records.SYS_ENTER, records.CACHE_ADD


@pytest.fixture
def script() -> Script:
    made = Script()
    made.maps[PID] = list(DEFAULT)
    return made


@pytest.mark.parametrize(
    ("rows", "left"),
    [
        # (kind, tid, error code); which growths are left, by their places
        ([(PF, 1, WRITE), (GREW, 1, 0)], []),
        ([(PF, 1, WRITE), (FAULT, 1, 0), (ADD, 1, 0), (FAULT, 1, 0), (GREW, 1, 0)], []),
        ([(PF, 1, WRITE), (GREW, 1, 0), (GREW, 1, 0)], [2]),
        ([(PF, 1, USER), (GREW, 1, 0)], [1]),
        ([(PF, 1, WRITE), (GREW, 2, 0)], [1]),
        ([(PF, 1, WRITE), (PF, 2, USER), (GREW, 1, 0), (GREW, 2, 0)], [3]),
        ([(PF, 1, WRITE), (CALL, 1, 0), (GREW, 1, 0)], [2]),
        ([(GREW, 1, 0), (PF, 1, WRITE)], [0]),
        ([(PF, 1, WRITE), (GREW, 1, 0), (PF, 1, WRITE), (GREW, 1, 0)], []),
    ],
)
def test_a_write_fault_explains_one_growth(
    rows: list[tuple[int, int, int]], left: list[int]
) -> None:
    made = np.array(
        [
            [at, kind | tid << 32, 0, error, 0, 0, 0, 0]
            for at, (kind, tid, error) in enumerate(rows)
        ],
        np.uint64,
    )
    kept = without_explained(made)
    assert [int(row[0]) for row in kept if int(row[1]) & 0xFFFFFFFF == GREW] == left
    others = [at for at, row in enumerate(rows) if row[0] != GREW]
    assert [int(row[0]) for row in kept if int(row[1]) & 0xFFFFFFFF != GREW] == others


def grown(script: Script) -> None:
    script.row(GREW, PID, 4096)


def clouds(script: Script) -> list[str]:
    return [event.why for event in script.end() if isinstance(event, events.Cloud)]


def test_a_copy_that_nothing_explains_puts_private_mappings_in_doubt(script: Script) -> None:
    script.pf(BASE)
    script.fault(0)
    grown(script)
    assert clouds(script) == [events.COPIED]


def test_a_copy_of_the_open_fault_or_of_a_call_is_no_doubt(script: Script) -> None:
    script.pf(BASE, USER | WRITE | PRESENT)
    grown(script)  # its fault came with the batch before
    script.enter("madvise", BASE, PAGE, 23)
    grown(script)
    grown(script)
    script.leave("madvise")
    assert clouds(script) == []


def test_shared_mappings_have_no_copies(script: Script) -> None:
    script.maps.clear()
    script.mmap(BASE, 4, flags=SHARED)
    script.pf(BASE)
    script.fault(0)
    grown(script)
    assert clouds(script) == []


def test_what_another_process_faults_in_is_not_its_own(script: Script) -> None:
    """A debugger writes to our memory: the records of the fault are the debugger's."""
    script.pf(BASE)
    script.fault(0)
    script.row(records.FOREIGN_ENTER, 500, PID)
    script.map(0, 15, tid=500)
    script.fault(5, tid=500)
    script.row(records.FOREIGN_EXIT, 500, 1)
    told = script.end()
    assert [event.why for event in told if isinstance(event, events.Cloud)] == [events.FOREIGN] * 2
    assert len(only(told, events.Fault)) == 1
    assert script.unfollowed == {}
    assert script.processes.newcomers == []


def test_a_mapping_that_another_process_got_at_before_its_own_did(script: Script) -> None:
    script.maps.clear()
    script.mmap(BASE, 4)
    script.row(records.FOREIGN_ENTER, 500, PID)
    script.row(records.FOREIGN_EXIT, 500, 1)
    script.pf(BASE)
    script.fault(0)
    assert [event.fresh for event in script.end() if isinstance(event, events.Map)] == [False]


def test_reclaim_is_anybody_s(script: Script) -> None:
    script.row(records.RECLAIM, 77, 32)
    assert script.events() == [events.Reclaim(2000)]
