"""Faults that xipfs caused: only PTEs that an invalidation of ours took are marked, and once."""

from __future__ import annotations

from xipfs.accounting.causes import EVICT, MOVE, Causes
from xipfs.trace.events import CacheDelete, Zap


def test_a_deletion_is_ours_only_within_the_time_of_our_invalidation() -> None:
    causes = Causes()
    causes.begin(7, 4, 2, MOVE, now_ns=100).ended_ns = 200
    assert causes.of_event(CacheDelete(150, 7, 5, 1)) == "move"
    assert causes.of_event(CacheDelete(99, 7, 5, 1)) == ""
    assert causes.of_event(CacheDelete(201, 7, 5, 1)) == ""
    assert causes.of_event(CacheDelete(150, 7, 6, 1)) == ""
    assert causes.of_event(Zap(150, 7, 5, 1)) == ""


def test_a_read_is_ours_once_and_only_if_all_of_its_pages_were_taken() -> None:
    causes = Causes()
    causes.begin(7, 4, 2, EVICT, now_ns=100)
    assert causes.of_read(7, 5, 6) == ""
    assert causes.of_read(7, 4, 4) == "evict"
    assert causes.of_read(7, 4, 4) == ""
