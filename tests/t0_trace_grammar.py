"""Records to events: each row of the grammar, written by hand.

Process 100 maps file 7 of the mount at 0x10000, 32 pages from page 0 on, unless a test says other.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from xipfs.trace import records
from xipfs.trace.events import (
    CROSSED,
    FOREIGN,
    GUP,
    MAJOR,
    MINOR,
    POPULATE,
    SIGBUS,
    UNTRACED,
    Around,
    CacheAdd,
    CacheDelete,
    Cloud,
    Doubt,
    Event,
    Exit,
    Extent,
    Fault,
    Fork,
    Incomplete,
    Lost,
    Map,
    Move,
    Protect,
    Registered,
    ThreadExit,
    Unmap,
    Unplaced,
    Zap,
)
from xipfs.trace.fault_batch import expanded
from xipfs.trace.grammar import Grammar
from xipfs.trace.output import Output
from xipfs.trace.pids import Adoption
from xipfs.trace.proc import Identity, MapsLine
from xipfs.trace.processes import Processes
from xipfs.trace.vmas import Vma

DEV, FILE, PID = 42, 7, 100
BASE, PAGE = 0x10000, 4096
READ, WRITE, USER, PRESENT, FETCH = 0, 2, 4, 1, 16
PRIVATE, SHARED, ANONYMOUS, POPULATED = 2, 1, 0x20, 0x8000
DEFAULT = [MapsLine(BASE, BASE + 32 * PAGE, 3, False, 0, FILE)]


class Script:
    """Writes rows, one microsecond apart, and feeds them."""

    def __init__(self) -> None:
        self.now = 1000
        self.rows: list[list[int]] = []
        self.maps: dict[int, list[MapsLine]] = {}
        self.people = {PID: Identity(PID, 1, "prog")}
        self.adoptions: dict[int, Adoption] = {}
        self.output = Output()
        self.processes = Processes(self.output, self.people.get, self.maps.get)
        #: What /proc says that threads wait in; the others are gone.
        self.calls: dict[int, str] = {}
        self.grammar = Grammar(
            self.processes, self.adoptions.__getitem__, call_of=lambda tid: self.calls.get(tid, "")
        )
        self.unfollowed = self.processes.unfollowed

    def row(self, kind: int, tid: int, *arguments: int) -> None:
        self.now += 1000
        self.rows.append([self.now, kind | tid << 32, *arguments, *[0] * (6 - len(arguments))])

    def pf(self, address: int, error: int = USER, tid: int = PID, kernel: bool = False) -> None:
        self.row(records.PF_KERNEL if kernel else records.PF_USER, tid, address, error)

    def fault(self, index: int, tid: int = PID, ino: int = FILE) -> None:
        self.row(records.FAULT, tid, DEV, ino, index)

    def map(self, first: int, last: int, tid: int = PID, ino: int = FILE) -> None:
        self.row(records.MAP_PAGES, tid, DEV, ino, first, last)

    def add(self, index: int, tid: int = PID, order: int = 0, ino: int = FILE) -> None:
        self.row(records.CACHE_ADD, tid, DEV, ino, index, order)

    def enter(self, call: str, *arguments: int, tid: int = PID) -> None:
        self.row(records.SYS_ENTER, tid, records.SYSTEM_CALLS.index(call), *arguments)

    def leave(self, call: str, result: int = 0, tid: int = PID) -> None:
        self.row(records.SYS_EXIT, tid, records.SYSTEM_CALLS.index(call), result & (1 << 64) - 1)

    def call(self, call: str, *arguments: int, result: int = 0, tid: int = PID) -> None:
        self.enter(call, *arguments, tid=tid)
        self.leave(call, result, tid=tid)

    def mmap(
        self, at: int, pages: int, flags: int = PRIVATE, pgoff: int = 0, prot: int = 3
    ) -> None:
        self.call("mmap", 0, pages * PAGE, flags, pgoff * PAGE, prot, result=at)

    def newtask(self, child: int, flags: int = 0, tid: int = PID) -> None:
        self.row(records.NEWTASK, tid, child, flags, 0x64_6C_69_68_63, 0)  # comm "child"

    def store(self, first: int, last: int, stored: bool = True) -> None:
        """The kernel stores a VMA of pages first..last from BASE on, or a hole, in its tree."""
        start, end = BASE + first * PAGE, BASE + (last + 1) * PAGE
        self.row(records.MA_WRITE, PID, start, end - 1, int(stored))

    def exit(self, tid: int = PID) -> None:
        self.row(records.EXIT, tid, tid)

    def end(self) -> list[Event]:
        """Feed what was written and return the events, the cache's left out."""
        self.exit(tid=PID)
        return self.events()

    def settle(self, over: bool | None, looked_ns: int = 0, fed_ns: int = 0) -> int | None:
        """Settle with this answer for all, looked at and fed up to so long after the last record.

        Return the last record of the oldest fault that may be over and is not told.
        """
        assert self.grammar.look(lambda _: over, lambda: self.now + looked_ns) is bool(over)
        self.grammar.settle(self.now + fed_ns)
        return self.grammar.unsettled_ns

    def events(self) -> list[Event]:
        rows, self.rows = self.rows, []
        self.grammar.feed(rows)
        return [
            e for e in expanded(self.output.take()) if not isinstance(e, CacheAdd | CacheDelete)
        ]


@pytest.fixture
def script() -> Script:
    made = Script()
    made.maps[PID] = list(DEFAULT)
    return made


def only(events: list[Event], kind: type) -> list[Event]:
    return [event for event in events if isinstance(event, kind)]


def faults(events: list[Event]) -> list[tuple[int, str]]:
    return [(event.index, event.verdict) for event in events if isinstance(event, Fault)]


# The records of one fault


