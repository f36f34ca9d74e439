"""Who may do what: search and write permission, sticky directories, owners, set-id bits, times.

Each table is run on an xipfs mount and on the kernel's own filesystem (calltables.py).
"""

from __future__ import annotations

import itertools

import pytest
from calltables import NOT_DIRECTORIES, NOT_LINKS, TYPES, Table
from conftest import needs

pytestmark = [needs("root", "fuse")]

#: Calls that alice may make in d if she may search it, and that change nothing.
SEARCHING = [
    "chmod d/hers 0644",
    "chown d/hers - -",
    "lchown d/hers - shared",
    "truncate d/hers 0",
    "open d/hers RDONLY",
    "open d/hers WRONLY",
    "attrs d/hers type",
    "utimes d/hers now now",
    "utimes d/hers 1 2 nofollow",
    "readlink d/link",
    "setxattr d/hers user.a 1",
    "list d/sub",
]
#: Calls that she may make if she may write to it too, each with the one that undoes it.
WRITING = [
    ("open d/new WRONLY,CREAT", "unlink d/new"),
    ("mkdir d/new", "rmdir d/new"),
    ("mkfifo d/new", "unlink d/new"),
    ("mknod d/new regular", "unlink d/new"),
    ("symlink t d/new", "unlink d/new"),
    ("link hers d/new", "unlink d/new"),
    ("rename d/hers d/new", "rename d/new d/hers"),
    ("rename2 d/hers d/sub/other 2", "rename2 d/sub/other d/hers 2"),
    ("rename hers d/new", "rename d/new hers"),
    ("rename d/sub d/new", "rename d/new d/sub"),
]


def alices_directory(table: Table) -> None:
    table.run(
        """
        root make dir d alice
        root make regular d/hers alice
        root symlink t d/link
        root make dir d/sub alice
        root make regular d/sub/other alice
        root make regular hers alice
        root chmod . 0777
        """
    )


def test_search_permission(table: Table) -> None:
    alices_directory(table)
    wanted = {"attrs d/hers type": "regular", "readlink d/link": "t", "list d/sub": "other"}
    for call in SEARCHING:
        for mode, result in ((0o100, wanted.get(call, "ok")), (0o677, "EACCES")):
            table.run(f"root chmod d {mode:o}\nalice {call} -> {result} d=")
    # Of one's own class the bits count, not of a more generous one.
    table.run("root chmod d 0711\nbob attrs d/hers type -> regular\nbob list d -> EACCES")
    table.run("root chmod d 0770\nbob attrs d/hers type -> EACCES")
    table.run("root chmod d 0\nroot attrs d/hers type -> regular\nroot list d -> hers,link,sub")


def test_write_permission_for_a_directory(table: Table) -> None:
    alices_directory(table)
    for do, undo in WRITING:
        for mode in (0o600, 0o500, 0o100):
            table.run(f"root chmod d {mode:o}\nalice {do} -> EACCES d= d/hers= d/sub= hers=")
        table.run(f"root chmod d 0300\nalice {do} -> ok d=mc\nalice {undo} -> ok d=mc")
    table.run(
        """
        root chmod d 0500
        alice unlink d/hers   -> EACCES d= d/hers=
        alice rmdir d/sub     -> EACCES d= d/sub=
        alice rename d/hers x -> EACCES d= .= d/hers=
        alice open d/hers RDONLY,CREAT -> ok d=
        # A directory that moves elsewhere has its .. changed, so it must be writable too.
        root chmod d 0700
        root chmod d/sub 0555
        alice rename d/sub sub   -> EACCES  d= d/sub=
        alice rename d/sub d/s   -> ok
        root chmod d/s 0755
        alice rename d/s sub     -> ok
        """
    )


