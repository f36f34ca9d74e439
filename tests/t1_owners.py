"""Owners of blocks: the second inode that leads to a block is refused."""

from __future__ import annotations

import numpy as np
import pytest

from xipfs.errors import ImageError
from xipfs.image.owners import Owners


def many(*blocks: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(blocks, np.uint64)


def test_a_second_inode_is_refused_and_both_are_named() -> None:
    owners = Owners()
    owners.meet(7, 100)
    owners.meet(7, 100)
    with pytest.raises(ImageError, match="block 100 at offset 409600 belongs to inode 8 and to"):
        owners.meet(8, 100)
    with pytest.raises(ImageError, match=r"block 100 at offset 409600 .* to inode 7"):
        owners.meet_many(0, many(99, 100))
    assert owners.first_met(0, 100) is None
    assert owners.first_met(0, 101) == 100


def test_blocks_far_apart_and_their_end() -> None:
    owners = Owners()
    owners.meet_many(0, many(65535, 65536, (1 << 40) - 1))
    with pytest.raises(ImageError, match="block 65536 "):
        owners.meet(1, 65536)
    assert owners.first_met(65536, 10) == 65536
    owners.free(np.array([65535, 65536]))
    assert owners.first_met(0, 1 << 20) is None
    owners.take(65535, 2)
    owners.meet_many(1, many(65535, 65536))
    with pytest.raises(ImageError, match="block 1099511627775 "):
        owners.meet_many(2, many(3, (1 << 40) - 1))


def test_a_freed_block_is_nobodys_until_it_is_taken() -> None:
    """A wrong bitmap had one file's block given to another; freed, it holds the other's bytes."""
    owners = Owners()
    owners.free(np.array([10, 70000]))
    with pytest.raises(ImageError, match=r"block 10 at offset 40960 .* inode 3 and was freed"):
        owners.meet(3, 10)
    with pytest.raises(ImageError, match=r"block 70000 .* was freed"):
        owners.meet_many(3, many(69999, 70000))
    assert owners.first_met(0, 1 << 20) is None
    owners.take(9, 2)
    owners.meet(3, 10)
    with pytest.raises(ImageError, match="block 70000 "):
        owners.meet((1 << 32) - 2, 70000)
    owners.meet((1 << 32) - 2, 71000)
    owners.meet((1 << 32) - 2, 71000)
