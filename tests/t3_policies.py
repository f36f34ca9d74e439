"""Policies and their replay: known small cases, the bound, and what a policy's text claims."""

from __future__ import annotations

from pathlib import Path

import pytest

from xipfs.accounting.charges import Charge, PteKind
from xipfs.errors import UsageError
from xipfs.migrate.registry import BUILT_IN, make_policy
from xipfs.replay.simulate import TRACES, Access, optimum, replay, seeded_trace

MS = 1_000_000
VALUES = {"threshold": [("promote", 2)]}


def stream(pages: str) -> list[Access]:
    return [Access(place, int(page), write=False) for place, page in enumerate(pages)]


def test_fifo_and_the_optimum_on_a_stream_worked_out_by_hand() -> None:
    # FIFO, 2 frames: 1 2 | 1 hit | 3 puts 1 out | 1 puts 2 out | 2 puts 3 out.
    assert replay(stream("121312"), make_policy("fifo", []), 2).hits == 1
    # Best: keep 1 throughout and let 3 pass by: hits at the third, fifth and sixth access.
    assert optimum(stream("121312"), 2) == 3


def test_tpp_wants_two_faults_within_its_window_and_keeps_its_rate() -> None:
    def fault(time_ns: int, page: int) -> Charge:
        return Charge(time_ns, 1, 7, page, PteKind.XIP, write=False, major=False, extra=0)

    tpp = make_policy("tpp", [("window_ms", 10), ("pages_per_s", 1)])
    faults = [(0, 1), (11, 1), (21, 1), (22, 2), (23, 2), (1000, 2)]
    moves = tpp.plan([fault(ms * MS, page) for ms, page in faults])
    assert [(move.ino, move.index) for move in moves] == [(7, 1)]
    moves = tpp.plan([fault(1005 * MS, 2)])
    assert [(move.ino, move.index) for move in moves] == [(7, 2)]


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", BUILT_IN)
def test_no_policy_beats_the_optimum(name: str, seed: int) -> None:
    for kind in TRACES:
        trace = seeded_trace(kind, seed)
        hits = replay(trace, make_policy(name, VALUES.get(name, [])), 200).hits
        assert hits <= optimum(trace, 200)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_policies_beat_fifo_where_they_claim_to(seed: int) -> None:
    scan, writes = seeded_trace("scan", seed), seeded_trace("writes", seed)
    fifo = make_policy("fifo", [])
    assert replay(scan, make_policy("tpp", []), 200).hits > replay(scan, fifo, 200).hits
    kept = replay(writes, make_policy("write-hot", []), 200).writes_to_region
    assert kept < replay(writes, fifo, 200).writes_to_region


def test_a_policy_from_a_file_and_what_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from xipfs.migrate.policies.fifo import Fifo as POLICY\n")
    assert replay(stream("11"), make_policy(str(file), []), 1).hits == 1
    with pytest.raises(UsageError, match="one of off, fifo, threshold, tpp, write-hot"):
        make_policy("lru", [])
    with pytest.raises(UsageError, match="policy=threshold without promote=N"):
        make_policy("threshold", [])
    with pytest.raises(UsageError, match="policy tpp has no parameter 'rma'"):
        make_policy("tpp", [("rma", 1)])
