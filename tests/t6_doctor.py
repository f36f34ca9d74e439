"""``xipfs doctor``: what is there is said to be there, what is missing is named with its remedy."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
from conftest import needs
from live import COMMAND, ENVIRONMENT, INSTANCES, Mounts, is_mounted, xipfs

from xipfs.cli import doctor, main
from xipfs.cli.bounded import within
from xipfs.cli.doctor import _Cleaned, as_text, clean, examine
from xipfs.errors import XipfsError
from xipfs.trace import session, uffd
from xipfs.trace.session import mount_tracefs


@needs("root", "fuse", "tracefs")
def test_this_machine_is_exact() -> None:
    lines = xipfs("doctor").stdout.splitlines()
    assert lines[0] == "ok      /dev/fuse: usable"
    assert "ok      root: uid 0" in lines
    assert any(line.startswith("ok      tracefs: ") for line in lines)
    assert lines[-1] == "exact: every fault is seen"
    answer = json.loads(xipfs("doctor", "--json").stdout)
    assert answer["exact"] is True
    assert answer["removed"] == []


def test_without_tracefs_it_says_what_is_lost_and_how_to_get_it(tmp_path: Path) -> None:
    found = {need.name: need for need in examine(tmp_path / "none")}
    tracefs = found["tracefs"]
    assert (tracefs.there, tracefs.needed) == (False, True)
    assert tracefs.found == f"tracefs is not mounted ({tmp_path}/none)"
    assert tracefs.lost == "faults are estimated from READ requests"
    assert tracefs.get == f"as root: mount -t tracefs nodev {tmp_path}/none"
    text = as_text(list(found.values()), ["dead mount /mnt"], ["instance x"], exact=False)
    assert text.startswith("removed dead mount /mnt\nNOT REMOVED instance x\n")
    assert "MISSING tracefs: tracefs is not mounted" in text
    assert text.endswith("not exact: see what is MISSING")


@needs("root", "fuse", "tracefs")
def test_what_a_killed_daemon_left_is_removed(live: Mounts) -> None:
    """Both tracefs instances with their filters and pids, the mount, and with it its read-ahead."""
    mount = live.mount(None, "observe=tracefs")
    left = list(INSTANCES.glob(f"xipfs-{mount.pid}-*"))
    readahead = Path(f"/sys/class/bdi/{mount.mount.major}:{mount.mount.minor}/read_ahead_kb")
    assert (len(left), readahead.read_text()) == (2, "0\n")
    mount.kill()
    with (left[0] / "trace_pipe").open("rb"):
        answer = json.loads(xipfs("doctor", "--clean", "--json", check=False).stdout)
        assert f"dead mount {mount.directory}" in answer["removed"]
        # (Another mount that starts meanwhile removes instances too.)
        assert not left[1].exists()
        # Somebody holds the other one: it stays, but traces nothing and so costs nothing.
        assert f"tracefs instance {left[0].name}, which somebody holds open" in answer["left"]
        assert (left[0] / "events/enable").read_text() == "0\n"
    xipfs("doctor", "--clean", check=False)
    assert not is_mounted(mount.directory)
    assert not any(path.exists() for path in left)


@needs("root", "fuse", "tracefs")
def test_the_next_mount_removes_what_a_killed_daemon_left(live: Mounts) -> None:
    mount = live.mount(None, "observe=tracefs")
    with (mount / "file").open("wb") as file:
        file.write(b"kept")
        file.flush()
        os.fsync(file.fileno())
    left = list(INSTANCES.glob(f"xipfs-{mount.pid}-*"))
    mount.kill()
    done = xipfs("mount", mount.image, mount.directory, "--log", mount.log, "-o", "observe=tracefs")
    assert done.stderr == f"xipfs mount: removed a dead mount from {mount.directory}\n"
    assert (mount / "file").read_bytes() == b"kept"
    assert not any(path.exists() for path in left)
    xipfs("umount", mount.directory)
    assert not is_mounted(mount.directory)


def test_a_number_used_again_does_not_keep_an_instance() -> None:
    now_s = time.time()
    assert session._made_by(str(os.getpid()), now_s)
    assert not session._made_by(str(os.getpid()), now_s - 30 * 86400)
    with subprocess.Popen(["true"]) as ended:
        pass
    assert not session._made_by(str(ended.pid), now_s)


def test_too_old_a_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"pyfuse3": "3.2.9", "trio": "0.24.0", "numba": "1.0rc1"}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {need.name: need for need in examine()}
    assert (found["pyfuse3"].there, found["pyfuse3"].found) == (
        False,
        "version 3.2.9, older than 3.3",
    )
    assert found["pyfuse3"].get == (
        "in xipfs's source tree: tools/setup, or pip install --upgrade '.[mount]'"
    )
    assert (found["trio"].there, found["numba"].there) == (True, True)
    assert (found["pyarrow"].there, found["pyarrow"].found) == (False, "not installed")


def test_a_kernel_that_is_locked_down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """tracefs is there and refuses everything: not the event is missing, but the permission."""
    monkeypatch.setattr(doctor, "_LOCKDOWN", tmp_path / "lockdown")
    (tmp_path / "lockdown").write_text("none integrity [confidentiality]\n")
    (tmp_path / "instances").mkdir()
    found = {need.name: need for need in examine(tmp_path)}
    lockdown = found["lockdown below confidentiality"]
    assert (lockdown.there, lockdown.found) == (False, "none integrity [confidentiality]")
    for need in (lockdown, found["tracefs"]):
        assert need.lost == "faults are estimated from READ requests"
        assert need.get == "boot with lockdown=integrity or without"


def test_what_exact_mode_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(uffd, "unusable", lambda: "userfaultfd(2): Function not implemented")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {need.name: need for need in examine()}
    exact = found["userfaultfd with WP_ASYNC"]
    assert (exact.there, exact.found) == (False, "userfaultfd(2): Function not implemented")
    assert exact.lost == "xipfs run --exact: pages that fault-around maps make no fault"
    assert exact.get == "Linux 6.7 or later with CONFIG_USERFAULTFD"
    compiler = found["a C compiler"]
    assert (compiler.there, compiler.found) == (False, "none of cc, gcc, clang")


@needs("root")
def test_another_user_is_told_what_only_root_has() -> None:
    """Each thing that is missing has what is lost and how to get it."""
    done = subprocess.run(
        [
            "setpriv",
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            *COMMAND,
            "doctor",
            "--json",
        ],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["exact"]) == (1, False)
    missing = {need["name"]: need for need in answer["needs"] if not need["there"]}
    assert {"root", "tracefs", "the kernel's read-ahead", "/proc/kpagecount"} <= missing.keys()
    assert missing["tracefs"]["get"] == "run as root"
    assert all(need["lost"] and need["get"] for need in answer["needs"] if not need["there"])


def test_cleaning_where_there_is_no_tracefs_is_no_error(tmp_path: Path) -> None:
    removed, left = clean(tmp_path / "none")
    assert not any(name.startswith("tracefs") for name in [*removed, *left])


def test_tracefs_is_mounted_only_over_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "instances").mkdir()
    assert mount_tracefs(tmp_path) is False
    assert mount_tracefs(tmp_path / "none") is False
    assert not os.path.ismount(tmp_path)


@needs("root", "tracefs")
def test_tracefs_is_mounted_where_nobody_did(tmp_path: Path) -> None:
    try:
        assert mount_tracefs(tmp_path) is True
        assert (tmp_path / "instances").is_dir()
        assert mount_tracefs(tmp_path) is False
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@needs("root", "fuse")
def test_what_does_not_answer_is_told_and_keeps_nobody_from_the_rest(
    live: Mounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped daemon stands for whatever waits in the kernel."""
    monkeypatch.setattr(doctor, "_STEP_S", 2.0)
    dead, stuck = live.mount(), live.mount()
    dead.kill()
    os.kill(stuck.pid, signal.SIGSTOP)
    try:
        removed, left = clean()
    finally:
        os.kill(stuck.pid, signal.SIGCONT)
    assert f"dead mount {dead.directory}" in removed
    assert f"mount {stuck.directory}, which did not answer within 2 s" in left
    assert is_mounted(stuck.directory)
    assert os.statvfs(stuck.directory).f_bsize == 4096


