"""``xipfs verify``: what is believed of page tables is what the kernel has, page by page.

Real programs stop where nobody expects it; the kernel's own pagemap, kpagecount and smaps say what
they have mapped. Programs with one thread must come out with nothing different and nothing
unknown.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import needs
from live import PAGE, LiveMount, Mounts, wait_until, xipfs
from proving import foreign
from t5_accounting import Toucher, fill

from xipfs.fs.types import PageKind

pytestmark = [needs("root", "fuse", "tracefs")]

N = 31


def verify(mount: LiveMount, *words: str, code: int = 0) -> dict[str, Any]:
    done = xipfs("verify", mount.directory, "--json", *words, check=False)
    assert done.returncode == code, (done.stdout, done.stderr)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def process(answer: dict[str, Any], pid: int) -> dict[str, Any]:
    return next(line for line in answer["processes"] if line["pid"] == pid)


@pytest.fixture(scope="module")
def mount(shared: Mounts) -> LiveMount:
    image = shared.image()
    fill(image, {"x": PageKind.XIP, "p": PageKind.PAGECACHE, "warm": PageKind.XIP})
    return shared.mount(image, "observe=tracefs")


Start = Callable[[str], Toucher]


@pytest.fixture
def start(mount: LiveMount, touch: Path) -> Iterator[Start]:
    """Start touch with words in which {x} and {p} are files; return it at its first pause."""
    running: list[Toucher] = []

    def begin(words: str) -> Toucher:
        names = {name: str(mount / name) for name in ("x", "p")}
        program = Toucher(touch, mount / "warm", words.format(**names))
        running.append(program)
        program.until_paused()
        return program

    yield begin
    for program in running:
        program.process.kill()
        program.process.communicate()


@pytest.mark.parametrize(
    ("words", "mapped"),
    [
        ("map {x} private rw read 0-30 pause", 31),
        ("map {x} private rw write 0-6 read 7-12 pause", 13),
        ("map {p} shared rw write 0-6 read 3-12 pause", 13),
        ("map {p} private rw read 0-30 write 5-9 pause", 31),
        ("map {x} private rw read 0-30 write 3-4 advise 2-10 dontneed pause", 22),
        ("map {x} private rw read 0-30 write 3-4 unmap 2-10 pause", 22),
        ("map {x} private rw read 0-30 write 3-4 protect 0-10 none pause", 31),
        ("map {p} private rw read 0-10 write 3-4 remap 31 pause", 11),
        ("map {x} private rw populate pause", 31),
        ("map {p} shared r populate pause", 31),
        ("map {x} private rw advise 4-9 populate_read pause", 6),
        ("map {x} private rw write 0-4 fork {{ read 5-9 write 0-2 pause }}", 10),
        ("part {x} private rw 7 9 read 0-8 write 8 pause", 9),
    ],
)
def test_a_stopped_program_has_what_is_believed(
    mount: LiveMount, start: Start, words: str, mapped: int
) -> None:
    program = start(words)
    answer = verify(mount)
    assert answer["pages_differ"] == 0
    assert answer["pages_unknown"] == {}
    assert answer["copies_differ"] == 0
    assert answer["invariants_broken"] == ""
    assert answer["mapcounts_differ"] == 0
    assert answer["mapcounts_compared"] is not None
    lines = [line for line in answer["processes"] if line["comm"] == "touch"]
    assert max(line["pages_resident"] for line in lines) >= mapped
    for line in lines:
        assert line["pages_resident"] == line["rss_pages_smaps"]
    # Or more: what is cached by now is mapped around.
    if "fork" not in words:
        assert process(answer, program.pid)["pages_resident"] >= mapped
    program.go()
    program.finish()


def test_the_files_pages_go_under_a_mapping(mount: LiveMount, start: Start) -> None:
    """Cut by another process, and moved by xipfs: pages of the file go, private copies by rule."""
    program = start("map {p} private rw read 0-30 write 0-2 write 28-29 pause pause")
    before = process(verify(mount), program.pid)
    mount.migrate("p", "xip", "0-9")
    moved = process(verify(mount), program.pid)
    # Pages 3 to 9 are not mapped any more; 0 to 2 are copies and stay.
    assert moved["pages_resident"] == before["pages_resident"] - 7
    os.truncate(mount / "p", 20 * PAGE)
    cut = verify(mount)
    # The size moved, so the kernel dropped all of the file (AUTO_INVAL_DATA): copies 0 to 2 stay.
    assert process(cut, program.pid)["pages_resident"] == before["pages_resident"] - 31 + 3
    assert (cut["pages_differ"], cut["pages_unknown"], cut["copies_differ"]) == (0, {}, 0)
    os.truncate(mount / "p", 31 * PAGE)
    mount.migrate("p", "pagecache")
    program.go()
    program.until_paused()
    program.go()
    program.finish()


def after_an_audit(mount: LiveMount) -> dict[str, int]:
    """Return what the audit has counted just now: it learns nothing for the next second."""

    def audit() -> dict[str, int]:
        figures: dict[str, int] = mount.cat_stats()["observer"]["audit"]
        return figures

    earlier = audit()["address_spaces"]
    wait_until("an audit", lambda: audit()["address_spaces"] > earlier)
    return audit()


def copy_behind_its_back(pid: int, address: int) -> None:
    """Write to a page of another process: the kernel copies it, and no event tells."""
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(address)
        memory.write(b"z")


def test_a_wrong_belief_is_found_told_and_put_right(mount: LiveMount, start: Start) -> None:
    program = start("map {x} private rw read 0-30 pause")
    start_of, _ = foreign.ranges(program.pid, [mount / "x"])[0]
    assert verify(mount)["pages_differ"] == 0
    audited = mount.cat_stats()["observer"]["audit"]["pages_differed"]
    copy_behind_its_back(program.pid, start_of + 11 * PAGE)
    deadline = time.monotonic() + 20
    done = xipfs("verify", mount.directory, "--json", check=False)
    answer = json.loads(done.stdout)
    if answer["pages_differ"]:
        assert done.returncode == 1
        assert process(answer, program.pid)["differences"] == [
            {
                "address": start_of + 11 * PAGE,
                "ino": (mount / "x").stat().st_ino,
                "index": 11,
                "shadow": "file",
                "kernel": "anon",
            }
        ]
    else:
        # The background audit came first; it has counted it.
        assert mount.cat_stats()["observer"]["audit"]["pages_differed"] == audited + 1
    again = verify(mount, "--pid", str(program.pid))
    assert again["pages_differ"] == 0, "the first column was put right"
    assert (again["copies_compared"], again["copies_differ"]) == (2, 0), "and the second"
    assert (
        mount.cat_stats()["observer"]["unfollowed"][
            "private copies found or missed in pagemap, not charged"
        ]
        == 1
    )
    assert time.monotonic() < deadline
    program.go()
    program.finish()


def test_a_call_on_another_process_s_memory_puts_it_in_doubt(
    mount: LiveMount, start: Start
) -> None:
    program = start("map {x} private rw read 0-30 pause")
    before = after_an_audit(mount)
    # With process_vm_writev, a call that is seen.
    start_of, _ = foreign.ranges(program.pid, [mount / "x"])[0]
    assert foreign.write_memory(program.pid, start_of + 11 * PAGE)
    answer = verify(mount)
    assert (answer["pages_differ"], answer["pages_unknown"], answer["copies_differ"]) == (0, {}, 0)
    after = mount.cat_stats()["observer"]
    assert after["audit"]["pages_differed"] == before["pages_differed"]
    assert after["audit"]["pages_repaired"] >= before["pages_repaired"] + N
    assert after["unfollowed"]["private copies found or missed in pagemap, not charged"] >= 1
    program.go()
    program.finish()


def test_what_is_unknown_is_read_from_pagemap_soon(mount: LiveMount, start: Start) -> None:
    """MADV_PAGEOUT drops PTEs and says of none: the whole mapping becomes unknown."""
    program = start("map {x} private rw pause read 0-30 write 3-7 advise 0-30 pageout pause")
    before = after_an_audit(mount)
    program.go()
    program.until_paused()
    wait_until(
        "the mapping is looked at",
        lambda: (
            mount.cat_stats()["observer"]["audit"]["pages_repaired"] >= before["pages_repaired"] + N
        ),
        timeout_s=20,
    )
    answer = verify(mount, "--pid", str(program.pid))
    assert answer["pages_compared"] == 2 * N, "this mapping and that of the warm-up"
    assert (answer["pages_differ"], answer["pages_unknown"], answer["copies_differ"]) == (0, {}, 0)
    assert mount.cat_stats()["observer"]["audit"]["pages_differed"] == before["pages_differed"]
    program.go()
    program.finish()


def test_the_audit_looks_at_one_address_space_a_second(mount: LiveMount, start: Start) -> None:
    program = start("map {x} private rw read 0-30 pause")
    before = mount.cat_stats()["observer"]["audit"]
    time.sleep(2.5)
    after = mount.cat_stats()["observer"]["audit"]
    assert after["address_spaces"] > before["address_spaces"]
    assert after["pages_compared"] > before["pages_compared"]
    assert after["pages_differed"] == before["pages_differed"]
    program.go()
    program.finish()


def test_what_cannot_be_verified(mount: LiveMount, live: Mounts) -> None:
    done = xipfs("verify", mount.directory, "--pid", "1", check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "xipfs verify: --pid 1; expected a process that uses the mount\n",
    )
    other = live.mount(None, "observe=off")
    done = xipfs("verify", other.directory, check=False)
    assert done.returncode == 1
    assert "its observer is off" in done.stderr
    assert "observe=tracefs" in done.stderr


#: A 32-bit program without a library: maps a file, reads 31 pages, unmaps 8, and waits for a line.
THIRTY_TWO_BITS = r"""
static int call(int n, int a, int b, int c, int d, int e)
{
    int result;

    asm volatile("push %%ebp; xor %%ebp, %%ebp; int $0x80; pop %%ebp"
                 : "=a"(result)
                 : "0"(n), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e)
                 : "memory");
    return result;
}

