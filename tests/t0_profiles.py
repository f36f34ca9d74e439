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
write_latency_ns = 40
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


def test_time_is_latency_by_access_and_bytes_by_bandwidth() -> None:
    profile = dataclasses.replace(
        load_profile("dram"),
        read_latency_ns=100,
        read_bytes_per_s=1_000_000_000,
        write_latency_ns=7,
        write_bytes_per_s=500_000_000,
    )
    assert profile.read_ns(3, 4096) == 4396
    assert profile.read_ns(0, 0) == 0
    assert profile.write_ns(2, 128) == 270


def test_one_of_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "media.toml"
    file.write_text(OWN)
    name = f"{file}:mram"
    assert load_profile(name) == Profile(name, "d", "s", 35, 40, 1000, 500, 0)


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
