"""Power cuts: every filesystem call, cut at each of its fences, has happened or has not.

The call runs on a medium that remembers what is durable. It is cut at its first fence, its second,
and so on; of what was stored and not yet durable nothing, all, or a random half of the words has
reached the medium. The image is then opened as a mount would open it, compared with the tree before
and after the call, and checked block by block.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from imagecheck import check
from media import PowerCut, RecordingMedium, new_medium, open_medium

from xipfs.clock import ManualClock
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import PageKind

ROOT = 1
REG = 0o100644
PAGE = 4096

Tree = dict[bytes, object]


def tree_of(fs: Filesystem, ino: int = ROOT) -> Tree:
    """Return all a program can see: names, attributes but atime, bytes, kinds, attributes."""
    found: Tree = {}
    for name, attr, _ in fs.readdir(ino, 0):
        facts: list[object] = [attr.ino, attr.mode, attr.nlink, attr.uid, attr.size_bytes]
        facts.append({x: fs.getxattr(attr.ino, x) for x in fs.listxattr(attr.ino)})
        if attr.mode >> 12 == 4:
            facts[4] = tree_of(fs, attr.ino)
        elif attr.mode >> 12 == 8:
            for run in fs.runs(attr.ino):
                facts.append((run.first, run.count, run.kind))
                if run.kind is not PageKind.HOLE:
                    facts.append(bytes(fs.read(attr.ino, run.first * PAGE, run.count * PAGE)))
        elif attr.mode >> 12 == 10:
            facts.append(fs.readlink(attr.ino))
        found[name] = facts
    return found


def pattern(page: int, size: int = PAGE) -> bytes:
    return bytes([page * 7 % 251 + 1]) * size


def prepare() -> bytes:
    """Make the image that every call starts from."""
    medium = new_medium(160)
    fs = open_medium(medium)
    file = fs.mknod(ROOT, b"file", REG, 0, 0, 0).ino
    fs.write(file, 0, b"".join(pattern(i) for i in range(12)))
    sparse = fs.mknod(ROOT, b"sparse", REG, 0, 0, 0).ino
    for page in (0, 600, 1 << 19):
        fs.write(sparse, page * PAGE, pattern(page))
    cached = fs.mknod(ROOT, b"cached", REG, 0, 0, 0).ino
    fs.set_default_kind(cached, PageKind.PAGECACHE)
    fs.write(cached, 0, pattern(9, 5 * PAGE + 100))
    fs.setxattr(file, b"user.a", b"1")
    sub = fs.mkdir(ROOT, b"sub", 0o755, 0, 0).ino
    fs.mkdir(sub, b"empty", 0o755, 0, 0)
    fs.symlink(ROOT, b"symlink", b"to/somewhere", 0, 0)
    fs.link(file, sub, b"hard")
    for number in range(40):
        fs.mknod(sub, b"n%02d" % number + b"x" * 80, REG, 0, 0, 0)
    fs.close()
    return bytes(medium.durable)


BASE = prepare()


def ino(fs: Filesystem, *path: bytes) -> int:
    at = ROOT
    for name in path:
        at = fs.lookup(at, name).ino
    return at


CALLS: dict[str, Callable[[Filesystem], object]] = {
    "mknod": lambda fs: fs.mknod(ROOT, b"new", REG, 0, 1, 1),
    "mknod that splits a leaf": lambda fs: fs.mknod(ino(fs, b"sub"), b"y" * 250, REG, 0, 0, 0),
    "mkdir": lambda fs: fs.mkdir(ROOT, b"new", 0o700, 1, 1),
    "symlink": lambda fs: fs.symlink(ROOT, b"new", b"t" * 4095, 1, 1),
    "link": lambda fs: fs.link(ino(fs, b"sparse"), ino(fs, b"sub"), b"second"),
    "unlink": lambda fs: fs.unlink(ROOT, b"cached"),
    "unlink one of two names": lambda fs: fs.unlink(ROOT, b"file"),
    "unlink a sparse file": lambda fs: fs.unlink(ROOT, b"sparse"),
    "unlink a link": lambda fs: fs.unlink(ROOT, b"symlink"),
    "rmdir": lambda fs: fs.rmdir(ino(fs, b"sub"), b"empty"),
    "rename": lambda fs: fs.rename(ROOT, b"file", ino(fs, b"sub"), b"moved"),
    "rename a directory": lambda fs: fs.rename(ino(fs, b"sub"), b"empty", ROOT, b"moved"),
    "rename over": lambda fs: fs.rename(ROOT, b"file", ROOT, b"cached"),
    "exchange": lambda fs: fs.rename(ROOT, b"sub", ROOT, b"file", 2),
    "write a new page": lambda fs: fs.write(ino(fs, b"file"), 12 * PAGE, pattern(99)),
    "write far out": lambda fs: fs.write(ino(fs, b"file"), 1 << 44, pattern(98)),
    "fill a hole": lambda fs: fs.write(ino(fs, b"sparse"), 5 * PAGE, pattern(97, 3 * PAGE)),
    "cut to a page": lambda fs: fs.setattr(ino(fs, b"file"), size_bytes=4 * PAGE),
    "cut within a page": lambda fs: fs.setattr(ino(fs, b"file"), size_bytes=4 * PAGE + 9),
    "cut to nothing": lambda fs: fs.setattr(ino(fs, b"sparse"), size_bytes=0),
    "extend": lambda fs: fs.setattr(ino(fs, b"cached"), size_bytes=1 << 40),
    "chmod": lambda fs: fs.setattr(ino(fs, b"file"), mode=0o600, uid=5),
    "setxattr": lambda fs: fs.setxattr(ino(fs, b"file"), b"user.b", b"2" * 300),
    "first setxattr": lambda fs: fs.setxattr(ino(fs, b"sub"), b"user.b", b"2"),
    "removexattr": lambda fs: fs.removexattr(ino(fs, b"file"), b"user.a"),
    "promote": lambda fs: fs.promote(ino(fs, b"file"), 3),
    "promote deep in a tree": lambda fs: fs.promote(ino(fs, b"sparse"), 600),
    "demote": lambda fs: fs.demote(ino(fs, b"cached"), 2),
    "promote a range": lambda fs: fs.move(ino(fs, b"file"), range(2, 9), PageKind.PAGECACHE),
    "promote over holes": lambda fs: fs.move(
        ino(fs, b"sparse"), range(512, 1024), PageKind.PAGECACHE
    ),
    "demote a range": lambda fs: fs.move(ino(fs, b"cached"), range(6), PageKind.XIP),
}


def outcome(image: bytes) -> Tree:
    """Open, look, close; the image must then be sound."""
    medium = RecordingMedium(image)
    fs = open_medium(medium, clock=ManualClock())
    found = tree_of(fs)
    fs.close()
    check(bytes(medium.durable))
    return found


@pytest.mark.parametrize("call", CALLS)
def test_a_cut_anywhere_in_a_call(call: str) -> None:
    before = outcome(BASE)
    medium = RecordingMedium(BASE)
    fs = open_medium(medium)
    start = medium.fences
    CALLS[call](fs)
    fences = medium.fences - start
    after = tree_of(fs)
    assert before != after
    assert fences >= 4, "a call that changes something is one journal commit at least"
    seen = {"before": 0, "after": 0}
    for fence in range(start + 1, start + fences + 1):
        medium = RecordingMedium(BASE, cut_at=fence)
        fs = open_medium(medium)
        with pytest.raises(PowerCut):
            CALLS[call](fs)
        images = [medium.after_cut(None), medium.after_cut(None, share=1)]
        images += [medium.after_cut(random.Random(seed)) for seed in range(3)]
        for number, image in enumerate(images):
            found = outcome(image)
            which = "before" if found == before else "after"
            assert found in (before, after), f"{call}: fence {fence - start}, image {number}"
            seen[which] += 1
    assert seen["before"]
    assert seen["after"]


def test_a_cut_in_the_demotion_of_dirty_pages_leaves_old_or_new_words() -> None:
    """Pages 1-3 are dirty in RAM. Their kinds change together, and only once they are at home."""

    def dirty(medium: RecordingMedium) -> tuple[Filesystem, int]:
        fs = open_medium(medium)
        cached = ino(fs, b"cached")
        fs.write(cached, PAGE, b"\xee" * 3 * PAGE)
        return fs, cached

    medium = RecordingMedium(BASE)
    fs, cached = dirty(medium)
    start = medium.fences
    assert fs.move(cached, range(1, 5), PageKind.XIP).moved == [1, 2, 3, 4]
    assert medium.fences - start == 4, "one transaction, whose first fence is the bytes' too"
    old = pattern(9, 1)
    kinds_seen = set()
    for fence in range(start + 1, start + 5):
        medium = RecordingMedium(BASE, cut_at=fence)
        fs, cached = dirty(medium)
        with pytest.raises(PowerCut):
            fs.move(cached, range(1, 5), PageKind.XIP)
        for seed in range(5):
            again = open_medium(RecordingMedium(medium.after_cut(random.Random(seed))))
            kinds = [again.page(cached, index).kind for index in range(6)]
            assert kinds[0] == kinds[5] == PageKind.PAGECACHE
            assert len(set(kinds[1:5])) == 1, f"fence {fence - start}, random.Random({seed})"
            kinds_seen.add(kinds[1])
            content = bytes(again.read(cached, 0, 6 * PAGE))
            assert content[:PAGE] + content[4 * PAGE :] == old * (PAGE + PAGE + 100)
            words = {content[at : at + 8] for at in range(PAGE, 4 * PAGE, 8)}
            allowed = {b"\xee" * 8} if kinds[1] is PageKind.XIP else {b"\xee" * 8, old * 8}
            assert words <= allowed, f"fence {fence - start}, random.Random({seed})"
    assert kinds_seen == {PageKind.XIP, PageKind.PAGECACHE}


@pytest.mark.parametrize("seed", range(5))
def test_a_cut_in_the_recovery_of_a_long_unlink(seed: int) -> None:
    """Freeing takes several transactions; each may be cut, and so may each mount's recovery."""
    chance = random.Random(seed)
    medium = new_medium(900)
    fs = open_medium(medium)
    file = fs.mknod(ROOT, b"big", REG, 0, 0, 0).ino
    fs.write(file, 0, bytes(700 * PAGE))
    fs.close()
    image = bytes(medium.durable)
    cut = 6
    for _ in range(40):
        medium = RecordingMedium(image, cut_at=cut)
        try:
            fs = open_medium(medium)
            if any(name == b"big" for name, _, _ in fs.readdir(ROOT, 0)):
                fs.unlink(ROOT, b"big")
            fs.close()
            break
        except PowerCut:
            image = medium.after_cut(chance)
            cut = chance.randint(2, 9)
    else:
        pytest.fail(f"no progress: random.Random({seed})")
    assert list(check(bytes(medium.durable))) == [1]


