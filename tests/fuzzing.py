"""Mutated images against fsck, mounts and reads: what tools/fuzz and t3_fuzz.py run.

Case N of seed S is always the same image. All are checked, mounted read-only, read and repaired;
every second one is mounted read-write and changed. Each must end well or in an error that says what
is damaged and where: no other exception, no 10 seconds, no GiB, no file's bytes in another file,
nothing lost by a repair and nothing left to find after it.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import random
import re
import resource
import signal
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from fuzz_images import BLOCK, LONG_NAME, MARK, TAG, TEMPLATES, Field, Places, page_of, template
from media import open_medium

from xipfs.clock import ManualClock
from xipfs.errors import FsError, ImageError
from xipfs.fs.filesystem import Filesystem
from xipfs.fs.types import PageKind
from xipfs.image.check import FINDINGS, check
from xipfs.image.repair import repair
from xipfs.memory.region import Buffer, RegionStatistics
from xipfs.memory.wear import Wear

TIME_MAX_S = 10
MEMORY_MAX_BYTES = 1 << 30
#: A directory of a small image that has more names runs in a circle.
NAMES_MAX = 10_000
#: What an error about damage says of where it is.
NAMES_A_PLACE = r"offset \d+|cut off|bytes long"
#: What a program is told of a damaged image besides EIO: what a sound one answers as well.
EXPECTED_ERRNOS = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EINVAL,
    errno.ENOSPC,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENODATA,
    errno.EROFS,
    errno.EMLINK,
    errno.EPERM,
    errno.EFBIG,
    errno.ENXIO,
}


#: Cases that a process takes at a time.
_PART = 50


Contents = dict[int, dict[str, bytes]]
"""By inode what was read: pages, target, attributes."""


class FuzzError(Exception):
    """A case did not end as every case must."""


class Memory:
    """Bytes as a medium: what is stored is there."""

    def __init__(self, content: bytes | bytearray, *, writable: bool) -> None:
        if len(content) < BLOCK:
            raise ImageError(f"image is {len(content)} bytes long")
        self.content = bytearray(content[: len(content) // BLOCK * BLOCK])
        self._view = memoryview(self.content).toreadonly()
        self.writable = writable
        self.wear = Wear()

    @property
    def size_bytes(self) -> int:
        return len(self.content)

    def load(self, offset: int, size: int) -> memoryview:
        assert 0 <= offset <= offset + size <= len(self.content), (offset, size)
        return self._view[offset : offset + size]

    def reserve(self, offset: int, size: int) -> None:
        pass

    def store(self, offset: int, data: Buffer) -> None:
        assert self.writable, "a store to a read-only medium"
        assert 0 <= offset <= offset + len(data) <= len(self.content), (offset, len(data))
        self.content[offset : offset + len(data)] = data

    def store_word(self, offset: int, value: int) -> None:
        self.store(offset, value.to_bytes(8, "little"))

    def flush(self, offset: int, size: int) -> None: ...

    def fence(self) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...

    def statistics(self) -> RegionStatistics:
        return RegionStatistics(0, 0, 0, 0)


@dataclass
class Case:
    """One mutated image and what was done to it; ``forged``: an entry's check was made to fit.

    A pointer that was forged is the image's word against itself: who is asked first gets the
    block, the other an error, and fsck must have told of it. ``copied``: a file's page lies where
    a node, leaf or target was; a repair may keep it as a file of whose that was.
    """

    seed: int
    number: int
    image: bytes
    what: list[str]
    forged: bool
    copied: bool


@dataclass
class Outcome:
    """What became of the cases: how they ended, and which findings there were."""

    endings: Counter[str] = field(default_factory=Counter)
    findings: Counter[str] = field(default_factory=Counter)
    cases: range = range(0)


# Many cases


def run(
    seed: int, count: int, jobs: int, progress: Callable[[int, list[str]], None]
) -> tuple[Outcome, list[str]]:
    """Judge cases 0 to ``count`` in ``jobs`` processes; return how they ended and what failed.

    ``progress(done, failures)`` is called now and then.
    """
    outcome, failures, done = Outcome(), [], 0
    parts = [range(start, min(start + _PART, count)) for start in range(0, count, _PART)]
    context = multiprocessing.get_context("fork")
    with context.Pool(jobs, initializer=limit_memory) as pool:
        for part, failed in pool.imap_unordered(_run_part, [(seed, part) for part in parts]):
            outcome.endings += part.endings
            outcome.findings += part.findings
            done += sum(1 for _ in part.cases)
            failures += failed
            progress(done, failures)
    return outcome, failures


def _run_part(work: tuple[int, range]) -> tuple[Outcome, list[str]]:
    seed, numbers = work
    outcome, failures = Outcome(cases=numbers), []
    for number in numbers:
        try:
            judge(make_case(seed, number), outcome)
        except FuzzError as error:
            failures.append(str(error))
    return outcome, failures


# Mutations


def make_case(seed: int, number: int) -> Case:
    """Return case ``number`` of ``seed``."""
    chance = random.Random(f"{seed} {number}")
    name = chance.choice(list(TEMPLATES))
    image, places = template(name)
    mutant = bytearray(image)
    what = [f"image {name}"]
    forged = copied = False
    for _ in range(chance.choice((1, 1, 1, 2, 2, 3, 5))):
        dice = chance.random()
        if dice < 0.85:
            forged |= _mutate_field(mutant, places, chance, what)
        elif dice < 0.93:
            _random_bytes(mutant, places, chance, what)
        else:
            copied |= _whole_block(mutant, places, chance, what)
    if chance.random() < 0.02:
        size = chance.choice((0, 1, 4095, 4096, 8192, len(mutant) // 2, len(mutant) - 4096))
        del mutant[size:]
        what.append(f"cut to {size} bytes")
    return Case(seed, number, bytes(mutant), what, forged, copied)


def _mutate_field(
    mutant: bytearray, places: Places, chance: random.Random, what: list[str]
) -> bool:
    fields = places.by_structure[chance.choice(list(places.by_structure))]
    each = chance.choice(fields)
    at, size = each.offset, each.size
    old = int.from_bytes(mutant[at : at + size], "little")
    if each.entry and chance.random() < 0.9:
        new = _entry_value(old, each, places, chance)
    else:
        new = _value(old, each, fields, mutant, places, chance)
    mutant[at : at + size] = (new & (1 << 8 * size) - 1).to_bytes(size, "little")
    fixed = chance.random() < 0.6
    what.append(f"{each.name} at {at}: {old:#x} -> {new:#x}{', checksum fits' if fixed else ''}")
    if fixed:
        for fix in each.fixes:
            fix(mutant)
    # Any change of an inode's root or height under a fitting checksum moves no entry: only a
    # check made to fit an entry can name another file's block.
    return fixed and each.entry is not None


def _value(
    old: int,
    each: Field,
    fields: list[Field],
    mutant: bytearray,
    places: Places,
    chance: random.Random,
) -> int:
    top = (1 << 8 * each.size) - 1
    other = chance.choice(fields)
    values = [
        0,
        1,
        top,
        top >> 1,
        (top >> 1) + 1,
        old + 1,
        old - 1,
        old ^ 1 << chance.randrange(8 * each.size),
        int.from_bytes(mutant[other.offset : other.offset + other.size], "little"),
        chance.choice(places.inos),
        chance.choice(places.blocks),
        each.offset // BLOCK,
        chance.getrandbits(8 * each.size),
        BLOCK,
        chance.randrange(0, 70_000),
    ]
    return chance.choice(values)


def _entry_value(old: int, each: Field, places: Places, chance: random.Random) -> int:
    """Another pointer: to anything, to itself, to nowhere, of another kind or home."""
    blocks = len(places.image) // BLOCK
    block = chance.choice(
        [
            chance.choice(places.blocks),
            chance.choice(places.blocks),
            each.offset // BLOCK,
            chance.randrange(blocks),
            0,
            blocks - 1,
            blocks,
            (1 << 40) - 1,
            (old & (1 << 40) - 1) + 1,
        ]
    )
    home = old >> 41 & 7 or (1 if each.entry and each.entry[1] in (0, 7) else 3)
    if chance.random() < 0.2:
        home = chance.randrange(8)
    kind = chance.randrange(2) if chance.random() < 0.2 else old >> 40 & 1
    zero = chance.randrange(16) if chance.random() < 0.1 else 0
    return old >> 48 << 48 | zero << 44 | home << 41 | kind << 40 | block


def _random_bytes(
    mutant: bytearray, places: Places, chance: random.Random, what: list[str]
) -> None:
    block = chance.choice([*places.blocks, 0, 1, 2, places.bitmap])
    at = block * BLOCK + chance.choice((chance.randrange(BLOCK), chance.randrange(128)))
    size = min(chance.choice((1, 8, 64, 4096)), len(mutant) - at)
    mutant[at : at + size] = chance.randbytes(size)
    what.append(f"{size} random bytes at {at}")


def _whole_block(mutant: bytearray, places: Places, chance: random.Random, what: list[str]) -> bool:
    """Put one block's content into another's place, or zeros; return whether it is a file's."""
    target = chance.choice([block for block in places.blocks if block not in places.pages] + [1])
    source = chance.choice([*places.blocks, -1])
    content = bytes(BLOCK) if source < 0 else bytes(mutant[source * BLOCK : (source + 1) * BLOCK])
    mutant[target * BLOCK : (target + 1) * BLOCK] = content
    what.append(f"block {target} holds block {source}'s bytes")
    return source in places.pages