def test_a_cached_read(script: Script) -> None:
    script.pf(BASE + 5 * PAGE + 17)
    script.map(0, 15)
    assert script.end() == [
        Map(2000, 1, PID, BASE, BASE + 32 * PAGE, FILE, 0, 3, False, True, fresh=False),
        Extent(2000, 1, BASE, BASE + 32 * PAGE),
        Fault(2000, 1, PID, PID, BASE + 5 * PAGE + 17, FILE, 5, False, False, True, False, MINOR,
              "trap"),
        Around(3000, 1, PID, BASE, FILE, 0, 15),
        Exit(4000, 1),
    ]  # fmt: skip


def test_a_cold_read_is_major_and_counts_once(script: Script) -> None:
    script.pf(BASE + 5 * PAGE)
    script.map(0, 15)  # a probe: it finds nothing to map
    script.fault(5)
    script.add(5)
    script.map(0, 15)
    events = script.end()
    assert faults(events) == [(5, MAJOR)]
    assert len(only(events, Around)) == 2
    assert script.unfollowed == {}


def test_a_cold_read_without_fault_around(script: Script) -> None:
    script.pf(BASE + 5 * PAGE)
    script.fault(5)
    script.add(5)
    script.fault(5)
    script.pf(BASE + 6 * PAGE)
    script.fault(6)
    assert faults(script.end()) == [(5, MAJOR), (6, MINOR)]


def test_readahead_of_other_pages_is_not_the_fault_s_own(script: Script) -> None:
    script.pf(BASE + 5 * PAGE)
    script.fault(5)
    script.add(6)
    script.add(7, order=2)
    assert faults(script.end()) == [(5, MINOR)]


def test_a_page_in_a_large_folio_was_added(script: Script) -> None:
    script.pf(BASE + 6 * PAGE)
    script.fault(6)
    script.add(4, order=2)
    script.fault(6)
    assert faults(script.end()) == [(6, MAJOR)]


def test_a_page_that_another_thread_reads_is_minor_however_long_it_waits(script: Script) -> None:
    script.pf(BASE + 5 * PAGE)
    script.fault(5)
    script.add(5, tid=555)
    script.fault(5)
    assert faults(script.end()) == [(5, MINOR)]


def test_a_second_retry_is_major(script: Script) -> None:
    script.pf(BASE)
    script.fault(0)
    script.fault(0)
    script.fault(0)
    assert faults(script.end()) == [(0, MAJOR)]


@pytest.mark.parametrize(
    ("error", "write", "execute", "protection"),
    [
        (USER, False, False, False),
        (USER | WRITE, True, False, False),
        (USER | FETCH, False, True, False),
        (USER | WRITE | PRESENT, True, False, True),
    ],
)
def test_the_error_code(
    script: Script, error: int, write: bool, execute: bool, protection: bool
) -> None:
    script.pf(BASE + PAGE, error)
    if not error & PRESENT:
        script.fault(1)
    (fault,) = only(script.end(), Fault)
    assert isinstance(fault, Fault)
    assert (fault.write, fault.execute, fault.protection) == (write, execute, protection)
    assert fault.user


def test_a_write_to_a_mapped_page_has_no_filemap_record(script: Script) -> None:
    script.pf(BASE + 3 * PAGE, USER)
    script.map(0, 15)
    script.pf(BASE + 3 * PAGE, USER | WRITE | PRESENT)
    script.pf(0x999000, USER)  # elsewhere: not the mount's
    assert [(f.index, f.write) for f in only(script.end(), Fault) if isinstance(f, Fault)] == [
        (3, False),
        (3, True),
    ]


def test_a_fault_that_the_kernel_takes_for_the_program(script: Script) -> None:
    script.pf(BASE, WRITE, kernel=True)
    script.fault(0)
    (fault,) = only(script.end(), Fault)
    assert isinstance(fault, Fault)
    assert (fault.user, fault.write, fault.origin) == (False, True, "trap")


def test_past_the_end_of_the_file(script: Script) -> None:
    script.pf(BASE + 31 * PAGE)
    script.row(records.SIGNAL, PID, 7, PID)
    assert faults(script.end()) == [(31, SIGBUS)]


@pytest.mark.parametrize(("first", "last"), [(20, 29), (30, 29)])
def test_past_the_end_after_a_probe_that_ended_with_the_file(
    script: Script, first: int, last: int
) -> None:
    touched(script, 0)
    script.pf(BASE + 31 * PAGE)
    script.map(first, last)
    script.row(records.SIGNAL, PID, 7, PID)
    events = script.end()
    assert faults(events) == [(0, MINOR), (31, SIGBUS)]
    assert len(only(events, Around)) == (1 if first <= last else 0)
    assert script.unfollowed == {}


def test_past_the_end_in_a_mapping_that_nothing_has_named(script: Script) -> None:
    """Beyond the end the kernel looks nothing up (filemap_fault): only the maps tell the file."""
    at = BASE + 1000 * PAGE
    script.mmap(at, 64, pgoff=4)
    script.maps[PID].append(MapsLine(at, at + 64 * PAGE, 3, False, 4, FILE))
    script.pf(at + 50 * PAGE + 1)
    script.row(records.SIGNAL, PID, 7, PID)
    assert faults(script.end()) == [(54, SIGBUS)]
    assert script.unfollowed == {}


def test_past_the_end_of_a_file_elsewhere_and_of_a_process_that_is_gone(script: Script) -> None:
    at = BASE + 1000 * PAGE
    script.mmap(at, 64)
    script.pf(at)
    script.row(records.SIGNAL, PID, 7, PID)
    script.pf(BASE)
    assert faults(script.events()) == []
    assert script.unfollowed == {}
    del script.maps[PID]
    script.pf(at)
    script.row(records.SIGNAL, PID, 7, PID)
    events = script.end()
    assert faults(events) == [(0, MINOR)]
    assert only(events, Unplaced) == [Unplaced(7000, 1, PID, PID, at, 0, "read", "user")]
    assert script.unfollowed == {"SIGBUS in a mapping that is not known": 1}


