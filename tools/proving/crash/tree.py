"""What a program sees of an image, and whether everything in it can still be used."""

from __future__ import annotations

import stat
from pathlib import Path

from proving.crash.medium import Settled, Undecided
from xipfs.clock import ManualClock
from xipfs.errors import FsError
from xipfs.fs.filesystem import Filesystem
from xipfs.image import layout
from xipfs.image.check import check
from xipfs.image.volume import Volume
from xipfs.memory.emulated import WORD_SIZE
from xipfs.memory.region import LINE_SIZE, Medium
from xipfs.units import PAGE_SHIFT, PAGE_SIZE, pages_of

ROOT = layout.ROOT_INO
NAME = "the medium"
Facts = tuple[object, ...]
Tree = dict[bytes, Facts]
"""By path: inode number, mode, times, link count, owner, attributes; a file's size and kinds."""
Contents = dict[int, bytes]
"""By inode number a regular file's bytes."""
Allowed = dict[int, list[bytes]]
"""By inode number the contents of which each word of a regular file must be."""


def open_medium(medium: Medium, *, ram_pages: int, clock: ManualClock | None = None) -> Filesystem:
    """Open the image on ``medium`` as a mount does."""
    return Filesystem(
        medium,
        image_path=Path(NAME),
        ram_bytes=ram_pages * PAGE_SIZE,
        struct_page_bytes=64,
        clock=clock or ManualClock(),
        lock=None,
        anon_pages=0,
    )


def tree_of(fs: Filesystem, ino: int = ROOT, path: bytes = b"") -> Tree:
    """Return all that a program can see below a directory but the bytes of files."""
    tree: Tree = {}
    for name, attr, _ in fs.readdir(ino, 0):
        facts: list[object] = [attr.ino, attr.mode, (attr.mtime_ns, attr.ctime_ns)]
        facts += [attr.nlink, attr.uid, attr.gid, attr.rdev]
        facts.append([(x, fs.getxattr(attr.ino, x)) for x in fs.listxattr(attr.ino)])
        where = path + b"/" + name
        if stat.S_ISDIR(attr.mode):
            tree |= tree_of(fs, attr.ino, where)
        elif stat.S_ISREG(attr.mode):
            kinds = [fs.page(attr.ino, page).kind for page in range(pages_of(attr.size_bytes))]
            facts += [attr.size_bytes, kinds]
        elif stat.S_ISLNK(attr.mode):
            facts.append(fs.readlink(attr.ino))
        tree[where] = tuple(facts)
    return tree


def without_times(tree: Tree) -> Tree:
    """Return the tree without what tells when it was made."""
    return {path: (*facts[:2], *facts[3:]) for path, facts in tree.items()}


def contents_of(fs: Filesystem, tree: Tree) -> Contents:
    """Return the bytes of the regular files in ``tree``."""
    return {ino: bytes(fs.read(ino, 0, size)) for ino, size in _files(tree).items()}


def _files(tree: Tree) -> dict[int, int]:
    """Return the sizes of the regular files in ``tree`` by inode number."""
    sizes: dict[int, int] = {}
    for facts in tree.values():
        ino, mode, size = facts[0], facts[1], facts[-2]
        assert isinstance(ino, int)
        assert isinstance(mode, int)
        if stat.S_ISREG(mode):
            assert isinstance(size, int)
            sizes[ino] = size
    return sizes


def judge_contents(state: Undecided, tree: Tree, allowed: Allowed) -> Contents:
    """Raise AssertionError unless every word, whatever its line holds, is an allowed one.

    A word depends on one line, so each line's contents are judged one by one. Return the bytes
    with undecided lines as the cut had them for certain.
    """
    volume = Volume(state, NAME)
    contents: Contents = {}
    for ino, size in _files(tree).items():
        content = bytearray()
        olds = allowed[ino]
        bodies = volume.maps.entries(volume.inodes.get(ino), 0, pages_of(size))
        for page, body in enumerate(bodies.tolist()):
            block = body & layout.ENTRY_BLOCK_MASK
            at = block << layout.BLOCK_SHIFT
            content += state.now[at : at + PAGE_SIZE] if body else bytes(PAGE_SIZE)
            uncertain = [line for line in state.unknown if line * LINE_SIZE >> PAGE_SHIFT == block]
            for line in uncertain if body else ():
                where = (page << PAGE_SHIFT) + line * LINE_SIZE % PAGE_SIZE
                for possible in state.possible(line):
                    _judge_words(ino, where, possible[: max(size - where, 0)], olds)
        contents[ino] = bytes(content[:size])
        if contents[ino] not in olds:
            _judge_words(ino, 0, contents[ino], olds)
    return contents


def _judge_words(ino: int, start: int, content: bytes, olds: list[bytes]) -> None:
    """Each word is one of those that the file held there; past an old end it held zeros."""
    for at in range(0, len(content), WORD_SIZE):
        word = content[at : at + WORD_SIZE]
        where = start + at
        if not any(
            old[where : where + WORD_SIZE].ljust(8, b"\0")[: len(word)] == word for old in olds
        ):
            raise AssertionError(f"inode {ino} at {where} holds {word!r}")


def judge_structure(medium: Medium) -> None:
    """Raise AssertionError for anything that fsck finds, and for an orphan that is left."""
    findings = check(medium, NAME)
    assert not findings, f"fsck: {findings}"


def use(image: bytes, contents: Contents) -> None:
    """Recover again, which changes nothing; open, rename and delete everything; fill the image."""
    medium = Settled(image)
    fs = open_medium(medium, ram_pages=4)
    assert bytes(medium.now) == image, "recovery run twice changed the image"
    _open_all(fs, contents)
    _delete_all(fs)
    assert tree_of(fs) == {}, "a name is left"
    free = fs.statfs().blocks_free
    table = int.from_bytes(medium.load(layout.STATE_BLOCK * PAGE_SIZE + 128 + 72, 8), "little")
    assert free == fs.statfs().blocks_total - table, "blocks are lost"
    file = fs.mknod(ROOT, b"fill", stat.S_IFREG | 0o600, 0, 0, 0).ino
    written = _fill(fs, file)
    # The root's leaf and the file's one map node take a block each.
    assert written == (free - 2) * PAGE_SIZE, f"{written} bytes fit into {free} free blocks"
    judge_structure(medium)
    fs.unlink(ROOT, b"fill")
    assert fs.statfs().blocks_free == free, "the free count did not return"
    judge_structure(medium)


def _fill(fs: Filesystem, file: int) -> int:
    offset, piece = 0, 16 * PAGE_SIZE
    while piece >= PAGE_SIZE:
        try:
            offset += fs.write(file, offset, b"f" * piece)
        except FsError:
            piece //= 2
    return offset


def _open_all(fs: Filesystem, contents: Contents) -> None:
    """Open and read every file as a program does."""
    for ino, size in _files(tree_of(fs)).items():
        fs.hold(ino)
        assert bytes(fs.read(ino, 0, size)) == contents[ino], f"inode {ino} reads differently"
        fs.drop(ino)


def _delete_all(fs: Filesystem, ino: int = ROOT) -> None:
    """Rename and delete every entry."""
    for name, attr, _ in list(fs.readdir(ino, 0)):
        fs.rename(ino, name, ino, name + b".moved")
        if stat.S_ISDIR(attr.mode):
            _delete_all(fs, attr.ino)
            fs.rmdir(ino, name + b".moved")
        else:
            fs.unlink(ino, name + b".moved")
