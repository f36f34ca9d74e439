"""Policies on a real mount: chosen at mount, changed while it lives, by name or by file."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from conftest import needs
from live import PAGE, LiveMount, Mounts, wait_until, xipfs
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import parser

pytestmark = [needs("root", "fuse")]

REQUESTS = ("observe=requests", "readahead=0")
README = Path(__file__).parents[1] / "README.md"


def said(mount: LiveMount, *words: str, code: int = 0) -> str:
    done = xipfs("policy", "set", mount.directory, *words, check=False)
    assert done.returncode == code, (done.stdout, done.stderr)
    return (done.stdout or done.stderr).replace(str(mount.directory), "MNT")


def read(mount: LiveMount, name: str) -> None:
    """Read a file of 11 pages page by page; nothing of it is in the kernel's cache before."""
    assert (mount / name).read_bytes() == bytes(11 * PAGE)


def test_a_policy_changes_on_a_live_mount(live: Mounts, tmp_path: Path) -> None:
    mount = live.mount()
    for name in "abcde":
        (mount / name).write_bytes(bytes(11 * PAGE))
    mount = live.remount(mount, *REQUESTS, "policy=threshold,promote=2")
    assert mount.cat_stats()["migration"]["parameters"] == {
        "pages_per_s": 0,
        "stay_ms": 0,
        "promote": 2,
    }
    read(mount, "a")
    assert mount.cat_stats()["migration"]["planned"] == 0, "one fault is not two"
    assert mount.letters("a") == "X" * 11
    assert said(mount, "fifo") == "MNT: policy fifo, pages_per_s=0, stay_ms=0\n"
    read(mount, "b")
    wait_until("fifo promotes", lambda: "P" in mount.letters("b"))
    migration = mount.cat_stats()["migration"]
    assert (migration["policy"], migration["signals"]) == ("fifo", ["fault"])
    assert said(mount, "off") == "MNT: policy off, pages_per_s=0, stay_ms=0\n"
    read(mount, "c")
    mount.vmstat()
    assert mount.letters("c") == "X" * 11
    file = tmp_path / "mine.py"
    file.write_text("from xipfs.migrate.policies.fifo import Fifo as POLICY\n")
    answer = json.loads(said(mount, f"{file},pages_per_s=1000", "--json"))
    assert (answer["policy"], answer["parameters"]["pages_per_s"]) == (str(file), 1000)
    read(mount, "d")
    wait_until("the file's policy promotes", lambda: "P" in mount.letters("d"))
    assert said(mount, "clock", "--dry").endswith(", high=98, low=95, dry\n")
    read(mount, "e")
    mount.vmstat()
    assert mount.letters("e") == "X" * 11
    assert mount.cat_stats()["migration"]["would_move"][0]["reason"] == "first touch"


OF_A_DIRECTORY = """
from dataclasses import replace
from xipfs.migrate.policies.fifo import Fifo

class POLICY(Fifo):
    def plan(self, signal, seen):
        for move in super().plan(signal, seen):
            yield replace(move, ino=INO)
            yield move
"""


def test_a_plan_for_what_is_no_file_any_more_is_refused_and_the_rest_done(
    live: Mounts, tmp_path: Path
) -> None:
    """The number of a file that went may be a directory's when its pages' turn comes."""
    mount = live.mount()
    (mount / "a").write_bytes(bytes(11 * PAGE))
    (mount / "directory").mkdir()
    file = tmp_path / "mine.py"
    file.write_text(OF_A_DIRECTORY.replace("INO", str(os.stat(mount / "directory").st_ino)))
    mount = live.remount(mount, *REQUESTS, f"policy={file}")
    read(mount, "a")
    wait_until("all is promoted", lambda: mount.letters("a") == "P" * 11)
    stats = mount.cat_stats()
    assert stats["background"]["failures"] == {}
    assert set(stats["migration"]["fail_reasons"]) == {"gone"}


