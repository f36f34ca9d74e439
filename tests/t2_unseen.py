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


def seen(*vmas: tuple[int, int, str]) -> Json:
    """The VMAs of the mapping: first page, pages, protection."""
    return {"vmas": [{"page": page, "pages": n, "prot": prot} for page, n, prot in vmas]}


def test_mprotect_write_of_locked_memory_copies_it_at_once(tmp_path: Path) -> None:
    """mprotect_fixup() populates a private VMA that is VM_LOCKED and becomes writable."""
    agrees(
        tmp_path,
        [
            (mmap("tmpfs", "r", "private"), ok()),
            (on("mlock", 0, 4), ok(rss_anon_pages=0, locked_pages=4)),
            (on("mprotect", 1, 2, prot="rw"), ok(minflt=2, rss_anon_pages=2, locked_pages=4)),
            (on("mprotect", 1, 2, prot="r"), ok(minflt=0, rss_anon_pages=2)),
            (on("munlock", 0, 4), ok(locked_pages=0)),
            (on("mprotect", 0, 1, prot="rw"), ok(minflt=0, rss_anon_pages=2)),
        ],
    )


@pytest.mark.parametrize("thing", ["tmpfs", None])
def test_memory_that_was_writable_stays_accounted_and_apart(
    tmp_path: Path, thing: str | None
) -> None:
    """mprotect_fixup() sets VM_ACCOUNT for a private write and never takes it back."""
    split = [(0, 1, "r--"), (1, 1, "r--"), (2, 2, "r--")]
    agrees(
        tmp_path,
        [
            (mmap(thing, "r", "private"), ok(map="m", **seen((0, 4, "r--")))),
            (on("mprotect", 1, prot="rw"), ok(map="m")),
            (on("mprotect", 1, prot="r"), ok(map="m", **seen(*split))),
            (on("mprotect", 0, 4, prot="rw"), ok(map="m", **seen((0, 4, "rw-")))),
            (on("mprotect", 1, prot="r"), ok(map="m")),
            (on("mprotect", 1, prot="rw"), ok(map="m", **seen((0, 4, "rw-")))),
        ],
    )


def test_an_area_with_copies_does_not_merge_into_one_without(tmp_path: Path) -> None:
    """is_mergeable_anon_vma() asks for exactly one anon_vma in the VMA that grows (6.1)."""
    apart = [(0, 1, "rw-"), (1, 1, "rw-"), (2, 2, "rw-")]
    agrees(
        tmp_path,
        [
            (mmap("tmpfs", "rw", "private"), ok()),
            (on("madvise", 1, advice="MADV_RANDOM"), ok(map="m", **seen(*apart))),
            (write(1), ok(minflt=1)),
            (on("madvise", 1, advice="MADV_NORMAL"), ok(map="m", **seen(*apart))),
            # The other way round the VMA with the copies grows over the one without.
            (on("madvise", 0, advice="MADV_RANDOM"), ok()),
            (on("madvise", 0, advice="MADV_NORMAL"),
             ok(map="m", **seen((0, 2, "rw-"), (2, 2, "rw-")))),
            (on("madvise", 2, 2, advice="MADV_RANDOM"), ok()),
            (on("madvise", 2, 2, advice="MADV_NORMAL"), ok(map="m", **seen((0, 4, "rw-")))),
        ],
    )  # fmt: skip


def test_mprotect_spares_the_fault_of_dirty_copies_only(tmp_path: Path) -> None:
    """can_change_pte_writable() of 6.1 asks for a dirty PTE; MADV_FREE makes a clean one."""
    agrees(
        tmp_path,
        [
            (mmap(None, "rw", "private", "anonymous"), ok()),
            (write(0), ok(minflt=1)),
            (write(1), ok(minflt=1)),
            (on("madvise", 0, advice="MADV_FREE"), ok()),
            (on("mprotect", 0, 4, prot="r"), ok()),
            (on("mprotect", 0, 4, prot="rw"),
             ok(map="m", pages=[{"index": 0, "write": False, "dirty": False},
                                {"index": 1, "write": True, "dirty": True}])),
            (write(0), ok(minflt=1)),
            (write(1), ok(minflt=0)),
        ],
    )  # fmt: skip


def anonymous() -> Json:
    return mmap(None, "rw", "private", "anonymous")


def page(index: int, **bits: Any) -> Json:
    """What is seen of one page of the mapping ``m``."""
    return {"map": "m", "pages": [{"index": index, **bits}]}


def test_madv_free_cleans_the_pte_of_a_page_that_a_child_maps_too(tmp_path: Path) -> None:
    """madvise_free_pte_range() looks at the mapcount only of a page that is dirty itself."""
    agrees(
        tmp_path,
        [
            (anonymous(), ok()),
            (write(0), ok()),
            ({"name": "fork", "child": "child"}, {}),
            (on("madvise", 0, advice="MADV_FREE"), ok(**page(0, dirty=False, young=False))),
            (on("observe", who="child"), page(0, dirty=True, present=True)),
        ],
    )


