"""fsck's repairs: each finding by its name, what -p, -y and -n do, cuts in the midst of it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz_images import BLOCK, Places, template
from fuzzing import Contents, Memory, contents, lost_of, make_case
from fuzzing import mount as open_image
from media import PowerCut, RecordingMedium

from xipfs.cli import main
from xipfs.cli.fsck import fsck_main
from xipfs.errors import ImageError
from xipfs.image.check import FINDINGS, check
from xipfs.image.filemap import seal
from xipfs.image.repair import SAFE, repair
from xipfs.image.volume import Volume

ROOT = 1
Damage = Callable[[bytearray, Places], None]


def put(name: str, value: int, *, at: int = 0, fits: bool = True) -> Damage:
    """Return what sets the image's field number ``at`` of that name; with a fitting checksum."""

    def damage(image: bytearray, places: Places) -> None:
        field = places.by_structure[name][at]
        image[field.offset : field.offset + field.size] = value.to_bytes(field.size, "little")
        for fix in field.fixes if fits else ():
            fix(image)

    return damage


def raw(offset: int, data: bytes) -> Damage:
    def damage(image: bytearray, _places: Places) -> None:
        image[offset : offset + len(data)] = data

    return damage


def point_to_another_file(image: bytearray, places: Places) -> None:
    """Let page 600 of a file with nodes lie in the block of a file of one page, sealed."""
    entries = places.by_structure["node1.entry"]
    target = next(field for field in entries if field.entry and field.entry[2] == 600)
    block = sorted(places.pages)[0]
    old = int.from_bytes(image[target.offset : target.offset + 8], "little")
    new = old >> 40 << 40 | block
    image[target.offset : target.offset + 8] = new.to_bytes(8, "little")
    target.fixes[0](image)


def point_to_own_node(image: bytearray, places: Places) -> None:
    """Let page 600 of a file lie in the node that names it, sealed, and damage its neighbour."""
    entries = {field.entry[2]: field for field in places.by_structure["node1.entry"] if field.entry}
    target, neighbour = entries[600], entries[601]
    old = int.from_bytes(image[target.offset : target.offset + 8], "little")
    new = old >> 40 << 40 | target.offset // BLOCK
    image[target.offset : target.offset + 8] = new.to_bytes(8, "little")
    target.fixes[0](image)
    image[neighbour.offset] ^= 1


def claim_the_tables_node(image: bytearray, places: Places) -> None:
    """Overwrite the node of the inode table's map, and let a free inode's root lead there."""
    root = places.by_structure["table.root"][0]
    node = int.from_bytes(image[root.offset : root.offset + 5], "little")
    page = sorted(places.pages)[0]
    image[node * BLOCK : (node + 1) * BLOCK] = image[page * BLOCK : (page + 1) * BLOCK]
    put("free inode.root", 0x0200_0000_0000 | node)(image, places)


def shorten_link(image: bytearray, places: Places) -> None:
    """Let the symbolic link have no byte."""
    for mode, size in zip(
        places.by_structure["special inode.mode"],
        places.by_structure["special inode.size"],
        strict=True,
    ):
        if image[mode.offset + 1] >> 4 == 10:
            image[size.offset : size.offset + 8] = bytes(8)
            size.fixes[0](image)


