"""The model under random programs: hypothesis looks for a command file that breaks an invariant.

Every rule of the machine below is one operation of the command language, run by the executor that
runs command files, so whatever hypothesis shrinks a failure to is a command file; it is printed
with the failure. After each step the machine is recounted (T1 to T9) and failed calls must have
changed nothing (T11); see ``mmworld``. Runs are the same each time: another seed is taken from
XIPFS_TEST_SEED, and ``XIPFS_TEST_SEED=N pytest tests/t2_machine.py -k RULES`` repeats it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from mmworld import DEVICE_PAGES, PROCESSES, World

from xipfs.cli import main
from xipfs.mm import InvariantError, MmStruct, audit, zap
from xipfs.mm.oracle.bench import Process
from xipfs.mm.oracle.command_file import read_command_file
from xipfs.mm.rmap import page_remove_rmap
from xipfs.mm.rules import Rules, rule_set_names

SEED = int(os.environ.get("XIPFS_TEST_SEED", "20080328"))
EXAMPLES = int(os.environ.get("XIPFS_TEST_EXAMPLES", "40"))
STEPS = 40
MAX_LABELS = 6

PROTS = st.sampled_from(["rw", "r", "rw", "none"])
ADVICE = st.sampled_from(
    [
        *("MADV_DONTNEED", "MADV_PAGEOUT", "MADV_COLD", "MADV_FREE", "MADV_REMOVE"),
        *("MADV_DONTFORK", "MADV_DOFORK", "MADV_WIPEONFORK", "MADV_POPULATE_READ"),
        *("MADV_POPULATE_WRITE", "MADV_DONTNEED_LOCKED", "MADV_WILLNEED", "MADV_MERGEABLE"),
    ]
)
SETTINGS = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
#: Numbers that choose among what there is now: taken modulo its count, so that they shrink to 0.
CHOICE = st.integers(0, 11)
PAGE = st.integers(0, DEVICE_PAGES + 1)
PAGES = st.integers(1, 6)
GUP = st.sampled_from(["get_user_pages", "get_user_pages_fast", "pin_user_pages_fast"])
REMOTE = st.sampled_from(["process_vm_readv", "proc_mem_read", "pipe_write", "read_into"])


class MmMachine(RuleBasedStateMachine):
    """Processes, mappings and files of one rule set; subclasses say which."""

    rule_set: Rules

    def __init__(self) -> None:
        super().__init__()
        self.world: World

    @initialize(
        short=st.booleans(), swap=st.booleans(),
        first=st.lists(st.tuples(CHOICE, st.booleans()), max_size=5),
        touches=st.lists(st.tuples(CHOICE, PAGE, st.booleans()), max_size=16),
    )  # fmt: skip
    def boot(
        self, short: bool, swap: bool, first: list[tuple[int, bool]],
        touches: list[tuple[int, int, bool]],
    ) -> None:  # fmt: skip
        """Make the machine, map a few things and use them, so that there is something to break.

        A machine that is short of memory has 3 anonymous pages.
        """
        self.world = World(self.rule_set, anon_pages=3 if short else 4096, swap=swap)
        for what, shared in first:
            self.map_object(0, what, 0, 4 if short else 8, "rw", shared)
        for label, page, write in touches:
            self.touch(0, label, page, write)

    def teardown(self) -> None:
        if hasattr(self, "world") and not self.world.failed:
            self.world.finish()

    def process(self, number: int) -> tuple[str, Process]:
        alive = list(self.world.bench.processes.items())
        return alive[number % len(alive)]

    def mapped(self, who: int, number: int) -> tuple[str, str, int] | None:
        """Return a process, one of its labels, and how many pages that has; None without any."""
        name, process = self.process(who)
        labels = list(process.labels.items())
        if not labels:
            return None
        label, mapping = labels[number % len(labels)]
        return name, label, mapping.pages

    def on_page(self, who: int, label: int, page: int, name: str, **arguments: Any) -> None:
        """Run an operation on one page of a mapping, if there is a mapping."""
        found = self.mapped(who, label)
        if found is not None:
            at = page % found[2]
            self.world.do(found[0], name, map=found[1], page=at, **arguments)

    def on_range(
        self, who: int, label: int, page: int, pages: int, name: str, **arguments: Any
    ) -> None:
        """Run an operation on a few pages of a mapping, which may reach beyond its end."""
        found = self.mapped(who, label)
        if found is not None:
            at = page % found[2]
            self.world.do(found[0], name, map=found[1], page=at, pages=pages, **arguments)

    @property
    def alive(self) -> bool:
        return bool(self.world.bench.processes)

    def map_object(
        self, who: int, what: int, first: int, pages: int, prot: str, shared: bool,
        extra: str = "", read_only: bool = False,
    ) -> None:  # fmt: skip
        """mmap one of the objects, or anonymous memory."""
        name, process = self.process(who)
        if len(process.labels) >= MAX_LABELS:
            return
        names: list[str | None] = [*self.world.header["objects"], None]
        chosen = names[what % len(names)]
        if chosen == "pfn-on-demand":
            shared = True  # A private one is a BUG (rule I5).
        if chosen in ("pfn", "inserted", "prepopulated"):
            first = 0  # Their ->mmap inserts pages 0 and on.
        if chosen in ("pfn", "inserted"):
            pages = 4
        if chosen is None:
            first = 0
        self.world.do(
            name, "mmap",
            map=f"m{len(self.world.steps)}", object=chosen, object_page=first, pages=pages,
            prot=prot, flags=["shared" if shared else "private", *extra.split()],
            open="r" if read_only else "rw",
        )  # fmt: skip

    @precondition(lambda self: self.alive)
    @rule(
        who=CHOICE, what=CHOICE, first=st.integers(0, 4), pages=st.sampled_from([4, 2, 8, 14]),
        prot=PROTS, shared=st.booleans(), extra=st.sampled_from(["", "", "", "populate", "locked"]),
        read_only=st.booleans(),
    )  # fmt: skip
    def mmap(
        self, who: int, what: int, first: int, pages: int, prot: str, shared: bool, extra: str,
        read_only: bool,
    ) -> None:  # fmt: skip
        self.map_object(who, what, first, pages, prot, shared, extra, read_only)

    @precondition(lambda self: self.alive)
    @rule(who=CHOICE, label=CHOICE, page=PAGE)
    def read(self, who: int, label: int, page: int) -> None:
        self.on_page(who, label, page, "read", offset=0, bytes=8)

    @precondition(lambda self: self.alive)
    @rule(who=CHOICE, label=CHOICE, page=PAGE, byte=st.sampled_from("WXYZ"))
    def write(self, who: int, label: int, page: int, byte: str) -> None:
        self.on_page(who, label, page, "write", offset=0, byte=byte)

    @precondition(lambda self: self.alive)
    @rule(who=CHOICE, label=CHOICE, page=PAGE, write=st.booleans())
    def touch(self, who: int, label: int, page: int, write: bool) -> None:
        """Read or write: once more, since nothing else has anything to work on without."""
        if write:
            self.on_page(who, label, page, "write", offset=1, byte="T")
        else:
            self.on_page(who, label, page, "read", offset=0, bytes=4)

    @precondition(lambda self: self.alive)
    @rule(who=CHOICE)
    def fork(self, who: int) -> None:
        free = [name for name in PROCESSES if name not in self.world.bench.processes]
        if free:
            self.world.do(self.process(who)[0], "fork", child=free[0])

    @precondition(lambda self: len(self.world.bench.processes) > 1)
    @rule(who=CHOICE)
    def exit(self, who: int) -> None:
        self.world.do(self.process(who)[0], "exit")

    @precondition(lambda self: self.alive)
    @rule(who=CHOICE, label=CHOICE, page=PAGE, pages=PAGES)
    def munmap(self, who: int, label: int, page: int, pages: int) -> None:
        self.on_range(who, label, page, pages, "munmap")

    @precondition(lambda self: self.alive)
    @rule(who=CHOICE, label=CHOICE, page=PAGE, pages=PAGES, prot=PROTS)
    def mprotect(self, who: int, label: int, page: int, pages: int, prot: str) -> None:
        self.on_range(who, label, page, pages, "mprotect", prot=prot)

    @precondition(lambda self: self.alive)
    @rule(who=CHOICE, label=CHOICE, page=PAGE, pages=PAGES, advice=ADVICE)
    def madvise(self, who: int, label: int, page: int, pages: int, advice: str) -> None:
        self.on_range(who, label, page, pages, "madvise", advice=advice)

    @precondition(lambda self: self.alive)
    @rule(
        who=CHOICE, label=CHOICE, page=PAGE, old=st.integers(0, 6), new=st.integers(0, 10),
        flags=st.sampled_from(
            [[], ["maymove"], ["maymove", "fixed"], ["maymove", "dontunmap"], ["fixed"]]
        ),
        moved=st.booleans(),
    )  # fmt: skip
    def mremap(
        self, who: int, label: int, page: int, old: int, new: int, flags: list[str], moved: bool
    ) -> None:
        found = self.mapped(who, label)
        if found is None:
            return
        to = f"m{len(self.world.steps)}" if flags else found[1]
        if "fixed" in flags and not new:
            return  # The place of no pages has no address.
        self.world.do(
            found[0], "mremap",
            map=found[1], page=page % found[2], old_pages=old, new_pages=new, flags=flags, to=to,
            moved=moved,
        )  # fmt: skip

    @precondition(lambda self: self.alive)
    @rule(
        who=CHOICE, label=CHOICE, page=PAGE, pages=PAGES,
        name=st.sampled_from(["mlock", "munlock", "msync"]),
    )  # fmt: skip
    def lock_or_sync(self, who: int, label: int, page: int, pages: int, name: str) -> None:
        flags = {"flags": ["sync"]} if name == "msync" else {}
        self.on_range(who, label, page, pages, name, **flags)

    @precondition(lambda self: self.alive)
    @rule(who=CHOICE, lock=st.booleans(), current=st.booleans(), future=st.booleans())
    def lock_all(self, who: int, lock: bool, current: bool, future: bool) -> None:
        chosen = [word for word, on in (("current", current), ("future", future)) if on]
        self.world.do(
            self.process(who)[0], "mlockall" if lock else "munlockall", flags=chosen if lock else []
        )

    @precondition(lambda self: self.alive)
    @rule(who=CHOICE, label=CHOICE, page=PAGE, name=GUP, write=st.booleans(), force=st.booleans())
    def gup(self, who: int, label: int, page: int, name: str, write: bool, force: bool) -> None:
        self.on_page(who, label, page, name, write=write, force=force)

    @precondition(lambda self: self.alive)
    @rule(who=CHOICE, label=CHOICE, page=PAGE, write=st.booleans(), pin=st.booleans())
    def hold(self, who: int, label: int, page: int, write: bool, pin: bool) -> None:
        self.on_page(who, label, page, "hold", write=write, pin=pin)

    @precondition(lambda self: self.alive and bool(self.world.bench.holding))
    @rule()
    def release(self) -> None:
        self.world.do(self.process(0)[0], "release")

    @precondition(lambda self: self.alive)
    @rule(who=CHOICE, label=CHOICE, page=PAGE, name=REMOTE)
    def kernel_reads(self, who: int, label: int, page: int, name: str) -> None:
        self.on_page(who, label, page, name, offset=0, bytes=8)

    @precondition(lambda self: self.alive)
    @rule(
        who=CHOICE, label=CHOICE, page=PAGE,
        name=st.sampled_from(["process_vm_writev", "proc_mem_write"]),
    )  # fmt: skip
    def kernel_writes(self, who: int, label: int, page: int, name: str) -> None:
        self.on_page(who, label, page, name, offset=8, data="K")

    @precondition(lambda self: self.alive)
    @rule(who=CHOICE, other=CHOICE, label=CHOICE, page=PAGE)
    def debug(self, who: int, other: int, label: int, page: int) -> None:
        found = self.mapped(other, label)
        if found is not None:
            self.world.do(
                self.process(who)[0], "ptrace_peek",
                target=found[0], map=found[1], page=page % found[2], offset=0,
            )  # fmt: skip

    @precondition(lambda self: self.alive)
    @rule(who=CHOICE, label=CHOICE, page=PAGE, name=st.sampled_from(["vmsplice", "direct_write"]))
    def page_goes_out(self, who: int, label: int, page: int, name: str) -> None:
        self.on_page(who, label, page, name, offset=0, bytes=512)

    @precondition(lambda self: self.alive)
    @rule(page=PAGE, name=st.sampled_from(["dev", "notified", "prepopulated", "file"]),
          to=st.sampled_from(["page", "xip"]), even_cows=st.booleans())  # fmt: skip
    def migrate(self, page: int, name: str, to: str, even_cows: bool) -> None:
        self.world.do(
            self.process(0)[0], "migrate", object=name, page=page, to=to, even_cows=even_cows
        )

    @precondition(lambda self: self.alive)
    @rule(
        name=st.sampled_from(["truncate", "file_read", "clear_refs", "pipe_read"]),
        who=CHOICE, what=CHOICE, number=st.integers(0, 6),
    )  # fmt: skip
    def rare(self, name: str, who: int, what: int, number: int) -> None:
        """Operations that one rule is enough for, lest they crowd out the others."""
        process = self.process(who)[0]
        objects = list(self.world.header["objects"])
        files = ("file", "image")
        arguments: dict[str, dict[str, Any]] = {
            "truncate": {"object": objects[what % len(objects)], "pages": 2 * number},
            "file_read": {"object": files[what % 2], "page": number, "bytes": 8},
            "clear_refs": {"value": number},
            "pipe_read": {"bytes": 512 if number else 100},
        }
        self.world.do(process, name, **arguments[name])


@pytest.mark.parametrize("name", rule_set_names())
def test_invariants_hold_for_any_program(name: str) -> None:
    print(f"XIPFS_TEST_SEED={SEED}, rules {name}")
    rules = Rules.parse(name)
    machine = type("MmMachine", (MmMachine,), {"rule_set": rules})
    run_state_machine_as_test(
        seed(SEED + rule_set_names().index(name))(machine),
        settings=SETTINGS,
    )


#: Shortest programs that each known defect of an old kernel takes to show, with what breaks.
DEFECTS = [
    # The seed's ->nopfn makes a private PTE writable: the store reaches the medium.
    ("seed", "nopfn", "private", "write", {"byte": "!"}, "I19"),
    ("2.6.26-nospecial", "nopfn", "private", "write", {"byte": "!"}, "I19"),
    # The seed copies a raw page on a shared write that was notified.
    ("seed", "notified", "shared", "write", {"byte": "!"}, "F13, F14"),
    # A debugger's forced write copies, though the mapping is shared.
    ("2.6.26", "dev", "shared r", "proc_mem_write", {"data": "!"}, "F13, F14"),
    ("2.6.32", "dev", "shared r", "proc_mem_write", {"data": "!"}, "F13, F14"),
    ("3.7-nospecial", "dev", "shared r", "proc_mem_write", {"data": "!"}, "F13, F14"),
    # No fault handler: anonymous memory, though the mapping is a file's.
    ("2.6.32", "inserted", "shared", "write", {"byte": "!"}, "I22"),
]


def break_it(world: World, thing: str, how: str, name: str, arguments: dict[str, Any]) -> Any:
    """Map page 0 of an object, read it, drop what ->mmap inserted, and do the operation."""
    prot = "r" if how.endswith(" r") else "rw"
    kind = how.removesuffix(" r")
    world.do(
        "a", "mmap",
        map="m", object=thing, object_page=0, pages=4, prot=prot, flags=[kind], open="rw",
    )  # fmt: skip
    if thing == "inserted":
        world.do("a", "madvise", map="m", page=0, pages=4, advice="MADV_DONTNEED")
    elif thing != "nopfn":
        world.do("a", "read", map="m", page=0, offset=0, bytes=4)
    return world.do("a", name, map="m", page=0, offset=0, **arguments)


@pytest.mark.parametrize(("era", "thing", "how", "name", "arguments", "broken"), DEFECTS)
def test_a_known_defect_shows_as_such(
    era: str, thing: str, how: str, name: str, arguments: dict[str, str], broken: str
) -> None:
    world = World(Rules.parse(era))
    assert break_it(world, thing, how, name, arguments)["result"] == "ok"
    found = audit.check(world.machine, holders=world.bench.holders())
    assert [(defect.rules, defect.mm.name) for defect in found] == [(broken, "a")]
    medium = world.text_of("xip:24" if thing == "nopfn" else "xip:0")
    assert medium == ("!IP 24" if broken == "I19" else "XIP 0")
    world.finish()


@pytest.mark.parametrize(
    ("thing", "how", "name", "arguments", "result", "medium"),
    [
        ("notified", "shared", "write", {"byte": "!"}, "ok", "!IP 0"),
        ("dev", "shared r", "proc_mem_write", {"data": "!"}, "EIO", "XIP 0"),
        ("dev", "private", "write", {"byte": "!"}, "ok", "XIP 0"),
        ("inserted", "shared", "write", {"byte": "!"}, "SIGBUS", "XIP 0"),
    ],
)
@pytest.mark.parametrize("era", ["6.1", "6.1-nospecial", "new"])
def test_later_kernels_do_not_have_the_defects(
    era: str, thing: str, how: str, name: str, arguments: dict[str, str], result: str, medium: str
) -> None:
    world = World(Rules.parse(era))
    assert break_it(world, thing, how, name, arguments)["result"] == result
    assert audit.check(world.machine, holders=world.bench.holders()) == []
    assert world.text_of("xip:0") == medium
    world.finish()


def test_the_seed_never_returns_from_reading_a_raw_page() -> None:
    world = World(Rules.parse("seed"))
    outcome = break_it(world, "dev", "private r", "process_vm_readv", {"bytes": 4})
    assert (outcome["result"], outcome["minflt"]) == ("LIVELOCK", 16)
    page: dict[str, Any] = {"map": "m", "page": 0}
    for name, arguments in (
        ("get_user_pages", {"write": False, "force": False}),
        ("ptrace_peek", {"target": "a", "offset": 0}),
        ("proc_mem_read", {"offset": 0, "bytes": 4}),
        ("vmsplice", {"offset": 0, "bytes": 4}),
        ("direct_write", {"offset": 0, "bytes": 512}),
    ):
        taken = world.do("a", name, **page, **arguments)
        assert (taken["result"], taken["minflt"]) == ("LIVELOCK", 16), name


def test_a_broken_rule_is_found_and_printed_as_a_command_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The machine is no use unless it can fail: unmapping forgets to lower the mapcount."""

    def forgets(mm: MmStruct, pfn: int) -> None:
        memory = mm.machine.memory
        page_remove_rmap(mm, pfn)
        memory.map[pfn] += 1
        memory.ref[pfn] += 1

    monkeypatch.setattr(zap, "page_remove_rmap", forgets)
    machine = type("MmMachine", (MmMachine,), {"rule_set": Rules()})
    with pytest.raises(InvariantError, match="mapcount") as caught:
        run_state_machine_as_test(seed(1)(machine), settings=SETTINGS)
    note = caught.value.__notes__[0]
    heading, _, text = note.partition("\n")
    assert heading.endswith("xipfs model run --rules 6.1 FILE")
    path = tmp_path / "shrunk.jsonl"
    path.write_text(text)
    # Shrunk: a mapping, a page in it, and what unmaps it.
    assert len(read_command_file(path).steps) <= 5
    assert main(["model", "run", "--rules", "6.1", str(path)]) == 1
    assert "T2: mapcount of pfn" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["model", "run", "--rules", "6.1", str(path)]) == 0
