"""The order of a migration's steps, without a mount: who is called when, and what tries again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
import trio.testing
from live import new_image

from xipfs.clock import SystemClock
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import PageKind
from xipfs.fuse.commands import Commands
from xipfs.fuse.control import Json
from xipfs.fuse.migration import GROUP_PAGES, Migrator
from xipfs.fuse.worker import Worker
from xipfs.migrate.engine import CHUNK_PAGES, IDLE_PAGES, Engine, Job, Tally
from xipfs.migrate.history import MANUAL
from xipfs.migrate.policy import Move
from xipfs.units import PAGE_SIZE

P, X = PageKind.PAGECACHE, PageKind.XIP


class Steps:
    """Stands for the kernel and the observer: notes each step, and lets a test act in it."""

    def __init__(self, directory: Path, pages: int) -> None:
        image = new_image(directory / "image", size_bytes=(pages + 1000) * PAGE_SIZE)
        ram_bytes = (pages + 8) * PAGE_SIZE
        self.fs = Filesystem.open(image, ram_bytes=ram_bytes, clock=SystemClock())
        self.ino = self.fs.mknod(1, b"file", 0o100644, 0, 0, 0).ino
        data = b"".join(bytes([1 + page % 251]) * PAGE_SIZE for page in range(pages))
        assert self.fs.write(self.ino, 0, data) == len(data)
        self.in_use: set[int] = set()
        self.heard: list[tuple[str, int, int]] = []
        self.on_drain: Callable[[], None] = lambda: None
        self.on_unmap: Callable[[], object] = lambda: None
        self.engine = Engine(self.fs)
        self.migrator = Migrator(self.engine, self, self.drain)  # type: ignore[arg-type]
        self.fs.set_hooks(
            on_unmap=lambda _ino, first, count: self.heard.append(("unmap", first, count)),
            on_evict=lambda _ino, _index: None,
            on_cut=lambda _ino, _first: None,
        )

    async def invalidate_pages(self, ino: int, first: int, count: int, cause: str) -> set[int]:
        assert (ino, cause) == (self.ino, "move")
        self.heard.append(("invalidate", first, count))
        await trio.lowlevel.checkpoint()
        return self.in_use & set(range(first, first + count))

    async def drain(self) -> int:
        self.heard.append(("drain", 0, 0))
        await trio.lowlevel.checkpoint()
        self.on_drain()
        return 0

    def pin(self, index: int) -> int:
        """Take a reference to a page, as a device does; return its frame."""
        pfn = self.fs.page(self.ino, index).pfn
        assert pfn is not None
        self.fs.memory.get_page(pfn)
        return pfn

    def ask(self) -> None:
        """Be somebody who reads another file."""
        self.migrator.page_io(self.ino + 1, 0, 0)

    def migrate(self, pages: range, to: PageKind, *, busy: bool = False) -> list[Tally]:
        async def run() -> list[Tally]:
            if busy:
                self.ask()
            jobs = [Job(self.ino, pages, to, "manual")]
            async with aclosing(self.migrator.migrate(jobs)) as chunks:
                return [tally async for _, _, tally in chunks]

        return trio.run(run)


def content(fs: Filesystem, ino: int) -> bytes:
    return bytes(fs.read(ino, 0, fs.getattr(ino).size_bytes))


def test_many_chunks_share_one_invalidation_and_one_drain(tmp_path: Path) -> None:
    pages = IDLE_PAGES + 10
    steps = Steps(tmp_path, pages)
    before = content(steps.fs, steps.ino)
    tallies = steps.migrate(range(pages), P)
    assert [each.moved for each in tallies] == [IDLE_PAGES, 10]
    assert steps.heard == [
        ("invalidate", 0, 8192),
        ("drain", 0, 0),
        ("unmap", 0, 8192),
        ("invalidate", 8192, 10),
        ("drain", 0, 0),
        ("unmap", 8192, 10),
    ]
    assert content(steps.fs, steps.ino) == before
    steps.heard.clear()
    tallies = steps.migrate(range(700, pages), X, busy=True)
    assert [each.moved for each in tallies] == [512] * 14 + [334]
    assert steps.heard[:3] == [
        ("invalidate", 700, 7502),
        ("drain", 0, 0),
        ("unmap", 700, 512),
    ]
    assert steps.heard.count(("drain", 0, 0)) == 1
    assert content(steps.fs, steps.ino) == before


def test_a_chunk_touched_while_it_waited_is_taken_away_again(tmp_path: Path) -> None:
    pages = 2 * CHUNK_PAGES
    steps = Steps(tmp_path, pages)

    def touch() -> None:
        steps.on_drain = lambda: None
        steps.migrator.page_io(steps.ino, CHUNK_PAGES + 3, CHUNK_PAGES + 3)

    steps.on_drain = touch
    steps.migrate(range(pages), P, busy=True)
    assert steps.heard == [
        ("invalidate", 0, 1024),
        ("drain", 0, 0),
        ("unmap", 0, 512),
        ("invalidate", 512, 512),
        ("drain", 0, 0),
        ("unmap", 512, 512),
    ]


def test_a_chunk_touched_before_its_commit_is_invalidated_once_more(tmp_path: Path) -> None:
    steps = Steps(tmp_path, 4)
    touched: list[int] = []

    def touch() -> None:
        # The first drain's: found when the chunk's turn comes. The second's: only afterwards.
        if len(touched) < 2:
            touched.append(1)
            steps.migrator.page_io(steps.ino, 3, 9)

    steps.on_drain = touch
    steps.migrate(range(4), P)
    assert steps.heard == [
        ("invalidate", 0, 4),
        ("drain", 0, 0),
        ("invalidate", 0, 4),
        ("drain", 0, 0),
        ("unmap", 0, 4),
        ("invalidate", 0, 4),
    ]


def test_a_move_by_hand_beside_a_policy_s_plan_is_nobody_else_s(tmp_path: Path) -> None:
    """Both want pages 0-3; whoever came first moved them, whatever the policy calls its reason."""
    steps = Steps(tmp_path, 8)
    plan = [Move(steps.ino, page, P, "manual", "tpp", 70) for page in range(8)]

    async def by_hand() -> None:
        async with aclosing(steps.migrator.migrate([Job(steps.ino, range(4), P, MANUAL)])) as all_:
            assert [tally.moved async for _, _, tally in all_] == [4]

    async def run() -> None:
        begun = trio.Event()
        steps.on_drain = begun.set
        async with trio.open_nursery() as nursery:
            nursery.start_soon(by_hand)
            await begun.wait()
            await steps.migrator.move_all(plan)

    trio.run(run)
    told = steps.migrator.history.describe()
    by_cause = {row["policy"]: (row["reason"], row["promoted"]) for row in told["by_cause"]}
    assert by_cause == {None: ("manual", 4), "tpp": ("manual", 4)}
    assert [(row["pid"], row["promoted"]) for row in told["by_process"]] == [(0, 4), (70, 4)]
    events, _, _ = steps.migrator.history.since(0)
    assert [(event.policy, event.moved) for event in events] == [(None, 4), ("tpp", 4)]


def counts(row: Json, *keys: str) -> tuple[object, ...]:
    names = ("promoted", "demoted", "failed", "pingpong")
    return (*(row[key] for key in keys), *(row[name] for name in names))


def test_the_events_add_up_to_the_tables_by_cause_and_by_process(tmp_path: Path) -> None:
    """Reasons and processes differ within one chunk, some moves are nobody's, and one fails."""
    steps = Steps(tmp_path, 8)
    steps.migrate(range(8), P)
    steps.pin(4)
    planned = [("cold", 0)] * 3 + [("old", 70)] * 2 + [("cold", 71)] + [("cold", 0)] * 2
    plan = [Move(steps.ino, page, X, why, "mine", pid) for page, (why, pid) in enumerate(planned)]
    assert trio.run(steps.migrator.move_all, plan) == Tally(7, 0, {"pinned": 1})
    history = steps.migrator.history
    by_hand, by_policy = (event.describe() for event in history.since(0)[0])
    assert by_hand["by"] == [
        {"policy": None, "reason": "manual", "pid": 0, "moved": 8, "failed": 0, "pingpong": 0}
    ]
    assert by_policy["moved_runs"] == [(0, 4), (5, 3)]
    assert (by_policy["reason"], by_policy["failed"]) == ("cold, old", {"pinned": 1})
    assert by_policy["by"] == [
        {"policy": "mine", "reason": "cold", "pid": 0, "moved": 5, "failed": 0, "pingpong": 5},
        {"policy": "mine", "reason": "old", "pid": 70, "moved": 1, "failed": 1, "pingpong": 1},
        {"policy": "mine", "reason": "cold", "pid": 71, "moved": 1, "failed": 0, "pingpong": 1},
    ]
    told = history.describe()
    assert [counts(row, "policy", "reason", "to") for row in told["by_cause"]] == [
        (None, "manual", "pagecache", 8, 0, 0, 0),
        ("mine", "cold", "xip", 0, 6, 0, 6),
        ("mine", "old", "xip", 0, 1, 1, 1),
    ]
    assert sorted(counts(row, "pid") for row in told["by_process"]) == [
        (0, 8, 5, 0, 5),
        (70, 0, 1, 1, 1),
        (71, 0, 1, 0, 1),
    ]
    totals = steps.engine.statistics()
    assert (totals.pgpromote_success, totals.pgdemote_success, totals.pgmigrate_fail) == (8, 7, 1)
    assert (told["pingpong"], by_policy["pingpong"]) == (7, 7)