@pytest.mark.parametrize("kind", ["regular", "fifo", "dir"])
def test_what_may_be_opened(table: Table, kind: str) -> None:
    table.run(f"root make {kind} it alice\nroot chown it alice shared")
    flags = {4: "RDONLY,NONBLOCK", 6: "RDWR,NONBLOCK"}
    if kind == "regular":
        flags |= {2: "WRONLY"}
    for bits, (needed, how) in itertools.product(range(8), flags.items()):
        if kind == "dir" and needed != 4:
            continue
        wanted = "ok" if bits & needed == needed else "EACCES"
        for user, shift in (("alice", 6), ("bob", 3)):
            mode = (0o777 & ~(7 << shift)) | bits << shift
            table.run(f"root chmod it {mode:o}\n{user} open it {how} -> {wanted}")
        mode = 0o770 | bits
        table.run(f"root chown it alice alice\nroot chmod it {mode:o}")
        table.run(f"bob open it {how} -> {wanted}\nroot chown it alice shared")
    if kind == "regular":
        for mode in (0o477, 0o177, 0o077):
            table.run(f"root chmod it {mode:o}\nalice open it RDONLY,TRUNC -> EACCES it=")
            table.run("alice truncate it 0 -> EACCES it=")
        table.run("root open it RDWR,TRUNC -> ok")


@pytest.mark.parametrize("kind", TYPES)
def test_chmod_and_chown_are_the_owners(table: Table, kind: str) -> None:
    table.run(f"root make {kind} it alice")
    if kind != "symlink":
        table.run(
            """
            root symlink it link
            alice chmod it 0711       -> ok     it=c .=
            alice chmod link 01642    -> ok     it=c link=a
            root attrs it mode        -> 1642
            bob chmod it 0777         -> EPERM  it=
            bob chmod link 0777       -> EPERM  it=
            root chmod it 0111        -> ok     it=c
            alice chown link - shared -> ok     it=c link=
            root sattrs link uid gid  -> alice shared
            alice chown it - bob      -> EPERM  it=
            alice chown it bob -      -> EPERM  it=
            bob chown it bob -        -> EPERM  it=
            bob chown it - bob        -> EPERM  it=
            bob chown it - -          -> ok
            root chown it bob bob     -> ok     it=c
            alice chmod it 0777       -> EPERM  it=
            root chown it alice alice -> ok
            root attrs link uid gid   -> root root
            """
        )
    table.run(
        """
        alice lchown it - shared  -> ok     it=c
        alice lchown it alice alice -> ok   it=c
        alice lchown it bob bob   -> EPERM  it=
        alice lchown it - bob     -> EPERM  it=
        bob lchown it alice alice -> EPERM  it=
        bob lchown it - -         -> ok
        root lchown it bob shared -> ok     it=c .=
        root attrs it uid gid     -> bob shared
        """
    )


@pytest.mark.parametrize("kind", NOT_LINKS)
def test_set_id_bits_after_chown_and_chmod(table: Table, kind: str) -> None:
    """chown takes them, of whoever calls, but not from a directory."""
    left = "6555" if kind == "dir" else "555"
    table.run(f"root make {kind} it alice\nroot symlink it link")
    for call in ("chown it", "chown link", "lchown it"):
        for user, owners in (
            ("root", "bob bob"),
            ("root", "alice alice"),
            ("alice", "alice shared"),
            ("alice", "- alice"),
            ("alice", "- -"),
        ):
            table.run(f"root chmod it 06555\n{user} {call} {owners} -> ok\n")
            table.run(f"root attrs it mode -> {left}")
    # Without group execution the bit is taken only from a group that the caller is not in.
    table.run(
        f"""
        root chmod it 06545
        alice chown it - alice -> ok
        root attrs it mode  -> {"6545" if kind == "dir" else "2545"}
        alice chmod it 02755
        root attrs it mode  -> 2755
        root chown it alice bob
        alice chmod it 02755 -> ok
        root attrs it mode  -> 755
        root chmod it 02755
        root attrs it mode  -> 2755
        """
    )


def left_of(mode: int, *, in_group: bool) -> str:
    """Without group execution the set-group-ID bit is not taken by members of the group."""
    kept = 0o2777 if in_group and not mode & 0o010 else 0o777
    return f"{mode & kept:o}"