@pytest.mark.parametrize("opener", [True, False])
def test_of_a_process_that_is_gone_its_sigbus_is_told_if_it_is_the_mount_s(
    script: Script, opener: bool
) -> None:
    script.maps.clear()
    if opener:
        script.processes.openers.add(PID)
    script.mmap(BASE, 64, pgoff=4)
    script.pf(BASE + 3 * PAGE + 1, WRITE, kernel=True)
    script.row(records.SIGNAL, PID, 7, PID)
    wanted = Unplaced(4000, 1, PID, PID, BASE + 3 * PAGE + 1, 7, "write", "kernel")
    assert only(script.end(), Unplaced) == ([wanted] if opener else [])
    assert script.unfollowed == {"SIGBUS in a mapping that is not known": 1}
    assert script.processes.openers == set()


def test_a_trap_while_page_faults_are_disabled_maps_nothing(script: Script) -> None:
    """write(2) copies without faulting first, and if that fails faults in and copies again."""
    touched(script, 0)
    script.pf(BASE + 20 * PAGE + 4, READ, kernel=True)
    script.pf(BASE + 20 * PAGE + 4, READ, kernel=True)
    script.map(16, 31)
    events = script.end()
    assert faults(events) == [(0, MINOR), (20, MINOR)]
    last = only(events, Fault)[-1]
    assert isinstance(last, Fault)
    assert (last.time_ns, last.user) == (script.now - 2000, False)


def test_two_traps_on_a_page_are_two_faults_if_the_first_did_something(script: Script) -> None:
    touched(script, 0)
    script.pf(BASE + 20 * PAGE)
    script.map(16, 31)
    script.pf(BASE + 20 * PAGE)  # another thread has unmapped it
    script.map(16, 31)
    script.pf(BASE + 20 * PAGE, USER | WRITE | PRESENT)
    script.pf(BASE + 20 * PAGE, USER | WRITE | PRESENT)
    assert faults(script.end()) == [(0, MINOR), *[(20, MINOR)] * 4]


def test_another_thread_s_signal_ends_no_fault(script: Script) -> None:
    script.pf(BASE + 31 * PAGE)
    script.row(records.SIGNAL, PID, 7, 101)
    assert faults(script.end()) == [(31, MINOR)]


def test_two_threads_interleave(script: Script) -> None:
    script.people[101] = Identity(PID, 1, "prog")
    script.pf(BASE)
    script.pf(BASE + PAGE, tid=101)
    script.fault(0)
    script.fault(1, tid=101)
    script.add(1, tid=101)
    script.add(0)
    script.fault(1, tid=101)
    script.fault(0)
    script.exit(tid=101)
    events = script.end()
    assert sorted(faults(events)) == [(0, MAJOR), (1, MAJOR)]
    assert {fault.mm for fault in events if isinstance(fault, Fault)} == {1}
    assert len(only(events, Exit)) == 1


def test_a_fault_still_in_the_kernel_comes_later_once(script: Script) -> None:
    script.pf(BASE)
    script.fault(0)
    script.add(0)
    assert only(script.events(), Fault) == []
    assert script.settle(False) is None  # it waits for its page
    assert script.events() == []
    script.fault(0)
    events = script.events()
    assert script.settle(None) == script.now  # it runs
    assert only(events + script.events(), Fault) == []
    assert script.settle(True) is None
    assert faults(script.events()) == [(0, MAJOR)]
    assert faults(script.end()) == []


def test_no_time_ends_a_fault_whose_thread_stands_still(script: Script) -> None:
    """Between the look-up and the page's coming into the cache: what came next is known then."""
    script.pf(BASE)
    script.fault(0)
    script.events()
    script.now += 3_600_000_000_000
    script.settle(None)
    script.now += 3_600_000_000_000
    script.settle(None)
    assert only(script.events(), Fault) == []
    script.add(0)
    script.map(0, 0)
    assert faults(script.end()) == [(0, MAJOR)]
    assert script.unfollowed == {}


def test_what_proc_says_is_of_later_than_the_records(script: Script) -> None:
    """Found over, but what it did between the last record read and the look is still to come."""
    script.pf(BASE)
    script.fault(0)
    script.events()
    assert script.settle(True, looked_ns=10_000) == script.now, "not read up to the look yet"
    script.add(0)
    script.fault(0)
    assert only(script.events(), Fault) == []
    assert script.settle(True, looked_ns=10_000, fed_ns=10_000) is None
    assert faults(script.events()) == [(0, MAJOR)]
    assert script.unfollowed == {}


def test_a_fault_that_is_over_comes_before_what_took_its_page(script: Script) -> None:
    script.pf(BASE)
    script.fault(0)
    script.row(records.CACHE_DELETE, 3, DEV, FILE, 0, 0)
    script.grammar.feed(script.rows)
    assert script.settle(True) is None
    kinds = [type(event) for event in expanded(script.output.take())]
    assert kinds.index(Fault) < kinds.index(CacheDelete)
    assert Cloud not in kinds


@pytest.mark.parametrize(
    ("record", "crossed"), [("delete", True), ("other", False), ("zap", True), ("again", False)]
)
def test_a_fault_told_after_what_may_have_taken_its_page(
    script: Script, record: str, crossed: bool
) -> None:
    """Whether its PTE came before and went, or came after, no record tells."""
    script.newtask(101, 0x100 | 0x10000)
    script.pf(BASE + PAGE)
    script.fault(1)
    if record == "zap":
        script.call("madvise", BASE, 2 * PAGE, 4, tid=101)
    else:
        script.row(records.CACHE_DELETE, 3, DEV, FILE, 2 if record == "other" else 0, 0)
        script.row(records.CACHE_DELETE, 3, DEV, FILE, 3 if record == "other" else 1, 0)
    events = script.events()
    assert script.settle(None) is not None
    if record == "again":
        script.add(1)
        script.fault(1)
    events += script.end()
    clouds = [event.why for event in events if isinstance(event, Cloud)]
    assert clouds == ([CROSSED] if crossed else [])


def test_a_thread_that_went_on_to_a_system_call_has_left_its_fault(script: Script) -> None:
    script.pf(BASE)
    script.map(0, 15)
    script.events()
    script.settle(True)
    assert faults(script.events()) == [(0, MINOR)]