def test_a_pinned_page_is_tried_ten_times_and_counted_once(tmp_path: Path) -> None:
    steps = Steps(tmp_path, 4)
    steps.migrate(range(4), P)
    pfn = steps.pin(2)
    steps.heard.clear()
    assert steps.migrate(range(4), X) == [Tally(3, 0, {"pinned": 1})]
    assert steps.heard == [
        ("invalidate", 0, 4),
        ("drain", 0, 0),
        ("unmap", 0, 4),
        *[("unmap", 2, 1)] * 9,
    ]
    counted = steps.engine.statistics()
    assert (counted.pgmigrate_fail, counted.fail_reasons) == (1, {"pinned": 1})
    assert (counted.pgmigrate_success, counted.pgdemote_success) == (7, 3)
    assert steps.fs.page(steps.ino, 2).kind is P
    steps.fs.memory.put_page(pfn)
    assert steps.migrate(range(4), X) == [Tally(1, 3, {})]


def test_pages_under_direct_io_stay_until_it_is_over(tmp_path: Path) -> None:
    steps = Steps(tmp_path, 6)
    steps.in_use = {1, 4, 9}
    assert steps.migrate(range(6), P) == [Tally(4, 0, {"direct_io": 2})]
    assert steps.engine.statistics().fail_reasons == {"direct_io": 2}
    assert steps.heard[:5] == [
        ("invalidate", 0, 6),
        ("drain", 0, 0),
        ("unmap", 0, 1),
        ("unmap", 2, 2),
        ("unmap", 5, 1),
    ]
    assert steps.heard.count(("invalidate", 0, 6)) == 10, "each pass looks anew"
    drains: list[int] = []

    def over() -> None:
        drains.append(1)
        if len(drains) == 3:
            steps.in_use = set()

    steps.on_drain = over
    assert steps.migrate(range(6), P) == [Tally(2, 4, {})]
    assert [steps.fs.page(steps.ino, page).kind for page in range(6)] == [P] * 6
    events, _, _ = steps.migrator.history.since(1)
    # The third drain came after the look that found them in use.
    assert (events[0].passes, events[0].moved, len(drains)) == (4, 2, 4)


