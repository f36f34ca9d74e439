"""What new objects are like, and which times of what each call moves.

Each table is run on an xipfs mount and on the kernel's own filesystem (calltables.py).
"""

from __future__ import annotations

import pytest
from calltables import NOT_DIRECTORIES, NOT_LINKS, TYPES, Table
from conftest import needs

pytestmark = [needs("root", "fuse")]

MAKERS = {
    "regular": "open it WRONLY,CREAT {mode}",
    "dir": "mkdir it {mode}",
    "fifo": "mkfifo it {mode}",
    "socket": "mknod it socket {mode}",
    "char": "mknod it char {mode}",
    "block": "mknod it block {mode}",
}


@pytest.mark.parametrize("kind", MAKERS)
def test_mode_owner_and_times_of_what_is_new(table: Table, kind: str) -> None:
    for mode, mask, wanted in (
        ("0755", "0", "755"),
        ("0151", "0", "151"),
        ("0151", "077", "100"),
        ("0345", "070", "305"),
        ("0345", "0501", "244"),
        ("0000", "022", "0"),
        ("01777", "0", "1777"),
    ):
        table.run(
            f"""
            root umask {mask}
            root {MAKERS[kind].format(mode=mode)} -> ok .=mc
            root attrs it type mode nlink uid gid -> {kind} {wanted} {1 + (kind == "dir")} root root
            root remove it -> ok .=mc
            """
        )
    users = ["root"] if kind in ("char", "block") else ["root", "alice", "bob"]
    table.run("root umask 022\nroot chmod . 0777")
    for user in users:
        for directory_mode, group in (("0777", user), ("02777", "shared")):
            table.run(
                f"""
                root chown . bob shared
                root chmod . {directory_mode}
                {user} {MAKERS[kind].format(mode="0700")}
                root attrs it uid gid -> {user} {group}
                root remove it
                """
            )
    if kind in ("char", "block"):
        table.run("alice " + MAKERS[kind].format(mode="0700") + " -> EPERM .=")


@pytest.mark.parametrize("kind", ["char", "block"])
def test_device_numbers(table: Table, kind: str) -> None:
    for device in ("0,0", "1,2", "255,255", "256,0", "0,256", "300,70000", "4095,1048575"):
        table.run(
            f"root mknod it {kind} 0644 {device}\nroot attrs it rdev -> {device}\nroot unlink it"
        )
    table.run("root mknod it fifo 0644 1,2\nroot attrs it rdev -> 0,0")


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "dir"])
def test_links(table: Table, kind: str) -> None:
    table.run(
        f"""
        root make {kind} a
        root link a b         -> ok  a=c .=mc
        root link b c         -> ok  a=c b=c .=mc
        root lchown b alice bob -> ok  a=c c=c .=
        root attrs c type nlink uid gid -> {kind} 3 alice bob
        root unlink a         -> ok  b=c c=c .=mc
        root attrs a type     -> ENOENT
        root attrs b nlink    -> 2
        root make {kind} over
        root rename over c    -> ok  b=c .=mc
        root attrs b nlink    -> 1
        root link absent d    -> ENOENT  .=
        root link b c         -> EEXIST  b= c= .=
        alice unlink b        -> EACCES  b= .=
        alice link b d        -> EACCES|EPERM  b= .=
        root rename b b       -> ok  b= .=
        root link b same
        root rename b same    -> ok  b= .=
        root attrs b nlink    -> 2
        """
    )


@pytest.mark.parametrize("kind", TYPES)
def test_rename(table: Table, kind: str) -> None:
    table.run(
        f"""
        root mkdir one
        root mkdir two
        root make {kind} one/a
        root rename one/a one/b   -> ok  one=mc
        root attrs one/a type     -> ENOENT
        root rename one/b two/a   -> ok  one=mc two=mc .=
        root attrs two/a type nlink -> {kind} {1 + (kind == "dir")}
        root attrs one nlink      -> 2
        root attrs two nlink      -> {2 + (kind == "dir")}
        root make {kind} one/c
        root rename2 one/c two/a 2 -> ok  one=mc two=mc
        root rename2 one/c two/a 1 -> EEXIST  one= two= one/c= two/a=
        root rename one/c two/a   -> ok  one=mc two=mc
        root make {kind} one/d
        alice rename one/d one/e  -> EACCES  one= one/d=
        root rename two/absent one/f -> ENOENT  one= two=
        """
    )
    if kind == "dir":
        table.run("root same two two/a/.. -> yes")


