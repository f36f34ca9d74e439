"""mount(8), umount(8) and fstab lines of the type fuse.xipfs, by the helper mount.fuse.xipfs.

Each test has a mount namespace of its own, in which the helper lies in /sbin.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import needs
from live import ENVIRONMENT, ROOT, new_image

from xipfs.clock import SystemClock
from xipfs.fs.filesystem import Filesystem

pytestmark = [needs("root", "fuse")]

#: A tool as pip makes it, and the rest of /sbin beside it.
SETUP = """
mount --make-rprivate /
mkdir before sbin mnt
mount --bind /usr/sbin before
mount -t tmpfs none sbin
ln -s $PWD/before/* sbin/
cp helper sbin/mount.fuse.xipfs
mount --bind sbin /usr/sbin
# Whatever happens: without a mount its daemon ends.
trap 'mountpoint -q mnt && umount -l mnt; true' EXIT
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with an image that has a file, and the helper."""
    image = new_image(tmp_path / "image", size_bytes=4 << 20)
    fs = Filesystem.open(image, ram_bytes=1 << 20, clock=SystemClock())
    fs.write(fs.mknod(1, b"file", 0o100644, 0, 0, 0).ino, 0, b"words\n")
    fs.close()
    helper = tmp_path / "helper"
    helper.write_text(
        f"#!{sys.executable}\nimport sys\nfrom xipfs.cli.mount import mount_main\n"
        "sys.exit(mount_main())\n"
    )
    helper.chmod(0o755)
    return tmp_path


def run(directory: Path, script: str) -> str:
    """Run a script in the namespace; return what it said, with the directory as HERE."""
    done = subprocess.run(
        ["unshare", "-m", "bash", "-euc", SETUP + script],
        cwd=directory,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=90,
        check=False,
    )
    said = done.stdout.replace(str(directory), "HERE")
    assert done.returncode == 0, said
    return said


def test_the_helper_is_installed() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["mount.fuse.xipfs"] == "xipfs.cli.mount:mount_main"


def test_mount_and_umount(directory: Path) -> None:
    said = run(
        directory,
        """
        mount -t fuse.xipfs image mnt -o ram=1M,observe=off,policy=tpp,high=99
        findmnt -nro FSTYPE,SOURCE,TARGET mnt
        cat mnt/file
        echo more >> mnt/file
        grep -oE '"(ram_bytes|high)": [0-9]+' mnt/.xipfs/stats.json | sort -u
        umount mnt
        mount -nv -r -t fuse.xipfs image mnt -o observe=off
        cat mnt/file
        echo no 2>&1 > mnt/file || echo refused
        umount mnt
        mount -f -t fuse.xipfs image mnt
        ls mnt
        """,
    )
    lines = [line for line in said.splitlines() if "Read-only" not in line]
    assert lines == [
        "fuse.xipfs HERE/image HERE/mnt",
        "words",
        '"high": 99',
        '"ram_bytes": 1048576',
        "words",
        "more",
        "refused",
    ]


def test_a_line_of_fstab(directory: Path) -> None:
    options = "ro,noatime,noexec,nofail,_netdev,nosuid,nodev,x-systemd.automount,ram=2M,observe=off"
    (directory / "fstab").write_text(
        f"{directory}/image {directory}/mnt fuse.xipfs {options} 0 0\n"
    )
    said = run(
        directory,
        """
        mount -T fstab -a
        cat mnt/file
        grep -oE '"ram_bytes": [0-9]+' mnt/.xipfs/stats.json | sort -u
        findmnt -nro OPTIONS mnt | grep -oE '^ro|nosuid|nodev|noexec|noatime'
        umount mnt
        mount -T fstab mnt
        cat mnt/file
        umount mnt
        """,
    )
    assert said.splitlines() == [
        "words", '"ram_bytes": 2097152', "ro", "nosuid", "nodev", "noexec", "noatime", "words",
    ]  # fmt: skip


def test_a_remount_changes_what_the_kernel_can(directory: Path) -> None:
    said = run(
        directory,
        """
        mount -t fuse.xipfs image mnt -o ram=1M,observe=off,default_permissions
        try() { mount -o remount,$1 mnt || echo "exit $?"; findmnt -nro OPTIONS mnt | cut -d, -f1; }
        try ro
        echo no 2>&1 > mnt/file || echo refused
        cat mnt/file
        try rw,noexec
        findmnt -nro OPTIONS mnt | grep -o noexec
        echo more >> mnt/file
        cat mnt/file
        try noatime
        try ram=2M,ro
        umount mnt
        mount -r -t fuse.xipfs image mnt -o observe=off
        try rw
        try noexec
        umount mnt
        """,
    )
    lines = [line for line in said.splitlines() if "Read-only" not in line]
    anew = "unmount it and mount it anew"
    told = "mount.fuse.xipfs: {} cannot be changed on a mount that is there; expected"
    told += f" exec, noexec, ro, rw; {anew}"
    assert lines == [
        *("ro", "refused", "words"),
        *("rw", "noexec", "words", "more"),
        *(told.format("noatime"), "exit 1", "rw"),
        *(told.format("ram=2M"), "exit 1", "rw"),
        f"mount.fuse.xipfs: HERE/mnt was mounted read-only, or is so for damage; {anew}",
        *("exit 1", "ro", "ro"),
    ]


def test_what_fails_exits_as_mount_does(directory: Path) -> None:
    said = run(
        directory,
        """
        try() { mount -t fuse.xipfs "$@" || echo "exit $?"; }
        try absent mnt
        try image mnt -o ram=1
        try image mnt -o nodiratime
        mount -t fuse.xipfs image mnt -o observe=off
        mkdir other
        try image other -o observe=off
        umount mnt
        mount.fuse.xipfs image || echo "exit $?"
        """,
    )
    told = [re.sub(r"(one of|in use) .*", r"\1", line) for line in said.splitlines()]
    assert told == [
        "mount.fuse.xipfs: absent is not a file; expected an image; make one with xipfs mkfs",
        "exit 1",
        "mount.fuse.xipfs: ram=1 is less than one page; expected 4096 or more",
        "exit 1",
        "mount.fuse.xipfs: unknown mount option 'nodiratime'; expected one of",
        "exit 1",
        "xipfs mount: image HERE/image is in use",
        "exit 32",
        "usage: mount.fuse.xipfs [-h] [-o OPT,OPT] [-f] IMAGE DIR",
        "mount.fuse.xipfs: error: the following arguments are required: DIR",
        "exit 1",
    ]
