"""fsck's repairs cut at each of their fences: begun again, they end in the same whole tree.

Three damages, chosen so that together their repairs come by every flush and fence of fsck: a lost
copy of the superblock, a pending transaction that is damaged, a block that two files own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from proving.crash.explorer import Tally, judge_states
from proving.crash.medium import Settled, Undecided, Watched
from proving.crash.tree import (
    NAME,
    ROOT,
    Allowed,
    Tree,
    contents_of,
    judge_contents,
    judge_structure,
    open_medium,
    tree_of,
    without_times,
)
from xipfs.image import layout
from xipfs.image.filemap import seal
from xipfs.image.repair import mark_clean, repair
from xipfs.image.volume import Volume
from xipfs.units import PAGE_SIZE

_STATE: Final = layout.STATE_BLOCK * PAGE_SIZE
_JOURNAL: Final = layout.JOURNAL_START * PAGE_SIZE
_UNDER_WAY: Final = (layout.STATE_REPAIR, layout.STATE_MOUNTED)


def _superblock(medium: Settled) -> None:
    medium.store(0, bytes(PAGE_SIZE))


def _journal(medium: Settled) -> None:
    header = layout.JOURNAL_HEADER.pack(layout.JOURNAL_MARK, 9, 64, 0, 0)
    medium.store(_JOURNAL, header + b"damaged!" * 12)


def _shared_block(medium: Settled) -> None:
    """Let the empty file ``d/e`` own the first page of ``a``, by an entry whose check holds."""
    volume = Volume(medium, NAME)
    root, names = volume.inodes.get(ROOT), volume.directories
    above, owner = names.lookup(root, b"d"), names.lookup(root, b"a")
    assert above is not None
    assert owner is not None
    empty = names.lookup(volume.inodes.get(above.ino), b"e")
    assert empty is not None
    body = volume.maps.entry(volume.inodes.get(owner.ino), 0)
    with volume.transaction():
        inode = volume.inodes.get(empty.ino)
        inode.root, inode.blocks, inode.size_bytes = seal(empty.ino, 0, 0, body), 1, PAGE_SIZE
        volume.inodes.put(inode)


DAMAGES: Final[dict[str, Callable[[Settled], None]]] = {
    "superblock": _superblock,
    "journal": _journal,
    "shared block": _shared_block,
}


def explore_repairs(base: bytes) -> Tally:
    """Damage the image in each way and judge every state of every cut of its repair."""
    tally = Tally()
    for name, damage in DAMAGES.items():
        damaged = Settled(base)
        damage(damaged)
        _Repair(name, bytes(damaged.now), tally).explore()
    return tally


class _Repair:
    """One damaged image, repaired."""

    def __init__(self, name: str, image: bytes, tally: Tally) -> None:
        self._name = name
        self._image = image
        self._tally = tally
        whole = Settled(image)
        repair(whole, NAME)
        fs = open_medium(whole, ram_pages=4)
        tree = tree_of(fs)
        self._tree: Tree = without_times(tree)
        self._allowed: Allowed = {ino: [held] for ino, held in contents_of(fs, tree).items()}

    def explore(self) -> None:
        """Repair and mark clean, cut at each fence and after each of the two."""
        medium = Watched(self._image)
        # The first fence is that of the flag; from there on no state looks clean.
        flags: list[tuple[int, ...]] = [(layout.STATE_CLEAN, layout.STATE_REPAIR)]
        medium.at_fence = lambda: self._judge(medium, flags.pop() if flags else _UNDER_WAY)
        repair(medium, NAME)
        medium.at_fence = None
        self._judge(medium, (layout.STATE_MOUNTED,))
        medium.at_fence = lambda: self._judge(medium, (layout.STATE_MOUNTED, layout.STATE_CLEAN))
        mark_clean(medium)
        self._judge(medium, (layout.STATE_CLEAN,))

    def _judge(self, medium: Watched, flags: tuple[int, ...]) -> None:
        where = f"repair {self._name}: fence {medium.fences + 1}"
        judge_states(self._tally, medium, where, lambda state: self._judge_state(state, flags))

    def _judge_state(self, state: Undecided, flags: tuple[int, ...]) -> None:
        flag = int.from_bytes(state.load(_STATE, 8), "little")
        assert flag in flags, f"the mount flag is {flag:#x}"
        if flag != layout.STATE_CLEAN or len(flags) > 1:
            repair(state, NAME)
        judge_structure(state)
        tree = tree_of(open_medium(state, ram_pages=1))
        assert without_times(tree) == self._tree, f"a third tree: {tree}"
        judge_contents(state, tree, self._allowed)
