"""The world of the model's state machine: what its command files start from, and what must hold.

Every kind of object in one header, and a judge that looks at the machine after each step. The
judge knows, era by era, which invariant the kernel itself broke and by which operation; anything
else is a defect of the model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xipfs.mm import audit
from xipfs.mm.flags import VM_SHARED
from xipfs.mm.oracle.command_file import CommandFile, Step
from xipfs.mm.oracle.replay import Replay, StepState
from xipfs.mm.rules import Rules

Json = dict[str, Any]

DEVICE_PAGES = 12
PROCESSES = ["a", "b", "c", "d"]

#: Stores that the model may carry to the medium through a shared mapping.
STORES = ("write", "process_vm_writev", "proc_mem_write")
#: What may take a write fault, so leave a private copy in a shared mapping in the seed (F13).
WRITERS = (
    *STORES,
    *("read_into", "mmap", "mlock", "madvise", "mlockall", "hold"),
    *("get_user_pages", "get_user_pages_fast", "pin_user_pages_fast"),
)
READERS = (
    *("read", "pipe_write", "vmsplice", "direct_write", "ptrace_peek"),
    *("process_vm_readv", "proc_mem_read"),
)
#: What takes PTEs along: defects that are already there show at another address.
MOVERS = ("fork", "mremap")
#: Calls that fault before they know whether the page serves them (rules G2, G6, K19).
FAULT_FIRST = (
    *("get_user_pages", "get_user_pages_fast", "pin_user_pages_fast", "hold", "vmsplice"),
    *("process_vm_readv", "process_vm_writev", "proc_mem_read", "proc_mem_write", "ptrace_peek"),
    "direct_write",
)
#: Calls over a range that keep what they did before the next VMA, or a hole, fails them.
RANGES = ("munlock", "madvise", "mprotect", "mremap")


def has_nopfn(rules: Rules) -> bool:
    """Whether ->nopfn can be tried: with the special bit it makes no sense (rule I20)."""
    return rules.kernel.nopfn and not rules.pte_special


def header(rules: Rules, *, anon_pages: int, swap: bool) -> Json:
    """Return a header with every kind of object that the era can map without a BUG."""
    frames: dict[str, Json] = {
        "zero": {"struct_page": True, "reserved": True, "zero_page": True, "data": ""}
    }
    for number in range(DEVICE_PAGES):
        frames[f"own:{number}"] = {"struct_page": True, "data": f"OWN {number}"}
    for number in range(32):
        frames[f"xip:{number}"] = {"struct_page": False, "data": f"XIP {number}"}
    frames["rsv:0"] = {"struct_page": True, "reserved": True, "data": "RSV 0"}
    for number in range(4):
        frames[f"dax:{number}"] = {
            "struct_page": True,
            "reserved": True,
            "devmap": True,
            "data": f"DAX {number}",
        }
    return {
        "oracle": 1,
        "experiment": "machine",
        "arch": "x86-64",
        "debug_vm": False,
        "pte_special": rules.pte_special,
        "thp": True,
        "ksm": True,
        "swap": swap,
        "page_size_bytes": 4096,
        "processes": PROCESSES,
        "anon_pages": anon_pages,
        "quirks": ["x86-pat-fork-enomem"] if rules.name == "6.1" else [],
        "frames": frames,
        "objects": objects(rules),
    }


def objects(rules: Rules) -> dict[str, Json]:
    """Return the objects: devices of every backing, PFNMAP ones, files of three filesystems."""
    backing = ["xip", "page", "xip", "insert-page", "xip", "page", "xip", "xip", "hole", "page"]
    frame = [f"{'xip' if kind == 'xip' else 'own'}:{n}" for n, kind in enumerate(backing)]
    if rules.kernel.insert_mixed:
        for index, kind, name in (
            (4, "reserved", "rsv:0"),
            (6, "ram", "own:6"),
            (7, "zero", "zero"),
        ):
            backing[index], frame[index] = f"mixed-{kind}", name
    backing += ["xip-insert-pfn", "xip"]
    device: Json = {
        "kind": "device",
        "pages": DEVICE_PAGES,
        "vma_flags": ["mm"],
        "at_mmap": [],
        "page_mkwrite": False,
        "access": False,
        "fsync": True,
        "fault_handler": True,
        "backing": backing,
        "frame": [*frame, "xip:10", "xip:11"],
        "migratable": True,
    }
    device["frame"][8] = None
    four_pages: Json = {**device, "pages": 4, "migratable": False}
    found = {
        "dev": device,
        "notified": {**device, "page_mkwrite": True, "access": True},
        "prepopulated": {
            **device,
            "at_mmap": [{"call": "vmf_insert_mixed", "page": 0, "pages": 1, "frame": "xip:0"}],
        },
        "pfn": {
            **four_pages,
            "vma_flags": [], "fault_handler": False, "access": True,
            "backing": None, "frame": None,
            "at_mmap": [{"call": "remap_pfn_range", "page": 0, "pages": 4, "frame": "xip:16"}],
        },
        "pfn-on-demand": {
            **four_pages,
            "vma_flags": ["pf", "io"], "frame": ["xip:23", "own:1", "xip:21", "own:2"],
            "backing": ["xip-insert-pfn", "ram-insert-pfn"] * 2,
            # A ->fault in a PFNMAP mapping is a BUG of the seed (rule I21).
            "nopfn": has_nopfn(rules),
        },
        "inserted": {
            **four_pages,
            "vma_flags": [], "fault_handler": False, "backing": None, "frame": None,
            "at_mmap": [{"call": "vm_insert_page", "page": 0, "pages": 4, "frame": "own:2"}],
        },
        "file": {"kind": "tmpfs-file", "pages": 6, "cached": [True] * 4 + [False] * 2,
                 "data": [f"FILE {n}" for n in range(6)], "fsync": True},
        "image": {
            "kind": "cramfs-file", "pages": 4, "at_mmap": "cramfs", "cached": [False] * 4,
            "size_bytes": 4 * 4096, "other_data_after_end": False,
            "backing": ["in-place", "in-place", "compressed", "hole"],
            "frame": ["image:0", "image:1", None, None],
            "data": ["IMAGE 0", "IMAGE 1", "IMAGE 2", ""],
        },
    }  # fmt: skip
    if rules.kernel.dax != "mixed":
        # Before DAX there was XIP, which the devices above stand for.
        found["dax"] = {
            "kind": "fsdax-file",
            "pages": 4,
            "fsync": True,
            "at_mmap": [],
            "backing": ["fsdax"] * 4,
            "frame": [f"dax:{n}" for n in range(4)],
        }
    if has_nopfn(rules):
        found["nopfn"] = {
            **four_pages,
            "nopfn": True,
            "backing": ["xip", "xip", "hole", "xip"],
            "frame": ["xip:24", "xip:25", None, "xip:27"],
        }
    return found


class World:
    """A command file that grows while it runs, and is judged after every step."""

    def __init__(self, rules: Rules, *, anon_pages: int = 4096, swap: bool = False) -> None:
        self.rules = rules
        self.header = header(rules, anon_pages=anon_pages, swap=swap)
        self.replay = Replay(CommandFile(Path("machine.jsonl"), self.header, []), rules)
        self.bench = self.replay.bench
        self.machine = self.bench.machine
        self.steps: list[Step] = []
        self.failed = False
        self._defects: set[audit.Defect] = set()
        self._medium = self._read_medium()

    def text(self) -> str:
        """Return the command file so far."""
        steps = [{"step": s.number, "who": s.who, "op": s.op} for s in self.steps]
        return "\n".join(json.dumps(line) for line in [self.header, *steps]) + "\n"

    def text_of(self, frame: str) -> str:
        """Return what a frame of the header holds, up to the first zero byte."""
        return self.bench.text(self.bench.frames.pfn(frame), 0, 16)

    def do(self, who: str, name: str, **arguments: object) -> Json:
        """Run one operation, judge what it left behind, and return its outcome.

        A failure carries the command file as a note.
        """
        number = len(self.steps)
        op = {"name": name, **arguments}
        step = Step(number, who, op, {}, "", "", number + 2)
        before = audit.counters(self.machine)
        self.steps.append(step)
        try:
            partial = self._may_be_partial(step)
            done = self.replay.execute(step)
            self._judge(done, before, partial=partial)
        except Exception as error:
            self.failed = True
            error.add_note(
                f"To replay, save these lines as FILE:  xipfs model run --rules {self.rules.name}"
                f" FILE\n{self.text()}"
            )
            raise
        return done.outcome

    def _judge(self, done: StepState, before: dict[str, object], *, partial: bool) -> None:
        op, outcome = done.step.op, done.outcome
        assert not done.stopped, done.stopped
        assert outcome.get("result") != "BUG", outcome
        defects = audit.check(self.machine, holders=self.bench.holders())
        assert (self.machine.bad_ptes, self.machine.bad_rss) == (0, 0)
        self._judge_failure(op, outcome, before, partial=partial)
        self._judge_defects(op, set(defects))
        self._judge_medium(done.step)

    def _may_be_partial(self, step: Step) -> bool:
        """Whether a failure of ``step`` may leave a part of its work done, as the kernel's does.

        mlock and MADV_POPULATE_ fault page by page (rule K19); the others go VMA by VMA, and tell
        of a hole at the end.
        """
        op = step.op
        if op["name"] == "mlock" or op.get("advice", "").startswith("MADV_POPULATE"):
            return True
        process = self.bench.processes.get(step.who)
        if op["name"] not in RANGES or process is None:
            return False
        mapping = process.mapping(op["map"])
        end = op["page"] + op.get("pages", op.get("old_pages"))
        vma = process.mm.find_vma(mapping.at(op["page"]))
        return vma is None or vma.end < mapping.at(end)

    def _judge_failure(
        self, op: Json, outcome: Json, before: dict[str, object], *, partial: bool
    ) -> None:
        """T11: a failed call changes no counter, but for what its own faults put in place."""
        name = op["name"]
        if outcome.get("result", "ok") in ("ok", "page") or partial:
            return
        after = audit.counters(self.machine)
        spared: set[str] = set()
        if name in FAULT_FIRST and outcome["minflt"]:
            # A raw page was faulted in, by a fault that succeeded; then there was no page to take.
            spared.add("raw")
        if name in (*FAULT_FIRST, *READERS) and self.rules.kernel.fault_around:
            # A read fault maps the cached neighbours before its own page turns out not to exist
            # (rule F22).
            spared |= {"file", "refcount", "mapcount"}
        changed = {
            key
            for key in before.keys() | after.keys()
            if before.get(key) != after.get(key) and key.rpartition(".")[2] not in spared
        }
        assert not changed, (op, outcome, f"T11: the failed call changed {sorted(changed)}")

    def _judge_defects(self, op: Json, defects: set[audit.Defect]) -> None:
        """T7 and T8 are broken only by the seed's kin, only by what is known to break them."""
        allowed = set()
        if has_nopfn(self.rules):
            allowed.add(audit.NOPFN_WRITE)
        if self.rules.era in ("seed", "2.6.26", "2.6.32", "3.7"):
            allowed |= {audit.SHARED_COW, audit.NO_HANDLER}
        assert {defect.rules for defect in defects} <= allowed, defects
        new = defects - self._defects
        self._defects = defects
        if not new or op["name"] in MOVERS:
            return
        for defect in new:
            if defect.rules == audit.NO_HANDLER:
                assert op["name"] in (*WRITERS, *READERS), (op, new)
            elif defect.rules == audit.NOPFN_WRITE or self.rules.era == "seed":
                assert op["name"] in WRITERS, (op, new)
            else:
                # F14: later kernels copy only for a write that is forced.
                forced = op["name"] == "proc_mem_write" or (op.get("write") and op.get("force"))
                assert forced, (op, new)

    def _read_medium(self) -> dict[str, bytes]:
        """Return the first bytes of every frame that exists from the start."""
        frames = self.bench.frames
        return {
            name: bytes(self.bench.data.of(frames.pfn(name))[:16]) for name in self.header["frames"]
        }

    def _judge_medium(self, step: Step) -> None:
        """What T7 is for: only a store through a shared mapping reaches the medium."""
        medium = self._read_medium()
        if medium == self._medium:
            return
        self._medium = medium
        assert step.op["name"] in STORES, step.op
        process = self.bench.processes[step.who]
        address = process.mapping(step.op["map"]).at(step.op["page"])
        vma = process.mm.find_vma(address)
        assert vma is not None
        known = has_nopfn(self.rules) and vma.vm_ops is not None and vma.vm_ops.nopfn is not None
        assert vma.flags & VM_SHARED or known, (step.op, "a private store changed the medium")

    def finish(self) -> None:
        """End all processes and let everything go: nothing may be left (T9)."""
        for who in list(self.bench.processes):
            self.do(who, "exit")
        while self.bench.holding:
            self.bench.release_held()
        while self.bench.pipe.read(1 << 20) > 0:
            pass
        assert audit.check(self.machine, holders=self.bench.holders()) == []
        counts = self.machine.statistics()
        left = (counts.nr_normal_ptes, counts.nr_special_ptes, counts.nr_anon_pages)
        assert left == (0, 0, 0)
        assert counts.page_table_pages == 0
        assert self.machine.pins == {}
        used = self.machine.memory.statistics().anon_used_pages
        assert used == 1, f"{used - 1} anonymous pages are never freed"