def test_a_long_truncation_is_finished_by_the_next_mount() -> None:
    """The first step decides; the pages that are left over are freed by whoever comes next."""
    medium = new_medium(900)
    fs = open_medium(medium)
    file = fs.mknod(ROOT, b"big", REG, 0, 0, 0).ino
    fs.write(file, 0, pattern(5, 700 * PAGE))
    fs.close()
    base = bytes(medium.durable)
    sizes = []
    for fence in range(2, 30):
        medium = RecordingMedium(base, cut_at=fence)
        fs = open_medium(medium)
        try:
            fs.setattr(file, size_bytes=PAGE + 1)
        except PowerCut:
            medium = RecordingMedium(medium.after_cut(random.Random(fence)))
            fs = open_medium(medium)
        else:
            break  # it took fewer fences than that
        sizes.append(fs.getattr(file).size_bytes)
        assert bytes(fs.read(file, 0, PAGE + 2)) == pattern(5, PAGE + 1) + (
            b"" if sizes[-1] == PAGE + 1 else pattern(5, 1)
        )
        fs.close()
        node = check(bytes(medium.durable))[file]
        assert (node.size, node.orphan) == (sizes[-1], False)
    assert sizes == [700 * PAGE] * sizes.count(700 * PAGE) + [PAGE + 1] * sizes.count(PAGE + 1)
    assert 1 <= sizes.count(700 * PAGE) <= 2
    assert len(sizes) >= 12, "three steps of four fences"


