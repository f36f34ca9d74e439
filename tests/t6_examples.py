"""The example programs print what their texts promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from xipfs.cli import main

EXAMPLES = Path(__file__).resolve().parents[1] / "tools" / "examples"

FIRST_TOUCH = """\
page    mapping  access  faults  raw PTEs  file rss  anon rss
XIP     private  read         1         1         0         0
XIP     private  write        2         0         0         1
XIP     shared   read         1         1         0         0
XIP     shared   write        1         1         0         0
cached  private  read         1         0         1         0
cached  private  write        1         0         0         1
cached  shared   read         1         0         1         0
cached  shared   write        1         0         1         0
"""
SPECIAL_BIT = """\
6.1            vm_insert_page   refcount 2, mapcount 1, get_user_pages 1 page
6.1            vm_insert_mixed  refcount 1, mapcount 0, get_user_pages refused
6.1-nospecial  vm_insert_page   refcount 2, mapcount 1, get_user_pages 1 page
6.1-nospecial  vm_insert_mixed  refcount 2, mapcount 1, get_user_pages 1 page
"""
MIGRATE = """\
process                    A              B              C          RAM page
PTEs                       raw file anon  raw file anon  raw file anon  ref map
read, faults [1, 1, 1]       1    0    0    1    0    0    1    0    0    1   0
C writes                     1    0    0    1    0    0    0    0    1    1   0
to page cache, cleared 2     0    0    0    0    0    0    0    0    1    1   0
read, faults [1, 1, 0]       0    1    0    0    1    0    0    0    1    3   2
to XIP, cleared 2            0    0    0    0    0    0    0    0    1    1   0
read, faults [1, 1, 0]       1    0    0    1    0    0    0    0    1    1   0
"""
LOCKLESS = """\
rules          XIP pages   lockless  taken in all
6.1            none               8  8 of 8
6.1            5                  5  5 of 8
6.1            0                  0  an error
6.1-nospecial  none               0  8 of 8
6.1-nospecial  5                  0  5 of 8
6.1-nospecial  0                  0  an error
"""


@pytest.mark.parametrize(
    ("words", "output"),
    [(["first_touch.py"], FIRST_TOUCH), (["first_touch.py", "seed"], FIRST_TOUCH)]
    + [(["special_bit.py"], SPECIAL_BIT), (["migrate_under_mapping.py"], MIGRATE)]
    + [(["lockless_gup.py"], LOCKLESS)],
    ids=["first_touch", "first_touch seed", "special_bit", "migrate_under_mapping", "lockless_gup"],
)
def test_an_example_program(words: list[str], output: str) -> None:
    command = [sys.executable, str(EXAMPLES / words[0]), *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == output


def test_the_example_command_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "run", "--picture", str(EXAMPLES / "fork_and_copy.jsonl")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  4 child: write map=m page=0 offset=0 byte=T -> ok, 2 minor" in lines
    assert "  5 child: write map=m page=1 offset=0 byte=C -> ok, 1 minor" in lines