def test_times_of_a_directory(table: Table) -> None:
    table.run(
        """
        root mkdir d
        root make regular d/f
        root mkdir d/s           -> ok  d=mc .=
        root symlink t d/l       -> ok  d=mc
        root open d/new RDONLY,CREAT  -> ok  d=mc
        root open d/new RDWR,CREAT    -> ok  d=
        root open d/new WRONLY,TRUNC 0 write  -> ok  d=
        root open d/new WRONLY,CREAT,EXCL     -> EEXIST  d=
        root chmod d/f 0600      -> ok  d=
        root chown d/f alice bob -> ok  d=
        root truncate d/f 9      -> ok  d=
        root utimes d/f 1 2      -> ok  d=
        root setxattr d/f user.a 1  -> ok  d=
        root setxattr d user.a 1 -> ok  d=c
        root unlink d/absent     -> ENOENT  d=
        root rmdir d/f           -> ENOTDIR d=
        root unlink d/s          -> EISDIR  d=
        root rmdir d/s           -> ok  d=mc
        root unlink d/f          -> ok  d=mc
        root unlink d/l          -> ok  d=mc
        root rmdir d             -> ENOTEMPTY  d= .=
        """
    )


def test_times_and_size_of_a_file(table: Table) -> None:
    table.run(
        """
        root make regular f
        root truncate f 1234567  -> ok  f=mc
        root attrs f size        -> 1234567
        root truncate f 567      -> ok  f=mc
        root truncate f 567      -> ok  f=mc
        root attrs f size        -> 567
        root open f RDWR 0 ftruncate 23456  -> ok  f=mc
        root open f WRONLY 0 ftruncate 1    -> ok  f=mc
        root open f WRONLY 0 ftruncate 1    -> ok  f=mc
        root attrs f size        -> 1
        root open f RDONLY 0 ftruncate 0    -> EINVAL  f=
        alice truncate f 0       -> EACCES  f=
        root open f WRONLY 0 write  -> ok  f=mc
        root open f WRONLY,TRUNC -> ok  f=mc
        root open f WRONLY,TRUNC -> ok  f=mc
        root attrs f size        -> 0
        root chmod f 0600        -> ok  f=c
        root chmod f 0600        -> ok  f=c
        root chown f root root   -> ok  f=c
        root chown f - -         -> ok  f=c
        root setxattr f user.a 1 -> ok  f=c
        root open f RDWR,CREAT   -> ok  f=
        # What was opened stays what it was opened for, whatever the mode is.
        root chmod . 0777
        alice open g RDWR,CREAT 0 ftruncate 5  -> ok
        root attrs g mode size   -> 0 5
        alice open h RDWR,CREAT 0644 write unlink read fstat -> '644 0 1'
        root attrs h type        -> ENOENT
        root open big WRONLY,CREAT 0755 ftruncate 2147483650 write
        root attrs big size      -> 2147483650
        """
    )


@pytest.mark.parametrize("kind", NOT_LINKS)
def test_times_of_a_name_that_goes(table: Table, kind: str) -> None:
    table.run(
        f"""
        root make {kind} it
        root symlink it link
        root utimes link 1900000000000000000 1950000000000000000 -> ok  it=amc link=a
        root utimes link 3 4 nofollow     -> ok  it= link=amc
        root attrs link mtime             -> 4
        root attrs it atime mtime         -> 1900000000000000000 1950000000000000000
        root utimes it 2147483648000000000 4294967296000000000
        root attrs it atime mtime         -> 2147483648000000000 4294967296000000000
        root utimes it 100000000100000000 200000000200000000
        root attrs it atime mtime         -> 100000000100000000 200000000200000000
        alice remove it                   -> EACCES  it= .=
        root remove it                    -> ok  .=mc link=
        root sattrs link type             -> ENOENT
        """
    )


@pytest.mark.parametrize("kind", NOT_DIRECTORIES)
def test_a_group_of_their_own_in_a_set_group_id_directory(table: Table, kind: str) -> None:
    table.run(
        f"""
        root mkdir d
        root chown d alice shared
        root chmod d 02777
        bob make {"fifo" if kind in ("char", "block") else kind} d/it
        root attrs d/it uid gid  -> bob shared
        bob mkdir d/sub 0700
        root attrs d/sub mode gid -> 2700 shared
        """
    )
