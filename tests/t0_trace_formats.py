"""Formats, /proc and names: the text that the observer reads, and what it makes of other text."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from xipfs.errors import ObserverError
from xipfs.trace import proc, session
from xipfs.trace.formats import EventFormat, Field, PageFormat, parse_event, parse_page, read_event
from xipfs.trace.proc import MapsLine
from xipfs.trace.records import TABLE

FORMATS = json.loads((Path(__file__).parent / "data/ring/formats.json").read_text())


def test_a_recorded_format() -> None:
    found = parse_event(FORMATS["events"]["task/task_newtask"])
    assert found == EventFormat(
        205,
        {
            "common_type": Field(0, 2, False),
            "common_flags": Field(2, 1, False),
            "common_preempt_count": Field(3, 1, False),
            "common_pid": Field(4, 4, True),
            "pid": Field(8, 4, True),
            "comm": Field(12, 16, False),
            "clone_flags": Field(32, 8, False),
            "oom_score_adj": Field(40, 2, True),
        },
    )


def test_fields_with_types_of_several_words() -> None:
    text = (
        "name: x\nID: 7\nformat:\n"
        "\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n"
        "\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n\n"
        "\tfield:__data_loc char[] name;\toffset:8;\tsize:4;\tsigned:0;\n"
        "\tfield:const struct page * page;\toffset:16;\tsize:8;\tsigned:0;\n"
        "\tfield:u8 no_sign;\toffset:24;\tsize:1;\n"
    )
    fields = parse_event(text).fields
    assert fields["name"] == Field(8, 4, False)
    assert fields["page"] == Field(16, 8, False)
    assert fields["no_sign"] == Field(24, 1, False)


@pytest.mark.parametrize("text", ["", "ID: 5\n", "name: x\nID: x\nformat:\n"])
def test_what_is_no_format(text: str) -> None:
    with pytest.raises(ObserverError, match="format file cannot be read"):
        parse_event(text)


def test_the_page_header() -> None:
    assert parse_page(FORMATS["header_page"]) == PageFormat(8, 16, 4096)
    with pytest.raises(ObserverError, match="describes its sub-buffers in an unknown way"):
        parse_page(FORMATS["header_page"].replace("timestamp", "time"))


@pytest.fixture
def tracing(tmp_path: Path) -> Path:
    """A tracefs of plain files with the recorded formats."""
    for name, text in FORMATS["events"].items():
        (tmp_path / "events" / name).mkdir(parents=True)
        (tmp_path / "events" / name / "format").write_text(text)
    (tmp_path / "instances").mkdir()
    return tmp_path


def test_an_event_that_cannot_be_used_says_why(tracing: Path) -> None:
    name = "exceptions/page_fault_user"
    assert isinstance(read_event(tracing, name, ("address",)), EventFormat)
    assert read_event(tracing, name, ("address", "moon", "sun")) == f"{name}: no field moon, sun"
    assert read_event(tracing, "no/such", ()) == "no/such: No such file or directory"
    (tracing / "events" / name / "format").write_text("nonsense")
    answer = read_event(tracing, name, ())
    assert isinstance(answer, str)
    assert answer.startswith(f"{name}: an event's format file cannot be read")


def test_what_this_kernel_offers(tracing: Path) -> None:
    found = session.probe(tracing)
    assert found.unusable == ""
    assert {point.name for point, _ in found.events} == set(FORMATS["events"])
    assert set(found.missing) == {point.name for point in TABLE} - set(FORMATS["events"])


def test_a_missing_event_is_named_with_what_is_lost(tracing: Path) -> None:
    (tracing / "events/maple_tree/ma_write/format").unlink()
    found = session.probe(tracing)
    assert found.unusable == ""
    assert found.missing["maple_tree/ma_write"] == (
        "maple_tree/ma_write: No such file or directory; lost: the mappings that exec makes,"
        " for processes gone before /proc is read"
    )
    (tracing / "events/filemap/mm_filemap_fault/format").unlink()
    found = session.probe(tracing)
    assert found.unusable == (
        "a needed event is missing: filemap/mm_filemap_fault: No such file or directory"
    )


def test_no_tracefs_at_all(tmp_path: Path) -> None:
    assert session.probe(tmp_path / "no").unusable.startswith("tracefs is not mounted (")
    with pytest.raises(ObserverError, match="faults cannot be observed through tracefs: tracefs"):
        session.Session(1, tmp_path / "no")


def test_instances_of_dead_daemons_are_removed_and_no_others(tracing: Path) -> None:
    dead = 4194303  # above any pid in use
    names = [
        f"xipfs-{dead}-0-G",
        f"xipfs-{dead}-0-P",
        f"xipfs-{os.getpid()}-0-G",
        "xipfs-x-0-G",
        "mine",
    ]
    for name in names:
        (tracing / "instances" / name).mkdir()
    assert sorted(session.clean_orphans(tracing)) == names[:2]
    left = sorted(path.name for path in (tracing / "instances").iterdir())
    assert left == sorted(names[2:])


MAPS = """\
55d0c0a00000-55d0c0a02000 r--p 00000000 00:2a 17                         /mnt/bin
55d0c0a02000-55d0c0a05000 r-xp 00002000 00:2a 17                         /mnt/bin
7f0000000000-7f0000001000 rw-s 0000f000 00:2a 18446744073709551615       /mnt/a b (deleted)
7f0000002000-7f0000003000 rw-p 00000000 00:00 0
7f0000004000-7f0000005000 ---p 00001000 00:2b 17                         /other 00:2a 17
7f0000006000-7f0000007000 rw-p 00000000 103:102 9                        /big minor
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]
"""


def test_maps_of_one_device() -> None:
    assert proc.parse_maps(MAPS, 0x2A) == [
        MapsLine(0x55D0C0A00000, 0x55D0C0A02000, 1, False, 0, 17),
        MapsLine(0x55D0C0A02000, 0x55D0C0A05000, 5, False, 2, 17),
        MapsLine(0x7F0000000000, 0x7F0000001000, 3, True, 15, (1 << 64) - 1),
    ]
    assert proc.parse_maps(MAPS, 0x103 << 20 | 0x102) == [
        MapsLine(0x7F0000006000, 0x7F0000007000, 3, False, 0, 9)
    ]
    assert proc.parse_maps("", 0x2A) == []


def test_a_device_number_as_the_kernel_keeps_it() -> None:
    assert proc.kernel_dev(os.makedev(0, 42)) == 42
    assert proc.kernel_dev(os.makedev(259, 300)) == 259 << 20 | 300


def test_this_process_and_one_that_is_none() -> None:
    own = proc.identify(os.getpid())
    assert own is not None
    assert (own.tgid, own.ppid) == (os.getpid(), os.getppid())
    assert os.getpid() in proc.tids_of(os.getpid())
    assert proc.read_maps(os.getpid(), os.stat("/proc/self/exe").st_dev) is not None
    nobody = 4194303
    assert proc.identify(nobody) is None
    assert proc.tids_of(nobody) == set()
    assert proc.read_maps(nobody, 1) is None
    assert proc.in_system_call(nobody) is True