def test_a_pin_that_goes_away_meanwhile_is_no_failure(tmp_path: Path) -> None:
    steps = Steps(tmp_path, 4)
    steps.migrate(range(4), P)
    pfn = steps.pin(1)
    tries = []

    def unmap(_ino: int, _first: int, _count: int) -> None:
        tries.append(1)
        if len(tries) == 4:
            steps.fs.memory.put_page(pfn)

    steps.fs.set_hooks(on_unmap=unmap, on_evict=lambda *_: None, on_cut=lambda *_: None)
    assert steps.migrate(range(4), X) == [Tally(4, 0, {})]
    assert len(tries) == 4
    assert steps.engine.statistics().pgmigrate_fail == 0


def test_a_file_that_goes_meanwhile_fails_as_gone(tmp_path: Path) -> None:
    steps = Steps(tmp_path, 4)
    steps.on_drain = lambda: steps.fs.unlink(1, b"file")
    assert steps.migrate(range(4), P) == [Tally(0, 0, {"gone": 4})]
    assert steps.engine.statistics().fail_reasons == {"gone": 4}


def test_pages_of_a_file_that_goes_fail_only_if_they_were_to_move(tmp_path: Path) -> None:
    steps = Steps(tmp_path, 4)
    steps.migrate(range(2), P)
    steps.migrate(range(3, 4), P)
    steps.on_drain = lambda: steps.fs.unlink(1, b"file")
    assert steps.migrate(range(4), P) == [Tally(0, 3, {"gone": 1})]
    assert steps.engine.statistics().fail_reasons == {"gone": 1}
    history = steps.migrator.history
    told = history.since(2)[0][0].describe()
    assert (told["first"], told["last"], told["moved"], told["failed"]) == (2, 2, 0, {"gone": 1})
    assert [line["failed"] for line in told["by"]] == [1]
    assert [row["failed"] for row in history.describe()["by_file"]] == [1]
    pages = {row["index"]: row["failed"] for row in history.pages.most_moved(9)}
    assert pages == {0: 0, 1: 0, 2: 1, 3: 0}


