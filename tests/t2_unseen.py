"""Experiments that were not recorded, with what Linux 6.1 would show by its source.

Each test is a small recording: operations and what must be observed after them. The expected
values are read from the kernel functions that the test names, never taken from the model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xipfs.mm.oracle.command_file import read_command_file
from xipfs.mm.oracle.replay import check_file

Json = dict[str, Any]
Steps = list[tuple[Json, Json]]

FRAMES: Json = {
    "zero": {"struct_page": True, "refcount": 1, "reserved": True, "zero_page": True},
    **{f"xip:{number}": {"struct_page": False, "data": f"xip{number}"} for number in range(4)},
    **{f"dax:{number}": {"struct_page": True, "devmap": True} for number in range(4)},
}
LINEAR: Json = {
    "kind": "device",
    "pages": 4,
    "vma_flags": [],
    "fault_handler": False,
    "backing": None,
    "at_mmap": [{"call": "remap_pfn_range", "page": 0, "frame": "xip:0", "pages": 4}],
}
ON_DEMAND: Json = {
    "kind": "device",
    "pages": 4,
    "vma_flags": ["pf", "io"],
    "fault_handler": True,
    "backing": ["xip-insert-pfn"] * 4,
    "frame": [f"xip:{number}" for number in range(4)],
}
TMPFS: Json = {"kind": "tmpfs-file", "pages": 4, "data": ["a", "b", "c", "d"], "fsync": True}
FSDAX: Json = {
    "kind": "fsdax-file",
    "pages": 4,
    "vma_flags": ["hg"],
    "fsync": True,
    "backing": ["fsdax"] * 4,
    "frame": [f"dax:{number}" for number in range(4)],
}
OBJECTS = {"linear": LINEAR, "demand": ON_DEMAND, "tmpfs": TMPFS, "fsdax": FSDAX}


def agrees(tmp_path: Path, steps: Steps, *, um: bool = False, swap: bool = False) -> None:
    """Replay ``steps``; a step's ``who`` stands in its operation."""
    header = {
        "oracle": 1,
        "arch": "um" if um else "x86-64",
        "pte_special": not um,
        "swap": swap,
        "processes": ["parent", "child"],
        "frames": {name: frame for name, frame in FRAMES.items() if not (um and "dax" in name)},
        "objects": {name: thing for name, thing in OBJECTS.items() if not (um and name == "fsdax")},
    }
    lines = [header]
    for number, (op, observed) in enumerate(steps):
        who = op.pop("who", "parent")
        lines.append({"step": number, "who": who, "op": op, "observed": observed})
    path = tmp_path / "experiment.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert check_file(read_command_file(path)).differences == []


def mmap(thing: str | None, prot: str, *flags: str, label: str = "m", pages: int = 4) -> Json:
    return {"name": "mmap", "map": label, "object": thing, "object_page": 0, "pages": pages,
            "prot": prot, "flags": list(flags), "open": "rw"}  # fmt: skip


def on(name: str, page: int = 0, pages: int = 1, label: str = "m", **arguments: Any) -> Json:
    return {"name": name, "map": label, "page": page, "pages": pages, **arguments}


def read(page: int, **arguments: Any) -> Json:
    return on("read", page, offset=0, bytes=14, **arguments)


def write(page: int, **arguments: Any) -> Json:
    return on("write", page, offset=0, byte="W", **arguments)


def ok(**observed: Any) -> Json:
    return {"result": "ok", **observed}


def gup(name: str, page: int, *, write: bool = False) -> Json:
    return on(name, page, write=write, force=False)


@pytest.mark.parametrize("um", [False, True])
def test_the_lockless_walk_takes_a_private_copy_in_a_pfnmap_vma(tmp_path: Path, um: bool) -> None:
    """gup_pte_range() has no VMA to refuse; without the special bit it takes nothing (G1, G8, G9).

    The raw neighbour is special, so it is left to the slow path, which says EFAULT.
    """
    anon = {"result": "page", "page": "anon", "refcount_held": 2}
    pinned = {"result": "page", "page": "anon", "refcount_held": 1025}
    refused = {"result": "EFAULT"}
    agrees(
        tmp_path,
        [
            (mmap("linear", "rw", "private"), ok()),
            (write(1), ok(minflt=1)),
            (gup("get_user_pages", 1), refused),
            (gup("get_user_pages_fast", 1), refused if um else anon),
            (gup("get_user_pages_fast", 1, write=True), refused if um else anon),
            (gup("pin_user_pages_fast", 1), refused if um else pinned),
            (gup("get_user_pages_fast", 0), refused),
            (on("vmsplice", 1, offset=0, bytes=16), refused if um else ok(bytes=16)),
            (on("process_vm_readv", 1, offset=0, bytes=16), refused),
            (on("mprotect", 0, 4, prot="none"), ok()),
            # Not _PAGE_USER any more: pte_access_permitted() says no.
            (gup("get_user_pages_fast", 1), refused),
        ],
        um=um,
    )
