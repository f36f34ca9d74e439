"""``fsck.xipfs`` as a program: each exit bit, what it says, and that -n writes nothing."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pty
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import needs
from fuzz_images import Places, template
from fuzzing import Memory, contents, lost_of
from fuzzing import mount as open_image
from live import COMMAND, ENVIRONMENT, Mounts
from t3_repair import DAMAGES, damaged, put, readable

from xipfs.cli import main
from xipfs.cli.fsck import fsck_main
from xipfs.image.check import check

_AS_PROGRAM = "import sys; from xipfs.cli.fsck import fsck_main; sys.exit(fsck_main())"
#: A real signal comes in the midst of what the first argument names.
_SIGNALLED = """
import contextlib, os, sys
import xipfs.cli.checking as checking
from xipfs.cli.fsck import fsck_main

phase, number = sys.argv.pop(1), int(sys.argv.pop(1))

@contextlib.contextmanager
def progress_bar(what, *, lines):
    yield lambda done, total: os.kill(os.getpid(), number) if what == phase and done else None

checking.progress_bar = progress_bar
sys.exit(fsck_main())
"""
KEYS = {"image", "exit_code", "error", "findings", "repairs", "left"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "image"


def program(
    *words: str | Path, script: str = _AS_PROGRAM, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run ``fsck.xipfs`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output="stdout" not in more,
        text=True,
        timeout=60,
        check=False,
        **{"env": ENVIRONMENT, **more},
    )


def sum_of(path: Path) -> tuple[str, int]:
    return hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns


UNSAFE = damaged(put("name.ino", 9999))
SAFE_ONE = damaged(put("counters.free_blocks", 3), "orphans")
IMAGES: dict[str, tuple[bytes, int]] = {
    "clean": (template("xip")[0], 0),
    "not unmounted": (template("orphans")[0], 0),
    "pending": (template("pending")[0], 0),
    "damaged": (UNSAFE, 4),
    "damaged and pending": (damaged(put("superblock.crc", 7, fits=False), "pending"), 4),
    "no image": (bytes(1 << 20), 8),
}


@pytest.mark.parametrize("name", IMAGES)
def test_n_writes_not_one_byte(name: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, code = IMAGES[name]
    path.write_bytes(image)
    before = sum_of(path)
    for more in itertools.product(("", "-f"), ("", "-C"), ("", "--json")):
        words = [word for word in more if word]
        assert main(["fsck", "-n", *words, str(path)]) == code, words
        assert sum_of(path) == before, words
    capsys.readouterr()


# How it ends


def answer_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    answer = json.loads(done.stdout)
    assert set(answer) == KEYS
    assert answer["exit_code"] == done.returncode
    assert (answer["error"] == "") == (done.returncode < 8)
    assert answer["error"] in done.stderr
    return dict(answer)


@pytest.mark.parametrize(
    ("image", "words", "code"),
    [
        (IMAGES["clean"][0], ["-n"], 0),
        (SAFE_ONE, ["-p"], 1),
        (UNSAFE, ["-y"], 1),
        (UNSAFE, ["-n"], 4),
        (UNSAFE, ["-p", "-f"], 4),
        (bytes(1 << 20), ["-y"], 8),
        (b"short", ["-n"], 8),
        (None, ["-n"], 8),
    ],
)
def test_every_end_has_its_bit_and_its_json(
    image: bytes | None, words: list[str], code: int, path: Path
) -> None:
    if image is not None:
        path.write_bytes(image)
    done = program(*words, "--json", path)
    assert done.returncode == code, done.stderr
    answer = answer_of(done)
    assert bool(answer["findings"]) == (code in (1, 4))
    assert bool(answer["repairs"]) == (code == 1)
    assert bool(answer["left"]) == (code == 4)


@pytest.mark.parametrize(
    "words",
    [["-n", "-y"], ["-p", "-n"], ["--such"], ["-Z"], ["-C0"], ["-y", "second"], ["--json"], []],
)
def test_a_wrong_command_line_is_16_and_prints_no_json(words: list[str], path: Path) -> None:
    path.write_bytes(UNSAFE)
    done = program(*words, path)
    assert (done.returncode, done.stdout) == (16, "")
    assert "fsck.xipfs: " in done.stderr
    assert path.read_bytes() == UNSAFE


@pytest.mark.parametrize("word", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    ("phase", "how"), [("checking", "-n"), ("checking", "-y"), ("repairing", "-y")]
)
def test_a_signal_is_32_and_the_next_run_does_it(
    phase: str, how: str, word: str, path: Path
) -> None:
    path.write_bytes(UNSAFE)
    before = readable(UNSAFE)
    number = str(int(getattr(signal, word)))
    done = program(phase, number, how, "--json", path, script=_SIGNALLED)
    assert done.returncode == 32, done.stderr
    assert answer_of(done)["error"] == f"{path}: canceled; what was repaired stays so"
    assert (path.read_bytes() == UNSAFE) == (phase == "checking")
    assert program("-y", path).returncode == 1
    assert program("-n", path).returncode == 0
    assert lost_of(before, readable(path.read_bytes())) == ""


def test_a_missing_library_is_128(path: Path) -> None:
    path.write_bytes(UNSAFE)
    broken = path.parent / "broken"
    broken.mkdir()
    (broken / "numpy.py").write_text("raise ImportError('libgone.so.3: cannot open')\n")
    env = {**ENVIRONMENT, "PYTHONPATH": f"{broken}:{ENVIRONMENT['PYTHONPATH']}"}
    done = program("-y", "--json", path, env=env)
    assert done.returncode == 128
    assert "a library cannot be loaded: libgone.so.3: cannot open" in answer_of(done)["error"]
    assert path.read_bytes() == UNSAFE
    done = subprocess.run(
        [*COMMAND, "fsck", "-n", str(path)], env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (128, "")


@pytest.mark.parametrize("raised", [ZeroDivisionError("of ours"), OSError(5, "the disk")])
def test_a_failure_of_fsck_itself_is_8(
    raised: Exception,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not 1, with which Python would end, and which says that all is repaired."""

    def fail(*_args: object) -> None:
        raise raised

    path.write_bytes(UNSAFE)
    monkeypatch.setattr("xipfs.cli.checking.repair", fail)
    monkeypatch.setattr("sys.argv", ["fsck.xipfs", "-y", str(path)])
    assert fsck_main() == 8
    said = capsys.readouterr().err
    assert f"fsck.xipfs: {path}: " in said
    assert ("a defect of fsck.xipfs" in said) == isinstance(raised, ZeroDivisionError)


