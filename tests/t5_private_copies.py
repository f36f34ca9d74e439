"""Private copies outlive their file's moves: bytes, kernel's counts and modelled counts (R14)."""

from __future__ import annotations

import ast
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import needs
from live import PAGE, LiveMount, Mounts, wait_until, xipfs
from t5_accounting import fill

from xipfs.fs.types import PageKind

pytestmark = [needs("root", "fuse", "tracefs")]

N = 31
#: Maps FILE privately, reads all of it, writes pages 0-6 and forks; the child writes 5-9. Both tell
#: where the mapping is, and on each line of input what the first bytes of pages 0-9 are.
PROGRAM = """
import ctypes, mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
memory = mmap.mmap(fd, 31 * 4096, flags=mmap.MAP_PRIVATE)
base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
for page in range(31):
    memory[page * 4096]
for page in range(7):
    memory[page * 4096 : page * 4096 + 6] = b"parent"
to_child, from_child = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    os.close(to_child[1])
    sys.stdin, out = os.fdopen(to_child[0]), os.fdopen(from_child[1], "w", 1)
    for page in range(5, 10):
        memory[page * 4096 : page * 4096 + 6] = b"child."
    for line in iter(sys.stdin.readline, ""):
        print([bytes(memory[page * 4096 : page * 4096 + 6]) for page in range(10)], file=out)
    os._exit(0)
os.close(to_child[0]), os.close(from_child[1])
down, up = os.fdopen(to_child[1], "w", 1), os.fdopen(from_child[0])
for line in sys.stdin:
    print(line, file=down, end="")
    told = up.readline()
    print(child, base, flush=True)
    print([bytes(memory[page * 4096 : page * 4096 + 6]) for page in range(10)], flush=True)
    print(told, end="", flush=True)
down.close()
os.wait()
"""


class Family:
    """The program above, with its child."""

    def __init__(self, file: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, file],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.child = self.base = 0

    def bytes_seen(self) -> tuple[list[bytes], list[bytes]]:
        """Have both read pages 0-9; return what they found."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("look\n")
        self.process.stdin.flush()
        self.child, self.base = map(int, self.process.stdout.readline().split())
        told = [self.process.stdout.readline() for _ in range(2)]
        parent, child = map(ast.literal_eval, told)
        return parent, child

    def copies(self) -> dict[str, list[tuple[int, int]]]:
        """Return (pfn, mapcount) of each one's private copies, as the kernel has them."""
        return {
            "parent": [counted(self.process.pid, self.base + page * PAGE) for page in range(7)],
            "child": [counted(self.child, self.base + page * PAGE) for page in range(10)],
        }


def counted(pid: int, address: int) -> tuple[int, int]:
    """Return the frame that ``pid`` maps there, and how often it is mapped."""
    entry = word_of(f"/proc/{pid}/pagemap", address // PAGE)
    assert entry >> 63, f"page at {address:#x} of {pid} is not there"
    assert not entry >> 61 & 1, f"page at {address:#x} of {pid} is a file's"
    pfn = entry & (1 << 55) - 1
    return pfn, word_of("/proc/kpagecount", pfn)


def word_of(path: str, number: int) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        (word,) = struct.unpack("=Q", os.pread(fd, 8, number * 8))
        return int(word)
    finally:
        os.close(fd)


@pytest.fixture
def mount(live: Mounts) -> LiveMount:
    image = live.image()
    fill(image, {"x": PageKind.XIP, "p": PageKind.PAGECACHE})
    return live.mount(image, "observe=tracefs")


@pytest.fixture(params=["x", "p"])
def family(mount: LiveMount, request: pytest.FixtureRequest) -> Iterator[tuple[Family, str]]:
    made = Family(str(mount / request.param))
    try:
        yield made, request.param
    finally:
        if made.child:
            os.kill(made.child, 9)
        made.process.kill()
        made.process.communicate()


def verified(mount: LiveMount) -> dict[str, Any]:
    """Return the answer of a look at all pages: what is not sure yet is looked at again."""
    answers: list[dict[str, Any]] = []

    def nothing_is_unknown() -> bool:
        answers.append(json.loads(xipfs("verify", mount.directory, "--json").stdout))
        return not answers[-1]["pages_unknown"]

    wait_until("a look at all pages", nothing_is_unknown, 30)
    return answers[-1]


def test_copies_keep_bytes_and_counts_through_moves_of_their_file(
    mount: LiveMount, family: tuple[Family, str]
) -> None:
    program, name = family
    # Pages 7-9 are the file's in the parent: every byte of page N is N.
    parent = [b"parent"] * 7 + [bytes([page]) * 6 for page in (7, 8, 9)]
    child = [b"parent"] * 5 + [b"child."] * 5
    seen = program.bytes_seen()
    assert seen == (parent, child)
    copies = program.copies()
    # Five are both's still; the others one's own.
    assert [count for _, count in copies["parent"]] == [2] * 5 + [1] * 2
    assert [count for _, count in copies["child"]] == [2] * 5 + [1] * 5
    before = mount.vmstat()
    assert before["nr_anon_pages"] == 7 + 5
    assert verified(mount)["copies_compared"] == 7 + 10
    for turn in range(4):
        to = "pagecache" if (name == "x") == (turn % 2 == 0) else "xip"
        assert mount.migrate(name, to)["moved"] == N
        assert program.copies() == copies, f"after the move to {to}"
        after = mount.vmstat()
        # All other PTEs are gone, so what is mapped and counted are the copies, as often as before.
        assert (after["nr_anon_pages"], after["nr_normal_ptes"]) == (7 + 5, 7 + 10)
        assert after["nr_special_ptes"] == 0
        answer = verified(mount)
        assert (answer["copies_compared"], answer["copies_differ"]) == (7 + 10, 0)
        seen = program.bytes_seen()
        assert seen == (parent, child)
        assert program.copies() == copies, "reading them made no others"
        faults = mount.vmstat()["pgfault"] - after["pgfault"]
        assert faults == 3, "the parent's pages 7-9 only; copies made none"
    assert before["pgfault_cow"] == mount.vmstat()["pgfault_cow"], "nothing was copied anew"
