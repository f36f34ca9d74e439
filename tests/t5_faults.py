"""``xipfs faults`` of a live mount: the figures of a recording, and an end in each case."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import needs
from live import COMMAND, ENVIRONMENT, PAGE, LiveMount, Mounts, xipfs
from t5_accounting import fill
from t5_record import end_recording, recording

from xipfs.fs.types import PageKind
from xipfs.stats.trace_file import TraceReader

pytestmark = [needs("root", "fuse", "tracefs")]

#: Ends when every client of the mount, however slow the machine, has had its turns.
PATIENCE_S = 90


@pytest.fixture(scope="module")
def mounted(shared: Mounts) -> LiveMount:
    image = shared.image()
    fill(image, {"file": PageKind.XIP, "cached": PageKind.PAGECACHE}, pages=48)
    return shared.mount(image, "observe=tracefs")


@contextmanager
def watching(mount: LiveMount, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Yield ``xipfs faults`` of the mount once it has begun; whatever happens, it ends."""
    command = [*COMMAND, "faults", str(mount.directory), *words]
    with subprocess.Popen(
        command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as watcher:
        try:
            assert watcher.stderr is not None
            said = watcher.stderr.readline()
            assert said == "counting faults from now on; Ctrl-C ends it\n"
            yield watcher
        finally:
            watcher.kill()


def interrupt(watcher: subprocess.Popen[str], number: int = signal.SIGINT) -> tuple[str, str]:
    """End the watcher as Ctrl-C does; return what was left of its output and its errors."""
    watcher.send_signal(number)
    out, errors = watcher.communicate(timeout=PATIENCE_S)
    assert watcher.returncode == 0, errors
    return out, errors


def lines_of(watcher: subprocess.Popen[str], count: int) -> list[str]:
    assert watcher.stdout is not None
    return [watcher.stdout.readline() for _ in range(count)]


def touch_pages(mount: LiveMount, touch: Path, name: str, what: str) -> int:
    """Let a program touch pages of the file; return its pid."""
    program = subprocess.Popen([touch, "map", mount / name, *what.split()])
    assert program.wait(timeout=PATIENCE_S) == 0
    return program.pid


def test_each_fault_is_a_line_as_it_comes(mounted: LiveMount, touch: Path) -> None:
    ino = (mounted / "file").stat().st_ino
    with watching(mounted, "--follow", "--json") as watcher:
        pid = touch_pages(mounted, touch, "file", "private rw read 0 write 17 read 34")
        faults = [json.loads(line) for line in lines_of(watcher, 3)]
        assert [
            (fault["pid"], fault["tid"], fault["comm"], fault["ino"], fault["page"])
            for fault in faults
        ] == [(pid, pid, "touch", ino, page) for page in (0, 17, 34)]
        assert [(fault["access"], fault["charged"]) for fault in faults] == [
            ("read", "xip"),
            ("write", "cow"),
            ("read", "xip"),
        ]
        out, errors = interrupt(watcher)
    losses = {"mount_outlived_recording": True, "faults": 3}
    losses |= {"faults_missed": 0, "items_missed": 0, "events_lost": 0}
    assert (json.loads(out), errors) == ({"losses": losses}, "")


def test_lines_for_people(mounted: LiveMount, touch: Path) -> None:
    with watching(mounted, "--follow") as watcher:
        pid = touch_pages(mounted, touch, "file", "private r read 5")
        (line,) = lines_of(watcher, 1)
        words = line.split()
        assert float(words[0]) > 0
        assert words[1:4] == [str(pid), "touch", "read"]
        assert words[5:] == ["xip", "5", "file"]
        out, errors = interrupt(watcher, signal.SIGTERM)
    assert (out, errors) == ("", "xipfs faults: 1 faults, 0 missed, 0 events lost\n")


def test_files_are_told_by_the_names_they_had(mounted: LiveMount, touch: Path) -> None:
    """Each fault comes right before the change of name, which no later look could tell."""
    below = mounted / "dir" / "below"
    below.mkdir(parents=True)
    (below / "one").write_bytes(bytes(3 * PAGE))
    words = [str(touch), "map", str(below / "one"), "private", "r"]
    words += ["read", "0", "pause", "read", "1", "pause", "read", "2"]
    with watching(mounted, "--by", "file", "--json") as watcher:
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
            assert program.stdin is not None
            assert program.stdout is not None
            for change in (
                lambda: (mounted / "dir").rename(mounted / "other"),
                lambda: (mounted / "other" / "below" / "one").unlink(),
            ):
                assert program.stdout.readline() == b"paused\n"
                change()
                program.stdin.write(b"\n")
                program.stdin.flush()
        out, _ = interrupt(watcher)
    lines = json.loads(out)["lines"]
    assert [(line["path"], line["faults"]) for line in lines] == [
        ("dir/below/one", 1),
        ("other/below/one", 1),
        ("other/below/one (deleted)", 1),
    ]
    assert len({line["ino"] for line in lines}) == 1


def test_pages_that_came_without_a_fault(mounted: LiveMount, touch: Path, tmp_path: Path) -> None:
    """A warm file of 48 pages: at most 16 come with each fault; 17 were mapped before."""
    (mounted / "file").read_bytes()
    words = [str(touch), "map", str(mounted / "file"), "private", "r"]
    early = subprocess.Popen(
        [*words, *["advise", "0-47", "random", "read", "0-16", "pause", "read", "17-20"]],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert early.stdout is not None
    assert early.stdout.readline() == b"paused\n"
    there = mapped_pages(early.pid, str(mounted / "file"))
    with watching(mounted, "--by", "process", "--json") as watcher:
        late = subprocess.Popen(
            [*words, "read", "0-47", "pause"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert late.stdout is not None
        assert late.stdout.readline() == b"paused\n"
        late_there = mapped_pages(late.pid, str(mounted / "file"))
        late.communicate(b"\n", timeout=PATIENCE_S)
        early.communicate(b"\n", timeout=PATIENCE_S)
        out, _ = interrupt(watcher)
    told = {line["pid"]: line for line in json.loads(out)["lines"]}
    assert 17 <= there <= 48
    assert (told[early.pid]["before"], told[early.pid]["comm"]) == (there, "touch")
    assert late_there == 48
    line = told[late.pid]
    assert (line["own"] + line["around"], line["before"], line["unsure"]) == (48, 0, 0)
    assert line["own"] == line["faults"]
    assert 3 <= line["own"] <= 5
    # The other's next pages were mapped already, or are its own or its fault-around's.
    line = told[early.pid]
    assert line["own"] + line["around"] == 0 if there >= 21 else line["own"] >= 1


def mapped_pages(pid: int, path: str) -> int:
    """Return how many pages of the file the process has mapped, as the kernel says."""
    chosen, rss_kib = False, 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            chosen = line.endswith(path)
        elif chosen and line.startswith("Rss:"):
            rss_kib += int(line.split()[1])
    return rss_kib * 1024 // PAGE


@pytest.mark.parametrize("by", ["process", "file", "page"])
def test_a_table_of_a_mount_is_that_of_its_recording(
    mounted: LiveMount, touch: Path, tmp_path: Path, by: str
) -> None:
    trace = tmp_path / "trace"
    recorder = recording(mounted.directory, trace)
    with watching(mounted, "--by", by, "--json") as watcher:
        touch_pages(mounted, touch, "file", "private rw read 0-20 write 3")
        touch_pages(mounted, touch, "cached", "shared rw read 0-5 write 40-47")
        out, errors = interrupt(watcher)
    end_recording(recorder)
    live, recorded = (
        json.loads(out),
        json.loads(xipfs("faults", trace, "--by", by, "--json").stdout),
    )
    assert live["lines"] == recorded["lines"]
    assert sum(line["faults"] for line in live["lines"]) >= 10
    for name in ("host", "kernel", "mount", "observer", "memory", "losses"):
        assert live["metadata"][name] == recorded["metadata"][name], name
    assert errors == ""
    # For the recording nothing has begun when the other reader came.
    with TraceReader(trace) as reader:
        items = [item for batch in reader.batches() for item in batch["item"]]
    assert items.count("start") == items.count("policy") == 1


def test_a_table_that_is_followed(mounted: LiveMount, touch: Path) -> None:
    with watching(mounted, "--follow", "--by", "page", "--json") as watcher:
        seen: list[int] = []
        for page in (1, 20):
            touch_pages(mounted, touch, "file", f"private r read {page}")
            seen.append(page)
            while True:
                (line,) = lines_of(watcher, 1)
                answer = json.loads(line)
                if answer["losses"]["faults"] == len(seen):
                    break
            assert [told["page"] for told in answer["lines"] if told["faults"]] == seen
        out, _ = interrupt(watcher)
    assert json.loads(out)["lines"] == answer["lines"]


def test_the_reader_leaves_while_nothing_happens(mounted: LiveMount) -> None:
    with watching(mounted, "--follow") as watcher:
        assert watcher.stdout is not None
        assert watcher.stderr is not None
        watcher.stdout.close()
        assert watcher.wait(timeout=PATIENCE_S) == 1
        assert watcher.stderr.read() == ""


def test_the_end_of_the_daemon_is_told_after_the_table(live: Mounts, touch: Path) -> None:
    mount = live.mount(None, "observe=tracefs")
    (mount / "file").write_bytes(bytes(3 * PAGE))
    with watching(mount, "--follow", "--by", "file") as watcher:
        touch_pages(mount, touch, "file", "private r read 2")
        lines_of(watcher, 3)
        mount.kill()
        out, errors = watcher.communicate(timeout=PATIENCE_S)
    assert watcher.returncode == 1
    # An empty line parts it from the table before, if that was all that was read.
    assert out.lstrip("\n").startswith("1 faults, 0 missed, 0 events lost; observer tracefs\n")
    assert ".xipfs" in errors


def test_what_is_no_mount_and_no_file(tmp_path: Path) -> None:
    done = xipfs("faults", tmp_path, check=False)
    said = f"{tmp_path} is not on an xipfs mount; expected a file on a fuse.xipfs mount"
    assert (done.returncode, done.stderr) == (1, f"xipfs faults: {said}\n")


def test_others_are_refused(shared: Mounts) -> None:
    mount = shared.mount(None, "observe=tracefs", "allow_other")
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
         sys.executable, "-m", "xipfs", "faults", ".", "--follow"],
        env=ENVIRONMENT, cwd=mount.directory, capture_output=True, text=True, check=False,
        timeout=PATIENCE_S,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert "is closed to uid 65534; expected root or the mount's owner" in done.stderr