def test_events_and_statistics_name_policy_reason_and_process(live: Mounts) -> None:
    mount = live.mount()
    (mount / "file").write_bytes(bytes(11 * PAGE))
    mount = live.remount(mount, *REQUESTS, "policy=fifo", "medium=pcm")
    ino = os.stat(mount / "file").st_ino
    read(mount, "file")
    wait_until("fifo promotes", lambda: "X" not in mount.letters("file"))
    lines = xipfs("events", mount.directory, "--json").stdout.splitlines()
    events = [json.loads(line) for line in lines]
    assert {(event["policy"], event["reason"]) for event in events} == {("fifo", "first fault")}
    assert sum(event["moved"] for event in events) == 11
    earned = {line["pid"] for event in events for line in event["by"]}
    assert (earned, sum(n for event in events for _, n in event["moved_runs"])) == (
        {os.getpid()}, 11,
    )  # fmt: skip
    shown = xipfs("events", mount.directory).stdout.splitlines()
    assert " to pagecache (fifo: first fault): " in shown[0]
    mount.migrate("file", "xip", "0-3")
    stats = json.loads(xipfs("stat", mount.directory, "--json", "--moved", "2").stdout)
    migration = stats["migration"]
    by_cause = {(row["policy"], row["reason"]): row for row in migration["by_cause"]}
    assert by_cause["fifo", "first fault"]["promoted"] == 11
    assert by_cause[None, "manual"]["demoted"] == by_cause[None, "manual"]["pingpong"] == 4
    (file,) = migration["by_file"]
    assert (file["ino"], file["moved_bytes"]) == (ino, 15 * PAGE)
    process, nobody = migration["by_process"]
    assert (process["pid"], process["promoted"]) == (os.getpid(), 11)
    assert process["comm"]
    assert (nobody["pid"], nobody["comm"], nobody["demoted"]) == (0, "(no process)", 4)
    assert [(page["ino"], page["index"]) for page in stats["moved"]] == [(ino, 0), (ino, 1)]
    assert max(stats["ram_pages_used"]["max"]) == 11
    text = xipfs("stat", mount.directory, "--moved", "1").stdout
    assert f"\n{ino:>10} {0:>10}{1:9}{1:9}{0:9}{0:9}{1:9}\n" in text + "\n"
    assert "fifo         pagecache       11        0" in text
    check_metrics(mount, stats)


def check_metrics(mount: LiveMount, stats: dict[str, Any]) -> None:
    """Read .xipfs/metrics with the parser of prometheus-client; compare it with a snapshot."""
    text = (mount / ".xipfs" / "metrics").read_text()
    assert xipfs("stat", mount.directory, "--openmetrics").stdout[-6:] == "# EOF\n"
    parse: Callable[[str], Iterable[Metric]] = parser.text_string_to_metric_families
    families = {family.name: family for family in parse(text)}
    values = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert values["xipfs_pgpromote_success_total",] == 11
    assert values["xipfs_nr_xip_pages",] == stats["vmstat"]["nr_xip_pages"]
    cause = ("fifo", "first fault", "pagecache")
    assert values["xipfs_migration_by_cause_promoted_total", *sorted(cause)] == 11
    ino = str(os.stat(mount / "file").st_ino)
    assert values["xipfs_migration_by_file_demoted_total", ino] == 4
    assert values["xipfs_migration_by_process_promoted_total", str(os.getpid())] == 11
    assert [
        [
            values[f"xipfs_migration_by_page_{name}_total", *sorted((ino, str(page)))]
            for name in ("promoted", "demoted", "pingpong", "failed", "refaults")
        ]
        for page in (3, 4)
    ] == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert values["xipfs_modelled_nvram_read_bytes_total", "pcm"] == 11 * PAGE
    # Eleven pages promoted, four of them moved back.
    assert [
        values["xipfs_migration_moved_bytes_total",],
        values["xipfs_migration_pingpong_total",],
        values["xipfs_migration_by_cause_moved_bytes_total", *sorted(cause)],
        values["xipfs_migration_by_file_moved_bytes_total", ino],
        values["xipfs_migration_by_process_moved_bytes_total", "0"],
        values["xipfs_migration_by_page_moved_bytes_total", *sorted((ino, "3"))],
    ] == [15 * PAGE, 4, 11 * PAGE, 15 * PAGE, 4 * PAGE, 2 * PAGE]
    steps = families["xipfs_migration_step_ns"]
    assert steps.type == "histogram"
    moved = {sample.name: sample for sample in steps.samples if sample.labels["step"] == "move"}
    figures = stats["migration"]["step_ns"]["move"]
    assert moved["xipfs_migration_step_ns_count"].value == figures["count"]
    assert moved["xipfs_migration_step_ns_sum"].value == figures["sum_ns"]


