"""Migration on a live mount: every reader sees the same bytes, nothing but the kind moves."""

from __future__ import annotations

import json
import mmap
import os
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import needs
from live import PAGE, LiveMount, Mounts, xipfs

pytestmark = [needs("root", "fuse")]

NOISE = random.Random(41).randbytes(41 * PAGE)


@pytest.fixture(scope="module")
def mnt(shared: Mounts) -> LiveMount:
    return shared.mount()


def test_there_and_back_under_an_open_mapping(mnt: LiveMount) -> None:
    path = mnt / "both-ways"
    path.write_bytes(NOISE)
    before = os.stat(path)
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as private,
    ):
        assert mapped[:] == NOISE
        private[5 * PAGE] = 0
        copied = private[:]
        for kind, letter in (("pagecache", "P"), ("xip", "X"), ("pagecache", "P"), ("xip", "X")):
            assert mnt.migrate("both-ways", kind) == {
                "file": str(path),
                "to": kind,
                "moved": 41,
                "already": 0,
                "failed": {},
                "failed_errno": {},
            }
            assert mnt.letters("both-ways") == letter * 41
            assert mapped[:] == NOISE
            assert private[:] == copied, "a private copy is the process's own"
            assert path.read_bytes() == NOISE
    after = os.stat(path)
    assert (after.st_size, after.st_mtime_ns, after.st_ctime_ns, after.st_blocks) == (
        before.st_size,
        before.st_mtime_ns,
        before.st_ctime_ns,
        before.st_blocks,
    )


