"""What the commands print, letter by letter, and how they end.

Figures that differ from run to run (paths, pids, times) are replaced by their names before the
comparison; everything else is as it was recorded and read through once by a person.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import textwrap
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import needs
from live import COMMAND, ENVIRONMENT, PAGE, LiveMount, Mounts, xipfs

from xipfs.cli import events
from xipfs.migrate.history import ChunkEvent

on_a_mount = needs("root", "fuse")
NOT_MOUNTED = (
    "xipfs umount: nothing is mounted at MNT/mixed; expected the mount point of an xipfs mount\n"
)


def text(block: str) -> str:
    return textwrap.dedent(block).lstrip("\n")


@pytest.fixture(scope="module")
def mnt(shared: Mounts) -> LiveMount:
    """One file of each kind: 70 XIP pages; holes; 3 of 5 pages promoted."""
    mount = shared.mount()
    (mount / "xip").write_bytes(bytes(70 * PAGE))
    with open(mount / "sparse", "wb") as file:
        file.truncate(1 << 30)
        file.seek(2 * PAGE)
        file.write(b"data")
    (mount / "mixed").write_bytes(bytes(5 * PAGE - 100))
    (mount / "empty").touch()
    mount.migrate("mixed", "pagecache", "1-3")
    return mount


def said(mount: LiveMount, *words: str, code: int = 0) -> str:
    """Run a command; return what it printed, with the mount's path as MNT."""
    done = xipfs(*(word.replace("MNT", str(mount.directory)) for word in words), check=False)
    assert done.returncode == code, done.stderr
    assert (done.stdout == "") == (code != 0 and done.stderr != "")
    output = done.stdout or done.stderr
    return output.replace(str(mount.directory), "MNT").replace(str(mount.image), "IMAGE")


@on_a_mount
def test_pages_of_a_file_of_xip_pages(mnt: LiveMount) -> None:
    ino = os.stat(mnt / "xip").st_ino
    assert said(mnt, "pages", "MNT/xip") == text(
        f"""
        MNT/xip  inode {ino}  286720 bytes  70 pages
        X XIP   P pagecache, resident   p pagecache, not resident   . hole
                   0 {"X" * 64}
                  64 XXXXXX
                      pages kind  refcount  mapcount
                       0-69    X         -         -
        """
    )


@on_a_mount
def test_pages_of_a_mixed_file(mnt: LiveMount) -> None:
    ino = os.stat(mnt / "mixed").st_ino
    assert said(mnt, "pages", "MNT/mixed") == text(
        f"""
        MNT/mixed  inode {ino}  20380 bytes  5 pages
        X XIP   P pagecache, resident   p pagecache, not resident   . hole
                   0 XPPPX
                      pages kind  refcount  mapcount
                          0    X         -         -
                        1-3    P         1         0
                          4    X         -         -
        """
    )


@on_a_mount
def test_pages_of_a_sparse_file_are_folded(mnt: LiveMount) -> None:
    ino = os.stat(mnt / "sparse").st_ino
    assert said(mnt, "pages", "MNT/sparse") == text(
        f"""
        MNT/sparse  inode {ino}  1073741824 bytes  262144 pages
        X XIP   P pagecache, resident   p pagecache, not resident   . hole
                   0 ..X{"." * 61}
                   * 4094 more lines of .
              262080 {"." * 64}
                      pages kind  refcount  mapcount
                        0-1    .         -         -
                          2    X         -         -
                   3-262143    .         -         -
        """
    )


@on_a_mount
def test_pages_of_an_empty_file(mnt: LiveMount) -> None:
    ino = os.stat(mnt / "empty").st_ino
    assert said(mnt, "pages", "MNT/empty") == text(
        f"""
        MNT/empty  inode {ino}  0 bytes  0 pages
        X XIP   P pagecache, resident   p pagecache, not resident   . hole
                      pages kind  refcount  mapcount
        """
    )