def test_lost_records_end_what_is_open_and_are_told(script: Script) -> None:
    script.pf(BASE)
    script.fault(0)
    script.row(records.LOST, 0, 12)
    script.pf(BASE + PAGE)
    script.fault(1)
    events = script.end()
    assert only(events, Lost) == [Lost(4000, 12)]
    assert faults(events) == [(0, MINOR), (1, MINOR)]


def test_who_lived_when_records_were_lost_is_marked(script: Script) -> None:
    """Also who is told of later only, and who was born then; not who came after."""
    script.maps = {200: [], 300: []}
    script.people |= {tid: Identity(tid, 1, "prog") for tid in (200, 300)}
    script.pf(BASE)
    script.fault(0)
    script.pf(0x1000, tid=200)  # lives, and has not touched the mount yet
    script.row(records.LOST, 0, 12)
    script.row(records.LOST, 0, 3)
    script.newtask(400)
    script.pf(0x1000, tid=300)  # born unseen
    marked = {200: 2, 300: 4, 400: None}
    told = script.end()
    assert only(told, Incomplete) == [Incomplete(5000, 1, PID)]
    for tid, mm in marked.items():
        space = script.processes.threads[tid].space
        script.processes.tell(script.now, space, Vma(0x70000, 0x78000, ino=FILE, pgoff=0))
        marks = [] if mm is None else [Incomplete(script.now, mm, tid)]
        assert only(script.events(), Incomplete) == marks


def test_the_page_cache_is_told_whoever_changes_it(script: Script) -> None:
    script.row(records.CACHE_ADD, 3, DEV, FILE, 8, 2)
    script.row(records.CACHE_DELETE, 4, DEV, FILE, 8, 0)
    script.grammar.feed(script.rows)
    assert script.output.take() == [CacheAdd(2000, FILE, 8, 4), CacheDelete(3000, FILE, 8, 1)]


# Whose mapping it is


def test_a_mapping_is_known_by_its_first_fault(script: Script) -> None:
    script.maps[PID] = []
    script.mmap(0x50000, 8, SHARED, pgoff=16, prot=1)
    script.pf(0x50000 + 3 * PAGE)
    script.fault(19)
    events = script.end()
    assert only(events, Map) == [
        Map(4000, 1, PID, 0x50000, 0x58000, FILE, 16, 1, True, True),
    ]
    assert faults(events) == [(19, MINOR)]


def test_a_mapping_of_another_file_is_never_told(script: Script) -> None:
    script.maps[PID] = []
    script.mmap(0x50000, 8)
    script.pf(0x50000)
    assert script.end() == []


def test_a_mapping_that_exec_made(script: Script) -> None:
    """Only its range is known; the first fault names file and offset, the window the page."""
    script.pf(BASE)
    script.fault(0)
    script.row(records.PREPARE_EXEC, PID, PID)
    script.row(records.MA_WRITE, PID, 0x400000, 0x40FFFF, 0xFFFF8880)
    script.row(records.MA_WRITE, PID, 0x408000, 0x40FFFF, 0)
    script.row(records.EXEC, PID, PID, PID)
    script.maps[PID] = []
    script.pf(0x402123, USER | FETCH)
    script.map(9, 15, ino=8)
    events = script.end()
    assert only(events, Exit)[0] == Exit(4000, 1)
    maps = only(events, Map)
    # The window starts at the mapping's start, two pages below the fault: page 9 lies there.
    assert maps[1] == Map(8000, 2, PID, 0x400000, 0x408000, 8, 9, 5, False, False)
    (fault,) = [f for f in events if isinstance(f, Fault) and f.mm == 2]
    assert (fault.ino, fault.index, fault.execute) == (8, 11, True)


def test_the_protection_of_exec_s_mapping_grows_with_what_its_faults_need(script: Script) -> None:
    script.row(records.PREPARE_EXEC, PID, PID)
    script.row(records.MA_WRITE, PID, 0x400000, 0x40FFFF, 1)
    script.row(records.EXEC, PID, PID, PID)
    script.pf(0x400000)
    script.fault(0)
    script.pf(0x401000, USER | WRITE)
    script.fault(1)
    assert only(script.end(), Protect) == [Protect(7000, 2, 0x400000, 0x410000, 3)]


def test_another_thread_s_exec_ends_the_process_s_threads(script: Script) -> None:
    script.people[101] = Identity(PID, 1, "prog")
    script.pf(BASE)
    script.fault(0)
    script.pf(BASE + PAGE, tid=101)
    script.fault(1, tid=101)
    script.row(records.PREPARE_EXEC, 101, 101)
    script.exit(PID)  # the leader, whose id the caller takes
    script.row(records.MA_WRITE, PID, 0x400000, 0x40FFFF, 1)
    script.row(records.EXEC, PID, PID, 101)
    script.pf(0x400000)
    script.fault(0)
    events = script.end()
    assert [event.mm for event in events if isinstance(event, Fault)] == [1, 1, 2]
    assert [event.mm for event in events if isinstance(event, Exit)] == [1, 2]


def test_exec_after_the_leader_has_gone(script: Script) -> None:
    """The leader's own exit came before: the next one under its id is the new program's."""
    script.people[101] = Identity(PID, 1, "prog")
    script.pf(BASE)
    script.fault(0)
    script.pf(BASE + PAGE, tid=101)
    script.fault(1, tid=101)
    script.exit(PID)
    script.row(records.PREPARE_EXEC, 101, 101)
    script.row(records.MA_WRITE, PID, 0x400000, 0x40FFFF, 1)
    script.row(records.EXEC, PID, PID, 101)
    script.pf(0x400000)
    script.fault(0)
    events = script.end()
    assert [event.mm for event in events if isinstance(event, Exit)] == [1, 2]
    assert not script.processes.threads


