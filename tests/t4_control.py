"""The control directory: hidden, fresh, consistent, closed to others, and hard to upset."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from typing import Any

import pytest
from conftest import needs
from live import PAGE, LiveMount, Mounts

pytestmark = [needs("root", "fuse")]


@pytest.fixture(scope="module")
def mnt(shared: Mounts) -> LiveMount:
    return shared.mount()


def ask(mount: LiveMount, request: bytes) -> list[dict[str, Any]]:
    """Send one request; return every line of the answer."""
    descriptor = os.open(mount / ".xipfs" / "control", os.O_RDWR)
    try:
        os.write(descriptor, request)
        answer = b""
        while part := os.read(descriptor, 1 << 16):
            answer += part
    finally:
        os.close(descriptor)
    return [json.loads(line) for line in answer.splitlines()]


def test_it_is_found_by_name_and_listed_nowhere(mnt: LiveMount) -> None:
    (mnt / "visible").touch()
    assert ".xipfs" not in os.listdir(mnt.directory)
    assert "visible" in os.listdir(mnt.directory)
    assert sorted(os.listdir(mnt / ".xipfs")) == ["control", "metrics", "stats.json"]


def test_permissions_are_the_owners_alone(mnt: LiveMount) -> None:
    modes = {
        name: stat.S_IMODE(os.stat(mnt / ".xipfs" / name).st_mode)
        for name in ("", "stats.json", "control", "pages.1.json")
    }
    assert modes == {"": 0o500, "stats.json": 0o400, "control": 0o600, "pages.1.json": 0o400}


def test_each_open_takes_its_own_snapshot_and_keeps_it(mnt: LiveMount) -> None:
    with open(mnt / ".xipfs" / "stats.json", "rb", buffering=0) as early:
        beginning = os.read(early.fileno(), 200)
        (mnt / "fresh").write_bytes(bytes(17 * PAGE))
        late = mnt.cat_stats()["vmstat"]["nr_xip_pages"]
        rest = b""
        while part := os.read(early.fileno(), 4096):
            rest += part
        before = json.loads(beginning + rest)["vmstat"]["nr_xip_pages"]
    assert late == before + 17


def test_the_snapshot_has_the_agreed_shape(mnt: LiveMount) -> None:
    stats = mnt.cat_stats()
    assert stats["schema"] == 1
    assert set(stats["vmstat"]) >= {
        "pgfault",
        "pgmajfault",
        "pgfault_xip",
        "pgfault_pagecache",
        "pgfault_cow",
        "pgfault_extra",
        "pgfault_hint",
        "pgmigrate_success",
        "pgmigrate_fail",
        "pgpromote_success",
        "pgdemote_success",
        "nr_xip_pages",
        "nr_pagecache_pages",
        "nr_resident_pages",
        "nr_special_ptes",
        "nr_normal_ptes",
        "nr_anon_pages",
    }
    assert set(stats["kernel"]) >= {"faults", "major", "minor"}
    assert set(stats["observer"]) >= {"mode", "events", "lost", "unfollowed"}
    assert set(stats["memory"]) == {
        "page_size_bytes",
        "struct_page_bytes",
        "memmap_bytes",
        "memmap_saved_bytes",
        "ram_bytes",
        "nvram_bytes",
    }
    assert stats["mount"]["pid"] == mnt.pid
    assert stats["mount"]["label"] == "test"
    assert stats["mount"]["rules"] == "6.1"


def test_stat_and_cat_tell_the_same(mnt: LiveMount) -> None:
    by_command, by_file = mnt.stats(), mnt.cat_stats()
    for stats in (by_command, by_file):
        del stats["ram_pages_used"]  # goes on with time
    assert by_command == by_file


def test_the_image_cannot_use_the_name(mnt: LiveMount) -> None:
    control = mnt / ".xipfs"
    (mnt / "plain").touch()
    changes: list[Callable[[], object]] = [
        lambda: os.mkdir(control),
        lambda: os.rmdir(control),
        lambda: os.rename(control, mnt / "renamed"),
        lambda: os.rename(mnt / "plain", control),
        lambda: os.link(mnt / "plain", control / "link"),
        lambda: os.unlink(control / "control"),
        lambda: os.chmod(control / "control", 0o666),
        lambda: (control / "new").touch(),
        lambda: os.setxattr(control, "user.x", b""),
    ]
    for change in changes:
        with pytest.raises(OSError) as refused:  # noqa: PT011
            change()
        assert refused.value.errno in (errno.EPERM, errno.EEXIST, errno.EACCES, errno.EISDIR)
    assert sorted(os.listdir(control)) == ["control", "metrics", "stats.json"]
    (mnt / "sub").mkdir()
    (mnt / "sub" / ".xipfs").write_bytes(b"only the root's is taken")
    assert (mnt / "sub" / ".xipfs").read_bytes() == b"only the root's is taken"


def test_questions_that_have_no_answer(mnt: LiveMount) -> None:
    control = mnt / ".xipfs"
    for name in ("pages.0.json", "pages.01.json", "pages.x.json", "pages.json", "nothing.1.json"):
        with pytest.raises(FileNotFoundError):
            (control / name).read_bytes()
    with pytest.raises(FileNotFoundError):
        (control / "pages.999999.json").read_bytes()
    with pytest.raises(OSError) as refused:  # noqa: PT011
        (control / "pages.1.json").read_bytes()
    assert refused.value.errno in (errno.EISDIR, errno.EINVAL)
    descriptor = os.open(control / "stats.json", os.O_WRONLY)  # root may open anything
    with pytest.raises(PermissionError):
        os.write(descriptor, b"{}")
    os.close(descriptor)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (b"", None),
        (b"not json", "malformed request"),
        (b"[1]", "a request it does not know"),
        (b"{}", "a request it does not know"),
        (b'{"op": "format"}', "a request it does not know"),
        (b'{"op": ["migrate"]}', "malformed request"),
        (b'{"op": "migrate"}', "malformed request"),
        (b'{"op": "migrate", "ino": "x", "to": "xip"}', "malformed request"),
        (b'{"op": "migrate", "ino": 999999, "to": "xip"}', "no inode 999999"),
        (b'{"op": "migrate", "ino": 1, "to": "xip"}', "directory"),
        (b'{"op": "migrate", "ino": 1, "to": "tape"}', "kind 'tape'"),
        (b'{"op": "migrate", "ino": 1, "to": ["xip"]}', "malformed request"),
        (b'{"op": "migrate", "ino": -5, "to": "xip"}', "no inode -5"),
        (b'{"op": "migrate", "ino": 1e999, "to": "xip"}', "malformed request"),
        (b'{"op": "migrate", "ino": 9999999999999999999999, "to": "xip"}', "no inode 9999"),
        (b"\xff\xfe", "malformed request"),
        (b"[" * 100_000, "malformed request"),
    ],
)
def test_a_malformed_request_is_answered_with_an_error(
    mnt: LiveMount, request_: bytes, said: str | None
) -> None:
    answers = ask(mnt, request_)
    if said is None:
        assert answers == []
    else:
        assert len(answers) == 1
        assert said.lower() in answers[0]["error"].lower()
        assert answers[0]["exit_code"] in (1, 2)
        assert answers[0]["errno"] > 0
    assert mnt.cat_stats()["schema"] == 1


def test_a_request_that_is_too_long_is_refused(mnt: LiveMount) -> None:
    descriptor = os.open(mnt / ".xipfs" / "control", os.O_RDWR)
    with pytest.raises(OSError, match="too long"):
        os.write(descriptor, b" " * (128 << 10))
    os.close(descriptor)


def test_requests_follow_each_other_on_one_handle(mnt: LiveMount) -> None:
    (mnt / "again").write_bytes(bytes(2 * PAGE))
    ino = os.stat(mnt / "again").st_ino
    descriptor = os.open(mnt / ".xipfs" / "control", os.O_RDWR)
    for to, pages in (("pagecache", 2), ("xip", 1), ("xip", 2)):
        request = {"op": "migrate", "ino": ino, "to": to, "ranges": [[0, pages]]}
        os.write(descriptor, json.dumps(request).encode())
        answer = json.loads(os.read(descriptor, 1 << 16))
        moved = 1 if to == "xip" else 2
        assert answer == {
            "result": {"moved": moved, "already": pages - moved, "failed": {}, "failed_errno": {}}
        }
    assert os.read(descriptor, 100) == b"", "and nothing after the result"
    os.close(descriptor)


def test_one_request_at_a_time_on_a_handle(mnt: LiveMount) -> None:
    descriptor = os.open(mnt / ".xipfs" / "control", os.O_RDWR)
    assert os.read(descriptor, 100) == b""
    os.write(descriptor, b"{}")
    with pytest.raises(OSError, match="busy"):
        os.write(descriptor, b"{}")
    answer = os.read(descriptor, 10)  # a part is not all
    with pytest.raises(OSError, match="busy"):
        os.write(descriptor, b"{}")
    answer += os.read(descriptor, 1 << 16)
    assert "does not know" in json.loads(answer)["error"]
    assert os.write(descriptor, b"{}") == 2
    os.close(descriptor)


def test_a_client_that_closes_early_upsets_nobody(mnt: LiveMount) -> None:
    """20 migrations of many chunks, whose clients do not stay to hear of it."""
    (mnt / "left").write_bytes(bytes(1000 * PAGE))
    ino = os.stat(mnt / "left").st_ino
    for turn in range(20):
        descriptor = os.open(mnt / ".xipfs" / "control", os.O_RDWR)
        to = "pagecache" if turn % 2 else "xip"
        os.write(descriptor, json.dumps({"op": "migrate", "ino": ino, "to": to}).encode())
        if turn % 3:
            os.read(descriptor, 10)
        os.close(descriptor)
    kinds = mnt.letters("left")
    assert len(kinds) == 1000
    assert set(kinds) <= {"X", "P", "p"}
    assert (mnt / "left").read_bytes() == bytes(1000 * PAGE)
    vmstat = mnt.vmstat()
    assert vmstat["nr_xip_pages"] + vmstat["nr_pagecache_pages"] >= 1000
    assert mnt.migrate("left", "xip")["failed"] == {}
    assert mnt.letters("left") == "X" * 1000


def test_a_read_only_mount_answers_questions(live: Mounts) -> None:
    mount = live.mount()
    (mount / "file").write_bytes(bytes(3 * PAGE))
    mount = live.remount(mount, "ro")
    assert mount.letters("file") == "XXX"
    assert mount.stats()["vmstat"]["nr_xip_pages"] == 3


def test_a_brief_move_is_answered_by_its_write(mnt: LiveMount) -> None:
    (mnt / "brief").write_bytes(bytes(3 * PAGE))
    ino = os.stat(mnt / "brief").st_ino
    descriptor = os.open(mnt / ".xipfs" / "control", os.O_RDWR)
    try:
        request = {"op": "migrate", "ino": ino, "to": "pagecache", "ranges": [[1, 1]]}
        for _ in range(2):  # the second finds it moved
            data = json.dumps(request | {"brief": True}).encode()
            assert os.write(descriptor, data) == len(data)
            assert os.read(descriptor, PAGE) == b""
        assert mnt.letters("brief") == "XPX"
        os.write(descriptor, json.dumps(request).encode())  # at length, on the same descriptor
        assert json.loads(os.read(descriptor, PAGE))["result"]["already"] == 1
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({"op": "migrate", "ino": 1, "to": "xip"}, errno.EISDIR),
        ({"op": "migrate", "ino": 1 << 40, "to": "xip"}, errno.ENOENT),
        ({"op": "migrate", "to": "xip"}, errno.EINVAL),
        ({"op": "migrate", "ino": 1, "to": "gold"}, errno.EINVAL),
        ({"op": "events", "follow": True}, errno.EINVAL),
        ({"op": "no such"}, errno.EINVAL),
    ],
)
def test_a_brief_request_fails_with_an_errno(
    mnt: LiveMount, request_: dict[str, Any], code: int
) -> None:
    descriptor = os.open(mnt / ".xipfs" / "control", os.O_RDWR)
    try:
        with pytest.raises(OSError, check=lambda error: error.errno == code):
            os.write(descriptor, json.dumps(request_ | {"brief": True}).encode())
        assert os.read(descriptor, PAGE) == b""
    finally:
        os.close(descriptor)