@on_a_mount
def test_pages_as_json(mnt: LiveMount) -> None:
    answer = json.loads(said(mnt, "pages", "--json", "MNT/mixed"))
    assert answer == {
        "file": "MNT/mixed",
        "ino": os.stat(mnt / "mixed").st_ino,
        "size_bytes": 20380,
        "nr_pages": 5,
        "runs": [
            {"first": 0, "count": 1, "letter": "X", "refcount": None, "mapcount": None},
            {"first": 1, "count": 3, "letter": "P", "refcount": 1, "mapcount": 0},
            {"first": 4, "count": 1, "letter": "X", "refcount": None, "mapcount": None},
        ],
    }


@on_a_mount
def test_migrate(mnt: LiveMount) -> None:
    (mnt / "moving").write_bytes(bytes(6 * PAGE))
    assert said(mnt, "migrate", "MNT/moving", "--to", "pagecache", "--pages", "0-1,4") == (
        "MNT/moving: 3 pages moved to pagecache, 0 already there, 0 refused\n"
    )
    assert said(mnt, "migrate", "MNT/moving", "--to", "pagecache") == (
        "MNT/moving: 3 pages moved to pagecache, 3 already there, 0 refused\n"
    )
    os.unlink(mnt / "moving")


@on_a_mount
def test_stat_before_any_fault(live: Mounts) -> None:
    mount = live.mount(None, "ram=1M", "struct_page=56")
    assert said(mount, "stat", "MNT") == text(
        """
        MNT  (IMAGE)
        observer off: 0 events, 0 lost
          switched off with observe=off
        kernel: its own faults are not known

        pgfault                            0
        pgmajfault                         0
        pgfault_xip                        0
        pgfault_pagecache                  0
        pgfault_cow                        0
        pgfault_sigbus                     0
        pgfault_extra                      0
        pgfault_hint                       0
        pgmigrate_success                  0
        pgmigrate_fail                     0
        pgpromote_success                  0
        pgdemote_success                   0
        pgevict                            0
        pgevict_policy                     0
        pgwriteback                        0
        nr_xip_pages                       0
        nr_pagecache_pages                 0
        nr_resident_pages                  0
        nr_special_ptes                    0
        nr_normal_ptes                     0
        nr_anon_pages                      0

        ram_bytes                    1048576  (1 MiB)
        nvram_bytes                 16777216  (16 MiB)
        memmap_bytes                   14336  (14 KiB)
        memmap_saved_bytes            229376  (224 KiB)
        """
    )


@on_a_mount
def test_stat_tells_the_cost_on_a_named_medium(live: Mounts) -> None:
    mount = live.mount(None, "medium=nor")
    before = mount.stats()["cost"]
    (mount / "file").write_bytes(bytes(2 * PAGE))
    os.sync()
    cost = mount.stats()["cost"]
    assert cost["medium"] == "nor"
    assert cost["nvram_written_bytes"] - before["nvram_written_bytes"] >= 2 * PAGE
    fences, lines = cost["nvram_fences"], cost["nvram_written_bytes"] // 64
    # A fence programs a buffer of 512 bytes; what is beyond goes at 512 bytes in 340 us.
    beyond_bytes = max(lines * 64 - fences * 512, 0)
    assert cost["write_ns_estimated"] == fences * 340_000 + beyond_bytes * 10**9 // 1_505_882
    told = said(mount, "stat", "MNT")
    assert "modelled cost on nor, one access after another\n" in told
    assert f"\nnvram_fences          {fences:14}\n" in told
    assert f"write_ns_estimated    {cost['write_ns_estimated']:14}" in told
    assert "struct_page_bytes            1048576  (1 MiB)\n" in told
    reached, blocks = next(iter(cost["wear"]["blocks_by_line_writes"].items()))
    assert f"wear: blocks          {blocks:14}  with {reached} line writes\n" in told
    hottest = cost["wear"]["hottest"][0]
    assert (
        f"hottest block         {hottest['block']:14}  ({hottest['line_writes']} line writes)\n"
        f"  writes a cell       {hottest['line_writes'] / 64:14.1f}"
        "  (mean over the block's 64 lines)\n"
    ) in told + "\n"
    assert "S29GL01GS" in cost["medium_source"]