def test_a_first_fault_that_nothing_closed_is_known_to_other_threads(script: Script) -> None:
    """Thread 101 computes on after its fault while its leader forks and unmaps."""
    script.maps.clear()
    script.mmap(BASE, 32)
    script.newtask(101, 0x10100)
    script.pf(BASE, tid=101)
    script.map(0, 15, tid=101)
    script.newtask(200)
    script.call("munmap", BASE, 32 * PAGE)
    script.exit(101)
    kinds = [type(event) for event in script.end()]
    assert kinds == [Map, Fault, Around, Fork, Unmap, ThreadExit, Exit]


def test_gup_after_a_foreign_fault_is_not_taken_for_it(script: Script) -> None:
    """A fault in a library's mapping, then an O_DIRECT read into the mount's: no system call."""
    script.mmap(0x900000, 16, pgoff=3)
    script.pf(0x901000)
    script.fault(9)
    script.pf(0x902000)
    script.map(8, 20)
    events = script.end()
    found = [event for event in events if isinstance(event, Fault)]
    assert [(f.address, f.index, f.origin) for f in found] == [
        (BASE + 9 * PAGE, 9, GUP),
        (BASE + 8 * PAGE, 8, GUP),
    ]
    assert [event.start for event in events if isinstance(event, Map)] == [BASE]
    assert script.unfollowed == {}


def test_untraced_cold_reads_in_one_window(script: Script) -> None:
    """The probe says only the window; the look-up after it says the page."""
    script.people[200] = Identity(200, 1, "other")
    script.maps[200] = [MapsLine(0x70000, 0x80000, 1, True, 0, FILE)]
    for index in (0, 1, 2):
        script.map(0, 15, tid=200)
        script.fault(index, tid=200)
        script.add(index, tid=200)
        script.map(0, 15, tid=200)
    script.exit(200)
    found = [event for event in script.events() if isinstance(event, Fault)]
    assert [(f.address, f.index, f.verdict) for f in found] == [
        (0x70000, 0, MAJOR),
        (0x71000, 1, MAJOR),
        (0x72000, 2, MAJOR),
    ]


def test_threads_whose_end_was_not_seen_are_ended(script: Script) -> None:
    """Untraced ones make no exit record, and after a loss any may be missing."""
    script.people[200] = Identity(200, 1, "other")
    script.maps[200] = [MapsLine(0x70000, 0x78000, 1, True, 4, FILE)]
    script.fault(6, tid=200)
    script.pf(BASE)
    script.fault(0)
    script.grammar.feed(script.rows)
    script.rows.clear()
    del script.people[PID]
    script.grammar.bury(script.now)
    assert only(script.events(), Exit) == []
    del script.people[200]
    script.grammar.bury(script.now)
    assert only(script.events(), Exit) == [Exit(script.now, 1)]
    script.row(records.LOST, 0, 1)
    script.events()
    script.grammar.bury(script.now)
    assert only(script.events(), Exit) == [Exit(script.now, 2)]
    assert not script.processes.threads


def test_a_descriptor_that_was_passed_on_is_seen_untraced(script: Script) -> None:
    script.people[200] = Identity(200, 1, "other")
    script.maps[200] = [MapsLine(0x70000, 0x78000, 1, True, 4, FILE)]
    script.fault(6, tid=200)
    script.exit(tid=200)
    events = script.events()
    (fault,) = only(events, Fault)
    assert isinstance(fault, Fault)
    assert (fault.address, fault.index, fault.origin) == (0x72000, 6, UNTRACED)
    assert script.processes.newcomers == [200]


def test_a_process_taken_in_while_it_runs(script: Script) -> None:
    lines = [MapsLine(0x70000, 0x78000, 1, True, 4, FILE)]
    script.adoptions[9] = Adoption(1500, Identity(300, 1, "late"), frozenset({300, 301}), lines)
    script.row(records.ADOPT, 0, 9)
    script.pf(0x71000, tid=301)
    script.map(4, 7, tid=301)
    script.exit(301)
    events = script.events()
    (fault,) = only(events, Fault)
    assert isinstance(fault, Fault)
    assert (fault.pid, fault.tid, fault.index) == (300, 301, 5)
    assert script.processes.comms[300] == "late"


def test_gup_finds_the_page_where_it_is_mapped(script: Script) -> None:
    script.fault(12)
    (fault,) = only(script.end(), Fault)
    assert isinstance(fault, Fault)
    assert (fault.address, fault.index, fault.origin) == (BASE + 12 * PAGE, 12, UNTRACED)
    script = Script()
    script.maps[PID] = list(DEFAULT)
    script.pf(0x999000)
    script.fault(12)
    script.fault(13)
    found = [f for f in script.end() if isinstance(f, Fault)]
    assert [(f.index, f.origin) for f in found][-1] == (13, GUP)


# System calls


def touched(script: Script, *pages: int) -> None:
    for page in pages:
        script.pf(BASE + page * PAGE)
        script.fault(page)


def test_a_populating_mmap_is_told_with_its_address(script: Script) -> None:
    script.enter("mmap", 0, 4 * PAGE, SHARED | POPULATED, 8 * PAGE, 1)
    for page in range(8, 12):
        script.fault(page)
        script.add(page)
        script.fault(page)
    script.leave("mmap", 0x50000)
    found = [f for f in script.end() if isinstance(f, Fault)]
    assert [(f.address, f.index, f.origin) for f in found] == [
        (0x50000 + i * PAGE, 8 + i, POPULATE) for i in range(4)
    ]
    assert not any(f.write for f in found)


def test_mlock_walks_its_range(script: Script) -> None:
    touched(script, 0)
    script.enter("mlock", BASE + 4 * PAGE, 2 * PAGE)
    script.fault(4)
    script.fault(5)
    script.leave("mlock")
    found = [f for f in script.end() if isinstance(f, Fault)][1:]
    assert [(f.index, f.origin, f.write) for f in found] == [
        (4, POPULATE, True),  # private and writable: COW is broken beforehand
        (5, POPULATE, True),
    ]