def test_a_fresh_page_never_shows_foreign_bytes() -> None:
    """A block that held another file's secret is filled before anything links it."""
    medium = new_medium(64)
    fs = open_medium(medium)
    secret = fs.mknod(ROOT, b"secret", REG, 0, 0, 0).ino
    fs.write(secret, 0, b"S" * 40 * PAGE)
    fs.unlink(ROOT, b"secret")
    fs.mknod(ROOT, b"other", REG, 0, 0, 0)
    fs.close()
    base = bytes(medium.durable)
    assert b"S" * PAGE in base
    for fence in range(2, 12):
        medium = RecordingMedium(base, cut_at=fence)
        fs = open_medium(medium)
        try:
            fs.write(fs.lookup(ROOT, b"other").ino, 100, b"n" * 5000)
        except PowerCut:
            for seed in range(20):
                again = open_medium(RecordingMedium(medium.after_cut(random.Random(seed))))
                other = again.lookup(ROOT, b"other")
                content = bytes(again.read(other.ino, 0, 10000))
                assert set(content) <= {0, ord("n")}, f"fence {fence}, random.Random({seed})"
            continue
        return
    pytest.fail("the write takes more fences than were cut")


def test_a_read_only_mount_shows_the_pending_transaction_and_writes_nothing() -> None:
    medium = RecordingMedium(BASE)
    fs = open_medium(medium)
    start = medium.fences
    medium = RecordingMedium(BASE, cut_at=start + 3)  # marked, not applied
    fs = open_medium(medium)
    with pytest.raises(PowerCut):
        fs.rename(ROOT, b"file", ROOT, b"renamed")
    image = medium.after_cut(None)
    for _ in range(2):
        medium = RecordingMedium(image, writable=False)
        fs = open_medium(medium)
        assert fs.read_only
        names = {name for name, _, _ in fs.readdir(ROOT, 0)}
        assert b"renamed" in names
        assert b"file" not in names
        fs.close()
        assert bytes(medium.now) == image