@needs("root", "fuse", "tracefs")
def test_stat_tells_each_process_under_80_columns(live: Mounts, touch: Path) -> None:
    mount = live.mount(None, "observe=tracefs")
    (mount / "file").write_bytes(bytes(31 * PAGE))
    mount = live.remount(mount, "observe=tracefs")
    subprocess.run(
        [str(touch), "map", str(mount / "file"), "private", "rw", "write", "0-30"],
        check=True,
        timeout=20,
    )
    output = said(mount, "stat", "MNT")
    assert all(len(line) < 80 for line in output.splitlines() if "MNT" not in line)
    output = re.sub(
        r"^observer tracefs: \d+ events", "observer tracefs: EVENTS events", output, flags=re.M
    )
    output = re.sub(r"^ *\d+ touch", "     PID touch", output, flags=re.M)
    assert output.splitlines()[1:3] == [
        "observer tracefs: EVENTS events, 0 lost",
        "kernel: 31 faults (31 major, 0 minor), 0 pages by fault-around",
    ]
    assert output.splitlines()[-2:] == [
        "     pid command           pgfault    major      xip   pcache      cow    extra",
        "     PID touch                  31        0        0        0       31       31",
    ]
    assert "\nnr_xip_pages                      31\n" in output
    json_again = json.loads(said(mount, "stat", "--json", "--hottest", "2", "MNT"))
    assert [(page["index"], page["pgfault_cow"]) for page in json_again["hottest"]] == [
        (0, 1),
        (1, 1),
    ]


@on_a_mount
def test_stat_repeated(mnt: LiveMount) -> None:
    lines = said(mnt, "stat", "MNT", "0.01", "3").splitlines()
    assert lines[0] == (
        "  pgfault     major       xip    pcache       cow     extra   promote    demote"
    )
    assert lines[2] == lines[3] == " ".join(["        0"] * 8)
    assert len(lines) == 4
    assert len(lines[0]) < 80
    objects = said(mnt, "stat", "--json", "MNT", "0.01", "2").splitlines()
    assert [json.loads(line)["schema"] for line in objects] == [1, 1]


@on_a_mount
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (
            "stat /",
            1,
            "xipfs stat: / is not on an xipfs mount; expected a file on a fuse.xipfs mount\n",
        ),
        (
            "pages MNT/absent",
            1,
            "xipfs pages: cannot look at MNT/absent: No such file or directory\n",
        ),
        (
            "pages MNT",
            2,
            "xipfs pages: MNT is not a regular file; expected a file on the mount\n",
        ),
        (
            "stat MNT 0",
            2,
            "xipfs stat: INTERVAL and COUNT; expected numbers above 0\n",
        ),
        (
            "migrate MNT/mixed --to xip --pages 2-5",
            2,
            "xipfs migrate: MNT/mixed: pages 2-5 reach outside the file; expected pages 0-4\n",
        ),
        (
            "migrate MNT/mixed --to xip --pages x",
            2,
            "xipfs migrate: page range 'x' is not valid; expected A-B or A, as in 0-15\n",
        ),
        (
            "migrate MNT/empty --to xip --pages 0",
            2,
            (
                "xipfs migrate: MNT/empty: pages 0-0 reach outside the file; "
                "expected a file that is not empty\n"
            ),
        ),
        (
            "umount /proc",
            1,
            "xipfs umount: /proc is a mount of type proc; expected type fuse.xipfs\n",
        ),
        (
            "umount MNT/mixed",
            1,
            NOT_MOUNTED,
        ),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    mnt: LiveMount, words: str, code: int, message: str
) -> None:
    assert said(mnt, *words.split(), code=code) == message