#: By finding: damages that must be found under that name (maybe under others too).
DAMAGES: dict[str, list[Damage]] = {
    "superblock": [
        put("superblock.blocks", 7, fits=False),
        put("superblock.crc", 7, at=1, fits=False),
    ],
    "mount-flag": [put("state.flag", 5), raw(BLOCK, b"XXRepair")],
    "journal": [put("journal.mark", 0x77)],
    "counters": [
        put("counters.free_blocks", 3),
        put("counters.inodes_used", 3, fits=False),
    ],
    "reserved": [raw(BLOCK + 40, b"!"), raw(2 * BLOCK - 1, b"!")],
    "inode": [
        put("file.mtime", 77, fits=False),
        put("file.mode", 0, fits=False),
        put("file.parent", 7),
        put("free inode.nlink", 7),
        put("table.mode", 0o100644),
        put("directory.height", 9, fits=False),
    ],
    "map": [
        put("node1.entry", 77, at=1),
        put("node1.entry", 0x0600_0000_0000 | 20, at=3, fits=False),
        put("file.root", 0x0200_0000_0005),
        put("file.size", 0),
        put("counters.inode_limit", 1 << 40),
        claim_the_tables_node,
    ],
    "shared-block": [point_to_another_file, point_to_own_node],
    "bitmap": [put("bitmap.byte", 0xFF, at=6), put("bitmap.byte", 0, at=3)],
    "list": [put("counters.free_ino", 0), put("counters.orphan_ino", 2)],
    "directory": [
        put("leaf.crc", 1, fits=False),
        put("leaf.owner", 77, fits=False),
        put("name.ino", 9999),
        put("name.hash", 5),
        put("name.type", 4),
        put("directory.entries", 3),
    ],
    "links": [put("file.nlink", 9), put("directory.parent", 9, at=1)],
    "unreachable": [put("name.ino", 3, at=3), put("directory.root", 0)],
    "symlink": [shorten_link],
    "xattrs": [put("xattrs.crc", 1, fits=False), put("xattr.name", 0x2F)],
}


def damaged(damage: Damage, name: str = "xip") -> bytes:
    image, places = template(name)
    mutant = bytearray(image)
    damage(mutant, places)
    assert mutant != image
    return bytes(mutant)


def readable(image: bytes | bytearray) -> Contents:
    """What a read-only mount can read of it; nothing if there is no such mount."""
    try:
        fs = open_image(Memory(image, writable=False))
    except ImageError:
        return {}
    return contents(fs)


CASES = [(name, at) for name in FINDINGS for at in range(len(DAMAGES[name]))]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "image"


def fsck_answer(
    path: Path, *words: str, capsys: pytest.CaptureFixture[str]
) -> tuple[int, dict[str, Any]]:
    """Run it; return its code and what it says."""
    capsys.readouterr()
    code = main(["fsck", *words, "--json", str(path)])
    answer = json.loads(capsys.readouterr().out)
    assert answer["exit_code"] == code
    return code, answer


def fsck(path: Path, *words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, set[str]]:
    """Run it; return its code and the names of the findings."""
    code, answer = fsck_answer(path, *words, capsys=capsys)
    return code, {finding["name"] for finding in answer["findings"]}