void start(int *stack)
{
    int descriptor = call(5, stack[2], 0, 0, 0, 0); /* open(argv[1]) */
    volatile char *base = (char *)call(192, 0, 31 * 4096, 1, 2, descriptor); /* mmap2 */
    char byte;

    for (int page = 0; page < 31; page++)
        byte = base[page * 4096];
    call(91, (int)base, 8 * 4096, 0, 0, 0); /* munmap */
    call(4, 1, (int)"paused\n", 7, 0, 0);
    call(3, 0, (int)&byte, 1, 0, 0);
    call(1, 0, 0, 0, 0, 0);
}

asm(".globl _start; _start: push %esp; call start");
"""


def test_of_a_32_bit_program_nothing_is_claimed(mount: LiveMount, tmp_path: Path) -> None:
    """Its system calls have no events: its page tables are unknown, not different."""
    source, program = tmp_path / "small.c", tmp_path / "small"
    source.write_text(THIRTY_TWO_BITS)
    flags = ["-m32", "-O1", "-static", "-nostdlib", "-ffreestanding", "-fno-pic", "-no-pie"]
    subprocess.run(["cc", *flags, "-fno-stack-protector", "-o", program, source], check=True)
    process = subprocess.Popen([program, mount / "x"], stdin=-1, stdout=-1)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.read(7) == b"paused\n"
    answer = verify(mount, "--pid", str(process.pid))
    assert answer["pages_compared"] == 0
    reason = "of a 32-bit program, whose system calls have no events"
    assert set(answer["pages_unknown"]) == {reason}
    assert answer["pages_unknown"][reason] >= 23
    process.communicate(b"\n")
    assert process.returncode == 0