def test_dirty_bytes_of_a_shared_mapping_come_along(live: Mounts) -> None:
    mount = live.mount()
    (mount / "file").write_bytes(NOISE)
    expected = bytearray(NOISE)
    with open(mount / "file", "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        for turn, kind in enumerate(["pagecache", "xip", "pagecache", "xip"]):
            for page in range(41):
                mapped[page * PAGE + turn] = expected[page * PAGE + turn] = turn + page
            assert mount.migrate("file", kind)["moved"] == 41
            assert mapped[:] == expected
            with open(mount / "file", "rb", buffering=0) as reader:
                assert reader.read() == expected
    after = live.remount(mount, "ro")
    assert (after / "file").read_bytes() == expected


def test_a_part_and_what_is_there_already(mnt: LiveMount) -> None:
    (mnt / "part").write_bytes(NOISE[: 8 * PAGE])
    counts = [
        (mnt.migrate("part", kind, pages)["moved"], mnt.letters("part"))
        for kind, pages in (
            ("pagecache", "2-3"),
            ("pagecache", "2-5"),
            ("xip", "0-3"),
            ("pagecache", "7"),
        )
    ]
    assert counts == [(2, "XXPPXXXX"), (2, "XXPPPPXX"), (2, "XXXXPPXX"), (1, "XXXXPPXP")]
    again = mnt.migrate("part", "pagecache", "4-5")
    assert (again["moved"], again["already"]) == (0, 2)


def test_holes_stay_holes(mnt: LiveMount) -> None:
    with open(mnt / "holes", "wb") as file:
        file.truncate(1 << 40)
        file.seek(5 * PAGE)
        file.write(NOISE[:PAGE])
    outcome = mnt.migrate("holes", "pagecache")
    assert (outcome["moved"], outcome["already"], outcome["failed"]) == (1, 0, {})
    assert mnt.pages("holes") == [
        (".", 0, 5, None, None),
        ("P", 5, 1, 1, 0),
        (".", 6, (1 << 28) - 6, None, None),
    ]


def test_the_counters_of_vmstat(live: Mounts) -> None:
    mount = live.mount()
    (mount / "file").write_bytes(NOISE)
    mount.migrate("file", "pagecache", "0-12")
    mount.migrate("file", "xip", "0-4")
    vmstat = mount.vmstat()
    names = ("pgmigrate_success", "pgmigrate_fail", "pgpromote_success", "pgdemote_success")
    assert [vmstat[name] for name in names] == [18, 0, 13, 5]
    assert (vmstat["nr_xip_pages"], vmstat["nr_pagecache_pages"]) == (41 - 8, 8)
    assert vmstat["nr_resident_pages"] == 8


def test_more_pages_than_ram(live: Mounts) -> None:
    mount = live.mount(None, "ram=64K")
    (mount / "file").write_bytes(NOISE)
    outcome = mount.migrate("file", "pagecache")
    assert (outcome["moved"], outcome["failed"]) == (41, {})
    assert mount.letters("file") == "p" * 25 + "P" * 16
    assert (mount / "file").read_bytes() == NOISE
    after = live.remount(mount, "ro", "ram=64K")
    assert (after / "file").read_bytes() == NOISE
    assert after.letters("file").replace("P", "p") == "p" * 41


def test_migration_while_others_read_and_write(live: Mounts) -> None:
    """One process writes through a mapping, one reads, while the file goes to and fro."""
    mount = live.mount()
    (mount / "busy").write_bytes(bytes(41 * PAGE))
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(mount / "busy")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    stop = threading.Event()
    torn: list[int] = []

    def read() -> None:
        with open(mount / "busy", "rb", buffering=0) as file:
            while not stop.is_set():
                data = os.pread(file.fileno(), 41 * PAGE, 0)
                torn.extend(page for page in range(41) if data[page * PAGE + 8] not in (0, page))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        for turn in range(6):
            outcome = mount.migrate("busy", "xip" if turn % 2 else "pagecache")
            assert outcome["failed"] == {}
            assert outcome["moved"] == 41
    finally:
        stop.set()
        reader.join()
        said, _ = writer.communicate(b"stop\n", timeout=30)
    assert torn == []
    rounds = int(said)
    assert rounds > 0
    expected = b"".join(
        rounds.to_bytes(8, "little") + bytes([page]) + bytes(PAGE - 9) for page in range(41)
    )
    assert (mount / "busy").read_bytes() == expected
    after = live.remount(mount, "ro")
    assert (after / "busy").read_bytes() == expected


#: Stores the number of the round at the start of each page; prints the last whole round.
_WRITER = """
import mmap, select, sys
with open(sys.argv[1], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0)
print("ready", flush=True)
rounds = 0
while not select.select([sys.stdin], [], [], 0)[0]:
    rounds += 1
    for page in range(41):
        mapped[page * 4096 : page * 4096 + 8] = rounds.to_bytes(8, "little")
        mapped[page * 4096 + 8] = page
    for page in range(41):
        assert mapped[page * 4096 : page * 4096 + 8] == rounds.to_bytes(8, "little"), page
mapped.close()
print(rounds)
"""


#: Maps the file; touches page N when told "N" and says what byte it found there.
_READER = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
print(sys.argv[1], flush=True)
for line in sys.stdin:
    print(mapped[int(line) * 4096 + 7], flush=True)
"""


def test_when_the_reply_comes_no_process_has_the_page_mapped(mnt: LiveMount) -> None:
    """The next touch faults, whoever makes it: it sees the new placement."""
    path = mnt / "mapped"
    path.write_bytes(NOISE)
    control = os.open(mnt / ".xipfs" / "control", os.O_RDWR)
    reader = subprocess.Popen(
        [sys.executable, "-c", _READER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        said, told = reader.stdout, reader.stdin
        assert said is not None
        assert told is not None
        assert said.readline() == f"{path}\n"
        maps = Path(f"/proc/{reader.pid}/maps").read_text().splitlines()
        (start,) = [int(line.partition("-")[0], 16) for line in maps if line.endswith(str(path))]

        def touch(page: int) -> int:
            print(page, file=told, flush=True)
            return int(said.readline())

        def is_mapped(page: int) -> bool:
            with open(f"/proc/{reader.pid}/pagemap", "rb", buffering=0) as pagemap:
                entry = os.pread(pagemap.fileno(), 8, (start // PAGE + page) * 8)
            return bool(int.from_bytes(entry, "little") >> 63)

        for turn in range(100):
            page, to = turn % 41, "xip" if turn // 41 % 2 else "pagecache"
            assert touch(page) == NOISE[page * PAGE + 7]
            assert is_mapped(page)
            request = {"op": "migrate", "ino": path.stat().st_ino, "to": to, "ranges": [[page, 1]]}
            os.write(control, json.dumps(request).encode())
            answer = os.read(control, 1 << 16)
            assert not is_mapped(page), (turn, answer)
            assert json.loads(answer) == {
                "result": {"moved": 1, "already": 0, "failed": {}, "failed_errno": {}}
            }
            assert os.read(control, 1) == b""
    finally:
        reader.communicate(timeout=30)
        os.close(control)


def test_what_cannot_be_migrated(mnt: LiveMount, live: Mounts) -> None:
    (mnt / "four").write_bytes(NOISE[: 4 * PAGE])
    (mnt / "none").write_bytes(b"")

    def refused(*words: str) -> tuple[int, str]:
        done = xipfs("migrate", *words, check=False)
        assert done.stdout == ""
        return done.returncode, done.stderr

    four = str(mnt / "four")
    code, said = refused(four, "--to", "pagecache", "--pages", "2-4")
    assert (code, said) == (
        2,
        f"xipfs migrate: {four}: pages 2-4 reach outside the file; expected pages 0-3\n",
    )
    assert refused(four, "--to", "tape")[0] == 2
    code, said = refused(four, "--to", "xip", "--pages", "3-1")
    assert code == 2
    assert "runs backwards" in said
    code, said = refused(str(mnt.directory), "--to", "xip")
    assert code == 2
    assert "is not a regular file" in said
    code, said = refused(str(mnt.image), "--to", "xip")
    assert code == 1
    assert "is not on an xipfs mount" in said
    code, said = refused(str(mnt / "absent"), "--to", "xip")
    assert code == 1
    assert "No such file" in said
    code, said = refused(str(mnt / ".xipfs" / "stats.json"), "--to", "xip")
    assert code == 2
    assert f"{mnt / '.xipfs' / 'stats.json'} is a control file" in said
    assert mnt.migrate("none", "xip")["moved"] == 0
    assert mnt.letters("four") == "XXXX"


def test_a_read_only_mount_migrates_nothing(live: Mounts) -> None:
    mount = live.mount()
    (mount / "file").write_bytes(NOISE)
    mount = live.remount(mount, "ro")
    done = xipfs("migrate", mount / "file", "--to", "pagecache", check=False)
    assert done.returncode == 1
    where = f"xipfs migrate: {mount.directory} is mounted read-only"
    remedy = "mount it read-write\n"
    assert done.stderr == f"{where}: no page can change its kind; {remedy}"
    words = ("migrate", "-r", mount.directory, "--to", "pagecache", "--dry-run")
    done = xipfs(*words, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{where}: it takes no request, nor a dry run; {remedy}"
    assert mount.letters("file") == "X" * 41


def test_by_default_no_policy_moves_anything(live: Mounts) -> None:
    mount = live.mount(None, "observe=requests,readahead=0")
    assert mount.stats()["migration"]["policy"] == "off"
    (mount / "file").write_bytes(NOISE)
    for _ in range(5):
        assert (mount / "file").read_bytes() == NOISE
    assert mount.letters("file") == "X" * 41


def test_a_dry_policy_counts_what_it_would_move_and_moves_nothing(live: Mounts) -> None:
    mount = live.mount(None, "observe=requests,readahead=0,policy=fifo,dry,medium=pcm")
    (mount / "file").write_bytes(NOISE)
    assert (mount / "file").read_bytes() == NOISE
    migration = mount.stats()["migration"]
    (planned,) = migration["would_move"]
    assert (planned["to"], planned["reason"]) == ("pagecache", "first fault")
    assert planned["count"] == 41
    dry = migration["dry_run"]
    assert (dry["modelled"], dry["promoted"], dry["medium"]) == (True, 41, "pcm")
    assert dry["cost"]["nvram_read_bytes"] == 41 * PAGE
    # 41 pages of 64 lines at 55 ns and the way to each, and the transactions.
    assert dry["cost"]["ns_estimated"] > 41 * 3621
    # What one decision point has planned moves together, in some transactions of 4 fences.
    lines = xipfs("events", mount.directory).stdout.splitlines()
    told = [re.search(r" to pagecache \(fifo: first fault\): (\d+) would move", at) for at in lines]
    assert sum(int(each[1]) for each in told if each) == 41
    assert dry["commits"] == len(lines) <= 41
    assert dry["cost"]["nvram_fences"] == 4 * len(lines)
    said = xipfs("stat", mount.directory).stdout
    written = dry["cost"]["nvram_written_bytes"]
    spent_us = dry["cost"]["ns_estimated"] / 1000
    assert 144 < spent_us < 999
    assert (
        "\npolicy fifo, dry: 41 moves asked for, 0 held back\n"
        "  would move 41 to pagecache: first fault\n"
        f"  modelled cost: 167936 bytes read from NVRAM, {written} written\n"
        "  modelled saving: 0 reads and 0 writes in RAM, 0 bytes\n"
        f"  modelled on pcm: {spent_us:.4g} us spent, 0 ns saved\n"
    ) in said
    metrics = (mount / ".xipfs" / "metrics").read_text().splitlines()
    for line in (
        "xipfs_policy_asked_total 41",
        "xipfs_policy_planned_total 41",
        "xipfs_policy_moves_under_way 0",
        'xipfs_policy_would_move_total{to="pagecache",reason="first fault"} 41',
        'xipfs_writeback_total{why="background"} 0',
        "xipfs_nr_dirty 0",
    ):
        assert line in metrics
    assert mount.stats()["vmstat"]["pgpromote_success"] == 0
    assert mount.letters("file") == "X" * 41


def test_a_dry_run_by_hand(live: Mounts) -> None:
    mount = live.mount(None, "medium=optane")
    (mount / "file").write_bytes(NOISE)
    mount.migrate("file", "pagecache", "3-4")
    words = ("migrate", mount / "file", "--to", "pagecache", "--dry-run", "--pages", "2-9")
    done = xipfs(*words).stdout.replace(str(mount.directory), "MNT")
    # 6 pages: 6 times 305 ns and 24,192 bytes at 6.6 GB/s are 5,495 ns; 4 fences of 62 ns and
    # 384 bytes at 2.3 GB/s are 414 ns. A line: 305 against 101 ns; 62 against 57 ns.
    assert done == (
        "MNT: 6 pages would move to pagecache, 2 already there, nothing was moved\n"
        "  MNT/file pages 2-2 (manual)\n"
        "  MNT/file pages 5-9 (manual)\n"
        "modelled: 24576 bytes read from NVRAM, 640 written, 4 fences\n"
        "modelled: RAM +24576 bytes, struct pages +384 bytes, 0 pages evicted\n"
        "modelled on optane: 5.909 us; from RAM a later load is 204 ns faster, a store 5 ns\n"
    )
    answer = json.loads(xipfs("migrate", "-r", mount.directory, *words[2:5], "--json").stdout)
    assert (answer["would_move"], answer["already"], answer["dry_run"]) == (39, 2, True)
    (answer,) = answer["mounts"]
    assert answer["cost"]["nvram_read_bytes"] == 39 * PAGE
    assert mount.letters("file") == "XXX" + "PP" + "X" * 36


def test_a_batch_of_files_by_paths_and_by_tree(mnt: LiveMount) -> None:
    tree = mnt / "tree"
    (tree / "sub").mkdir(parents=True)
    for number, pages in enumerate((1, 2, 300)):
        (tree / "sub" / f"{number}").write_bytes(bytes([number + 1]) * pages * PAGE)
    (tree / "empty").write_bytes(b"")
    (tree / "link").symlink_to("sub/0")
    os.link(tree / "sub" / "1", tree / "twice")
    done = xipfs("migrate", "-r", tree, "--to", "pagecache", "--json")
    outcome = json.loads(done.stdout)
    assert (outcome["to"], outcome["moved"], outcome["already"]) == ("pagecache", 303, 0)
    assert outcome["failed"] == {}
    assert [(each["file"], each["moved"]) for each in outcome["files"]] == [
        (str(tree / "empty"), 0),
        (str(tree / "twice"), 2),
        (str(tree / "sub" / "0"), 1),
        (str(tree / "sub" / "2"), 300),
    ]
    done = xipfs("migrate", tree / "sub" / "0", tree / "twice", "--to", "xip")
    assert done.stdout == "2 files: 3 pages moved to xip, 0 already there, 0 refused\n"
    assert mnt.letters("tree/sub/1") == "XX"
    assert mnt.letters("tree/sub/2") == "P" * 300
    refused = xipfs("migrate", tree, tree / "twice", "--to", "xip", check=False)
    assert refused.returncode == 2
    assert "is not a regular file" in refused.stderr
    refused = xipfs("migrate", "-r", tree, "--to", "xip", "--pages", "0", check=False)
    assert (refused.returncode, refused.stdout) == (2, "")


def test_events_and_statistics_of_moves(live: Mounts) -> None:
    mount = live.mount()
    (mount / "file").write_bytes(NOISE)
    for kind in ("pagecache", "xip"):
        mount.migrate("file", kind, "3-7")
    lines = xipfs("events", mount.directory, "--json").stdout.splitlines()
    events = [json.loads(line) for line in lines]
    keys = ("first", "last", "to", "reason", "moved", "failed", "moved_bytes", "passes")
    assert [[event[key] for key in keys] for event in events] == [
        [3, 7, "pagecache", "manual", 5, {}, 5 * PAGE, 1],
        [3, 7, "xip", "manual", 5, {}, 5 * PAGE, 1],
    ]
    assert [event["ram_pages_used"] for event in events] == [5, 0]
    parts = {"unmap", "copy", "commit"}
    for event, drop in zip(events, (set(), {"drop"}), strict=True):
        spent = event["durations_ns"]
        assert set(spent) == {"invalidate", "drain", "move"} | parts | drop
        assert 0 < sum(spent[part] for part in parts | drop) <= spent["move"]
    figures = mount.stats()["migration"]
    assert (figures["pingpong"], figures["chunks"]) == (5, 2)
    line = {"policy": None, "reason": "manual", "failed": 0, "refaults": 0}
    assert figures["by_cause"] == [
        line
        | {"to": "pagecache", "promoted": 5, "demoted": 0, "moved_bytes": 5 * PAGE, "pingpong": 0},
        line | {"to": "xip", "promoted": 0, "demoted": 5, "moved_bytes": 5 * PAGE, "pingpong": 5},
    ]
    counts = {step: figures["step_ns"][step]["count"] for step in figures["step_ns"]}
    both = dict.fromkeys(("invalidate", "drain", "move", "unmap", "copy", "commit"), 2)
    assert counts == both | {"drop": 1, "invalidate_again": 0}
    follower = subprocess.Popen(
        [sys.executable, "-m", "xipfs", "events", mount.directory, "--follow", "--json"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert follower.stdout is not None
    said = [follower.stdout.readline() for _ in range(2)]
    mount.migrate("file", "pagecache", "9")
    said.append(follower.stdout.readline())
    follower.terminate()
    assert follower.wait(10) == 130
    follower.stdout.close()
    last = json.loads(said[2])
    assert (last["first"], last["last"], last["to"], last["moved"]) == (9, 9, "pagecache", 1)
