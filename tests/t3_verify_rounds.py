"""Verification in rounds: what one round found stays told when another follows."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from xipfs.accounting import verify
from xipfs.accounting.verify import Comparison, Look
from xipfs.fuse.verifying import RESTLESS, Verifier


@pytest.mark.parametrize(
    ("first", "differ", "unknown"),
    [
        (Comparison(100, pages_compared=8, pages_differ=3), 3, {}),
        (Comparison(100, pages_compared=6, pages_unknown=Counter(lost=2)), 0, {"lost": 2}),
        (Comparison(100, pages_compared=8), 0, {}),
    ],
)
def test_a_second_round_hides_nothing(
    monkeypatch: pytest.MonkeyPatch, first: Comparison, differ: int, unknown: dict[str, int]
) -> None:
    """Process 200 moves during the first look; 100 is learnt then, and right in the second."""
    books = SimpleNamespace(
        kernel=SimpleNamespace(pids={1: 100, 2: 200}, clouds={}), mms={}, check=lambda: ""
    )

    async def drained() -> int:
        return 0

    live: Any = SimpleNamespace(
        drain_settled=drained,
        accountant=books,
        mount=SimpleNamespace(major=0, minor=1),
        observer=SimpleNamespace(comm=lambda _: "touch"),
    )
    look = Look({}, {}, 0)
    looks = iter([({1: look}, {2: RESTLESS}, False), ({1: look, 2: look}, {}, True)])
    compared = iter([first, Comparison(100, pages_compared=8), Comparison(200, pages_compared=4)])

    async def next_look(_: Verifier, __: list[int]) -> object:
        return next(looks)

    monkeypatch.setattr(Verifier, "_look", next_look)
    monkeypatch.setattr(verify, "compare", lambda *_: next(compared))
    answer = trio.run(Verifier(live).verify, None)
    assert (answer["pages_differ"], answer["pages_unknown"]) == (differ, unknown)
    assert [process["pid"] for process in answer["processes"]] == [100, 200]
