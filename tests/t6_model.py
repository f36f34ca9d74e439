"""What ``xipfs model`` prints, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xipfs.cli import main

ORACLE = Path(__file__).parent / "oracle"

#: Two processes, one XIP page and one cached page.
PROGRAM = """\
{"oracle": 1, "processes": ["A", "B"], "frames": {\
"xip:0": {"struct_page": false, "data": "in place"},\
"own:1": {"struct_page": true, "data": "cached"}},\
"objects": {"dev": {"kind": "device", "pages": 2, "vma_flags": ["mm"], "fault_handler": true,\
"backing": ["xip", "page"], "frame": ["xip:0", "own:1"]}}}
{"op": {"name": "mmap", "map": "m", "object": "dev", "pages": 3, "prot": "rw",\
 "flags": ["private"]}}
{"op": {"name": "read", "map": "m", "page": 1, "offset": 0, "bytes": 14}}
{"op": {"name": "write", "map": "m", "page": 0, "offset": 0, "byte": "!"}}
{"op": {"name": "fork", "child": "B"}}
{"who": "B", "op": {"name": "read", "map": "m", "page": 0, "offset": 0, "bytes": 14}}
{"who": "B", "op": {"name": "read", "map": "m", "page": 2, "offset": 0, "bytes": 14}}
"""

PICTURE = """\
  0 A: mmap map=m object=dev pages=3 prot=rw flags=private -> ok
    A: rss file 0, anon 0; raw ptes 0; locked 0
      m[0-2] rw-p mm           ...
  1 A: read map=m page=1 offset=0 bytes=14 -> ok, 1 minor
    A: rss file 1, anon 0; raw ptes 0; locked 0
      m[0-2] rw-p mm           .P.
  2 A: write map=m page=0 offset=0 byte=! -> ok, 2 minor
    A: rss file 1, anon 1; raw ptes 0; locked 0
      m[0-2] rw-p mm           AP.
                               d
  3 A: fork child=B -> ok
    A: rss file 1, anon 1; raw ptes 0; locked 0
      m[0-2] rw-p mm           AP.
    B: rss file 1, anon 1; raw ptes 0; locked 0
      m[0-2] rw-p mm           AP.
  4 B: read map=m page=0 offset=0 bytes=14 -> ok
    A: rss file 1, anon 1; raw ptes 0; locked 0
      m[0-2] rw-p mm           AP.
    B: rss file 1, anon 1; raw ptes 0; locked 0
      m[0-2] rw-p mm           AP.
  5 B: read map=m page=2 offset=0 bytes=14 -> SIGBUS
    A: rss file 1, anon 1; raw ptes 0; locked 0
      m[0-2] rw-p mm           AP.
    B: rss file 1, anon 1; raw ptes 0; locked 0
      m[0-2] rw-p mm           AP.
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.jsonl"
    path.write_text(PROGRAM)
    return path


def test_check_of_all_recordings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "check", str(ORACLE)]) == 0
    assert capsys.readouterr().out == "1210 steps, 1210 agree, 0 differ\n"


def test_check_json(capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(ORACLE / f"{name}.jsonl") for name in ("bug-control.um", "mix-fork.um")]
    assert main(["model", "check", "--json", *files]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["schema"], answer["steps"], answer["agree"], answer["differ"]) == (1, 27, 27, 0)
    assert [file["steps"] for file in answer["files"]] == [2, 25]


def test_check_shows_a_difference_with_its_rule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (ORACLE / "mix-fork.um.jsonl").read_text().splitlines()
    step = json.loads(lines[13])
    step["observed"]["rss_anon_pages"] += 1
    lines[13] = json.dumps(step)
    path = tmp_path / "wrong.jsonl"
    path.write_text("\n".join(lines))
    assert main(["model", "check", str(path)]) == 1
    assert capsys.readouterr().out == (
        f"{path}:14: step 12 write (child writes page 0 (anon shared with parent)):"
        " rss_anon_pages: recorded 3, model 2; rules F3, F15, T3; F10 to F20\n"
        "25 steps, 24 agree, 1 differ\n"
    )


def test_run_picture(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "run", "--picture", str(program)]) == 0
    assert capsys.readouterr().out == PICTURE


def test_run_prints_a_json_line_a_step(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "run", str(program)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert lines[1]["state"]["data"] == "cached"
    assert lines[2]["state"]["minflt"] == 2
    assert lines[4]["state"]["data"] == "!n place"
    assert (lines[5]["state"]["result"], lines[5]["state"]["si_code"]) == ("SIGBUS", 2)
    assert [page["present"] for page in lines[5]["state"]["pages"]] == [True, True, False]


def test_run_under_another_rule_set(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "run", "--rules", "seed", str(program)]) == 0
    assert '"minflt": 2' in capsys.readouterr().out


def test_diff_of_eras(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "program.jsonl"
    gup = (
        '{"op": {"name": "get_user_pages", "map": "m", "page": 0, "write": false, "force": false}}'
    )
    head, first, *_ = PROGRAM.splitlines()
    path.write_text("\n".join([head, first, gup]))
    assert main(["model", "diff", "2.6.32", "6.1", str(path)]) == 1
    assert capsys.readouterr().out == (
        "  1 A: get_user_pages map=m page=0 write=False force=False -> EFAULT, 1 minor\n"
        "      result: 2.6.32 'EFAULT', 6.1 'EEXIST'; rules G1 to G5\n"
        "2 steps, 2.6.32 and 6.1 part in 1\n"
    )
    assert main(["model", "diff", "6.1", "6.12", str(path)]) == 0


def test_malformed_and_missing_files_are_wrong_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(PROGRAM.replace('"pages": 3', '"pages": "three"'))
    assert main(["model", "run", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"xipfs model: {path}:2: field op.pages: 'three'; expected an integer of at least 0\n"
    )
    assert main(["model", "check", str(tmp_path / "none.jsonl")]) == 2
    assert main(["model", "diff", "2.4", "6.1", str(path)]) == 2
    assert main(["model", "check", str(tmp_path / "..")]) == 2