Change = Callable[[Script], None]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.call("munmap", BASE + 2 * PAGE, 3 * PAGE),
         [Unmap(5000, 1, BASE + 2 * PAGE, BASE + 5 * PAGE)]),
        (lambda s: s.call("munmap", BASE, PAGE, result=-22), []),
        (lambda s: s.call("munmap", 0x900000, PAGE), []),
        (lambda s: s.mmap(BASE + 30 * PAGE, 4, PRIVATE | ANONYMOUS),
         [Unmap(5000, 1, BASE + 30 * PAGE, BASE + 34 * PAGE)]),
        (lambda s: s.call("mprotect", BASE, 2 * PAGE, 1),
         [Protect(5000, 1, BASE, BASE + 2 * PAGE, 1)]),
        (lambda s: s.call("madvise", BASE, 100, 4), [Zap(5000, 1, BASE, BASE + PAGE)]),
        (lambda s: s.call("madvise", BASE, PAGE, 4, result=-12), [Zap(5000, 1, BASE, BASE + PAGE)]),
        (lambda s: s.call("madvise", BASE, PAGE, 4, result=-22), []),
        (lambda s: s.call("madvise", BASE, PAGE, 1), []),
        # mremap: moved, grown where it is, grown elsewhere, shrunk, kept (DONTUNMAP).
        (lambda s: s.call("mremap", BASE, 32 * PAGE, 40 * PAGE, 1, result=0x900000),
         [Move(5000, 1, BASE, BASE + 32 * PAGE, 0x900000, 0x900000 + 40 * PAGE, False)]),
        (lambda s: s.call("mremap", BASE, 32 * PAGE, 40 * PAGE, 1, result=BASE),
         [Move(5000, 1, BASE, BASE + 32 * PAGE, BASE, BASE + 40 * PAGE, False)]),
        (lambda s: s.call("mremap", BASE, 32 * PAGE, 30 * PAGE, 1, result=BASE),
         [Unmap(5000, 1, BASE + 30 * PAGE, BASE + 32 * PAGE)]),
        (lambda s: s.call("mremap", BASE + PAGE, 2 * PAGE, 2 * PAGE, 5, result=0x900000),
         [Move(5000, 1, BASE + PAGE, BASE + 3 * PAGE, 0x900000, 0x902000, True)]),
        (lambda s: s.call("mremap", BASE, 32 * PAGE, 40 * PAGE, 0, result=-12), []),
    ],
    ids=[
        "munmap", "munmap fails", "munmap elsewhere", "mmap over", "mprotect", "dontneed",
        "dontneed over a hole", "dontneed fails", "random", "move", "grow", "shrink", "dontunmap",
        "mremap fails",
    ],
)  # fmt: skip
def test_what_a_call_does_to_a_mapping(
    script: Script, change: Change, expected: list[Event]
) -> None:
    touched(script, 0)
    change(script)
    events = script.end()
    kinds = (Unmap, Protect, Zap, Move)
    assert [event for event in events if isinstance(event, kinds)] == expected


def test_faults_after_a_move_lie_at_the_new_place(script: Script) -> None:
    touched(script, 0)
    script.call("mremap", BASE + 8 * PAGE, 4 * PAGE, 4 * PAGE, 1, result=0x900000)
    script.pf(0x902000, USER | WRITE | PRESENT)
    script.pf(BASE + 8 * PAGE, USER | WRITE | PRESENT)  # nothing of the mount is there any more
    script.pf(BASE + 12 * PAGE, USER | WRITE | PRESENT)
    assert faults(script.end()) == [(0, MINOR), (10, MINOR), (12, MINOR)]


def test_what_is_not_followed_is_named(script: Script) -> None:
    touched(script, 0)
    script.call("remap_file_pages", BASE + 8 * PAGE, PAGE)
    script.call("madvise", BASE, PAGE, 21)
    script.call("madvise", BASE, PAGE, 77)
    script.call("mprotect", BASE, PAGE, 1, result=-13)
    script.leave("munmap")
    script.end()
    assert dict(script.unfollowed) == {
        "remap_file_pages": 1,
        "MADV_PAGEOUT": 1,
        "madvise advice 77": 1,
        "mprotect that failed half way": 1,
        "a system call seen only at its end": 1,
    }


@pytest.mark.parametrize(
    ("call", "arguments", "changing"),
    [
        ("madvise", (BASE + 4 * PAGE, PAGE, 4), True),
        ("munmap", (BASE - PAGE, 2 * PAGE), True),
        ("munmap", (BASE - PAGE, PAGE), False),
        ("madvise", (BASE + 32 * PAGE, PAGE, 4), False),
        ("mmap", (BASE + 31 * PAGE, 1, PRIVATE | ANONYMOUS, 0, 3), True),
        ("mmap", (0, 16 * PAGE, PRIVATE, 0, 3), False),
        # It may move to anywhere; these name no range at all.
        ("mremap", (BASE - PAGE, PAGE, PAGE, 3), True),
        ("mlockall", (), True),
        ("remap_file_pages", (BASE, PAGE), True),
    ],
)
def test_a_call_over_what_was_told_is_a_change_until_it_returns(
    script: Script, call: str, arguments: tuple[int, ...], changing: bool
) -> None:
    script.enter(call, *arguments)
    script.events()
    assert script.grammar.changing() == frozenset(), "nothing was told yet"
    script.leave(call, -22)
    script.pf(BASE)
    script.map(0, 15)
    script.events()
    assert script.grammar.changing() == frozenset({1}), "a fault is one, too"
    script.settle(True)
    assert script.grammar.changing() == frozenset()
    script.enter(call, *arguments)
    script.events()
    assert script.grammar.changing() == frozenset({1} if changing else ())
    script.leave(call, -22)
    script.events()
    assert script.grammar.changing() == frozenset()


@pytest.mark.parametrize("end", ["exit", "lost"])
def test_a_call_that_never_returns_is_no_change_for_ever(script: Script, end: str) -> None:
    script.newtask(101, 0x100 | 0x10000)
    touched(script, 0)
    script.call("munlock", 0, PAGE)
    script.enter("munmap", BASE, 32 * PAGE, tid=101)
    script.events()
    assert script.grammar.changing() == frozenset({1})
    if end == "exit":
        script.exit(101)
    else:
        script.row(records.LOST, 0, 12)
    script.events()
    assert script.grammar.changing() == frozenset()


