"""The region: an image file as persistent memory, and its counters."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from xipfs.errors import ImageError
from xipfs.memory.region import Region, RegionStatistics


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "region"
    path.write_bytes(bytes(range(256)) * 32)
    return path


def test_what_is_stored_can_be_loaded_and_is_in_the_file(file: Path) -> None:
    region = Region(file, writable=True)
    region.store(100, b"hello")
    region.store_word(4096, 0x0102030405060708)
    assert bytes(region.load(99, 7)) == b"\x63hello\x69"
    assert bytes(region.load(4096, 8)) == bytes([8, 7, 6, 5, 4, 3, 2, 1])
    region.sync()
    region.close()
    assert file.read_bytes()[100:105] == b"hello"


def test_a_load_is_a_view_that_sees_later_stores_and_cannot_be_written(file: Path) -> None:
    region = Region(file, writable=True)
    view = region.load(0, 4)
    region.store(0, b"new!")
    assert bytes(view) == b"new!"
    with pytest.raises(TypeError):
        view[0] = 1
    del view
    region.close()


def test_a_read_only_region_stores_nothing(file: Path) -> None:
    before = file.read_bytes()
    region = Region(file, writable=False)
    assert not region.writable
    with pytest.raises(TypeError):
        region.store(0, b"x")
    with pytest.raises(ValueError, match="read-only"):
        region.store_word(0, 1)
    region.sync()
    region.close()
    assert file.read_bytes() == before


@pytest.mark.parametrize(("offset", "size"), [(-1, 2), (8191, 2), (8192, 1), (0, 8193)])
def test_nothing_outside_the_region_can_be_reached(file: Path, offset: int, size: int) -> None:
    region = Region(file, writable=True)
    with pytest.raises(AssertionError):
        region.load(offset, size)
    with pytest.raises(AssertionError):
        region.store(offset, bytes(size))
    region.close()


def test_a_word_must_be_aligned(file: Path) -> None:
    region = Region(file, writable=True)
    with pytest.raises(AssertionError):
        region.store_word(4, 1)
    region.close()


def test_a_view_outlives_the_region(file: Path) -> None:
    region = Region(file, writable=True)
    view = region.load(0, 4)
    region.close()
    assert bytes(view) == b"\x00\x01\x02\x03"


def test_every_store_flush_and_fence_is_counted(file: Path) -> None:
    region = Region(file, writable=True)
    assert region.statistics() == RegionStatistics(0, 0, 0, 0)
    region.store(60, bytes(8))  # two lines
    region.flush(60, 8)
    region.store_word(0, 1)
    region.flush(0, 8)
    region.fence()
    assert region.statistics() == RegionStatistics(
        stores=2, stored_bytes=16, flushed_lines=3, fences=1
    )
    region.close()


class RecordedMap(mmap.mmap):
    """A mapping that notes what of it was brought to the disk."""

    synced: list[tuple[int, int]] = []  # noqa: RUF012

    def flush(self, offset: int = 0, size: int = -1) -> None:
        self.synced.append((offset, size))
        super().flush(*(() if size < 0 else (offset, size)))


def test_a_region_that_syncs_brings_to_disk_what_each_fence_orders(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, int]] = []
    monkeypatch.setattr(RecordedMap, "synced", synced)
    monkeypatch.setattr("xipfs.memory.region.mmap.mmap", RecordedMap)
    region = Region(file, writable=True, sync_fences=True)
    assert synced == [(0, -1)], "what came before, whole"
    synced.clear()
    region.store(5000, b"new")
    region.fence()
    assert synced == [], "nothing was flushed"
    region.flush(5000, 3)
    region.fence()
    assert synced == [(4096, 907)], "from the page's start to the last byte"
    region.flush(100, 8)
    region.flush(4096, 64)
    region.fence()
    region.fence()
    assert synced == [(4096, 907), (0, 4160)], "one call a fence that orders anything"
    region.close()
    region = Region(file, writable=True)
    region.flush(0, 8)
    region.fence()
    assert len(synced) == 2, "without the option only sync() goes to the disk"
    region.close()


def test_a_file_that_is_no_region_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="absent cannot be opened: No such file"):
        Region(tmp_path / "absent", writable=False)
    short = tmp_path / "short"
    short.write_bytes(b"x" * 4095)
    with pytest.raises(ImageError, match="4095 bytes long; expected an image made by xipfs mkfs"):
        Region(short, writable=False)


def test_what_is_left_of_the_last_page_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(bytes(4096 + 100))
    region = Region(path, writable=False)
    assert region.size_bytes == 4096
    region.close()
