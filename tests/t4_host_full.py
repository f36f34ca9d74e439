"""A sparse image on a host disk that fills: calls get ENOSPC, the mount lives, bytes are kept."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import needs
from live import PAGE, Mounts, new_image, xipfs

from xipfs.errors import FsError
from xipfs.memory.region import Region

pytestmark = [needs("root", "fuse")]

BLOCK = 64 << 10


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "disk", disk], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def block(number: int) -> bytes:
    return bytes([number % 250 + 1]) * BLOCK


def fill(path: Path) -> int:
    """Write blocks until there is no room; return how many were taken whole."""
    with open(path, "wb", buffering=0) as file:
        for number in range(256):
            try:
                file.write(block(number))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                os.fsync(file.fileno())
                return number
    raise AssertionError("16 MiB went onto a disk of 4")


def exhaust_names(directory: Path) -> int:
    """Make directories until there is no room; return how many."""
    for number in range(1000):
        try:
            (directory / f"{number:0>200}").mkdir()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return number
    raise AssertionError("there was room for 1000 directories")


@pytest.mark.expects_log
def test_a_store_is_refused_before_it_is_begun(host: Path) -> None:
    image = host / "region"
    with open(image, "wb") as file:
        file.truncate(8 << 20)
    region = Region(image, writable=True)
    region.store(5 << 20, b"kept")
    (host / "other").write_bytes(bytes((4 << 20) - (64 << 10)))
    # Another page of the same 64 KiB has its room since the first store.
    region.store((5 << 20) + (64 << 10) - 4, b"kept")
    told = r"no room for bytes 1048576 to 1052671 of image .*region"
    with pytest.raises(FsError, match=told) as no:
        region.store(1 << 20, b"lost")
    assert no.value.errno == errno.ENOSPC
    with pytest.raises(FsError, match="no room"):
        region.store_word(2 << 20, 1)
    # A single page still fits where 64 KiB do not.
    os.truncate(host / "other", (4 << 20) - (64 << 10) - PAGE)
    region.store(1 << 20, b"page")
    with pytest.raises(FsError, match="no room"):
        region.store((1 << 20) + PAGE, b"lost")
    assert bytes(region.load(5 << 20, 4)) == b"kept"
    assert region.statistics().stores == 3
    region.close()


@pytest.mark.parametrize("pagecache", [False, True], ids=["xip", "pagecache"])
def test_a_full_host_is_a_full_filesystem(host: Path, live: Mounts, pagecache: bool) -> None:
    image = new_image(host / "image", pagecache=pagecache)
    mount = live.mount(image, "ram=1M")
    mount.expected_log = [r"WARNING .*the host has no room for bytes \d+ to \d+ of image .*/image"]
    (mount / "before").write_bytes(b"before")
    (mount / "mapped").touch()
    taken = fill(mount / "file")
    assert 30 <= taken < 64
    assert exhaust_names(mount.directory) > 0
    with open(mount / "mapped", "r+b") as file:
        file.truncate(1 << 20)
        with mmap.mmap(file.fileno(), 1 << 20) as memory:
            for page in range(256):
                memory[page * PAGE] = 1
            with pytest.raises(OSError, match="No space left"):
                memory.flush()
    content = (mount / "file").read_bytes()
    assert content == b"".join(block(number) for number in range(len(content) // BLOCK))
    assert len(content) == taken * BLOCK
    assert mount.running()
    # What the image has its room for can be given away and taken again.
    (mount / "file").unlink()
    assert fill(mount / "again") >= taken - 2
    assert (mount / "before").read_bytes() == b"before"
    mount.umount()
    assert xipfs("fsck", "-n", image).returncode == 0


def test_an_image_that_cannot_be_made_says_so(host: Path) -> None:
    tree = host.parent / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(bytes(range(1, 251)) * (5 << 12))
    done = xipfs("mkfs", host / "image", "--size", "16M", "--root-dir", tree, check=False)
    assert done.returncode == 1
    assert "the host has no room for bytes" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (host / "image").exists()
