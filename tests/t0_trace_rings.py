"""Rings: everything comes once and in order, however little one call may do; memory is bounded.

A ring is a plain file here: sub-buffers one after the other, and its end for "empty".
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from xipfs.trace.records import COLUMNS
from xipfs.trace.ring import CHUNK_PAGES, Rows, sorted_rows
from xipfs.trace.rings import BUFFER_KIB_MAX, Rings

PAGE_BYTES = 64
ROWS_A_PAGE = PAGE_BYTES // 8


class Times:
    """A decoder for pages that hold nothing but time stamps; 0 is no record."""

    def decode(self, pages: npt.NDArray[np.uint8]) -> Rows:
        stamps = np.ascontiguousarray(pages).view(np.uint64).reshape(-1)
        rows = np.zeros((np.count_nonzero(stamps), COLUMNS), np.uint64)
        rows[:, 0] = stamps[stamps > 0]
        return rows

    def merge(self, rows: Rows) -> Rows:
        return sorted_rows(rows)


def instance(path: Path, cpus: list[list[int]], buffer_kib: int = 8) -> Path:
    """A tracefs instance whose rings hold these time stamps."""
    for number, stamps in enumerate(cpus):
        (path / f"per_cpu/cpu{number}").mkdir(parents=True)
        padded = np.zeros(-(-len(stamps) // ROWS_A_PAGE) * ROWS_A_PAGE, np.uint64)
        padded[: len(stamps)] = stamps
        padded.tofile(path / f"per_cpu/cpu{number}/trace_pipe_raw")
    (path / "buffer_size_kb").write_text(f"{buffer_kib}\n")
    return path


def taken(rings: Rings, until_ns: int) -> list[list[int]]:
    """What each call gives that is known to be all up to its time, as an observer takes it."""
    calls, held, reached_ns = [], np.zeros(0, np.uint64), -1
    while reached_ns < until_ns:
        batches, now_ns = rings.read(Times(), until_ns)
        assert now_ns > reached_ns
        reached_ns = now_ns
        rows = np.sort(np.concatenate([held, *(batch[:, 0] for batch in batches)]))
        calls.append(rows[rows <= reached_ns].tolist())
        held = rows[rows > reached_ns]
    return calls


@pytest.mark.parametrize("seed", range(20))
def test_all_of_it_comes_once_and_in_order(tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    stamps = choose.sample(range(1, 200_000), 9000)
    # One ring has most of it; each is in order, as the kernel writes it.
    owner = choose.choices(range(4), [90, 5, 4, 1], k=len(stamps))
    cpus = [sorted(s for s, o in zip(stamps, owner, strict=True) if o == cpu) for cpu in range(4)]
    instances = [
        instance(tmp_path / "G", cpus[:2]),
        instance(tmp_path / "P", cpus[2:]),
    ]
    rings = Rings(instances, PAGE_BYTES, rows_max=600)
    if choose.random() < 0.5:
        rings.pump()
    until_ns = choose.choice([200_000, 120_000])
    calls = taken(rings, until_ns)
    rings.close()
    assert [stamp for call in calls for stamp in call] == sorted(s for s in stamps if s <= until_ns)
    # The bound, and the chunk that goes over it, for each ring that is read.
    assert max(map(len, calls)) <= 4 * (600 + CHUNK_PAGES * ROWS_A_PAGE)
    assert len(calls) >= 4


def test_what_is_not_decoded_is_bounded(tmp_path: Path) -> None:
    stamps = list(range(1, 1 + 10 * CHUNK_PAGES * ROWS_A_PAGE))
    limit = 3 * CHUNK_PAGES * PAGE_BYTES
    rings = Rings([instance(tmp_path / "P", [stamps])], PAGE_BYTES, pumped_bytes_max=limit)
    for _ in range(5):
        rings.pump()
        assert rings.pumped_bytes == limit
    # What stayed in the ring is read all the same, after what was pumped.
    assert [s for call in taken(rings, 10**6) for s in call] == stamps
    assert rings.pumped_bytes == 0
    rings.close()


def test_a_ring_is_not_read_past_the_time_that_is_asked_for(tmp_path: Path) -> None:
    # A ring that is being written to has always more: a few records in a sub-buffer of its own.
    stamps = list(range(1, 1 + 10 * ROWS_A_PAGE))
    rings = Rings([instance(tmp_path / "P", [stamps])], PAGE_BYTES)
    batches, reached_ns = rings.read(Times(), ROWS_A_PAGE + 1)
    assert reached_ns == ROWS_A_PAGE + 1
    # Two sub-buffers begin by then. Only that the third begins later says so.
    assert [s for batch in batches for s in batch[:, 0]] == stamps[: 3 * ROWS_A_PAGE]
    [ring] = rings._rings
    assert os.lseek(ring.fd, 0, os.SEEK_CUR) == 3 * PAGE_BYTES
    rings.close()


def test_a_look_whether_rings_are_empty_takes_nothing(tmp_path: Path) -> None:
    """With pipes for rings: a plain file is always readable."""

    def write(stamps: list[int]) -> None:
        os.write(writer, np.array(stamps, np.uint64).tobytes())

    path = instance(tmp_path / "P", [[], []])
    for ring in path.glob("per_cpu/*/trace_pipe_raw"):
        ring.unlink()
        os.mkfifo(ring)
    rings = Rings([path], PAGE_BYTES)
    writer = os.open(path / "per_cpu/cpu1/trace_pipe_raw", os.O_RDWR)
    assert rings.empty()
    write([1, 2, 3, 4, 5, 6, 7, 8])
    assert not rings.empty()
    assert rings.pumped_bytes == 0
    rings.pump()
    assert rings.pumped_bytes == PAGE_BYTES
    assert not rings.empty(), "by what was pumped"
    write([9, 10, 11, 12, 13, 14, 15, 16])
    assert [s for call in taken(rings, 10**6) for s in call] == [*range(1, 17)]
    assert rings.empty()
    os.close(writer)
    rings.close()


def test_a_ring_that_was_half_full_is_doubled(tmp_path: Path) -> None:
    def after(pages: int, buffer_kib: int) -> int:
        path = instance(
            tmp_path / f"{pages}-{buffer_kib}", [[1] * (pages * ROWS_A_PAGE)], buffer_kib
        )
        rings = Rings([path], PAGE_BYTES)
        rings.pump()
        rings.close()
        assert rings.buffer_kib[path] == int((path / "buffer_size_kb").read_text())
        return rings.buffer_kib[path]

    # 64 pages of 64 bytes are 4 KiB.
    assert after(64, 8) == 8
    assert after(65, 8) == 16
    assert after(65, BUFFER_KIB_MAX) == BUFFER_KIB_MAX
