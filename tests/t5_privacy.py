"""Only the mount's own processes are recorded, and only its owner and root are told of them.

A stranger is a process that the trace sees (its parent uses the mount, so it is in the pid filter)
and that never touches the mount: whatever is asked, neither its number nor its name is told.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pyarrow.parquet
import pytest
from conftest import needs
from live import COMMAND, ENVIRONMENT, PAGE, LiveMount, Mounts, xipfs
from t5_accounting import fill

from xipfs.fs.types import PageKind

pytestmark = [needs("root", "fuse", "tracefs")]

NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
#: The last fault's number that can be asked for: its answer is the number of the next.
LAST = 10**15 - 1
USER, STRANGER = "its-user", "its-stranger"
#: Both begin covered by the trace, since the shell has opened the mount; then both fault.
FAMILY = """
read line < "$1/file"
"$2/{user}" map "$1/file" private r read 0-30 fork {{ read 0-4 }} &
echo user $!
"$2/{stranger}" map "$2/private" shared rw write 0-99 fork {{ write 0-99 }} \
    map "$2/private" private rw write 0-99 advise 0-99 dontneed read 0-99 &
echo stranger $!
wait
"""


@pytest.fixture(scope="module")
def mounted(shared: Mounts) -> LiveMount:
    image = shared.image()
    fill(image, {"file": PageKind.XIP}, pages=31)
    return shared.mount(image, "observe=tracefs", "allow_other")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scene")


@pytest.fixture(scope="module")
def family(mounted: LiveMount, touch: Path, scene: Path) -> dict[str, int]:
    """The pids of a user and a stranger that have run while a recording was made."""
    for name in (USER, STRANGER):
        (scene / name).write_bytes(touch.read_bytes())
        (scene / name).chmod(0o755)
    (scene / "private").write_bytes(bytes(100 * PAGE))
    (scene / "script").write_text(FAMILY.format(user=USER, stranger=STRANGER))
    told = xipfs(
        "run", "--mount", mounted.directory, "-o", scene / "trace", "--json",
        "--report", scene / "report", "--", "sh", scene / "script", mounted.directory, scene,
    ).stdout  # fmt: skip
    return {line.split()[0]: int(line.split()[1]) for line in told.splitlines()}


def test_a_stranger_is_never_told_of(
    mounted: LiveMount, family: dict[str, int], scene: Path
) -> None:
    control = mounted.directory / ".xipfs"
    answers = {
        name: (control / name).read_text()
        for name in ("stats.json", "faults.1.json", "hottest.9.json", "verify.1.json")
    }
    answers["report"] = (scene / "report").read_text()
    table = pyarrow.parquet.read_table(scene / "trace")
    answers["trace"] = json.dumps(table.to_pydict()) + str(table.schema.metadata)
    for name, text in answers.items():
        assert STRANGER not in text, name
        assert str(scene / "private") not in text, name
    pids = set(table["pid"].to_pylist())
    stats = json.loads(answers["stats.json"])
    pids |= {line["pid"] for line in stats["processes"]}
    assert family["user"] in pids
    assert family["stranger"] not in pids
    # Two of the user's: itself and its child. The shell has read(2) only, which is no fault.
    assert [line["comm"] for line in stats["processes"]] == [USER, USER]
    assert stats["observer"]["events"] > 500, "the stranger was not even seen"
    faults = json.loads(answers["report"])["faults"]
    assert stats["kernel"]["faults"] == stats["vmstat"]["pgfault"] == faults


def test_others_are_told_nothing(mounted: LiveMount, family: dict[str, int]) -> None:
    """With allow_other anybody may use the mount; the control files stay closed to them."""

    def as_nobody(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*NOBODY, *words],
            cwd=mounted.directory,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    assert as_nobody("head", "-c1", "file").returncode == 0, "the mount itself is open to others"
    refused = [
        ("ls", ".xipfs"),
        ("cat", ".xipfs/stats.json"),
        ("cat", f".xipfs/run.{family['user']}.json"),
        *(("cat", f".xipfs/{name}.1.json") for name in ("faults", "items", "hottest", "verify")),
        ("cat", ".xipfs/pages.2.json"),
        ("sh", "-c", 'echo \'{"op": "events"}\' > .xipfs/control'),
        ("chmod", "755", ".xipfs"),
    ]
    for words in refused:
        done = as_nobody(*words)
        assert (words, done.returncode != 0, done.stdout) == (words, True, "")
        assert "denied" in done.stderr or "not permitted" in done.stderr, (words, done.stderr)
    for verb in (["stat", "."], ["stat", "--hottest", "3", "."], ["pages", "file"]):
        done = as_nobody(*COMMAND, *verb)
        assert (done.returncode, done.stdout) == (1, "")
        assert "is closed to uid 65534; expected root or the mount's owner" in done.stderr


def owner_and_mode(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_uid, status.st_mode & 0o7777


def test_traces_and_logs_are_their_makers_alone(
    mounted: LiveMount, family: dict[str, int], scene: Path
) -> None:
    trace = scene / "trace"
    for path in (trace, mounted.log):
        assert (path.name, *owner_and_mode(path)) == (path.name, 0, 0o600)
    # Nor does one that somebody else laid out beforehand become theirs to read.
    trace.unlink()
    trace.touch()
    os.chown(trace, 65534, 65534)
    xipfs("run", "--mount", mounted.directory, "-o", trace, "--force", "--", "true")
    assert owner_and_mode(trace) == (0, 0o600)
    other = scene / "other"
    other.write_text("kept")
    trace.unlink()
    trace.symlink_to(other)
    xipfs("run", "--mount", mounted.directory, "-o", trace, "--force", "--", "true")
    assert (other.read_text(), trace.is_symlink()) == ("kept", False)
    pipe = scene / "pipe"
    os.mkfifo(pipe)
    words = ("--mount", mounted.directory, "-o", pipe, "--force", "--", "true")
    done = xipfs("run", *words, check=False)
    assert (done.returncode, pipe.is_fifo()) == (2, True)
    assert f"{pipe} is not a regular file" in done.stderr
