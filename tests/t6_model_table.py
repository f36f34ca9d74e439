"""What ``xipfs model table`` prints."""

from __future__ import annotations

import json

import pytest

from xipfs.cli import main

MEMMAP = """\
struct pages of a 512 MiB image
  struct page                          percent of      outweighs      outweighs
        bytes  guests  memmap bytes         image          image    from guests
           32       1       4194304         0.781             no            129
           32     100     419430400        78.125             no            129
           56       1       7340032         1.367             no             74
           56     100     734003200       136.719            yes             74
           64       1       8388608         1.562             no             65
           64     100     838860800        156.25            yes             65
The claim, made for 100 guests: their struct pages outweigh the image.
It holds for struct pages of 56 and 64 bytes, and not for 32 (32-bit machines).
"""
GUP = """\
locks and atomics of one call a thread, pages mapped
                  slow mmap
                       lock     slow pte         page                  fast irq
pages  threads      atomics   lock pairs      atomics  fast locks         pairs
    8        1            2            8            8           0             1
    8        4            8           32           32           0             4
"""
MAPPINGS = """\
VM_MIXEDMAP private vm_insert_pfn    no          ok         -   -   0  copied
VM_MIXEDMAP private vm_insert_pfn    yes         BUG [4]    -   -   0  -
VM_MIXEDMAP shared  vm_insert_pfn    no          ok         -   -   0  -
VM_MIXEDMAP shared  vm_insert_pfn    yes         BUG [4]    -   -   0  -
VM_MIXEDMAP private vm_insert_page   no          EINVAL     -   -   0  -
VM_MIXEDMAP private vm_insert_page   yes         ok         1   1   1  copied
VM_MIXEDMAP shared  vm_insert_page   no          EINVAL     -   -   0  -
VM_MIXEDMAP shared  vm_insert_page   yes         ok         1   1   1  -
VM_MIXEDMAP private vm_insert_mixed  no          ok         -   -   0  copied
VM_MIXEDMAP private vm_insert_mixed  yes         ok         0   0   0  copied
VM_MIXEDMAP shared  vm_insert_mixed  no          ok         -   -   0  -
VM_MIXEDMAP shared  vm_insert_mixed  yes         ok         0   0   0  -
[1] BUG_ON(!(vma->vm_flags & (VM_PFNMAP|VM_MIXEDMAP)))
[2] BUG_ON((vma->vm_flags & VM_PFNMAP) && is_cow_mapping(vma->vm_flags))
[3] BUG_ON(vma->vm_flags & VM_PFNMAP)
[4] BUG_ON((vma->vm_flags & VM_MIXEDMAP) && pfn_valid(pfn))
"""


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["model", "table", *words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines())) < 80
    return "".join(line.rstrip() + "\n" for line in out.splitlines())


def test_memmap(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "memmap", "--image-size", "512M", "--guests", "1,100") == MEMMAP


def test_mappings(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "mappings")
    assert out.startswith("what mappings hold, count and copy, rules 6.1\n")
    assert out.endswith(MAPPINGS)


def test_gup(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "gup", "--pages", "8", "--threads", "1,4", "--rules", "6.1-nospecial")
    assert out.startswith(GUP)
    mix = out.removeprefix(GUP).splitlines()
    assert mix[0] == "calls that leave the lockless path, rules 6.1-nospecial, seed 1"
    assert mix[2].split() == ["0", "8", "500", "100.0", "0.0"]
    assert mix[-1].split() == ["100", "8", "500", "100.0", "100.0"]


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--json", "--image-size", "4K", "--guests", "65")
    answer = json.loads(printed_json(capsys, "memmap", *words))
    assert answer["table"] == "memmap"
    assert answer["struct pages of a 4 KiB image"][2] == {
        "struct_page_bytes": 64,
        "guests": 65,
        "memmap_bytes": 4160,
        "percent_of_image": 101.562,
        "outweighs_image": True,
        "outweighs_from_guests": 65,
    }
    for table in ("mappings", "gup"):
        answer = json.loads(printed_json(capsys, table, "--json", "--rules", "seed"))
        assert answer.pop("table") == table
        assert all(rows and isinstance(rows[0], dict) for rows in answer.values())


def printed_json(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["model", "table", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["memmap", "--guests", "0"], "--guests 0"),
        (["memmap", "--guests", "1,x"], "--guests 1,x"),
        (["memmap", "--image-size", "100"], "--image-size 100"),
        (["mappings", "--rules", "2.4"], "no rule set '2.4'"),
        (["gup", "--threads", ""], "--threads"),
    ],
)
def test_mistakes_are_named(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["model", "table", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("xipfs model: ")
    assert message in err
