"""A command's figures: whose faults count, and why a page came without one."""

from __future__ import annotations

from xipfs.accounting.runs import KEPT_RUNS, Runs
from xipfs.trace import events as ev

ROOT, CHILD, STRANGER = 100, 101, 200
NOTHING = {"before_library": 0, "shared_read_only": 0, "past_library": 0, "without_library": 0}


def runs() -> Runs:
    made = Runs({ROOT: ROOT, CHILD: ROOT}.get, {ROOT: "sh", CHILD: "prog"}.get)  # type: ignore[arg-type]
    made.follow(ROOT)
    return made


def fault(mm: int, pid: int, verdict: str = ev.MINOR, *, protection: bool = False) -> ev.Fault:
    return ev.Fault(
        0, mm, pid, pid, 0, 7, 0,
        write=protection, execute=False, user=True, protection=protection,
        verdict=verdict, origin=ev.TRAP,
    )  # fmt: skip


def around(mm: int, pid: int) -> ev.Around:
    return ev.Around(0, mm, pid, 0, 7, 0, 15)


def test_what_descends_from_the_command_counts_and_nothing_else() -> None:
    books = runs()
    books.fault(fault(1, ROOT))
    books.fault(fault(2, CHILD, ev.MAJOR))
    books.fault(fault(2, CHILD, protection=True))  # its page was mapped before
    books.fault(fault(2, CHILD, ev.SIGBUS))
    books.fault(fault(3, STRANGER))
    books.around(3, STRANGER, 5, shared=False)
    told = books.describe(ROOT)
    assert told is not None
    assert (told["faults"], told["pages_own_fault"], told["pages_around"]) == (4, 2, 0)
    assert (told["programs"], told["programs_living"]) == (2, 2)
    assert books.describe(STRANGER) is None


def test_each_reason() -> None:
    books = runs()
    books.around(1, ROOT, 3, shared=False)
    books.registered(ev.Registered(0, 1, ROOT))
    books.registered(ev.Registered(0, 1, ROOT))  # says nothing new
    books.around(1, ROOT, 5, shared=True)
    books.around(1, ROOT, 7, shared=False)
    books.around(2, CHILD, 11, shared=True, unsure=4)
    books.around(3, STRANGER, 5, shared=True, unsure=5)
    books.exit(2)
    told = books.describe(ROOT)
    assert told is not None
    assert (told["pages_around"], told["pages_unsure"]) == (26, 4)
    assert told["inexact"] == {
        "before_library": 3,
        "shared_read_only": 5,
        "past_library": 7,
        "without_library": 11,
    }
    assert told["without_library"] == {"prog": 11}
    assert told["pages_around"] == 26
    assert (told["programs"], told["programs_registered"], told["programs_living"]) == (2, 1, 1)


def test_who_may_still_register_is_counted_as_without_until_then() -> None:
    books = runs()
    books.around(1, ROOT, 3, shared=False)
    told = books.describe(ROOT)
    assert told is not None
    assert (told["inexact"], told["without_library"]) == (
        NOTHING | {"without_library": 3},
        {"sh": 3},
    )
    books.registered(ev.Registered(0, 1, ROOT))
    told = books.describe(ROOT)
    assert told is not None
    assert (told["inexact"], told["without_library"]) == (NOTHING | {"before_library": 3}, {})


def test_only_the_latest_commands_are_kept() -> None:
    books = runs()
    books.fault(fault(1, ROOT))
    for root in range(1000, 1000 + KEPT_RUNS):
        books.follow(root)
    assert books.describe(ROOT) is None
    assert books.describe(1000) is not None
    books.fault(fault(1, ROOT))  # of a forgotten command: goes nowhere
    books.exit(1)