@pytest.mark.parametrize("words", ["", "fly", "pages", "stat a b", "migrate a --to tape"])
def test_usage_errors_end_with_2(words: str) -> None:
    done = xipfs(*words.split(), check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("usage: xipfs")


def test_the_version() -> None:
    assert xipfs("--version").stdout == "xipfs 0.1.0\n"


def test_every_verb_has_help_and_is_in_the_list() -> None:
    listed = re.findall(r"^  (\w+) {2,}\w", xipfs("--help").stdout.partition("verbs:")[2], re.M)
    assert {"mkfs", "mount", "umount", "stat", "pages", "migrate"} <= set(listed)
    for verb in listed:
        output = xipfs(verb, "--help").stdout
        assert output.startswith(f"usage: xipfs {verb} ")


def test_migrates_help() -> None:
    assert xipfs("migrate", "--help").stdout == text(
        """
        usage: xipfs migrate [-h] [-r] --to {pagecache,xip} [--pages A-B,...]
                             [--dry-run] [--json]
                             PATH [PATH ...]

        Move a file's pages between XIP and pagecache.

        positional arguments:
          PATH                  regular files on the mount

        options:
          -h, --help            show this help message and exit
          -r, --recursive       take directories with all files below
          --to {pagecache,xip}  the new kind
          --pages A-B,...       only these pages, as in 0-15,20 (one file; default
                                all)
          --dry-run             move nothing; say what would move, and its cost
          --json                the outcome as one JSON object
        """
    )


@on_a_mount
def test_a_reader_that_goes_away_is_no_error_to_speak_of(mnt: LiveMount) -> None:
    done = subprocess.run(
        ["sh", "-c", f"{' '.join(COMMAND)} stat --json {mnt.directory} | head -c 10"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout == '{\n  "schem'
    assert done.stderr == ""


@pytest.mark.parametrize("as_json", [True, False])
def test_lost_events_are_told_where_the_others_are_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    told = ChunkEvent(1_500_000_000, 2, 3, 4, "xip", "manual", moved=2).describe()
    answers = [{"lost": 904}, {"event": told}, {"lost": 0}]
    monkeypatch.setattr(events, "mount_of", lambda _: None)
    monkeypatch.setattr(events, "request", lambda *_, **__: iter(answers))
    assert events.run(Namespace(directory=Path("/"), follow=False, json=as_json)) == 0
    said, errors = capsys.readouterr()
    if as_json:
        lost, event = (json.loads(line) for line in said.splitlines())
        assert (lost, event["moved"], errors) == ({"lost": 904}, 2, "")
    else:
        assert said == "1.500000 inode 2 pages 3-4 to xip (manual): 2 moved, 0.000 ms\n"
        assert errors == "xipfs events: 904 events were lost before the next\n"


@on_a_mount
@pytest.mark.parametrize("how", ["kill", "abort"])
def test_who_follows_a_mount_that_dies_is_told_in_a_line(live: Mounts, how: str) -> None:
    """Killed while it answers, or its connection aborted: no traceback."""
    mount = live.mount()
    (mount / "file").write_bytes(bytes(PAGE))
    mount.migrate("file", "pagecache")
    follower = subprocess.Popen(
        [*COMMAND, "events", mount.directory, "--follow"],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert follower.stdout is not None
    assert "1 moved" in follower.stdout.readline()
    if how == "kill":
        mount.kill()
    else:
        # Where the daemon was at the time: its reply comes too late.
        mount.expected_log = [r"ERROR fuse_\w+\(\): fuse_reply_\* failed with No such file"]
        mount.abort()
    _, said = follower.communicate(timeout=20)
    assert follower.returncode == 1
    told = re.fullmatch(
        r"xipfs events: MNT/.xipfs/control cannot be used: (.*); (.*)\n",
        said.replace(str(mount.directory), "MNT"),
    )
    assert told, said
    assert told[2] == "see the daemon's log"
