"""Verification in rounds: what one round found stays told when another follows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from t3_accounting import MM, Scene, fs

from xipfs.accounting import verify
from xipfs.accounting.verify import Comparison, Look
from xipfs.fuse.observing import TracefsObserver
from xipfs.fuse.verifying import BUSY, INVALIDATED, RESTLESS, Verifier

__all__ = ["fs"]  # a fixture


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
        kernel=SimpleNamespace(pids={1: 100, 2: 200}, clouds={}),
        ledger=SimpleNamespace(incomplete={2}),
        mms={},
        check=lambda: "",
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
    told = [(process["pid"], process["incomplete"]) for process in answer["processes"]]
    assert told == [(100, False), (200, True)]


class Around:
    """A live mount on which things happen around a look at one address space, and only then."""

    def __init__(self, fs: Any) -> None:
        self.scene = Scene(fs)
        self.scene.file("XXXX")
        self.other = self.scene.ino
        self.scene.file("XXXX")
        self.scene.run(self.scene.map(4), self.scene.fault(0))
        self.accountant = self.scene.books
        self.mount = SimpleNamespace(dev=1)
        self.notifier = SimpleNamespace(in_flight=lambda: self.invalidated)
        self.dropped: set[int] = set()
        self.replies = SimpleNamespace(
            forget_unmapped=lambda: None,
            askers=list,
            over=len,
            unfinished=lambda _askers, _over: set(self.dropped),
            serials=Counter(),
        )
        self.observer = TracefsObserver()
        self.observer.changing = lambda: self.changing  # type: ignore[method-assign]
        self.invalidated: set[int] = set()
        self.changing: frozenset[int] = frozenset()
        self.drains: list[Callable[[], object]] = [lambda: None, lambda: None]

    async def drain_settled(self) -> int:
        self.drains.pop(0)()
        return 0


@pytest.mark.parametrize(
    ("happens", "why"),
    [
        (lambda _: None, None),
        (lambda live: live.scene.run(live.scene.fault(1)), RESTLESS),
        (lambda live: setattr(live, "changing", frozenset({MM})), BUSY),
        (lambda live: setattr(live, "changing", frozenset({MM + 1})), None),
    ],
)
def test_what_happens_between_the_drains_spoils_a_look(
    fs: object, monkeypatch: pytest.MonkeyPatch, happens: Callable[[Any], object], why: str | None
) -> None:
    live = Around(fs)
    live.drains[1] = lambda: happens(live)
    monkeypatch.setattr(verify, "look_at", lambda *_: Look({}, {}, 0))
    good, moved, _ = trio.run(Verifier(live)._look, [MM])  # type: ignore[arg-type]
    assert (list(good), moved) == (([MM], {}) if why is None else ([], {MM: why}))


@pytest.mark.parametrize("ours", [True, False])
def test_an_invalidation_under_way_spoils_a_look(
    fs: object, monkeypatch: pytest.MonkeyPatch, ours: bool
) -> None:
    """It has unmapped pages whose records are still to come, and is over by the second drain."""
    live = Around(fs)

    def look_at(*_: object) -> Look:
        live.invalidated = {live.scene.ino if ours else live.other}
        return Look({}, {}, 0)

    live.drains[1] = lambda: setattr(live, "invalidated", set())
    monkeypatch.setattr(verify, "look_at", look_at)
    good, moved, _ = trio.run(Verifier(live)._look, [MM])  # type: ignore[arg-type]
    assert (list(good), moved) == (([], {MM: INVALIDATED}) if ours else ([MM], {}))


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("when", ["before", "between"])
def test_an_answer_that_is_acted_on_spoils_a_look(
    fs: object, monkeypatch: pytest.MonkeyPatch, ours: bool, when: str
) -> None:
    """Whether it was given before the first drain, or after, and acted on by the second."""
    live = Around(fs)
    ino = live.scene.ino if ours else live.other
    if when == "before":
        live.dropped = {ino}
    live.drains[1] = lambda: live.replies.serials.update({ino} if when == "between" else ())
    monkeypatch.setattr(verify, "look_at", lambda *_: Look({}, {}, 0))
    good, moved, _ = trio.run(Verifier(live)._look, [MM])  # type: ignore[arg-type]
    assert (list(good), moved) == (([], {MM: INVALIDATED}) if ours else ([MM], {}))