def test_of_a_call_seen_only_at_its_end_nothing_is_known(script: Script) -> None:
    script.pf(BASE)
    script.map(0, 15)
    script.enter("munmap", BASE, PAGE)
    script.row(records.LOST, 0, 12)
    script.leave("munmap")
    assert only(script.end(), Doubt) == [Doubt(6000, 1, BASE, BASE + 32 * PAGE)]


# Processes


def test_fork_copies_what_was_told(script: Script) -> None:
    touched(script, 0)
    script.call("madvise", BASE + 4 * PAGE, PAGE, 10)  # MADV_DONTFORK
    script.newtask(101)
    script.pf(BASE, USER | WRITE | PRESENT, tid=101)
    script.exit(101)
    script.pf(BASE, USER | WRITE | PRESENT)
    events = script.end()
    hole = (BASE + 4 * PAGE, BASE + 5 * PAGE)
    assert only(events, Fork) == [Fork(6000, 1, 2, PID, 101, (hole,))]
    assert [(f.mm, f.pid) for f in events if isinstance(f, Fault)] == [(1, 100), (2, 101), (1, 100)]
    assert [event.mm for event in events if isinstance(event, Exit)] == [2, 1]
    assert len(only(events, Map)) == 1
    assert script.processes.comms[101] == "child"


def test_a_library_says_that_it_has_registered(script: Script) -> None:
    script.call("madvise", 0, 0, 0x78697066, result=-22)
    events = script.end()
    assert only(events, Registered) == [Registered(3000, 1, PID)]
    assert only(events, Exit) == [Exit(4000, 1)], "nothing was mapped, but its end matters"
    assert script.unfollowed == {}


def test_what_descends_from_a_followed_process_is_known_until_it_is_forgotten(
    script: Script,
) -> None:
    roots = script.processes.roots
    roots |= {PID: PID, 102: 999}
    script.newtask(101)
    script.newtask(103, tid=101)
    script.newtask(104, 0x100 | 0x10000)  # a thread: no process of its own
    script.newtask(102)
    script.newtask(105, tid=200)
    script.exit(101)
    script.events()
    assert roots == {PID: PID, 101: PID, 102: PID, 103: PID}
    later = script.now + 3_000_000_000
    script.processes.forget_dead(later)
    assert 101 in roots, "the events of this drain are still to be asked about"
    script.processes.forget_dead(later)
    assert roots == {PID: PID, 102: PID, 103: PID}


def test_threads_and_vfork_share_the_address_space(script: Script) -> None:
    touched(script, 0)
    script.newtask(101, 0x100 | 0x10000)
    script.newtask(102, 0x100)
    for tid in (101, 102):
        script.pf(BASE + PAGE, tid=tid)
        script.fault(1, tid=tid)
        script.exit(tid)
    events = script.end()
    assert only(events, Fork) == []
    assert [(f.mm, f.pid, f.tid) for f in events if isinstance(f, Fault)] == [
        (1, 100, 100),
        (1, 100, 101),
        (1, 102, 102),
    ]
    assert len(only(events, Exit)) == 1


def test_a_number_used_again_is_another_process(script: Script) -> None:
    touched(script, 0)
    script.newtask(101)
    script.exit(101)
    script.newtask(101)
    script.pf(BASE, USER | WRITE | PRESENT, tid=101)
    script.exit(101)
    events = script.end()
    assert [fork.child_mm for fork in events if isinstance(fork, Fork)] == [2, 3]
    assert [f.mm for f in events if isinstance(f, Fault)] == [1, 3]


def test_an_address_space_without_the_mount_leaves_no_trace(script: Script) -> None:
    script.maps[PID] = []
    script.newtask(101)
    script.mmap(0x50000, 4, PRIVATE | ANONYMOUS)
    script.pf(0x50000)
    script.exit(101)
    assert script.end() == []
    assert script.unfollowed == {}


def test_a_mapping_that_disagrees_is_mended_and_named(script: Script) -> None:
    touched(script, 0)
    events = script.events()
    script.maps[PID] = []
    script.pf(BASE + PAGE)
    script.fault(3, ino=9)  # another file lies there
    script.pf(BASE + 2 * PAGE)
    events += script.end()
    assert [(f.ino, f.index) for f in events if isinstance(f, Fault)] == [(FILE, 0), (9, 3)]
    assert script.unfollowed["mapping disagreed with the shadow"] == 1


# The kernel's own VMAs


def extents(events: list[Event]) -> list[tuple[int, int]]:
    """Return the extents told, as first and last page from BASE on."""
    return [
        (event.start - BASE >> 12, (event.end - BASE >> 12) - 1)
        for event in events
        if isinstance(event, Extent)
    ]


def test_the_kernel_s_vmas_are_told_as_they_split_and_merge(script: Script) -> None:
    script.maps.clear()
    script.mmap(BASE, 16)
    script.store(0, 15)
    touched(script, 0)
    script.enter("mprotect", BASE + 4 * PAGE, 4 * PAGE, 1)
    script.store(4, 7)
    script.store(8, 15)
    script.leave("mprotect")
    script.enter("mprotect", BASE + 4 * PAGE, 4 * PAGE, 3)
    script.store(0, 15)
    script.leave("mprotect")
    assert extents(script.end()) == [(0, 15), (4, 7), (8, 15), (0, 15)]


def test_a_mapping_that_replaces_another_goes_first(script: Script) -> None:
    """mmap stores before it returns; what it puts away is told before what it puts there."""
    script.maps.clear()
    script.mmap(BASE, 16)
    script.store(0, 15)
    touched(script, 0)
    script.enter("mmap", BASE + 4 * PAGE, 4 * PAGE, PRIVATE, 0, 3)
    script.store(2, 7)
    script.leave("mmap", BASE + 4 * PAGE)
    told = [event for event in script.end() if isinstance(event, Unmap | Extent)]
    assert told == [
        Extent(5000, 1, BASE, BASE + 16 * PAGE),
        Unmap(9000, 1, BASE + 4 * PAGE, BASE + 8 * PAGE),
        Extent(9000, 1, BASE + 2 * PAGE, BASE + 8 * PAGE),
    ]


