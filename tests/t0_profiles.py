"""Profiles of media: the shipped file, a user's own, and what is said of a wrong one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from xipfs.errors import UsageError
from xipfs.memory.profiles import Profile, load_profile, shipped_names

OWN = """
[mram]
description = "d"
source = "s"
read_latency_ns = 35
read_unit_bytes = 16
write_latency_ns = 40
write_unit_bytes = 32
read_bytes_per_s = 1000
write_bytes_per_s = 500
endurance_writes = 0
"""


def test_the_shipped_ones_each_with_a_source() -> None:
    assert shipped_names() == ["nor", "pcm", "optane", "dram", "cxl"]
    for name in shipped_names():
        profile = load_profile(name)
        assert len(profile.source) > 60
        assert profile.read_latency_ns > 0


def test_time_is_latency_by_access_and_bandwidth_for_the_bytes_beyond_its_unit() -> None:
    profile = dataclasses.replace(
        load_profile("dram"),
        read_latency_ns=100,
        read_unit_bytes=64,
        read_bytes_per_s=1_000_000_000,
        write_latency_ns=7,
        write_unit_bytes=256,
        write_bytes_per_s=500_000_000,
    )
    # 3 units are 192 bytes; 3,904 more at 1 ns.
    assert profile.read_ns(3, 4096) == 4204
    assert profile.read_ns(0, 0) == 0
    # 2 units are 512 bytes; 512 more at 2 ns.
    assert profile.write_ns(2, 1024) == 14 + 1024
    assert profile.write_ns(2, 512) == 14
    assert profile.write_ns(2, 64) == 14, "less than the units: no time comes back"


@pytest.mark.parametrize(
    ("name", "read", "size_bytes", "time_ns"),
    [
        ("nor", True, 32, 325),  # 100 + 15 * 15
        ("nor", True, 4096, 41_600),  # 128 pages of 32 bytes
        ("nor", False, 512, 340_000),
        ("nor", False, 4096, 2_720_000),  # 8 buffers
        ("pcm", True, 64, 156),  # 101 + 55
        ("pcm", True, 4096, 3_621),  # 101 and 64 array reads
        ("pcm", False, 64, 207),  # 57 + 150
        ("pcm", False, 4096, 9_657),
        ("optane", True, 64, 305),
        ("optane", True, 4096, 915),  # 4,032 bytes at 6.6 GB/s: 610.9
        ("optane", False, 64, 62),
        ("optane", False, 4096, 1_815),  # 4,032 bytes at 2.3 GB/s: 1,753.04
        ("dram", True, 64, 101),
        ("dram", True, 4096, 290),  # 4,032 bytes at 21.3 GB/s: 189.3
        ("dram", False, 64, 57),
        ("cxl", True, 64, 181),
        ("cxl", False, 64, 137),
    ],
)
def test_one_access_takes_what_the_source_says(
    name: str, read: bool, size_bytes: int, time_ns: int
) -> None:
    profile = load_profile(name)
    assert (profile.read_ns if read else profile.write_ns)(1, size_bytes) == time_ns


def test_one_of_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "media.toml"
    file.write_text(OWN)
    name = f"{file}:mram"
    assert load_profile(name) == Profile(name, "d", "s", 35, 16, 40, 32, 1000, 500, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("read_latency_ns = 35\n", ""), "missing or unknown fields: read_latency_ns"),
        (('source = "s"', 'source = "s"\ncolour = 1'), "missing or unknown fields: colour"),
        (("read_latency_ns = 35", "read_latency_ns = -1"), "read_latency_ns is -1; expected a"),
        (("read_latency_ns = 35", "read_latency_ns = true"), "read_latency_ns is True"),
        (("write_bytes_per_s = 500", "write_bytes_per_s = 0"), "expected a whole number from 1"),
        (('source = "s"', "source = 3"), "source is 3; expected a text"),
        (("[mram]", "[mram"), "is not TOML"),
        (("[mram]", "[other]"), "no such medium in media.toml; expected other"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    file = tmp_path / "media.toml"
    assert change[0] in OWN
    file.write_text(OWN.replace(*change))
    with pytest.raises(UsageError, match="m") as refused:
        load_profile(f"{file}:mram")
    assert message in str(refused.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        load_profile(f"{tmp_path}/none.toml:mram")