# Judging


def judge(case: Case, outcome: Outcome) -> None:
    """Run the case; raise FuzzError if it ends in a way no case may."""
    with titled(case), _limits():
        _judge(case, outcome)


@contextlib.contextmanager
def titled(case: Case, how: str = "") -> Iterator[None]:
    """Make every error a FuzzError that names the case."""
    title = f"{case.seed}:{case.number} ({'; '.join([*case.what, *([how] if how else [])])})"
    try:
        yield
    except FuzzError as error:
        raise FuzzError(f"{title}: {error}") from error
    except Exception as error:
        raise FuzzError(f"{title}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """End what takes too long; limit_memory() ends what takes too much.

    Nothing here waits for anything, so its time is the processor's: other work is not counted.
    """

    def late(_number: int, _frame: object) -> None:
        raise FuzzError(f"not done after {TIME_MAX_S} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, TIME_MAX_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def limit_memory() -> None:
    """Let this process have 1 GiB more than it has now; beyond it gets MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * 4096 + MEMORY_MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def _judge(case: Case, outcome: Outcome) -> None:
    try:
        findings = check(Memory(case.image, writable=False), "image")
    except ImageError as error:
        _clear(error)
        outcome.endings["fsck refuses"] += 1
        findings = None
    for finding in findings or ():
        if finding.name not in FINDINGS or not 0 <= finding.offset < max(len(case.image), 1):
            raise FuzzError(f"fsck's finding names no place: {finding}")
        outcome.findings[finding.name] += 1
    before: Contents = {}
    for writable in (False, True) if case.number % 2 else (False,):
        if len(case.image) < BLOCK:
            break
        title = "read-write" if writable else "read-only"
        try:
            fs = mount(Memory(case.image, writable=writable))
        except ImageError as error:
            _clear(error)
            outcome.endings[f"{title} mount refused"] += 1
            continue
        if writable:
            change(fs)
        found = contents(fs)
        foreign = foreign_in(found)
        if not writable:
            before = found
        if foreign and not (case.forged and findings):
            raise FuzzError(f"{title}: {foreign}")
        with _errors():
            fs.close()
        outcome.endings[
            "served another file's block, forged" if foreign else f"{title} served"
        ] += 1
    if findings is not None:
        mend(case, before, bool(findings), outcome)


def mend(case: Case, before: Contents, damaged: bool, outcome: Outcome) -> None:
    """Repair: nothing may be left to find, and nothing lost that could be read before."""
    medium = Memory(case.image, writable=True)
    done, lacked_room = repair(medium, "image")
    if bool(done) != damaged and not lacked_room:
        raise FuzzError(f"{'nothing' if damaged else 'something'} was repaired: {done}")
    title = "repaired, but for what lacked a block" if lacked_room else "repaired"
    outcome.endings[title if damaged else "nothing to repair"] += 1
    if not damaged:
        return
    left = check(medium, "image")
    if left and not lacked_room:
        raise FuzzError(f"fsck finds after a repair: {left[:3]}")
    after = contents(mount(Memory(medium.content, writable=False)))
    foreign = foreign_in(after)
    if foreign and not (case.forged or case.copied):
        raise FuzzError(f"after the repair {foreign}")
    lost = lost_of(before, after)
    if lost and lacked_room:
        # A block that two claim, and that no free one could part, goes to who asks first.
        for ino in [ino for ino in before if lost_of({ino: before[ino]}, after)]:
            alone = contents(mount(Memory(medium.content, writable=False)), first=ino)
            after[ino] = alone[ino]
        lost = lost_of(before, after)
    if lost:
        raise FuzzError(f"the repair lost {lost}")


def lost_of(before: Contents, after: Contents) -> str:
    """Return what could be read before and cannot now, or is something else; '' if nothing."""
    for ino, read in before.items():
        found = after.get(ino, {})
        for what, value in read.items():
            if not value.strip(b"\0"):
                continue  # maybe a hole; what a wrong map hid may come back there
            kept = found.get(what)
            if kept is not None:
                kept = kept[: len(value)]  # a wrong size may have cut it short
            if kept != value:
                return f"{what} of inode {ino}"
    return ""


def mount(medium: Memory) -> Filesystem:
    """Open the image as a mount does."""
    return open_medium(medium, ram_pages=8, clock=ManualClock(2 * 10**9))


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Let a call fail as calls may fail."""
    try:
        yield
    except ImageError as error:
        _clear(error)
    except FsError as error:
        if error.errno not in EXPECTED_ERRNOS:
            raise FuzzError(f"errno {error.errno}: {error}") from error


def _clear(error: ImageError) -> None:
    """Raise FuzzError unless the error says what is damaged and where."""
    text = str(error)
    if not re.search(NAMES_A_PLACE, text):
        raise FuzzError(f"an error that names no place: {text}") from error


def contents(fs: Filesystem, first: int = 1) -> Contents:
    """Return by inode what can be read without an error: pages, target, attributes.

    Inode ``first`` is read before all others.
    """
    found: Contents = {}
    seen, todo = {1, first}, [1, first] if first != 1 else [1]
    with _errors():
        fs.statfs()
    while todo:
        ino = todo.pop()
        read = found.setdefault(ino, {})
        with _errors():
            attr = fs.getattr(ino)
            if stat.S_ISDIR(attr.mode):
                todo += _names(fs, ino, seen)
            elif stat.S_ISREG(attr.mode):
                _bytes(fs, ino, attr.size_bytes, read)
            elif stat.S_ISLNK(attr.mode):
                read["target"] = fs.readlink(ino)
        with _errors():
            for name in fs.listxattr(ino):
                read[f"attribute {name!r}"] = fs.getxattr(ino, name)
    return found


def foreign_in(found: Contents) -> str:
    """Return where another file's bytes are, or ''."""
    for ino, read in found.items():
        foreign = _foreign(ino, b"".join(read.values())) if read else ""
        if foreign:
            return foreign
    return ""


def _names(fs: Filesystem, ino: int, seen: set[int]) -> list[int]:
    below: list[int] = []
    count = 0
    with _errors():
        for name, attr, _cookie in fs.readdir(ino, 0):
            count += 1
            if count > NAMES_MAX:
                raise FuzzError(f"directory {ino} does not end")
            if attr.ino not in seen:
                seen.add(attr.ino)
                below.append(attr.ino)
            with _errors():
                if fs.lookup(ino, name).ino != attr.ino:
                    raise FuzzError(f"{name!r} in {ino} is two inodes")
    with _errors():
        fs.lookup(ino, b"..")
    with _errors():
        fs.lookup(ino, b"no such name")
    return below


def _bytes(fs: Filesystem, ino: int, size: int, found: dict[str, bytes]) -> None:
    """Read what is no hole, the end, and a hole."""
    pages = {0, 600, max(size - 1, 0) // BLOCK, 1 << 35}
    with _errors():
        for run in fs.runs(ino):
            if run.kind is not PageKind.HOLE:
                pages |= set(range(run.first, run.first + run.count))
    for page in pages:
        with _errors():
            found[f"page {page}"] = bytes(fs.read(ino, page * BLOCK, BLOCK))
    with _errors():
        fs.fault_in(ino, min(pages))


def _foreign(ino: int, data: Buffer) -> str:
    """Tell of 8 words with another file's mark."""
    usable = len(data) // TAG.size * TAG.size
    words = np.frombuffer(data, "<u8", usable // 8)
    marked = words & np.uint64(0xFFFF) == MARK
    other = marked & (words >> np.uint64(16) & np.uint64(0xFFFF) != ino & 0xFFFF)
    if np.count_nonzero(other) < 8:
        return ""
    owner = int(words[np.argmax(other)]) >> 16 & 0xFFFF
    return f"inode {ino} was served with bytes of inode {owner}"


def change(fs: Filesystem) -> None:
    """Do what programs do; each call may fail."""
    with _errors():
        made = fs.mknod(1, b"made", 0o100644, 0, 0, 0).ino
        for page in (0, 1, 5):
            fs.write(made, page * BLOCK, page_of(made, page))
        fs.setxattr(made, b"user.made", b"yes")
        fs.promote(made, 1)
        fs.demote(made, 1)
    for name in (b"tall", b"first", b"one page"):
        with _errors():
            attr = fs.lookup(1, name)
            fs.write(attr.ino, 2 * BLOCK, page_of(attr.ino, 2))
            fs.setattr(attr.ino, size_bytes=BLOCK + 1)
            fs.removexattr(attr.ino, b"user.colour")
        with _errors():
            fs.unlink(1, name)
    with _errors():
        fs.rename(1, b"link", 1, b"renamed link")
    with _errors():
        below = fs.mkdir(1, b"new directory", 0o755, 0, 0).ino
        fs.symlink(below, b"to", b"somewhere", 0, 0)
        fs.rename(1, b"fifo", below, b"fifo")
        fs.rename(1, b"empty", below, b"empty")
    with _errors():
        below = fs.lookup(1, b"directory").ino
        for number in range(20):
            fs.unlink(below, LONG_NAME % number)
    with _errors():
        fs.rmdir(1, b"empty")
    with _errors():
        fs.sync()