@pytest.mark.parametrize(("name", "at"), CASES)
def test_each_finding_is_found_and_repaired(
    name: str, at: int, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = damaged(DAMAGES[name][at])
    path.write_bytes(image)
    code, found = fsck(path, "-n", capsys=capsys)
    assert code == 4
    assert name in found
    assert path.read_bytes() == image
    code, _found = fsck(path, "-p", "-f", capsys=capsys)
    assert code == (1 if found <= SAFE else 4)
    if code == 4:
        assert path.read_bytes() == image
        assert fsck(path, "-y", capsys=capsys)[0] == 1
    assert fsck(path, "-n", capsys=capsys) == (0, set())
    assert path.read_bytes()[BLOCK : BLOCK + 8] == b"XIPClean"


@pytest.mark.parametrize(("name", "at"), CASES)
def test_nothing_that_could_be_read_is_lost(name: str, at: int) -> None:
    image = damaged(DAMAGES[name][at])
    before = readable(image)
    medium = Memory(image, writable=True)
    repair(medium, "image")
    after = contents(open_image(Memory(medium.content, writable=False)))
    assert lost_of(before, after) == ""


def test_what_nobody_names_is_found_in_lost_and_found() -> None:
    """The root loses all its names: every file and directory in it comes back by its number."""
    image = damaged(put("leaf.owner", 77, fits=False))
    places = template("xip")[1]
    leaf = next(f for f in places.by_structure["leaf.owner"]).offset // BLOCK
    mutant = bytearray(image)
    mutant[leaf * BLOCK : (leaf + 1) * BLOCK] = bytes(BLOCK)
    before = contents(open_image(Memory(template("xip")[0], writable=False)))
    medium = Memory(mutant, writable=True)
    repair(medium, "image")
    assert check(medium, "image") == []
    fs = open_image(Memory(medium.content, writable=False))
    place = fs.lookup(ROOT, b"lost+found")
    assert place.mode == 0o040700
    names = {name for name, _attr, _cookie in fs.readdir(place.ino, 0)}
    assert b"#2" in names
    after = contents(fs)
    assert {ino: after[ino] for ino in before} == before


def test_lost_pages_of_the_inode_table_are_found_again() -> None:
    """The table's root leads nowhere: all inodes come back, under their names."""
    image, places = template("xip")
    before = contents(open_image(Memory(image, writable=False)))
    mutant = bytearray(image)
    root = places.by_structure["table.root"][0].offset
    mutant[root : root + 8] = bytes(8)
    medium = Memory(mutant, writable=True)
    repair(medium, "image")
    assert check(medium, "image") == []
    fs = open_image(Memory(medium.content, writable=False))
    assert contents(fs) == before
    assert {name for name, _attr, _cookie in fs.readdir(ROOT, 0)} >= {b"tall", b"first again"}


@pytest.mark.parametrize(
    ("entry", "found", "done"),
    [
        ((4, 0, 600), "page 600", "page 600 is a hole now"),
        ((4, 1, 1), "page 512 to 1023", "pages 512 to 1023 are holes now"),
    ],
)
def test_a_hole_names_the_file_and_its_pages(
    entry: tuple[int, int, int],
    found: str,
    done: str,
    path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Page 600 of inode 4, and its second node."""
    ino, level, position = entry
    image, places = template("xip")
    entries = places.by_structure[f"node{level + 1}.entry"]
    offset = next(field.offset for field in entries if field.entry == entry)
    mutant = bytearray(image)
    mutant[offset] ^= 1
    path.write_bytes(mutant)
    assert main(["fsck", "-y", str(path)]) == 1
    out = capsys.readouterr().out
    where = f"map at offset {offset} inode {ino}"
    assert f"{where}: entry of level {level}, position {position}: {found}\n" in out
    assert f"repaired: {where}: {done}\n" in out


def test_a_full_image_keeps_what_cannot_be_parted(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second file claims the only page of another, and no block is free for a copy."""
    fs = open_image(medium := Memory(template("xip")[0], writable=True))
    owner = fs.mknod(ROOT, b"owner", 0o100644, 0, 0, 0).ino
    fs.write(owner, 0, b"mine" * (BLOCK // 4))
    claimer = fs.mknod(ROOT, b"claimer", 0o100644, 0, 0, 0).ino
    filler = fs.mknod(ROOT, b"filler", 0o100644, 0, 0, 0).ino
    while fs.statfs().blocks_free > 3:
        fs.write(filler, fs.getattr(filler).size_bytes, bytes(BLOCK))
    while fs.statfs().blocks_free:
        fs.write(fs.mknod(ROOT, b"f%d" % fs.statfs().blocks_free, 0o100644, 0, 0, 0).ino, 0, b"x")
    fs.close()
    volume = Volume(medium, "image")
    body = volume.maps.entry(volume.inodes.get(owner), 0)
    with volume.transaction():
        inode = volume.inodes.get(claimer)
        inode.root, inode.blocks, inode.size_bytes = seal(claimer, 0, 0, body), 1, BLOCK
        volume.inodes.put(inode)
    path.write_bytes(medium.content)
    code, found = fsck(path, "-y", capsys=capsys)
    assert (code, "shared-block" in found) == (5, True)
    code, left = fsck(path, "-n", capsys=capsys)
    assert (code, "shared-block" in left) == (4, True)
    assert main(["fsck", "-y", str(path)]) == 4
    out = capsys.readouterr().out
    assert re.search(rf"^left: shared-block at offset \d+ inode {claimer}: block \d+", out, re.M)
    assert "No block was free for their repair. Mount the image, delete files" in out
    for first in (owner, claimer):
        fs = open_image(Memory(path.read_bytes(), writable=False))
        assert bytes(fs.read(first, 0, BLOCK)) == b"mine" * (BLOCK // 4), "whoever is asked first"


# But for the one that marks as used what is used here.
@pytest.mark.parametrize(("name", "at"), [case for case in CASES if case != ("bitmap", 0)])
def test_a_full_image_is_repaired_or_the_report_names_what_stays(
    name: str, at: int, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, places = template("full")
    mutant = bytearray(image)
    DAMAGES[name][at](mutant, places)
    before = readable(mutant)
    path.write_bytes(mutant)
    code, answer = fsck_answer(path, "-y", capsys=capsys)
    assert name in {finding["name"] for finding in answer["findings"]}
    again, left = fsck_answer(path, "-n", capsys=capsys)
    assert left["findings"] == answer["left"]
    assert (code, again) == ((bool(answer["repairs"]) | 4, 4) if answer["left"] else (1, 0))
    # It can be mounted, as the report advises.
    after = contents(open_image(Memory(path.read_bytes(), writable=False)))
    assert lost_of(before, after) == ""


def garbage(image: bytes, block: int) -> bytes:
    noise = random.Random(block).randbytes(BLOCK)
    return image[: block * BLOCK] + noise + image[(block + 1) * BLOCK :]


def test_any_structure_of_a_full_image_is_repaired() -> None:
    """Each node, leaf, page of the table and block of attributes is overwritten."""
    image, places = template("full")
    structures = sorted(set(places.blocks) - places.pages)
    assert len(structures) > 15
    for block in structures:
        mutant = garbage(image, block)
        assert check(Memory(mutant, writable=False), "image"), block
        medium = Memory(mutant, writable=True)
        before = readable(mutant)
        repair(medium, "image")
        assert check(medium, "image") == [], block
        assert lost_of(before, readable(medium.content)) == "", block


def test_a_table_that_cannot_be_completed_stays_as_it_is(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page of the table is overwritten, a file claims its block, and no other is free."""
    image, places = template("full")
    # A page of the table without a root, whose inodes are all empty files.
    inodes = [field for field in places.by_structure["file.root"] if field.entry]
    by_block: dict[int, list[int]] = {}
    for field in inodes:
        root = int.from_bytes(image[field.offset : field.offset + 8], "little")
        by_block.setdefault(field.offset // BLOCK, []).append(root)
    table = next(at for at, roots in by_block.items() if len(roots) == 32 and not any(roots))
    mutant = bytearray(garbage(image, table))
    entry = next(f for f in places.by_structure["node1.entry"] if f.entry == (4, 0, 600))
    old = int.from_bytes(mutant[entry.offset : entry.offset + 8], "little")
    mutant[entry.offset : entry.offset + 8] = (old >> 40 << 40 | table).to_bytes(8, "little")
    entry.fixes[0](mutant)
    # The page that this takes from the file gets another owner.
    entry = next(f for f in places.by_structure["node1.entry"] if f.entry == (4, 0, 1))
    body = old & (1 << 48) - 1
    mutant[entry.offset : entry.offset + 8] = body.to_bytes(8, "little")
    entry.fixes[0](mutant)
    path.write_bytes(mutant)
    before = readable(mutant)
    assert main(["fsck", "-y", str(path)]) & ~1 == 4
    out = capsys.readouterr().out
    assert "left: map at offset" in out
    assert "No block was free for their repair." in out
    assert lost_of(before, readable(path.read_bytes())) == ""
    code, answer = fsck_answer(path, "-y", capsys=capsys)
    assert (code, answer["repairs"]) == (4, []), "nothing was repaired"


# Cuts


def fences_of(image: bytes) -> int:
    medium = RecordingMedium(image)
    repair(medium, "image")
    return medium.fences


def cut_cases() -> Iterator[tuple[str, bytes]]:
    for name in ("map", "shared-block", "directory", "unreachable", "inode"):
        yield name, damaged(DAMAGES[name][0])
    image, places = template("full")
    leaf = next(iter(places.by_structure["leaf.crc"])).offset // BLOCK
    yield "full, a leaf", garbage(image, leaf)
    below = [field.offset // BLOCK for field in places.by_structure["leaf.crc"]]
    mutant = bytearray(image)
    mutant[below[-1] * BLOCK] ^= 1
    yield "full, a leaf's checksum", bytes(mutant)
    inodes = [field.offset // BLOCK for field in places.by_structure["file.crc"]]
    yield "full, a page of the table", garbage(image, inodes[-1])


CUT_CASES = dict(cut_cases())


@pytest.mark.parametrize("name", CUT_CASES)
def test_a_repair_that_is_cut_is_done_again(name: str) -> None:
    """At every fence (of long repairs at 40), with none, all and some of what was pending."""
    image = CUT_CASES[name]
    before = contents(open_image(Memory(image, writable=False)))
    fences = fences_of(image)
    for cut_at in range(1, fences + 1, -(-fences // 40)):
        medium = RecordingMedium(image, cut_at=cut_at)
        with pytest.raises(PowerCut):
            repair(medium, "image")
        for chance, share in ((None, 0.0), (None, 1), (random.Random(cut_at), 0.5)):
            again = Memory(medium.after_cut(chance, share), writable=True)
            if check(again, "image"):
                repair(again, "image")
            assert check(again, "image") == [], (cut_at, share)
            after = contents(open_image(Memory(again.content, writable=False)))
            assert lost_of(before, after) == "", (cut_at, share)


@pytest.mark.parametrize("part", range(2))
def test_cuts_in_repairs_of_random_damage(part: int) -> None:
    seed = random.randrange(1 << 30)
    for number in range(20):
        case = make_case(seed, number + 20 * part)
        again = f"seed {seed}, number {number + 20 * part}: {case.what}"
        try:
            if not check(Memory(case.image, writable=False), "image"):
                continue
        except ImageError:
            continue
        print(again)
        cut_at = random.Random(f"{seed} {number}").randrange(1, fences_of(case.image) + 1)
        medium = RecordingMedium(case.image, cut_at=cut_at)
        with pytest.raises(PowerCut):
            repair(medium, "image")
        left = Memory(medium.after_cut(random.Random(number)), writable=True)
        if check(left, "image"):
            repair(left, "image")
        assert check(left, "image") == [], again


def test_an_interrupted_repair_is_not_mounted() -> None:
    image = damaged(raw(BLOCK, b"XXRepair"))
    with pytest.raises(ImageError, match=r"a repair was interrupted .*offset 4096"):
        open_image(Memory(image, writable=True))


# The command


def test_flags_that_exclude_each_other_are_a_usage_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_bytes(template("xip")[0])
    for words in (["-n", "-y"], ["-p", "-n"], ["-y", "-p"], [], ["--such"]):
        monkeypatch.setattr("sys.argv", ["fsck.xipfs", *words, str(path)])
        assert fsck_main() == 16, words


def test_preen_believes_the_clean_flag_unless_forced(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path.write_bytes(damaged(put("counters.free_blocks", 3)))
    assert fsck(path, "-p", capsys=capsys) == (0, set())
    assert fsck(path, "-p", "-f", capsys=capsys) == (1, {"counters"})
    path.write_bytes(damaged(put("counters.free_blocks", 3), "orphans"))
    assert fsck(path, "-a", capsys=capsys) == (1, {"counters"})


def test_a_person_is_asked(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = damaged(put("counters.free_blocks", 3))
    path.write_bytes(image)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _question: "no")
    assert main(["fsck", str(path)]) == 4
    assert path.read_bytes() == image
    monkeypatch.setattr("builtins.input", lambda _question: "y")
    assert main(["fsck", str(path)]) == 1
    assert check(Memory(path.read_bytes(), writable=False), "image") == []


def test_an_interrupt_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_args: object) -> None:
        raise KeyboardInterrupt

    path.write_bytes(damaged(put("counters.free_blocks", 3)))
    monkeypatch.setattr("xipfs.cli.checking.check", interrupted)
    assert main(["fsck", "-y", str(path)]) == 32


def test_a_pending_transaction_is_no_finding(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path.write_bytes(template("pending")[0])
    for words in (["-n"], ["-p"], ["-y"]):
        assert fsck(path, *words, capsys=capsys) == (0, set())
        assert path.read_bytes() == template("pending")[0]