def test_a_wrong_policy_leaves_the_old_one(live: Mounts) -> None:
    mount = live.mount(None, "policy=fifo")
    for words, message in (
        ("lru", "policy=lru; expected one of off, fifo, threshold, clock, tpp"),
        ("tpp,high=1", "high=1 and low=90; expected percent, low below high"),
        ("tpp,high", "parameter high''; expected KEY=VALUE"),
        ("/absent.py", "cannot be loaded: FileNotFoundError"),
        ("profile,file=/absent", "the profile /absent cannot be read"),
    ):
        assert message in said(mount, words, code=2)
    (mount / "mine.py").write_text("from xipfs.migrate.policies.tpp import Tpp as POLICY\n")
    for words in (f"{mount / 'mine.py'}", f"profile,file={mount / 'mine.py'}"):
        told = "MNT/mine.py is on the mount itself, which waits for its policy; expected a file"
        assert told in said(mount, words, code=2)
    assert mount.cat_stats()["migration"]["policy"] == "fifo"


def test_a_policy_that_fails_is_off_and_told(live: Mounts, tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(OF_A_DIRECTORY.replace("INO", "1 // 0"))
    mount = live.mount(None, *REQUESTS, f"policy={file}")
    mount.expected_log = [f"ERROR policy {file} failed; it is off from now on"]
    (mount / "a").write_bytes(bytes(11 * PAGE))
    read(mount, "a")
    assert mount.cat_stats()["migration"]["policy"] == "off"
    said = " ".join(xipfs("stat", mount.directory).stdout.split())
    assert f"policy failed and is off: {file}: ZeroDivisionError('integer division" in said
    assert mount.letters("a") == "X" * 11
    assert "moves asked for" not in said


def test_a_policy_that_does_not_return_is_off_and_the_mount_goes_on(
    live: Mounts, tmp_path: Path
) -> None:
    """Whatever it waits for and whatever it catches."""
    asleep, stubborn, file = (tmp_path / name for name in ("asleep.py", "stubborn.py", "bad.py"))
    asleep.write_text("import time\ntime.sleep(1000)\n")
    stubborn.write_text(
        "while True:\n    try:\n        [None] * 1000\n    except Exception:\n        pass\n"
    )
    file.write_text(OF_A_DIRECTORY.replace("yield replace(move, ino=INO)", "while True: pass"))
    mount = live.mount(None, *REQUESTS, "policy=fifo")
    (mount / "a").write_bytes(bytes(11 * PAGE))
    for loaded in (asleep, stubborn):
        assert "PolicyTimeout('it took more than 3 s" in said(mount, str(loaded), code=2)
        assert mount.cat_stats()["migration"]["policy"] == "fifo"
    mount.expected_log = [f"ERROR policy {file} failed; it is off from now on"]
    said(mount, str(file))
    read(mount, "a")
    told = mount.cat_stats()["migration"]
    assert told["policy"] == "off"
    failure = f"{file}: PolicyTimeout('it took more than 3 s for one decision')"
    assert told["failure"] == failure
    assert (mount / "a").read_bytes() == bytes(11 * PAGE)


def until_it_fails(mount: LiveMount) -> None:
    """Read a file, which the policy hears of within the second, and ask until there is an error."""
    error = None
    while error is None:
        try:
            (mount / "a").read_bytes()
            os.statvfs(mount.directory)
        except OSError as failed:
            error = failed
        time.sleep(0.02)
    assert error.errno in (errno.ENOTCONN, errno.ECONNABORTED), error


def test_a_policy_that_waits_for_its_own_mount_ends_it_cleanly(
    live: Mounts, tmp_path: Path
) -> None:
    """Its daemon's thread waits in the kernel for itself: no signal's handler runs there."""
    file = tmp_path / "bad.py"
    image = live.image()
    mount = live.mount(image, *REQUESTS)
    (mount / "a").write_bytes(bytes(11 * PAGE))
    file.write_text(
        OF_A_DIRECTORY.replace("yield replace(move, ino=INO)", f"open({str(mount / 'a')!r})")
    )
    mount.expected_log = [
        f"ERROR policy {file} does not return: the mount ends, programs on it get errors",
        f"ERROR policy {file} failed; it is off from now on",
    ]
    said(mount, str(file))
    (mount / "b").write_bytes(b"not synced")
    began_s = time.monotonic()
    until_it_fails(mount)
    assert 8 < time.monotonic() - began_s < 20
    wait_until("the daemon's end", lambda: not mount.running())
    log = mount.log.read_text()
    assert f"  {file}:" in log, "where it stood"
    assert log.endswith(f"{image}: image closed\n")
    mount = live.mount(image)
    assert (mount / "a").read_bytes() == bytes(11 * PAGE)
    assert (mount / "b").read_bytes() == b"not synced"


def test_c_code_of_a_policy_that_never_returns_ends_the_daemon(
    live: Mounts, tmp_path: Path
) -> None:
    """It holds the interpreter's lock, so that nothing else of the daemon runs."""
    file = tmp_path / "bad.py"
    endless = "__import__('builtins').sum(__import__('itertools').repeat(0))"
    file.write_text(OF_A_DIRECTORY.replace("yield replace(move, ino=INO)", endless))
    image = live.image()
    mount = live.mount(image, *REQUESTS)
    with open(mount / "a", "wb") as kept:
        kept.write(bytes(11 * PAGE))
        kept.flush()
        os.fsync(kept.fileno())
    said(mount, str(file))
    until_it_fails(mount)
    wait_until("the daemon's end", lambda: not mount.running())
    assert f'File "{file}", line ' in mount.log.read_text()
    mount.killed = True
    mount = live.mount(image)
    assert (mount / "a").read_bytes() == bytes(11 * PAGE)


def test_a_read_only_mount_only_counts(live: Mounts) -> None:
    mount = live.mount()
    (mount / "file").write_bytes(bytes(11 * PAGE))
    mount = live.remount(mount, "ro", "policy=fifo", *REQUESTS)
    read(mount, "file")
    migration = mount.cat_stats()["migration"]
    assert (migration["dry"], migration["would_move"][0]["to"]) == (True, "pagecache")
    assert "MNT is mounted read-only, so it takes no request" in said(mount, "tpp", code=1)


def test_a_dry_run_foretells_what_the_move_then_costs(live: Mounts) -> None:
    """8,801 pages are two chunks, of which one has its entries in several leaves of the map."""
    # No page goes home by itself meanwhile.
    mount = live.mount(
        live.image(size_bytes=48 << 20), "ram=40M", "dirty_ratio=100", "dirty_background_ratio=99"
    )
    path = mount / "file"
    path.write_bytes(bytes(8900 * PAGE))
    mount.migrate("file", "pagecache", "700-800")
    for to, moving in (("pagecache", 8700), ("xip", 8801)):
        words = ("migrate", path, "--to", to, "--pages", "99-8899", "--json")
        (told,) = json.loads(xipfs(*words, "--dry-run").stdout)["mounts"]
        before = mount.cat_stats()["cost"]
        assert told["would_move"] == json.loads(xipfs(*words).stdout)["moved"] == moving
        after = mount.cat_stats()["cost"]
        names = ("nvram_read_bytes", "nvram_written_bytes", "nvram_fences")
        assert told["cost"] == {name: after[name] - before[name] for name in names}
        with open(path, "r+b", buffering=0) as file:
            for page in range(500, 1100, 7):
                os.pwrite(file.fileno(), b"dirty", page * PAGE)
    assert told["cost"]["nvram_fences"] == 2 * 4
    assert told["cost"]["nvram_written_bytes"] > 86 * PAGE, "dirty pages went home"


def test_a_dry_run_foretells_what_becomes_of_holes_and_of_pages_without_frames(
    live: Mounts,
) -> None:
    """256 of 512 pages have a frame, 40 are holes; after a mount none has a frame."""
    mount = live.mount(None, "ram=1M")
    path = mount / "file"
    with open(path, "wb") as file:
        file.write(bytes(range(256)) * 16 * 300)
        file.seek(340 * PAGE)
        file.write(bytes(range(256)) * 16 * 212)
    assert mount.migrate("file", "pagecache")["moved"] == 512
    for resident in (256, 0):
        if not resident:
            assert mount.migrate("file", "pagecache")["moved"] == 512
            mount = live.remount(mount, "ram=1M")
        words = ("migrate", mount / "file", "--to", "xip", "--json")
        (told,) = json.loads(xipfs(*words, "--dry-run").stdout)["mounts"]
        before = mount.cat_stats()
        moved = json.loads(xipfs(*words).stdout)
        after = mount.cat_stats()
        names = ("nvram_read_bytes", "nvram_written_bytes", "nvram_fences")
        assert told["cost"] == {n: after["cost"][n] - before["cost"][n] for n in names}
        assert (told["would_move"], told["already"]) == (moved["moved"], moved["already"])
        assert moved["moved"] == 512
        assert told["ram_bytes_more"] == -resident * PAGE
        assert before["vmstat"]["nr_resident_pages"] == resident
        assert after["vmstat"]["nr_resident_pages"] == 0


def test_a_dry_policy_counts_only_pages_that_are_there(live: Mounts, tmp_path: Path) -> None:
    """README's own policy asks for groups of 8; a file has 3 pages, another's page 1 is a hole."""
    example = README.read_text().split("```python\n")
    (groups,) = [part.split("```")[0] for part in example if "class Groups" in part]
    file = tmp_path / "groups.py"
    file.write_text(groups)
    mount = live.mount()
    (mount / "short").write_bytes(bytes(3 * PAGE))
    with open(mount / "sparse", "wb") as sparse:
        sparse.write(bytes(PAGE))
        sparse.seek(2 * PAGE)
        sparse.write(bytes(PAGE))
    for name, pages, bytes_read in (("short", 3, 12288), ("sparse", 2, 8192)):
        mount = live.remount(mount, *REQUESTS, f"policy={file}", "dry")
        (mount / name).read_bytes()
        migration = mount.cat_stats()["migration"]
        dry = migration["dry_run"]
        assert (dry["promoted"], dry["cost"]["nvram_read_bytes"]) == (pages, bytes_read)
        assert dry["ram_bytes_more"] == bytes_read
        assert [row["count"] for row in migration["would_move"]] == [pages]
        assert said(mount, str(file)).startswith("MNT: policy ")
        mount = live.remount(mount, *REQUESTS, f"policy={file}")
        (mount / name).read_bytes()
        wait_until("they move", lambda: mount.vmstat()["pgpromote_success"] == pages)  # noqa: B023
        assert mount.migrate(name, "xip")["moved"] == pages
