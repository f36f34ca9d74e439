"""mkfs cut at each of its fences: there is no image yet, or a whole one."""

from __future__ import annotations

from proving.crash.explorer import Tally, judge_states
from proving.crash.medium import Undecided, Watched
from proving.crash.tree import NAME, open_medium, tree_of
from proving.crash.workloads import BLOCKS, make_medium
from xipfs.errors import ImageError
from xipfs.image.check import check
from xipfs.image.superblock import load
from xipfs.units import PAGE_SIZE


def explore_mkfs() -> Tally:
    """Make an image on a medium of zeros and judge every state of every cut, and of its end."""
    tally = Tally()
    medium = Watched(bytes(BLOCKS * PAGE_SIZE))
    medium.at_fence = lambda: _judge(tally, medium, whole=False)
    make_medium(medium)
    _judge(tally, medium, whole=True)
    return tally


def _judge(tally: Tally, medium: Watched, *, whole: bool) -> None:
    where = "done" if whole else f"fence {medium.fences + 1}"
    judge_states(tally, medium, f"mkfs: {where}", lambda state: _judge_state(state, whole=whole))


def _judge_state(state: Undecided, *, whole: bool) -> None:
    try:
        load(state, NAME)
    except ImageError:
        if whole:
            raise
        return
    fs = open_medium(state, ram_pages=1)
    assert tree_of(fs) == {}
    # Until mkfs ends one copy of the superblock may be missing; the other is then enough.
    names = {finding.name for finding in check(state, NAME)}
    assert names <= (set() if whole else {"superblock"}), names