def test_a_machine_that_does_not_answer_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_STEP_S", 0.2)
    monkeypatch.setattr(doctor, "examine", lambda: time.sleep(3600))
    assert main(["doctor"]) == 1
    said = capfd.readouterr()
    assert said.out == ""
    assert "looking at this machine took longer than 0.2 s" in said.err
    assert "dmesg" in said.err


def _write_half() -> None:
    """End in the middle of the answer."""
    (pipe,) = [fd for fd in range(3, 100) if _is_pipe(fd)][-1:]
    os.write(pipe, b'["half')
    os._exit(1)


def _is_pipe(fd: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(fd).st_mode)
    except OSError:
        return False


def test_a_step_that_fails_is_an_error_and_no_answer(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(XipfsError, match="dividing failed: its process ended"):
        within(60, "dividing", lambda: 1 // 0)
    assert "ZeroDivisionError" in capfd.readouterr().err
    with pytest.raises(XipfsError, match="writing half of it failed: its process ended"):
        within(60, "writing half of it", _write_half)
    cleaned = _Cleaned()
    assert cleaned.done("one", lambda: 1) == 1
    assert cleaned.done("two", lambda: 1 // 0) is None
    assert cleaned.done("three", lambda: 3) == 3
    assert cleaned.left == ["two: two failed: its process ended"]
    assert within(60, "listing", lambda: ["x" * 100_000]) == ["x" * 100_000]