def test_what_fork_stores_is_the_child_s(script: Script) -> None:
    touched(script, 0)
    script.store(0, 3)
    script.store(8, 31, stored=False)
    script.newtask(101)
    script.pf(BASE + 9 * PAGE)
    script.fault(9)
    events = script.end()
    assert only(events, Unmap) == []
    assert extents(events) == [(0, 31)]
    assert script.unfollowed == {}


def test_a_call_without_events_is_read_from_proc(script: Script) -> None:
    """As a 32-bit call of a 64-bit program is: its store belongs to no call that was seen."""
    touched(script, 0)
    told = script.events()
    script.maps[PID] = [
        MapsLine(BASE, BASE + 4 * PAGE, 3, False, 0, FILE),
        MapsLine(BASE + 12 * PAGE, BASE + 32 * PAGE, 3, False, 12, FILE),
    ]
    script.store(12, 31)
    script.pf(BASE + 13 * PAGE)
    script.fault(13)
    events = told + script.end()
    assert only(events, Unmap) == [Unmap(5000, 1, BASE + 4 * PAGE, BASE + 12 * PAGE)]
    assert script.unfollowed == {"mapping changed by a call that is not seen": 1}


def test_remap_file_pages_is_read_from_proc(script: Script) -> None:
    """Page 4 shows page 20 of the file from then on; what it populated was told of nowhere."""
    touched(script, 0)
    told = script.events()
    at = BASE + 4 * PAGE
    script.maps[PID] = [
        MapsLine(BASE, at, 3, True, 0, FILE),
        MapsLine(at, at + PAGE, 3, True, 20, FILE),
        MapsLine(at + PAGE, BASE + 32 * PAGE, 3, True, 5, FILE),
    ]
    # The kernel takes whole pages of the size.
    script.call("remap_file_pages", at, PAGE + 100)
    script.pf(at)
    script.fault(20)
    events = told + script.end()
    assert only(events, Unmap) == [Unmap(5000, 1, at, at + PAGE)]
    *_, last = only(events, Map)
    assert isinstance(last, Map)
    assert (last.start, last.end, last.pgoff, last.fresh) == (at, at + PAGE, 20, False)
    assert script.unfollowed == {"remap_file_pages": 1}


@pytest.mark.parametrize("target", [PID, 0])
def test_memory_that_others_get_at_is_in_doubt_and_changing_until_they_have_done(
    script: Script, target: int
) -> None:
    """0: the target of a process_madvise, which anybody's may be."""
    touched(script, 0)
    script.events()
    script.settle(True)
    script.events()
    script.row(records.FOREIGN_ENTER, 500, target)
    clouds = only(script.events(), Cloud)
    assert script.grammar.changing() == frozenset({1})
    script.row(records.FOREIGN_EXIT, 500, 0)
    clouds += only(script.events(), Cloud)
    assert clouds == [Cloud(4000, 1, FOREIGN), Cloud(5000, 1, FOREIGN)]
    assert script.grammar.changing() == frozenset()


@pytest.mark.parametrize(
    ("call", "over"),
    [("101 0x4 0x1 0x2", False), ("running", False), ("230 0x0", True), ("", True)],
)
def test_after_a_loss_proc_tells_whether_a_call_on_others_memory_is_over(
    script: Script, monkeypatch: pytest.MonkeyPatch, call: str, over: bool
) -> None:
    """Its end may be among the lost records; what its thread does later is its own."""
    monkeypatch.setattr("xipfs.trace.grammar._FOREIGN_CALLS", {"101"})
    touched(script, 0)
    script.row(records.FOREIGN_ENTER, 500, PID)
    script.events()
    script.calls[500] = "230 0x0"
    script.grammar.bury(script.now)
    assert script.grammar.changing() == frozenset({1}), "nothing was lost: there will be a record"
    script.row(records.LOST, 0, 7)
    script.events()
    script.calls[500] = call
    script.grammar.bury(script.now)
    assert script.grammar.changing() == (frozenset() if over else frozenset({1}))
    assert len(only(script.events(), Cloud)) == over
    script.row(records.FOREIGN_EXIT, 500, 0)
    assert len(only(script.events(), Cloud)) == (not over)
    assert script.grammar.changing() == frozenset()


def test_after_a_loss_mappings_are_what_proc_says(script: Script) -> None:
    touched(script, 0)
    told = script.events()
    script.maps[PID] = [
        MapsLine(BASE, BASE + 4 * PAGE, 3, False, 0, FILE),
        MapsLine(BASE + 8 * PAGE, BASE + 32 * PAGE, 3, False, 9, FILE),  # another piece of the file
    ]
    script.row(records.LOST, 0, 7)
    script.pf(BASE + 9 * PAGE)
    script.fault(10)
    events = told + script.end()
    assert only(events, Unmap) == [Unmap(4000, 1, BASE + 4 * PAGE, BASE + 32 * PAGE)]
    assert faults(events) == [(0, MINOR), (10, MINOR)]
    assert script.unfollowed == {}


def test_nothing_is_claimed_of_a_32_bit_program(script: Script) -> None:
    script.people[PID] = Identity(PID, 1, "prog", compat=True)
    touched(script, 0)
    script.newtask(101)
    assert only(script.end(), Doubt) == [Doubt(2000, 1, 0, 1 << 64, calls_unseen=True)]


def test_a_probe_maps_the_neighbours_before_the_fault_s_own_io_is_over(script: Script) -> None:
    """Another thread can meet them while page 3 is read."""
    script.pf(BASE + 3 * PAGE)
    script.map(0, 15)
    script.fault(3)
    script.add(3)
    assert only(script.events(), Around) == [Around(3000, 1, PID, BASE, FILE, 0, 15)]
    script.map(0, 15)
    assert only(script.end(), Around) == [Around(6000, 1, PID, BASE, FILE, 0, 15)]
