"""The mappings of some address spaces as rows, and the tables over them, for ``charge_loop``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from xipfs.accounting import charge_loop as loop
from xipfs.mm import bulk_loop as bulk
from xipfs.mm.flags import VM_MAYSHARE
from xipfs.mm.mm_struct import MmStruct
from xipfs.mm.pte import MIDDLE_SHIFT
from xipfs.mm.vma import Vma
from xipfs.units import PAGE_SHIFT

if TYPE_CHECKING:
    from xipfs.accounting.accountant import Accountant

_PAGES_SHIFT: Final = MIDDLE_SHIFT - PAGE_SHIFT
#: Gibibytes; larger mappings are left to the accountant.
_REGIONS_MAX: Final = 4096


class ChargeRows:
    """Rows of ``World.rows`` and ``Charging.live``, in the order of ``mms`` and addresses."""

    def __init__(self, books: Accountant, mms: list[MmStruct]) -> None:
        self._books = books
        self.vmas = [vma for mm in mms for vma in mm]
        self._mms = mms
        self._state = _state(mms)
        self._row_of = {vma: row for row, vma in enumerate(self.vmas)}
        self.first_row = np.cumsum([0, *(len(mm) for mm in mms)], dtype=np.int64)
        self.rows = np.zeros((len(self.vmas), bulk.ROW_COLUMNS), np.int64)
        self.live = np.zeros((len(self.vmas), loop.LIVE_COLUMNS), np.int64)
        regions = file_regions = 0
        for row, vma in enumerate(self.vmas):
            self._fill(row, vma, regions, file_regions)
            if self.live[row, loop.INO] >= 0:
                regions += len(_regions(vma))
                file_regions += len(_file_regions(vma))
        self.middles = np.zeros(regions, np.int64)
        self.shadow_middles = np.zeros(regions, np.int64)
        self.cached_middles = np.zeros(file_regions, np.int64)
        self.frame_middles = np.zeros(file_regions, np.int64)
        self.refresh_all()

    def still_hold(self, mms: list[MmStruct]) -> bool:
        """Return whether these are the rows of ``mms``, whose VMAs are as they were."""
        return mms == self._mms and _state(mms) == self._state

    def refresh_all(self) -> None:
        """Look up all tables again."""
        for vma in self.vmas:
            self.refresh(vma)

    def _fill(self, row: int, vma: Vma, regions: int, file_regions: int) -> None:
        assert vma.file is not None, vma
        assert isinstance(vma.file.name, int), vma
        self.rows[row] = (
            vma.start >> PAGE_SHIFT,
            vma.end >> PAGE_SHIFT,
            vma.flags,
            vma.pgoff,
            0,
            vma.pgoff + vma.pages,
            regions,
        )
        ino = vma.file.name if len(_file_regions(vma)) <= _REGIONS_MAX else -1
        private = not vma.flags & VM_MAYSHARE
        self.live[row] = ino, private, vma.page_prot, regions, file_regions

    def refresh(self, vma: Vma | None) -> None:
        """Look up the tables over ``vma`` again: the accountant may have made some."""
        if vma is None:
            return
        row = self._row_of[vma]
        ino, _, _, first, file_first = self.live[row].tolist()
        if ino < 0:
            return
        number = vma.mm.name
        assert isinstance(number, int)
        model = vma.mm.tables.middles
        shadow = self._books.kernel.tables_of(number).middles
        for place, region in enumerate(_regions(vma), first):
            self.middles[place] = model.get(region, 0)
            self.shadow_middles[place] = shadow.get(region, 0)
        frames = self._books.file(ino).frames.middles
        cached_tables = self._books.kernel.cached.tables.get(ino)
        cached = {} if cached_tables is None else cached_tables.middles
        for place, region in enumerate(_file_regions(vma), file_first):
            self.cached_middles[place] = cached.get(region, 0)
            self.frame_middles[place] = frames.get(region, 0)


def _state(mms: list[MmStruct]) -> list[tuple[Vma, int, int, int, int, int, int, int]]:
    """Return all that decides how a fault in one of the VMAs ends, but for pages and PTEs."""
    return [
        (vma, vma.start, vma.end, vma.pgoff, vma.flags, vma.page_prot, vma.anon_vma, vma.chain)
        for mm in mms
        for vma in mm
    ]


def _regions(vma: Vma) -> range:
    return range(vma.start >> MIDDLE_SHIFT, (vma.end - 1 >> MIDDLE_SHIFT) + 1)


def _file_regions(vma: Vma) -> range:
    return range(vma.pgoff >> _PAGES_SHIFT, (vma.pgoff + vma.pages - 1 >> _PAGES_SHIFT) + 1)
