"""The modelled machine: physical memory, rules, counters, and the address spaces on it.

One ``Machine`` is one kernel. Counters that a reader wants often (``nr_special_ptes`` and so on)
are kept as the PTEs change, and recounted from the page tables by ``audit.check``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from xipfs.errors import OutOfFramesError
from xipfs.memory.frames import PG_RESERVED, PhysicalMemory
from xipfs.mm import rules as rule_functions
from xipfs.mm.bug import KernelBug
from xipfs.mm.rules import Rules
from xipfs.mm.swap import Swap
from xipfs.mm.table_pool import TablePool
from xipfs.units import PAGE_SIZE

if TYPE_CHECKING:
    from xipfs.mm.mm_struct import MmStruct
    from xipfs.mm.vma import Vma

#: Kinds of rss, and their index in MmStruct.rss (the kernel's MM_FILEPAGES and so on).
MM_FILEPAGES: Final = 0
MM_ANONPAGES: Final = 1
MM_SHMEMPAGES: Final = 2


@dataclass(frozen=True)
class MachineStatistics:
    """A snapshot of a machine's counters; counts of PTEs, pages and events since the start."""

    pgfault: int
    pgmajfault: int
    nr_special_ptes: int
    nr_normal_ptes: int
    nr_anon_pages: int
    bad_ptes: int
    address_spaces: int
    page_table_pages: int


class PageData:
    """The bytes of pages, where they are tracked: pfn to 4096 bytes; a missing page is zeros."""

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}

    def of(self, pfn: int) -> bytearray:
        """Return the writable bytes of ``pfn``."""
        page = self.pages.get(pfn)
        if page is None:
            page = self.pages[pfn] = bytearray(PAGE_SIZE)
        return page

    def copy(self, source: int, target: int) -> None:
        """Copy page ``source`` to page ``target``."""
        self.pages[target] = bytearray(self.pages.get(source, bytes(PAGE_SIZE)))

    def clear(self, pfn: int) -> None:
        """Make ``pfn`` zeros."""
        self.pages.pop(pfn, None)


class Machine:
    """One kernel: ``memory``, ``rules``, ``swap`` and counters.

    ``track_data=True`` also follows the bytes of pages; a live mount leaves it off, as the
    processes hold them. ``devmap_pfns`` are device pages with struct page (fsdax); ``thp``,
    ``ksm``, ``soft_dirty`` say whether the kernel was built with them. ``swap_on``: anonymous
    pages can leave. ``quirks`` switches on named oddities of one architecture or of one bug (see
    ``quirks.py``).

    >>> from xipfs.memory.frames import PhysicalMemory
    >>> machine = Machine(PhysicalMemory(ram_pages=8, nvram_pages=8))
    >>> machine.statistics().nr_normal_ptes
    0
    """

    def __init__(
        self,
        memory: PhysicalMemory,
        rules: Rules | None = None,
        *,
        track_data: bool = False,
        zero_pfn: int | None = None,
        devmap_pfns: frozenset[int] = frozenset(),
        thp: bool = True,
        ksm: bool = True,
        soft_dirty: bool = True,
        swap_on: bool = False,
        quirks: frozenset[str] = frozenset(),
    ) -> None:
        self.memory = memory
        self.rules = Rules() if rules is None else rules
        self.pte_special = bool(self.rules.pte_special)
        self.data: PageData | None = PageData() if track_data else None
        self.swap = Swap(swap_on)
        self.devmap_pfns = devmap_pfns
        self.thp = thp
        self.ksm = ksm
        self.soft_dirty = soft_dirty
        self.quirks = quirks
        self.mms: list[MmStruct] = []
        self.table_pool = TablePool()
        #: Whose system call runs; matters for the quirk of rule F16a only.
        self.current: MmStruct | None = None
        #: pfn to references held by neither a PTE nor a cache: pins, pipe buffers.
        self.pins: dict[int, int] = {}
        if zero_pfn is None:
            zero_pfn = memory.alloc_anon()
            memory.flags[zero_pfn] = PG_RESERVED
        self.zero_pfn: Final = zero_pfn
        self.pgfault = 0
        self.pgmajfault = 0
        self.nr_special_ptes = 0
        self.nr_normal_ptes = 0
        self.nr_anon_pages = 0
        #: "bad page map" reports the kernel would have logged (rules N3, N4, N10).
        self.bad_ptes = 0
        #: Address spaces that ended with rss left over (check_mm; rule N7).
        self.bad_rss = 0
        self._anon_vma_serial = 0

    def new_anon_vma(self) -> int:
        """Return a fresh anon_vma identity."""
        self._anon_vma_serial += 1
        return self._anon_vma_serial

    def vm_normal_page(self, vma: Vma, address: int, pte: int) -> int:
        """Return the pfn of the counted page behind a present PTE, or -1 if it has none.

        vm_normal_page() of section 2: by the special bit (N9, N10), or by the pfn (N2 to N6).
        A PTE that neither rule explains is counted in ``bad_ptes`` and taken as raw; KernelBug
        where the era would follow its pfn blindly.
        """
        pfn = pte >> 12
        valid = self.memory.pfn_valid(pfn)
        is_zero = pfn == self.zero_pfn
        if self.pte_special:
            kind = rule_functions.pte_kind_special(pte, vma.flags, valid, is_zero)
        else:
            kind = rule_functions.pte_kind_nospecial(
                pfn,
                vma.flags,
                vma.pgoff_of(address),
                valid,
                is_zero,
                self.rules.kernel.mixed_zero_is_raw,
            )
        if kind == rule_functions.NORMAL:
            return pfn
        if kind == rule_functions.BAD:
            self._bad_pte()
        return -1

    def _bad_pte(self) -> None:
        """Report a PTE that no rule explains, or crash on its pfn (rules N3, N4)."""
        answer = self.rules.kernel.invalid_pfn
        if answer == "BUG" or (answer == "bad if debug" and not self.rules.debug_vm):
            raise KernelBug("vm_normal_page", "!pfn_valid(pte_pfn(pte))")
        self.bad_ptes += 1

    def alloc_page(self) -> int:
        """Return a fresh anonymous frame, or -1 if memory is out (rule F19: no state change)."""
        try:
            pfn: int = self.memory.alloc_anon()
        except OutOfFramesError:
            return -1
        if self.data is not None:
            self.data.clear(pfn)
        return pfn

    def put_page(self, pfn: int) -> None:
        """Drop a reference of a counted page."""
        self.memory.put_page(pfn)

    def hold(self, pfn: int, references: int = 1) -> None:
        """Take ``references`` for a holder outside page tables and caches (a pin)."""
        assert self.memory.ref[pfn] > 0, pfn
        self.memory.ref[pfn] += references
        self.pins[pfn] = self.pins.get(pfn, 0) + references

    def release(self, pfn: int, references: int = 1) -> None:
        """Drop what ``hold`` took."""
        left = self.pins[pfn] - references
        assert left >= 0, (pfn, left)
        if left:
            self.pins[pfn] = left
        else:
            del self.pins[pfn]
        self.memory.ref[pfn] -= references - 1
        self.memory.put_page(pfn)

    def statistics(self) -> MachineStatistics:
        """Return the counters now."""
        return MachineStatistics(
            pgfault=self.pgfault,
            pgmajfault=self.pgmajfault,
            nr_special_ptes=self.nr_special_ptes,
            nr_normal_ptes=self.nr_normal_ptes,
            nr_anon_pages=self.nr_anon_pages,
            bad_ptes=self.bad_ptes,
            address_spaces=len(self.mms),
            page_table_pages=sum(mm.tables.table_pages() for mm in self.mms),
        )
