"""Mount options: what is understood, what the defaults are, and that nothing is ignored."""

from __future__ import annotations

import pytest

from xipfs.errors import EXIT_USAGE, UsageError
from xipfs.options import HELP, MountOptions, parse_options


def test_the_defaults() -> None:
    assert parse_options([]) == MountOptions(
        ro=False,
        sync=False,
        ram_bytes=67108864,
        dirty_background_ratio=10,
        dirty_ratio=20,
        dirty_expire_ms=30_000,
        dirty_writeback_ms=5000,
        struct_page_bytes=64,
        medium=None,
        rules="6.1",
        observe="auto",
        hint_pages_per_s=0,
        readahead_kib=None,
        policy="off",
        policy_values=(),
        dry=False,
        allow_other=False,
    )


def test_every_option_at_once_in_one_word_or_in_many() -> None:
    expected = MountOptions(
        ro=True,
        sync=True,
        ram_bytes=1 << 20,
        struct_page_bytes=56,
        medium="pcm",
        rules="2.6.32-nospecial",
        observe="requests",
        readahead_kib=128,
        policy="threshold",
        policy_values=(("promote", 4),),
        allow_other=True,
    )
    words = [
        "ro",
        "sync",
        "ram=1M",
        "struct_page=56",
        "medium=pcm",
        "rules=2.6.32-nospecial",
        "observe=requests",
        "readahead=128",
        "policy=threshold",
        "promote=4",
        "allow_other",
    ]
    assert parse_options(words) == expected
    assert parse_options([",".join(words)]) == expected
    assert parse_options(["", "ro,,", *words[1:]]) == expected


def test_the_last_of_two_counts() -> None:
    assert parse_options(["ro,rw"]).ro is False
    there = parse_options(["relatime,noatime", "exec,noexec"])
    assert (there.noatime, there.noexec) == (True, True)
    back = parse_options(["noatime,noexec,relatime", "exec"])
    assert (back.noatime, back.noexec) == (False, False)
    assert parse_options(["ram=1M,ram=2M"]).ram_bytes == 2 << 20


def test_ram_is_whole_pages() -> None:
    assert parse_options(["ram=10000"]).ram_bytes == 8192
    assert parse_options(["ram=4096"]).ram_bytes == 4096


def test_readahead_off_is_zero() -> None:
    assert parse_options(["readahead=off"]).readahead_kib == 0
    assert parse_options(["readahead=0"]).readahead_kib == 0


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("dirty_ratio=10", "dirty_background_ratio=10 with dirty_ratio=10"),
        ("dirty_ratio=101", "dirty_ratio=101"),
        ("dirty_expire_ms=0", "dirty_expire_ms=0"),
        ("dirty_writeback_ms=1.5", "dirty_writeback_ms=1.5"),
        ("nodiratime", "unknown mount option 'nodiratime'"),
        ("noatime=1", "mount option 'noatime' takes no value"),
        ("RAM=1M", "unknown mount option 'RAM'"),
        ("ram", "mount option 'ram' has no value"),
        ("ram=", "size '' is not a number of bytes"),
        ("ram=4095", "less than one page"),
        ("ram=2T", "ram=2 TiB; expected at most 1T"),
        ("ro=1", "mount option 'ro' takes no value"),
        ("allow_other=yes", "mount option 'allow_other' takes no value"),
        ("struct_page=63", "struct_page=63; expected one of 32, 56, 64"),
        ("struct_page=-1", "struct_page=-1; expected a whole number"),
        ("observe=TRACEFS", "observe=TRACEFS; expected one of auto"),
        ("observe=", "observe=; expected one of auto"),
        ("readahead=-1", "readahead=-1; expected a whole number"),
        ("readahead=\u0663", "expected a whole number"),
        ("medium=tape", "medium=tape: no such medium in media.toml; expected nor, pcm, optane,"),
        ("medium=mine.toml:a", "mine.toml is not absolute; expected /path/to/FILE:TABLE"),
        ("hint=-1", "hint=-1; expected a whole number of 0 or more"),
        ("hint=5,observe=off", "hint= with observe=off; expected observe=tracefs"),
        ("dry", "dry without a policy; expected policy=NAME,dry"),
        ("promote=2", "unknown mount option 'promote'"),
    ],
)
def test_a_wrong_option_is_refused(word: str, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_options([word])
    assert message in str(refused.value)
    assert refused.value.exit_code == EXIT_USAGE


def test_every_option_has_a_line_of_help() -> None:
    names = {entry.partition("=")[0] for entry in HELP}
    assert names == {
        "ro",
        "rw",
        "noatime",
        "relatime",
        "noexec",
        "exec",
        "sync",
        "ram",
        "dirty_background_ratio",
        "dirty_ratio",
        "dirty_expire_ms",
        "dirty_writeback_ms",
        "struct_page",
        "medium",
        "rules",
        "observe",
        "hint",
        "readahead",
        "policy",
        "dry",
        "allow_other",
    }


def test_they_are_told_as_json_ready_values() -> None:
    assert parse_options(["ram=64K,policy=threshold,promote=2"]).describe() == {
        "ro": False,
        "noatime": False,
        "noexec": False,
        "sync": False,
        "ram_bytes": 65536,
        "dirty_background_ratio": 10,
        "dirty_ratio": 20,
        "dirty_expire_ms": 30_000,
        "dirty_writeback_ms": 5000,
        "struct_page_bytes": 64,
        "medium": None,
        "rules": "6.1",
        "observe": "auto",
        "hint_pages_per_s": 0,
        "readahead_kib": None,
        "policy": "threshold",
        "policy_values": {"promote": 2},
        "dry": False,
        "allow_other": False,
    }
