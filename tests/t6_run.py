"""``xipfs run``: what it says when it cannot do what it was asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import needs
from live import Mounts, xipfs

from xipfs.cli import preloading
from xipfs.cli.run import as_text, choose_mount
from xipfs.errors import UsageError


def said(*words: str | Path) -> tuple[int, str]:
    done = xipfs("run", *words, check=False)
    return done.returncode, done.stderr


def test_errors_of_the_command_line(tmp_path: Path) -> None:
    assert said("--exact", "--") == (
        2,
        "xipfs run: no command; expected xipfs run [OPTIONS] -- CMD [ARGUMENTS]\n",
    )
    assert said("--force", "--", "true") == (
        2,
        "xipfs run: --force without -o; expected -o FILE, which it overwrites\n",
    )
    nothing = f"nothing is mounted at {tmp_path}; expected the mount point of an xipfs mount"
    assert said("--mount", tmp_path, "--", "true") == (1, f"xipfs run: {nothing}\n")


@needs("root", "fuse", "tracefs")
def test_a_mount_that_cannot_tell_and_a_trace_that_exists(live: Mounts, tmp_path: Path) -> None:
    mount = live.mount(None, "observe=off")
    marker = tmp_path / "ran"
    code, complaint = said("--mount", mount.directory, "--", "touch", marker)
    assert code == 1
    assert complaint == (
        "xipfs run: faults are not seen on this mount (observer off: switched off with observe=off)"
        "; mount as root with -o observe=tracefs; xipfs doctor says what is missing\n"
    )
    seen = live.mount(None, "observe=tracefs")
    (tmp_path / "trace").touch()
    assert said("--mount", seen.directory, "-o", tmp_path / "trace", "--", "touch", marker) == (
        2,
        f"xipfs run: {tmp_path}/trace exists; --force overwrites it\n",
    )
    lost = tmp_path / "nowhere" / "report"
    words = ("--mount", seen.directory, "--report", lost, "--", "touch", marker)
    assert said(*words) == (
        2,
        f"xipfs run: {lost} cannot be written: No such file or directory\n",
    )
    assert not marker.exists(), "the program ran, though nothing could be said of it"
    assert choose_mount(["cat", str(mount.directory / "file"), str(mount.directory)]) == mount.mount
    with pytest.raises(UsageError, match=r"^which mount\? .* are mounted"):
        choose_mount(["true"])


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(preloading.PreloadError) as raised:
        preloading.library(tmp_path / "cache")
    assert str(raised.value) == (
        "exact mode needs a C compiler to make its library, and there is none; expected cc or gcc "
        "or clang; apt-get install gcc libc6-dev"
    )


def test_the_library_is_compiled_once_and_never_taken_from_others(tmp_path: Path) -> None:
    made = preloading.library(tmp_path / "cache")
    first = made.stat()
    assert (first.st_mode & 0o777, first.st_uid) == (0o755, os.geteuid())
    assert preloading.library(tmp_path / "cache").stat().st_ino == first.st_ino
    assert [path.name for path in made.parent.iterdir()] == [made.name]
    made.parent.chmod(0o777)
    with pytest.raises(preloading.PreloadError, match=r"^others can write to"):
        preloading.library(tmp_path / "cache")


def test_a_source_that_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preloading, "SOURCE", tmp_path / "register.c")
    preloading.SOURCE.write_text("int broken(")
    with pytest.raises(preloading.PreloadError, match=r"cannot compile .*register\.c: .*error"):
        preloading.library(tmp_path / "cache")


def test_the_report_for_people() -> None:
    told = {
        "exact": True,
        "faults": 70,
        "pages_own_fault": 67,
        "pages_around": 44,
        "pages_unsure": 2,
        "programs": 2,
        "programs_registered": 1,
        "programs_living": 1,
        "inexact": {
            "before_library": 1,
            "shared_read_only": 30,
            "past_library": 0,
            "without_library": 13,
        },
        "without_library": {"busybox": 13},
        "events_lost": 5,
        "recorded": {"faults": 70, "faults_missed": 0},
    }
    assert as_text(told).splitlines() == [
        "70 faults; 111 pages mapped: 67 by a fault of their own, 44 without",
        "1 of 2 address spaces registered; 44 pages inexact:",
        "       1 before the library ran: exec and the loader",
        "      30 shared mappings of read-only descriptors",
        "       0 past the library: in dlopen, MAP_LOCKED, raw system calls",
        "      13 programs without the library: static, set-uid, clone(2)",
        "          13 busybox",
        "2 of those without are unsure: no event tells if they were mapped",
        "1 address spaces of it live on, uncounted from here",
        "5 events lost: the figures are too low",
        "70 faults recorded, 0 missed",
    ]
