"""Direct I/O that no thread waits for (libaio, io_uring) beside migrations: no byte is lost."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import needs
from live import PAGE, ROOT, LiveMount, Mounts

pytestmark = [needs("root", "fuse")]

API = pytest.mark.parametrize("api", ["libaio", "uring"])


@pytest.fixture(scope="module")
def aio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled tests/aio.c."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    program = tmp_path_factory.mktemp("aio") / "aio"
    words = [compiler, "-O1", "-o", str(program), str(ROOT / "tests" / "aio.c")]
    subprocess.run(words, check=True, timeout=60)
    return program


class Program:
    """A run of aio."""

    def __init__(self, *words: str | Path) -> None:
        self.process = subprocess.Popen(
            [str(word) for word in words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def finish(self) -> str:
        """Let it end, which must be well; return what it said last."""
        said, complained = self.process.communicate("\n", timeout=60)
        assert self.process.returncode == 0, complained
        return said.strip()


@pytest.fixture
def two(live: Mounts) -> Iterator[tuple[LiveMount, LiveMount]]:
    """A mount with a file of 8 pages, and one with a source to read from."""
    mount, source = live.mount(), live.mount()
    (mount / "file").write_bytes(b"before.." * PAGE)
    (source / "source").write_bytes(os.urandom(2 * PAGE))
    try:
        yield mount, source
    finally:
        if source.running():
            os.kill(source.pid, signal.SIGCONT)


@API
def test_what_is_being_read_into_a_mapping_arrives_in_the_file(
    api: str, aio: Path, two: tuple[LiveMount, LiveMount]
) -> None:
    mount, source = two
    program = Program(aio, api, "into", mount / "file", source / "source")
    try:
        assert program.says() == "ready"
        os.kill(source.pid, signal.SIGSTOP)
        program.go_on()
        assert program.says() == "submitted"
        outcome = mount.migrate("file", "pagecache")
        # Nobody can say which of its pages are in flight, so none moves.
        assert (outcome["moved"], outcome["failed"]) == (0, {"direct_io": 8})
        os.kill(source.pid, signal.SIGCONT)
        program.go_on()
        assert program.says() == "same"
        expected = (source / "source").read_bytes()
        assert (mount / "file").read_bytes()[3 * PAGE : 5 * PAGE] == expected
        program.finish()
        assert mount.migrate("file", "pagecache")["moved"] == 8, "it is gone"
        assert (mount / "file").read_bytes()[3 * PAGE : 5 * PAGE] == expected
    finally:
        program.process.kill()
        program.process.communicate()


@API
def test_random_moves_under_reads_and_writes_lose_no_byte(
    api: str, aio: Path, live: Mounts
) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}: of random.Random() here, and of tests/aio.c")
    chance = random.Random(seed)
    mount = live.mount(None, "ram=1M")  # less than the file: evictions too
    pages = 512
    initial = b"".join((page << 32).to_bytes(8, "little") * (PAGE // 8) for page in range(pages))
    (mount / "file").write_bytes(initial)
    program = Program(aio, api, "storm", mount / "file", str(seed))
    moved = 0
    try:
        for turn in range(25):
            first = chance.randrange(pages) if turn else 0
            last = min(first + chance.choice((0, 5, 300)), pages - 1) if turn else pages - 1
            to = chance.choice(("pagecache", "xip")) if turn else "pagecache"
            outcome = mount.migrate("file", to, f"{first}-{last}")
            assert set(outcome["failed"]) <= {"no_ram"}, outcome
            moved += outcome["moved"]
            assert program.process.poll() is None, program.process.communicate()
        transfers = int(program.finish())
    finally:
        program.process.kill()
        program.process.communicate()
    assert moved >= pages
    assert transfers > 100