def test_willneed_brings_anonymous_pages_into_the_swap_cache(tmp_path: Path) -> None:
    """madvise_willneed() of a VMA without file reads its swap entries; the touch is then minor."""
    agrees(
        tmp_path,
        [
            (anonymous(), ok()),
            (write(0), ok()),
            (on("madvise", 0, advice="MADV_PAGEOUT"), ok(**page(0, swapped=True, mincore=False))),
            (on("madvise", 0, advice="MADV_WILLNEED"), ok(**page(0, swapped=True, mincore=True))),
            (read(0), ok(data="W", minflt=1, majflt=0, **page(0, refcount=2))),
        ],
        swap=True,
    )


def test_locked_memory_leaves_the_swap_cache(tmp_path: Path) -> None:
    """should_try_to_free_swap() is true of a VM_LOCKED VMA, so only the PTE's reference is left."""
    agrees(
        tmp_path,
        [
            (anonymous(), ok()),
            (write(0), ok()),
            (on("mprotect", 0, 4, prot="r"), ok()),
            (on("madvise", 0, advice="MADV_PAGEOUT"), ok()),
            (on("madvise", 0, advice="MADV_WILLNEED"), ok()),
            (on("mlock", 0), ok(minflt=1, majflt=0, **page(0, refcount=1))),
        ],
        swap=True,
    )


def test_a_page_of_the_swap_cache_goes_back_to_its_entry(tmp_path: Path) -> None:
    """MADV_PAGEOUT takes a page that one PTE maps, though a swapped-out child shares its entry."""
    agrees(
        tmp_path,
        [
            (anonymous(), ok()),
            (write(0), ok()),
            (on("madvise", 0, advice="MADV_PAGEOUT"), ok(rss_anon_pages=0)),
            ({"name": "fork", "child": "child"}, {}),
            (read(0), ok(data="W", majflt=1, **page(0, refcount=2, mapcount=1))),
            (on("madvise", 0, advice="MADV_PAGEOUT"),
             ok(rss_anon_pages=0, **page(0, swapped=True))),
            (read(0, who="child"), ok(data="W", majflt=1)),
            (read(0), ok(data="W", minflt=1, majflt=0)),
        ],
        swap=True,
    )  # fmt: skip


def test_soft_dirty_tracking_reaches_later_ptes_of_a_pfnmap_vma(tmp_path: Path) -> None:
    """clear_refs_write() clears VM_SOFTDIRTY of every VMA; its walk passes PFNMAP ones over."""
    agrees(
        tmp_path,
        [
            (mmap("demand", "rw", "shared"), ok()),
            (read(0), ok(minflt=1)),
            ({"name": "clear_refs", "value": 4}, {"result": "ok"}),
            (on("observe"), page(0, write=True)),
            (write(0), ok(minflt=0)),
            (read(1), ok(minflt=1, **page(1, write=False))),
            (write(1), ok(minflt=1, **page(1, write=True, dirty=True))),
        ],
    )


def test_shared_anonymous_memory_can_be_synced(tmp_path: Path) -> None:
    """shmem has noop_fsync()."""
    agrees(
        tmp_path,
        [
            (mmap(None, "rw", "shared", "anonymous"), ok()),
            (on("msync", 0, 4, flags=["sync"]), ok()),
        ],
    )


def test_smaps_counts_shared_memory_that_is_swapped_out(tmp_path: Path) -> None:
    """smap_gather_stats(): what the file has in swap, less what a private PTE hides."""
    agrees(
        tmp_path,
        [
            (mmap("tmpfs", "rw", "shared"), ok()),
            (mmap("tmpfs", "rw", "private", label="p"), ok()),
            (write(0, label="p"), ok()),
            (read(0), ok()),
            (on("madvise", 0, 2, advice="MADV_PAGEOUT"),
             ok(map="m", vmas=[{"rss": 2, "swap": 2}])),
            (on("observe", label="p"), {"map": "p", "vmas": [{"rss": 1, "swap": 1}]}),
            (read(1), ok(data="b", majflt=1, map="m", vmas=[{"rss": 3, "swap": 1}])),
        ],
        swap=True,
    )  # fmt: skip


def test_reading_a_hole_of_shared_memory_fills_no_cache(tmp_path: Path) -> None:
    """shmem_file_read_iter() copies from the zero page."""
    file_read = {"name": "file_read", "object": "tmpfs", "page": 1, "bytes": 14}
    agrees(
        tmp_path,
        [
            (mmap("tmpfs", "rw", "shared"), ok()),
            (on("madvise", 1, advice="MADV_REMOVE"), ok(**page(1, mincore=False))),
            (dict(file_read), ok(data="")),
            (on("observe"), page(1, mincore=False)),
            (read(1), ok(data="", minflt=1, majflt=0, **page(1, mincore=True))),
        ],
    )


def test_a_hole_can_be_punched_into_a_dax_file(tmp_path: Path) -> None:
    """vfs_fallocate() reaches ext4, which unmaps the range and frees its blocks."""
    agrees(
        tmp_path,
        [
            (mmap("fsdax", "rw", "shared"), ok()),
            (write(1), ok(minflt=1, **page(1, frame="dax:1", devmap=True))),
            (on("madvise", 1, advice="MADV_REMOVE"), ok(**page(1, present=False))),
            (read(1), ok(data="", minflt=1, **page(1, frame="zero", devmap=False))),
        ],
    )