@pytest.mark.parametrize("how", ["gone", "left"])
def test_what_an_earlier_pass_has_moved_is_told_though_there_is_no_later_one(
    tmp_path: Path, how: str
) -> None:
    """The file goes between two passes, or whoever asked for the move does."""
    steps = Steps(tmp_path, 4)
    steps.migrate(range(4), P)
    pfn = steps.pin(1)
    scope = trio.CancelScope()

    async def between_passes() -> None:
        if how == "left":
            scope.cancel()
            return
        steps.fs.memory.put_page(pfn)
        steps.fs.unlink(1, b"file")

    def unmap(_ino: int, first: int, _count: int) -> None:
        if first == 0:
            trio.lowlevel.spawn_system_task(between_passes)

    async def demote() -> Tally:
        plan = [Move(steps.ino, page, X, "cold", "mine", 70) for page in range(4)]
        with scope:
            return await steps.migrator.move_all(plan)
        return Tally()

    steps.fs.set_hooks(on_unmap=unmap, on_evict=lambda *_: None, on_cut=lambda *_: None)
    failed, line = ({"gone": 1}, 1) if how == "gone" else ({}, 0)
    assert trio.run(demote) == (Tally(3, 0, failed) if how == "gone" else Tally())
    totals, history = steps.engine.statistics(), steps.migrator.history
    assert (totals.pgdemote_success, totals.fail_reasons) == (3, failed)
    (_, event), _, _ = history.since(0)
    assert (event.moved, event.moved_runs, event.failed) == (3, [(0, 1), (2, 2)], failed)
    (process,) = [row for row in history.describe()["by_process"] if row["pid"] == 70]
    assert counts(process, "pid") == (70, 0, 3, line, 3)
    assert [(each["moved"], each["failed"]) for each in event.describe()["by"]] == [(3, line)]


def waited_beside_a_reader(steps: Steps, chunks: int) -> float:
    """Return for how long a migration of so many chunks gives way, in virtual s."""

    async def read() -> None:
        steps.ask()

    async def run() -> float:
        start = trio.current_time()
        steps.ask()
        job = Job(steps.ino, range(chunks * CHUNK_PAGES), P, "")
        # The request comes while the chunk moves, and is served after it.
        steps.on_unmap = lambda: trio.lowlevel.spawn_system_task(read)
        async with aclosing(steps.migrator.migrate([job])) as all_:
            async for _ in all_:
                pass
        return trio.current_time() - start

    return trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize(
    ("chunk_s", "waited_s"),
    [
        (0.003, 3 * 0.024),
        (0.050, 3 * 0.4),
        (5.0, 3 * 0.4),  # the host's disk was busy: others had to wait, and may not for 40 s more
    ],
)
def test_others_get_eight_times_the_time_that_a_chunk_kept_them_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_s: float, waited_s: float
) -> None:
    steps = Steps(tmp_path, 4 * CHUNK_PAGES)
    now_ns = 0

    def unmap(_ino: int, _first: int, _count: int) -> None:
        nonlocal now_ns
        now_ns += round(chunk_s * 1e9)
        steps.on_unmap()

    clock = SimpleNamespace(monotonic_ns=lambda: now_ns, time_ns=time.time_ns)
    monkeypatch.setattr("xipfs.fuse.migration.time", clock)
    steps.fs.set_hooks(on_unmap=unmap, on_evict=lambda *_: None, on_cut=lambda *_: None)
    assert waited_beside_a_reader(steps, 4) == pytest.approx(waited_s)
    events, _, _ = steps.migrator.history.since(0)
    assert [event.durations_ns["move"] for event in events] == [round(chunk_s * 1e9)] * 4