@pytest.mark.parametrize("mode", [0o4777, 0o2777, 0o6777, 0o4666, 0o2666, 0o6767])
def test_set_id_bits_after_a_change_of_the_bytes(table: Table, mode: int) -> None:
    """Another user's change takes them, root's does not, and one that fails neither."""
    for name, owner in (("roots", "root"), ("alices", "alice")):
        table.run(f"root make regular {name} {owner}\nroot truncate {name} 5")
        for user in ("alice", "bob"):
            left = left_of(mode, in_group=user == owner)
            for change in (
                f"open {name} WRONLY 0 write",
                f"open {name} WRONLY 0 ftruncate 3",
                f"open {name} WRONLY,TRUNC",
                f"open {name} WRONLY,APPEND 0 write",
                f"truncate {name} 7",
            ):
                table.run(f"root chmod {name} {mode:o}\n{user} {change} -> ok {name}=mc")
                table.run(f"root attrs {name} mode -> {left}")
        table.run(f"root chmod {name} {mode:o}\nroot open {name} WRONLY 0 write")
        table.run(f"root truncate {name} 2\nroot open {name} WRONLY,TRUNC")
        table.run(f"bob truncate {name} -1 -> EINVAL {name}=\nroot attrs {name} mode -> {mode:o}")
        # The descriptor that wrote sees it at once.
        table.run(f"bob open {name} RDWR 0 write fstat -> '{left} 1 1'")


STICKY_OWNERS = [
    # owner of the directory, of the object: whether alice may take it away
    ("alice", "alice", True),
    ("alice", "root", True),
    ("alice", "bob", True),
    ("root", "alice", True),
    ("bob", "alice", True),
    ("root", "root", False),
    ("root", "bob", False),
    ("bob", "root", False),
    ("bob", "bob", False),
]


@pytest.mark.parametrize("kind", TYPES)
def test_a_sticky_directory_gives_away_only_to_owners(table: Table, kind: str) -> None:
    table.run("root make dir s alice 01777\nroot make dir plain alice")
    for directory, owner, may in STICKY_OWNERS:
        wanted = "ok" if may else "EACCES|EPERM"
        # A directory of somebody else's may not be written to, so it cannot move out.
        leaves = "EACCES|EPERM" if kind == "dir" and owner != "alice" else wanted
        here = "plain/y" if leaves == "ok" else "s/x"
        table.run(
            f"""
            root chown s {directory} {directory}
            root make {kind} s/x {owner}
            alice rename s/x plain/y  -> {leaves}
            root attrs {here} type uid -> {kind} {owner}
            root rename {here} s/x
            alice rename s/x s/z      -> {wanted}
            root rename s/{"z" if may else "x"} s/x
            root make {"dir" if kind == "dir" else "regular"} plain/mine alice
            alice rename plain/mine s/x -> {wanted}
            root attrs s/x uid        -> {"alice" if may else owner}
            root remove s/x
            root remove plain/mine    -> {"ENOENT" if may else "ok"}
            root make {kind} s/x {owner}
            alice remove s/x          -> {wanted}
            root remove s/x           -> {"ENOENT" if may else "ok"}
            """
        )


@pytest.mark.parametrize(
    ("moved", "replaced"), list(itertools.product(NOT_DIRECTORIES, NOT_DIRECTORIES))[::5]
)
def test_every_type_replaces_every_other(table: Table, moved: str, replaced: str) -> None:
    table.run(
        f"""
        root make dir s bob 01777
        root make {moved} s/a alice
        root make {replaced} s/b bob
        root link s/a kept
        alice rename s/a s/b  -> EACCES|EPERM  s/a= s/b= s=
        root chown s alice alice
        alice rename s/a s/b  -> ok  s=mc
        root same s/b kept    -> yes
        root attrs s/a type   -> ENOENT
        root attrs s/b type nlink uid -> {moved} 2 alice
        """
    )


@pytest.mark.parametrize("kind", NOT_LINKS)
def test_who_may_set_times(table: Table, kind: str) -> None:
    table.run(
        f"""
        root make {kind} it root 0644
        alice utimes it now now    -> EACCES  it=
        alice utimes it now omit   -> EPERM|EACCES  it=
        alice utimes it omit 5     -> EPERM   it=
        alice utimes it 5 omit     -> EPERM   it=
        alice utimes it 5 5        -> EPERM   it=
        root chmod it 0666
        alice utimes it now now    -> ok      it=amc
        alice utimes it omit omit  -> ok      it=
        alice utimes it omit 5     -> EPERM   it=
        alice utimes it 5 omit     -> EPERM   it=
        alice utimes it 5 5        -> EPERM   it=
        root chown it alice alice
        root chmod it 0444
        alice utimes it now now    -> ok      it=amc
        alice utimes it 1900000000 1950000000000000001 -> ok it=amc
        root attrs it atime mtime  -> 1900000000 1950000000000000001
        root utimes it 7 omit      -> ok      it=ac
        root utimes it omit now    -> ok      it=mc
        root utimes it now now     -> ok      it=amc
        """
    )
