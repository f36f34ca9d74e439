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


@pytest.mark.parametrize(
    ("words", "output"),
    [(["first_touch.py"], FIRST_TOUCH), (["first_touch.py", "seed"], FIRST_TOUCH)]
    + [(["special_bit.py"], SPECIAL_BIT)],
    ids=["first_touch", "first_touch seed", "special_bit"],
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