@pytest.mark.parametrize(("how", "code"), [("-y", 1), ("-n", 4)])
def test_a_reader_that_goes_away_changes_nothing(how: str, code: int, path: Path) -> None:
    path.write_bytes(damaged(put("leaf.owner", 77, fits=False)))
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = program(how, path, stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (code, "")
    left = check(Memory(path.read_bytes(), writable=False), "image")
    assert (left == []) == (how == "-y")


# More than one at work


def test_two_at_once_and_a_question_on_a_terminal(path: Path) -> None:
    """One waits for its answer and holds the image: a second is refused, -n warns."""
    path.write_bytes(UNSAFE)
    ours, theirs = pty.openpty()
    first = subprocess.Popen(
        [sys.executable, "-c", _AS_PROGRAM, str(path)],
        env={**ENVIRONMENT, "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    try:
        said = b""
        while b"Repair? [y/N]" not in said:
            said += os.read(ours, 4096)
        assert b"checking" in said, "the terminal is shown how far it is"
        for how in ("-y", "-p"):
            done = program(how, path)
            assert done.returncode == 8
            assert f"in use by the process with pid {first.pid}" in done.stderr
        done = program("-n", path)
        assert done.returncode == 4
        assert "warning: image" in done.stderr
        assert path.read_bytes() == UNSAFE
        os.write(ours, b"y\n")
        assert first.wait(timeout=60) == 1
    finally:
        first.kill()
        first.wait()
        os.close(ours)
    assert program("-n", path).returncode == 0


@needs("root", "fuse")
@pytest.mark.parametrize("options", ["observe=off", "observe=off,ro"])
def test_a_mounted_image_is_refused(live: Mounts, options: str) -> None:
    mount = live.mount(None, options)
    (mount / "file").write_bytes(b"x") if "ro" not in options.split(",") else None
    for how in ("-y", "-p"):
        done = program(how, "--json", mount.image)
        assert done.returncode == 8
        assert f"in use by the process with pid {mount.pid}" in done.stderr
        assert "unmount it there" in answer_of(done)["error"]
    done = program("-n", mount.image)
    assert ("warning" in done.stderr) == ("ro" not in options.split(",")), "readers bear each other"
    assert done.returncode == 0
    mount.umount()
    assert program("-y", mount.image).returncode == 0


# Progress


def test_progress_is_told_where_it_is_asked_for(path: Path) -> None:
    path.write_bytes(UNSAFE)
    quiet, told = program("-n", path), program("-n", "-C", path)
    assert quiet.stderr == ""
    lines = told.stderr.splitlines()
    assert (lines[0], lines[-1]) == ("checking: 0 %", "checking: 100 %")
    assert told.stdout == quiet.stdout
    both = program("-y", "-C", path).stderr.splitlines()
    ends = [line for line in both if line.endswith(": 100 %")]
    assert ends == ["checking: 100 %", "repairing: 100 %", "checking again: 100 %"]


def test_progress_of_a_large_image_comes_in_small_steps() -> None:
    medium = Memory(template("xip")[0], writable=True)
    fs = open_image(medium)
    directory = fs.mkdir(1, b"many", 0o755, 0, 0).ino
    for number in range(640):
        fs.mknod(directory, b"%d" % number, 0o100644, 0, 0, 0)
    fs.close()
    told: list[tuple[int, int]] = []
    assert check(medium, "image", lambda done, total: told.append((done, total))) == []
    done, totals = [each for each, _ in told], {total for _, total in told[1:]}
    (total,) = totals
    assert total > 2 * 640
    assert done == sorted(done)
    assert done[-1] == total
    assert max(after - before for before, after in itertools.pairwise(done)) <= 32


# Much at once


def test_many_kinds_of_damage_at_once(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first -y repairs all of it, the second finds nothing, and nothing readable is lost."""
    seed = int(os.environ.get("XIPFS_SEED", random.randrange(1 << 30)))
    print(f"replay: XIPFS_SEED={seed} pytest {__file__}")
    kinds: list[tuple[str, Callable[[bytearray, Places], None]]] = [
        (name, damage)
        for name, damages in DAMAGES.items()
        # Of the superblock only one copy: without both it is no image.
        for damage in (damages[:1] if name == "superblock" else damages)
    ]
    for number in range(12):
        chance = random.Random(f"{seed} {number}")
        image, places = template("xip")
        chosen = chance.sample(kinds, chance.randrange(3, 9))
        mutant = bytearray(image)
        for _name, damage in chosen:
            damage(mutant, places)
        what = f"XIPFS_SEED={seed}, number {number}: {[name for name, _ in chosen]}"
        before = readable(mutant)
        path.write_bytes(mutant)
        capsys.readouterr()
        assert main(["fsck", "-y", "--json", str(path)]) == 1, what
        found = {finding["name"] for finding in json.loads(capsys.readouterr().out)["findings"]}
        assert len(found) > 1, what
        assert main(["fsck", "-y", "--json", str(path)]) == 0, what
        assert json.loads(capsys.readouterr().out)["findings"] == [], what
        assert lost_of(before, contents(open_image(Memory(path.read_bytes(), writable=False)))) == (
            ""
        ), what
