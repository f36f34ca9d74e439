"""The emulated medium cut at a chosen fence, and images made on it without a file."""

from __future__ import annotations

import random
from pathlib import Path

from xipfs.clock import ManualClock
from xipfs.fs.build import make_image
from xipfs.fs.filesystem import Filesystem
from xipfs.image.superblock import geometry
from xipfs.memory.emulated import EmulatedMedium
from xipfs.memory.region import LINE_SIZE, Medium
from xipfs.units import PAGE_SIZE


class PowerCut(BaseException):
    """The power went away; nothing above may catch this as an ordinary failure."""


class RecordingMedium(EmulatedMedium):
    """The emulated medium; the fence number ``cut_at`` (from 1) never completes."""

    def __init__(
        self, content: bytes | bytearray, *, writable: bool = True, cut_at: int = 0
    ) -> None:
        super().__init__(content, writable=writable)
        self._cut_at = cut_at

    def fence(self) -> None:
        if self.fences + 1 == self._cut_at:
            self.fences += 1
            raise PowerCut
        super().fence()

    def volatile_lines(self) -> set[int]:
        """Return the numbers of the lines whose last store is not durable."""
        return set(self.pending())

    def after_cut(self, chance: random.Random | None, share: float = 0.5) -> bytes:
        """Return what a cut now leaves: none of what is pending, all (``share`` 1), or some."""
        image = bytearray(self.durable)
        for line, contents in sorted(self.pending().items()):
            stores = len(contents) - 1 if share == 1 else 0
            if share != 1 and chance is not None:
                stores = chance.randrange(len(contents))
            image[line * LINE_SIZE : (line + 1) * LINE_SIZE] = contents[stores]
        return bytes(image)


def new_medium(blocks: int = 64, *, pagecache: bool = False) -> RecordingMedium:
    """Return an empty image of ``blocks`` blocks; the same bytes each time."""
    superblock = geometry(
        blocks * PAGE_SIZE,
        uuid=bytes(range(16)),
        hash_key=bytes(range(16, 32)),
        created_ns=1_000_000_000,
        default_pagecache=pagecache,
        label="medium",
    )
    medium = RecordingMedium(bytes(blocks * PAGE_SIZE))
    make_image(medium, superblock, ManualClock())
    return medium


def open_medium(
    medium: Medium, *, ram_pages: int = 16, clock: ManualClock | None = None
) -> Filesystem:
    """Open the image on ``medium`` as a mount does."""
    return Filesystem(
        medium,
        image_path=Path("medium"),
        ram_bytes=ram_pages * PAGE_SIZE,
        struct_page_bytes=64,
        clock=clock or ManualClock(),
        lock=None,
    )
