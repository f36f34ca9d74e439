"""What a mount's use of the region costs: counted exactly, timed by a profile's arithmetic."""

from __future__ import annotations

import dataclasses

from media import new_medium, open_medium

from xipfs.clock import ManualClock
from xipfs.fs.types import PageKind
from xipfs.memory.profiles import load_profile
from xipfs.stats.cost import cost

PAGE = 4096
REG = 0o100644


def test_fills_flushes_frames_and_their_times() -> None:
    clock = ManualClock()
    fs = open_medium(new_medium(), clock=clock)
    file = fs.mknod(1, b"file", REG, 0, 0, 0).ino
    fs.set_default_kind(file, PageKind.PAGECACHE)
    fs.write(file, 0, bytes(3 * PAGE))
    fs.fsync(file)
    clock.advance(2_000_000_000)  # three frames for two seconds
    before = cost(fs, None)
    assert before["nvram_read_bytes"] == 0
    assert before["ram_frame_seconds"] == 6.0
    assert before["medium"] is None
    assert "read_ns_estimated" not in before

    for index in range(3):
        assert fs.demote(file, index)
        assert fs.promote(file, index)
    clock.advance(1_000_000_000)
    written = bytes([7]) * PAGE
    base = cost(fs, None)
    assert base["nvram_read_bytes"] == 3 * PAGE
    assert base["ram_frame_seconds"] == 9.0
    fs.write(file, 0, written)
    after_write = cost(fs, None)
    fs.fsync(file)
    profile = dataclasses.replace(
        load_profile("pcm"),
        read_latency_ns=1000,
        read_unit_bytes=1024,
        read_bytes_per_s=4096,
        write_latency_ns=10,
        write_bytes_per_s=64,
        endurance_writes=1000,
    )
    after = cost(fs, profile)
    # fsync writes the one dirty page home and fences once.
    assert after["nvram_written_bytes"] - after_write["nvram_written_bytes"] == PAGE
    assert after["nvram_fences"] - after_write["nvram_fences"] == 1
    # Of each page 3,072 bytes are beyond the unit, at 4,096 bytes a second.
    assert after["read_ns_estimated"] == 3 * 1000 + 2_250_000_000
    # A line takes a second, but for the first of each fence.
    lines, fences = after["nvram_written_bytes"] // 64, after["nvram_fences"]
    assert after["write_ns_estimated"] == fences * 10 + (lines - fences) * 10**9
    hottest = after["wear"]["hottest"][0]
    mean = hottest["cell_writes_block_mean"]
    assert mean == hottest["line_writes"] / 64
    assert after["wear"]["endurance_used_hottest_block_mean"] == round(mean / 1000, 9)
    assert sum(after["wear"]["blocks_by_line_writes"].values()) == after["wear"]["blocks_written"]
    assert after["modelled"] is True


def test_an_unlimited_medium_does_not_wear_out() -> None:
    assert (
        "endurance_used_hottest_block_mean"
        not in cost(open_medium(new_medium()), load_profile("dram"))["wear"]
    )
