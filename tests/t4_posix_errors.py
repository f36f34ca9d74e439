"""Which errno each call that takes a path fails with, for every kind of wrong path and object.

Each table is run on an xipfs mount and on the kernel's own filesystem (calltables.py).
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from calltables import NOT_DIRECTORIES, SPECIAL, TYPES, Table
from conftest import needs
from live import Mounts

pytestmark = [needs("root", "fuse")]

#: Calls that take a path {p} of something that is there, and of something that they make.
TAKING = [
    "chmod {p} 0600",
    "chown {p} root root",
    "lchown {p} root root",
    "truncate {p} 5",
    "open {p} RDONLY,NONBLOCK",
    "open {p} WRONLY,NONBLOCK",
    "rmdir {p}",
    "unlink {p}",
    "link {p} other",
    "rename {p} other",
    "rename2 {p} other 1",
    "rename2 {p} there 2",
    "sattrs {p} type",
    "attrs {p} type",
    "readlink {p}",
    "utimes {p} now now",
    "utimes {p} now now nofollow",
    "setxattr {p} user.a 1",
    "getxattr {p} user.a",
    "list {p}",
    "chdir {p}",
]
MAKING = [
    "open {p} WRONLY,CREAT",
    "mkdir {p}",
    "mkfifo {p}",
    "mknod {p} regular",
    "mknod {p} char",
    "symlink target {p}",
    "link there {p}",
    "rename there {p}",
    "rename2 there {p} 1",
]
#: These look at the last component itself, where the others follow a symbolic link.
NOT_FOLLOWING = ("lchown", "rmdir", "unlink", "link", "rename", "attrs", "readlink", "nofollow")
LONGEST = "n" * 255


def each_call(path: str, errno: str, calls: list[str]) -> str:
    return "".join(f"root {call.format(p=path)} -> {errno}\n" for call in calls)


def test_a_component_of_the_path_is_missing_or_no_directory(table: Table) -> None:
    table.run("root make regular there -> ok")
    table.run(each_call("absent/x", "ENOENT", TAKING + MAKING))
    for kind in SPECIAL + ["regular"]:
        table.run(f"root make {kind} {kind} -> ok")
        table.run(each_call(f"{kind}/x", "ENOTDIR", TAKING + MAKING))
        table.run(f"root attrs {kind} type nlink -> {kind} 1")
    table.run("root attrs there type nlink -> regular 1\nroot attrs . nlink -> 2")


def test_what_is_not_there(table: Table) -> None:
    table.run("root make regular there\nroot symlink absent dangling")
    table.run(each_call("absent", "ENOENT", TAKING))
    following = [call for call in TAKING if not any(word in call for word in NOT_FOLLOWING)]
    table.run(each_call("dangling", "ENOENT", following))
    table.run(each_call("''", "ENOENT", TAKING + MAKING))
    table.run("root symlink '' empty -> ENOENT\nroot open dangling/ WRONLY,CREAT -> EISDIR")
    table.run("root list . -> dangling,there")


def test_names_and_paths_that_are_too_long(table: Table) -> None:
    table.run("root make regular there")
    for path in (LONGEST + "x", f"absent/../{LONGEST}x", "x/" * 2048, "p" * 4096):
        wanted = "ENOENT" if path.startswith("absent") else "ENAMETOOLONG"
        table.run(each_call(path, wanted, TAKING + MAKING))
    table.run(f"root symlink {'t' * 4095} longest\nroot symlink {'t' * 4096} over -> ENAMETOOLONG")
    table.run(f"root rename there {LONGEST}\nroot mkdir d\nroot rename {LONGEST} d/{LONGEST}")
    table.run(f"root list d -> {LONGEST}\nroot attrs ./{'d/../' * 700}d/{LONGEST} nlink -> 1")


def test_paths_of_path_max(table: Table) -> None:
    part = "p" * 199
    directory = ""
    while len(directory) < 3900:
        directory += part + "/"
        table.run(f"root mkdir {directory}")
    path = directory + "f" * (4095 - len(directory))
    for make in MAKING:
        table.run(f"root make regular there\nroot {make.format(p=path)} -> ok")
        table.run(f"root {make.format(p=path + 'f')} -> ENAMETOOLONG")
        table.run(f"root attrs {path}f type -> ENAMETOOLONG\nroot attrs {path} nlink -> 1|2")
        table.run(f"root remove {path}\nroot remove there -> ok|ENOENT")


def test_loops_of_symbolic_links(table: Table) -> None:
    table.run("root make regular there\nroot symlink a b\nroot symlink b a\nroot symlink c c")
    for loop in ("a", "b", "c"):
        table.run(each_call(f"{loop}/x", "ELOOP", TAKING + MAKING))
    following = [call for call in TAKING if not any(word in call for word in NOT_FOLLOWING)]
    table.run(each_call("a", "ELOOP", following))
    for flags in ("RDONLY", "WRONLY", "RDWR", "RDONLY,CREAT"):
        table.run(f"root open c {flags},NOFOLLOW -> ELOOP")
    # As many as the kernel follows, and one more.
    table.run("root make regular link0")
    for number in range(41):
        table.run(f"root symlink link{number} link{number + 1}")
    table.run("root sattrs link40 type -> regular\nroot sattrs link41 type -> ELOOP")


@pytest.mark.parametrize("kind", TYPES)
def test_what_is_there_is_not_made_again(table: Table, kind: str) -> None:
    table.run(f"root make regular there\nroot make {kind} it")
    makers = [call for call in MAKING if not call.startswith(("open", "rename there"))]
    table.run(each_call("it", "EEXIST", [*makers, "open {p} WRONLY,CREAT,EXCL"]))
    table.run(f"root attrs it type -> {kind}\nroot list . -> it,there")


@pytest.mark.parametrize("kind", NOT_DIRECTORIES)
def test_directories_and_what_is_none(table: Table, kind: str) -> None:
    table.run(
        f"""
        root make {kind} it
        root mkdir d
        root rmdir it       -> ENOTDIR  it= .=
        root unlink d       -> EISDIR   d= .=
        root rename d it    -> ENOTDIR  d= it= .=
        root rename it d    -> EISDIR   d= it= .=
        root rename2 it d 1 -> EEXIST   d= it= .=
        root link d it      -> EEXIST
        root link d x       -> EPERM    d= .=
        root make {kind} d/x
        root rmdir d        -> ENOTEMPTY  d= .=
        root mkdir e
        root rename e d     -> ENOTEMPTY|EEXIST  d= e= .=
        root rename d e     -> ok
        root list e         -> x
        root rmdir e/.      -> EINVAL
        root mkdir e/sub
        root rmdir e/sub/.. -> ENOTEMPTY
        root rename it e/sub/.. -> EBUSY|EEXIST|ENOTEMPTY
        root rename e e/sub -> EINVAL
        root rename e e/sub/new -> EINVAL
        root rename e/. f   -> EBUSY
        root rename e/sub/.. f -> EBUSY
        root mkdir .        -> EEXIST
        root mkdir e/..     -> EEXIST
        root unlink .       -> EISDIR|EBUSY
        root rmdir /        -> EBUSY
        """
    )


def test_opening_and_cutting_what_is_no_file(table: Table) -> None:
    for kind in TYPES:
        table.run(f"root make {kind} {kind}")
    table.run(
        """
        root open dir RDONLY            -> ok
        root open dir WRONLY            -> EISDIR
        root open dir RDWR              -> EISDIR
        root open dir RDONLY,TRUNC      -> EISDIR
        root open dir RDONLY,CREAT      -> EISDIR
        root open dir RDONLY,CREAT,DIRECTORY -> EINVAL|EISDIR
        root open regular RDONLY,DIRECTORY   -> ENOTDIR
        root open symlink RDONLY,DIRECTORY,NOFOLLOW -> ENOTDIR
        root open regular/ RDONLY       -> ENOTDIR
        root open new/ WRONLY,CREAT     -> EISDIR
        root open socket RDONLY         -> ENXIO
        root open socket WRONLY         -> ENXIO
        root open socket RDWR           -> ENXIO
        root open fifo WRONLY,NONBLOCK  -> ENXIO
        root open fifo RDONLY,NONBLOCK  -> ok
        root open .,TMPFILE RDWR        -> ENOENT
        root truncate dir 0             -> EISDIR   dir=
        root truncate fifo 0            -> EINVAL   fifo=
        root truncate socket 0          -> EINVAL   socket=
        root truncate char 0            -> EINVAL   char=
        root truncate block 0           -> EINVAL   block=
        root truncate regular -1        -> EINVAL   regular=
        root truncate regular -9223372036854775808 -> EINVAL  regular=
        root truncate regular 9223372036854775807  -> EFBIG  regular=
        root open regular RDONLY 0644 ftruncate 5  -> EINVAL  regular=
        root open regular RDWR 0644 ftruncate -1   -> EINVAL  regular=
        root readlink regular           -> EINVAL
        root readlink dir               -> EINVAL
        root list regular               -> ENOTDIR
        """
    )


def test_addresses_that_lie_nowhere(table: Table) -> None:
    table.run("root make regular there")
    for call in (
        "chmod @ 0600",
        "chown @ 0 0",
        "lchown @ 0 0",
        "truncate @ 0",
        "open @ 0",
        "mkdir @ 0700",
        "rmdir @",
        "unlink @",
        "mkfifo @ 0600",
        "mknod @ 0600 0",
        "symlink @ @",
        "link @ @",
        "rename @ @",
    ):
        table.run(f"root nowhere {call} -> EFAULT")


def test_over_the_edge_of_the_filesystem(table: Table, tmp_path: Path) -> None:
    (tmp_path / "outside").touch()
    table.run(
        f"""
        root make regular there
        root make dir d
        root link there {tmp_path}/new      -> EXDEV  there=
        root link {tmp_path}/outside new    -> EXDEV  .=
        root rename there {tmp_path}/new    -> EXDEV  there= .=
        root rename {tmp_path}/outside new  -> EXDEV  .=
        root rename d {tmp_path}/new        -> EXDEV  d= .=
        """
    )


def test_a_mount_point_is_busy(table: Table) -> None:
    table.run("root mkdir d\nroot mkdir e\nroot make regular there")
    subprocess.run(["mount", "-t", "tmpfs", "none", table.directory / "d"], check=True)
    try:
        table.run("root rmdir d -> EBUSY\nroot rename d x -> EBUSY\nroot rename e d -> EBUSY")
        table.run("root link there d/x -> EXDEV\nroot unlink d -> EISDIR")
    finally:
        subprocess.run(["umount", table.directory / "d"], check=True)
    table.run("root rmdir d -> ok")


READ_ONLY = """
    root chmod there 0600           -> EROFS  there=
    root chown there alice alice    -> EROFS  there=
    root chown there - -            -> EROFS  there=
    root truncate there 5           -> EROFS  there=
    root truncate there 0           -> EROFS  there=
    root open there WRONLY          -> EROFS  there=
    root open there RDWR            -> EROFS
    root open there RDONLY,TRUNC    -> EROFS  there=
    root open there RDONLY,CREAT    -> ok
    root open there RDONLY,CREAT,EXCL -> EEXIST
    root open new RDONLY,CREAT      -> EROFS  .=
    root open there RDONLY 0 read   -> x
    root mkdir new                  -> EROFS  .=
    root mkdir d                    -> EEXIST
    root mkfifo new                 -> EROFS  .=
    root mkfifo there               -> EEXIST
    root mknod new char             -> EROFS
    root symlink there new          -> EROFS  .=
    root symlink there d            -> EEXIST
    root link there new             -> EROFS  there=
    root link there d               -> EEXIST
    root unlink there               -> EROFS  there= .=
    root unlink new                 -> EROFS|ENOENT
    root unlink d                   -> EROFS|EISDIR
    root rmdir d                    -> EROFS  d= .=
    root rmdir new                  -> EROFS|ENOENT
    root rename there new           -> EROFS  there= .=
    root rename there d             -> EROFS
    root utimes there now now       -> EROFS  there=
    root utimes there 1 2           -> EROFS  there=
    root utimes there omit omit     -> ok     there=
    root setxattr there user.a 1    -> EROFS  there=
    root list .                     -> d,fifo,there
    alice open there WRONLY         -> EROFS|EACCES
    root open fifo RDWR,NONBLOCK    -> ok
"""


def test_nothing_changes_on_a_read_only_mount(live: Mounts) -> None:
    mount = live.mount(live.image(), "allow_other")
    linux = live.directory / "linux"
    linux.mkdir()
    for directory in (mount.directory, linux):
        made = Table(directory)
        made.run("root open there WRONLY,CREAT 0644 write\nroot mkdir d\nroot mkfifo fifo")
        made.end()
    subprocess.run(["mount", "--bind", linux, linux], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", linux], check=True)
    try:
        for directory in (linux, live.remount(mount, "ro", "allow_other").directory):
            read_only = Table(directory)
            read_only.run(READ_ONLY)
            read_only.end()
    finally:
        subprocess.run(["umount", linux], check=True)