def test_nobody_is_given_way_to_if_nobody_asks(tmp_path: Path) -> None:
    async def run() -> float:
        start = trio.current_time()
        jobs = [Job(steps.ino, range(4 * CHUNK_PAGES), P, "")]
        async with aclosing(steps.migrator.migrate(jobs)) as all_:
            async for _ in all_:
                pass
        return trio.current_time() - start

    steps = Steps(tmp_path, 4 * CHUNK_PAGES)
    assert trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0)) == 0


def test_progress_is_told_twenty_times_a_second_and_no_oftener(tmp_path: Path) -> None:
    pages = 6 * CHUNK_PAGES
    steps = Steps(tmp_path, pages)
    clock = trio.testing.MockClock()

    def unmap(_ino: int, _first: int, _count: int) -> None:
        clock.jump(0.03)

    async def run() -> list[Json]:
        steps.ask()
        request = {"ino": steps.ino, "to": "pagecache"}
        live = SimpleNamespace(fs=steps.fs, migrator=steps.migrator)
        async with aclosing(Commands(live).by_name()["migrate"](request)) as answers:  # type: ignore[arg-type]
            return [answer async for answer in answers]

    steps.fs.set_hooks(on_unmap=unmap, on_evict=lambda *_: None, on_cut=lambda *_: None)
    # After 0.06, 0.12 and, the last chunk being the result's, not 0.18 s.
    assert trio.run(run, clock=clock) == [
        {
            "progress": {
                "pages_done": 2 * CHUNK_PAGES,
                "pages_total": pages,
                "pages_moved": 2 * CHUNK_PAGES,
            }
        },
        {
            "progress": {
                "pages_done": 4 * CHUNK_PAGES,
                "pages_total": pages,
                "pages_moved": 4 * CHUNK_PAGES,
            }
        },
        {"result": {"moved": pages, "already": 0, "failed": {}, "failed_errno": {}}},
    ]


def test_a_file_that_is_as_wanted_does_not_keep_others_waiting(tmp_path: Path) -> None:
    async def run() -> int:
        turns = 0

        async def another() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(another)
            jobs = [Job(steps.ino, range(8 * GROUP_PAGES), X, "")]
            async with aclosing(steps.migrator.migrate(jobs)) as chunks:
                async for _ in chunks:
                    pass
            nursery.cancel_scope.cancel()
        return turns

    steps = Steps(tmp_path, 4)
    assert trio.run(run) >= 6


def test_a_worker_returns_raises_and_finishes_what_was_cancelled() -> None:
    async def run() -> None:
        worker = Worker("test")
        assert await worker.run(divmod, 17, 5) == (3, 2)
        with pytest.raises(ZeroDivisionError):
            await worker.run(divmod, 17, 0)
        done: list[int] = []
        with trio.move_on_after(0):
            await worker.run(done.append, 1)
        assert await worker.run(len, done) == 0, "cancelled before it began"
        begun, go_on = threading.Event(), threading.Event()

        def slow() -> None:
            begun.set()
            if go_on.wait(30):
                done.append(1)

        async def cancel() -> None:
            while not begun.is_set():
                await trio.sleep(0.001)
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            go_on.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel)
            with trio.CancelScope() as scope:
                await worker.run(slow)
            assert done == [1], "cancelled after it began"
        results = []
        async with trio.open_nursery() as nursery:
            for number in range(20):

                async def call(number: int = number) -> None:
                    results.append(await worker.run(abs, -number))

                nursery.start_soon(call)
        assert sorted(results) == list(range(20))

    trio.run(run)
