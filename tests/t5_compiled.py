"""Compiled code: made before the first mount of an installation serves, once, or done without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import needs
from live import ENVIRONMENT, Mounts, xipfs
from t5_accounting import fill

from xipfs.cli import compiling
from xipfs.fs.types import PageKind

#: Of a file of 4,096 pages, each pass one fault for each fault-around window of 16 pages.
PAGES, PASSES, FAULTS_A_PASS = 4096, 400, 256


@needs("root", "fuse", "tracefs")
@pytest.mark.timeout(600)
def test_the_first_mount_compiles_before_it_serves_and_loses_nothing(
    live: Mounts, touch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    monkeypatch.setitem(ENVIRONMENT, "NUMBA_CACHE_DIR", str(tmp_path / "compiled"))
    assert "MISSING compiled code: not on disk yet" in xipfs("doctor").stdout
    image = live.image()
    fill(image, {"x": PageKind.XIP})
    mount = tmp_path / "mnt"
    mount.mkdir()
    words: list[str | Path] = [
        "mount",
        "-o",
        "observe=tracefs",
        "--log",
        tmp_path / "log",
        image,
        mount,
    ]
    told = []
    for _ in range(2):
        told.append(xipfs(*words, timeout=400).stderr.splitlines())
        try:
            with open(mount / "x", "r+b") as file:
                file.truncate(PAGES * 4096)
            # It begins while the daemon still loads what was compiled.
            loop = f"repeat {PASSES} {{ advise 0-{PAGES - 1} dontneed read 0-{PAGES - 1} }}"
            said = f"map {mount / 'x'} shared r read 0-{PAGES - 1} {loop}"
            subprocess.run([touch, *said.split()], check=True, stdout=subprocess.DEVNULL)
            stats = json.loads((mount / ".xipfs/stats.json").read_bytes())
        finally:
            xipfs("umount", mount)
        assert stats["observer"]["lost"] == 0
        assert stats["vmstat"]["pgfault"] >= PASSES * FAULTS_A_PASS
    assert [line.split(" (")[0] for line in told[0]][:1] == [
        "xipfs mount: compiling the observer's code, once for this installation"
    ]
    assert told[0][1].startswith("xipfs mount: compiled in ")
    assert told[1] == [], "it is there"
    assert "ok      compiled code: on disk" in xipfs("doctor").stdout


def prepared() -> list[str]:
    told: list[str] = []
    compiling.prepare(told.append)
    return told


def test_what_cannot_be_compiled_is_told_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "compiled"))
    slower = "faults are decoded and charged by Python, some 30 times slower"
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert prepared()[1:] == [f"not compiled (it failed): until it is, {slower}"]
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    assert prepared()[1].startswith("not compiled ([Errno 2] No such file")
    monkeypatch.setattr(sys, "executable", "/bin/sleep")
    monkeypatch.setattr(compiling, "_MAX_S", 0.0)
    assert prepared()[1] == f"not compiled (not done within 0 s): until it is, {slower}"
    monkeypatch.setattr(compiling, "_directory", lambda: None)
    assert prepared() == [
        f"no directory for compiled code can be written (NUMBA_CACHE_DIR names one): {slower}"
    ]
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert prepared() == [f"numba is not installed: {slower}"]


def test_nothing_of_the_current_directory_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hashlib.py").write_text("open('was_here', 'w')\nraise SystemExit('ours')\n")
    # It gets as far as its first import of ours that is not there.
    monkeypatch.setattr(compiling, "_MAX_S", 3.0)
    assert "ours" not in prepared()[1]
    assert not (tmp_path / "was_here").exists()


def test_a_user_without_a_home_has_a_directory_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 54321)
    assert compiling._directory() == tmp_path


def test_another_source_or_a_file_that_is_gone_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    kept = tmp_path / "run.nbc"
    kept.touch()
    note = tmp_path / "xipfs-compiled.json"
    assert not compiling.is_ready()
    made_from = compiling._made_from()
    note.write_text(f'{{"made_from": "{made_from}", "files": ["{kept}"]}}')
    assert compiling.is_ready()
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    assert not compiling.is_ready()
    monkeypatch.delenv("NUMBA_CPU_NAME")
    kept.unlink()
    assert not compiling.is_ready()
    for broken in ("", "[]", "{}", '{"made_from": 1, "files": 2}'):
        note.write_text(broken)
        assert not compiling.is_ready()
