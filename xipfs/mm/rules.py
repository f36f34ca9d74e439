"""Which kernel the model is: eras, and the decisions that differ between them as pure functions.

Every place where two kernels part is one field of ``Kernel``; the code of the model reads fields,
never an era's name. So an era is a row of a table that can be read against the rules, a test can
break one rule by replacing one field, and ``xipfs model diff`` compares two rows.

The functions below take and return plain integers and booleans. They hold no state, so that a
compiled bulk path can use the very functions that the readable path uses.

The row 6.1 is what the recorded kernels do; where a rule of the later sources differs from the
recording, it is in row 6.12. Rows 2.6.26 to 3.7 follow rules read from 2.6.32 and the mails of
the patch series.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from xipfs.errors import UsageError
from xipfs.mm.flags import (
    VM_ACCESS_FLAGS,
    VM_INSERTPAGE,
    VM_MAYWRITE,
    VM_MIXEDMAP,
    VM_PFNMAP,
    VM_SHARED,
    VM_WRITE,
)
from xipfs.mm.pte import PTE_DEVMAP, PTE_SPECIAL


@dataclass(frozen=True)
class Kernel:
    """One kernel's answers; defaults are those of 6.1. Rule numbers (RULES.md) stand beside."""

    name: str
    #: Whether a pte_special architecture exists at all; else only the pfn tells (P9, I20).
    special_bit: bool = True
    #: ->nopfn is called for an empty PTE (I15 to I19).
    nopfn: bool = False
    #: vm_insert_mixed() exists (I10).
    insert_mixed: bool = True
    #: Insertion answers VM_FAULT codes, not errnos (I7, I11).
    insert_returns_vm_fault: bool = True
    #: vm_insert_pfn() checks the address range (I6).
    insert_pfn_checks_range: bool = True
    #: vm_insert_mixed() in a VMA that is not MIXED (I10, I11; 6.1 recorded: BUG).
    mixed_without_flag: Literal["BUG", "SIGBUS"] = "BUG"
    #: The XIP fault handler when two threads race and the second finds the PTE set (I14).
    ebusy_in_handler: Literal["BUG", "ok"] = "ok"
    #: The flag that vm_insert_page() leaves in the VMA (I9).
    insert_page_flag: int = VM_MIXEDMAP
    #: Flags that remap_pfn_range() adds are DONTEXPAND and DONTDUMP too (I1).
    remap_sets_dontexpand: bool = True
    #: remap_pfn_range() of the whole of a shared VMA sets vm_pgoff too (I3).
    remap_sets_shared_pgoff: bool = False
    #: vm_normal_page() of a pfn without struct page in an ordinary VMA: a bad PTE, one only with
    #: CONFIG_DEBUG_VM, or a crash either way (N3, N4).
    invalid_pfn: Literal["bad", "bad if debug", "BUG"] = "bad"
    #: The zero page may be inserted only where a write cannot follow (I12).
    checks_zero_page: bool = False
    #: vm_normal_page() without the bit: the zero page in a MIXED VMA is raw (N10).
    mixed_zero_is_raw: bool = False
    #: A private or anonymous read of nothing maps the zero page: never, special-bit kernels only,
    #: or always (P8).
    zero_page: Literal["never", "special", "always"] = "always"
    #: An empty PTE of a VMA without fault handler (I22).
    no_handler: Literal["anonymous", "SIGBUS"] = "SIGBUS"
    #: A private write fault lets the DAX handler copy into the new page (F11).
    handler_copies: bool = True
    #: A shared write to a raw read-only PTE (F13).
    raw_shared_write: Literal["cow", "reuse", "pfn_mkwrite"] = "pfn_mkwrite"
    #: ->pfn_mkwrite alone makes a VMA write-notified (F9).
    notify_by_pfn_mkwrite: bool = True
    #: How an anonymous page that a write finds read-only is judged reusable (F20).
    anon_reuse: Literal["mapcount", "exclusive"] = "exclusive"
    #: get_user_pages of a raw PTE (G2).
    gup_raw: Literal["livelock", "EFAULT", "EEXIST"] = "EEXIST"
    #: get_user_pages may return the zero page (G4).
    gup_zero_page: bool = True
    #: A forced write into a shared VMA without VM_WRITE (F14).
    gup_forced_shared: Literal["cow", "EFAULT"] = "EFAULT"
    #: FOLL_PIN counts 1024 (G5).
    pin_bias: bool = True
    #: fork copies every MIXED VMA (K1).
    fork_copies_mixed: bool = True
    #: VM_SPECIAL contains VM_MIXEDMAP: such VMAs are neither locked nor merged (K19 to K21).
    mixed_is_special: bool = True
    #: A VMA without anon_vma does not grow by one that has private copies (is_mergeable_anon_vma
    #: since 3.0); before, it did.
    merge_needs_anon_vma: bool = True
    #: mprotect makes exclusive anonymous pages writable at once (K9).
    mprotect_upgrades_anon: bool = True
    #: ... clean ones too; 6.1 asks for a dirty PTE (can_change_pte_writable).
    mprotect_upgrades_clean: bool = False
    #: Read faults map cached neighbours (F22).
    fault_around: bool = True
    #: A hole of an XIP file: the "sparse page" of filemap_xip, or the zero page as in DAX (F8, R4).
    xip_hole: Literal["sparse", "zero"] = "zero"
    #: DAX pages are mapped: raw in MIXED VMAs, with the devmap bit, or counted (H8, H9).
    dax: Literal["mixed", "devmap", "counted"] = "devmap"
    #: ->fault in a PFNMAP VMA (I21).
    fault_in_pfnmap: Literal["BUG", "ok"] = "ok"
    #: mkwrite insertion over another pfn: warn and NOPAGE, or -EFAULT and SIGBUS (I13).
    mkwrite_mismatch: Literal["warn", "SIGBUS"] = "warn"
    #: MADV_POPULATE_READ and MADV_POPULATE_WRITE are known.
    madv_populate: bool = True
    #: MADV_COLD and MADV_PAGEOUT are known.
    madv_cold: bool = True
    #: MADV_FREE and MADV_WIPEONFORK are known.
    madv_free: bool = True
    #: MREMAP_DONTUNMAP is known: no, or of any VMA (K11).
    mremap_dontunmap: Literal["no", "any"] = "any"
    #: A mapping of old size 0 of a private VMA is refused by mremap.
    mremap_private_dup: Literal["ok", "EINVAL"] = "EINVAL"


_OLD: Final = {
    "insert_returns_vm_fault": False,
    "remap_sets_dontexpand": False,
    "no_handler": "anonymous",
    "handler_copies": False,
    "raw_shared_write": "reuse",
    "notify_by_pfn_mkwrite": False,
    "anon_reuse": "mapcount",
    "gup_raw": "EFAULT",
    "gup_forced_shared": "cow",
    "pin_bias": False,
    "mixed_is_special": False,
    "mprotect_upgrades_anon": False,
    "fault_around": False,
    "xip_hole": "sparse",
    "dax": "mixed",
    "madv_populate": False,
    "madv_cold": False,
    "madv_free": False,
    "mremap_dontunmap": "no",
    "mremap_private_dup": "ok",
    "zero_page": "special",
}
_2_6: Final = {
    **_OLD,
    "insert_page_flag": VM_INSERTPAGE,
    "fork_copies_mixed": False,
    "merge_needs_anon_vma": False,
}


def _kernel(name: str, **fields: object) -> Kernel:
    return Kernel(name=name, **fields)  # type: ignore[arg-type]


#: Era name to its kernel, oldest first.
ERAS: Final[dict[str, Kernel]] = {
    kernel.name: kernel
    for kernel in (
        _kernel(
            "seed",
            **{
                **_2_6,
                "special_bit": False,
                "nopfn": True,
                "insert_mixed": False,
                "fault_in_pfnmap": "BUG",
                "invalid_pfn": "bad if debug",
                "insert_pfn_checks_range": False,
                "zero_page": "never",
                "raw_shared_write": "cow",
                "gup_raw": "livelock",
                "gup_zero_page": False,
            },
        ),
        _kernel(
            "2.6.26",
            **{
                **_2_6,
                "nopfn": True,
                "ebusy_in_handler": "BUG",
                "invalid_pfn": "BUG",
                "zero_page": "never",
                "gup_zero_page": False,
            },
        ),
        _kernel("2.6.32", **{**_2_6, "remap_sets_shared_pgoff": True}),
        _kernel("3.7", **{**_OLD, "remap_sets_dontexpand": True}),
        Kernel("6.1"),
        Kernel(
            "6.12",
            mixed_without_flag="SIGBUS",
            checks_zero_page=True,
            mixed_zero_is_raw=True,
            mprotect_upgrades_clean=True,
        ),
        Kernel(
            "new",
            mixed_without_flag="SIGBUS",
            checks_zero_page=True,
            mixed_zero_is_raw=True,
            mprotect_upgrades_clean=True,
            dax="counted",
            mkwrite_mismatch="SIGBUS",
        ),
    )
}
DEFAULT_ERA: Final = "6.1"
_OF_THE_ERA: Final = Kernel("the era's")


@dataclass(frozen=True)
class Rules:
    """A named rule set: an era, and whether its architecture has the special PTE bit.

    ``pte_special=None`` takes what the era has. ``debug_vm`` is CONFIG_DEBUG_VM (rule N3).
    ``kernel`` may be given to break or mend single rules; by default it is the era's row.

    >>> Rules().name, Rules(era="6.1", pte_special=False).name
    ('6.1', '6.1-nospecial')
    >>> Rules.parse("2.6.32-nospecial").pte_special
    False
    >>> Rules(era="seed").pte_special
    False
    """

    era: str = DEFAULT_ERA
    pte_special: bool | None = None
    debug_vm: bool = False
    kernel: Kernel = field(default=_OF_THE_ERA, repr=False)

    def __post_init__(self) -> None:
        if self.era not in ERAS:
            raise UsageError(f"no rule set for era {self.era!r}", expected=", ".join(ERAS))
        if self.kernel is _OF_THE_ERA:
            object.__setattr__(self, "kernel", ERAS[self.era])
        if self.pte_special is None:
            object.__setattr__(self, "pte_special", self.kernel.special_bit)
        if self.pte_special and not self.kernel.special_bit:
            raise UsageError(
                f"era {self.era!r} has no special PTE bit (rule I20)", expected="pte_special=False"
            )

    @classmethod
    def parse(cls, text: str) -> Rules:
        """Return the rule set named ``text``: an era, ``-nospecial`` added for lack of the bit."""
        era, dash, suffix = text.strip().partition("-")
        if dash and suffix != "nospecial":
            raise UsageError(f"no rule set {text!r}", expected=", ".join(rule_set_names()))
        if era not in ERAS:
            raise UsageError(f"no rule set {text!r}", expected=", ".join(rule_set_names()))
        return cls(era=era, pte_special=False if dash else None)

    @property
    def name(self) -> str:
        """The name that ``parse`` takes."""
        return self.era + ("" if self.pte_special or not self.kernel.special_bit else "-nospecial")

    @property
    def maps_zero_page(self) -> bool:
        """Whether reading untouched anonymous memory maps the zero page (rule P8)."""
        return self.kernel.zero_page == "always" or (
            self.kernel.zero_page == "special" and bool(self.pte_special)
        )


def rule_set_names() -> list[str]:
    """Return every name that ``Rules.parse`` takes."""
    plain = list(ERAS)
    return plain + [f"{name}-nospecial" for name in plain if ERAS[name].special_bit]


#: What ``pte_kind`` answers.
RAW: Final = 0
NORMAL: Final = 1
BAD: Final = 2


def vma_permits(vm_flags: int, write: bool) -> bool:
    """Whether the VMA allows the access at all; else it is a SIGSEGV (access_error)."""
    return bool(vm_flags & (VM_WRITE if write else VM_ACCESS_FLAGS))


def is_cow_mapping(vm_flags: int) -> bool:
    """Return whether writes to the VMA are copied: private and may be written (rule N1)."""
    return vm_flags & (VM_SHARED | VM_MAYWRITE) == VM_MAYWRITE


def pte_kind_special(pte: int, vm_flags: int, valid: bool, is_zero: bool) -> int:
    """vm_normal_page() with the special bit: how the PTE was inserted decides (rules N9, N10)."""
    if not pte & PTE_SPECIAL:
        return NORMAL if valid else BAD
    if vm_flags & (VM_PFNMAP | VM_MIXEDMAP) or is_zero or pte & PTE_DEVMAP:
        return RAW
    return BAD


def pte_kind_nospecial(
    pfn: int, vm_flags: int, linear_pfn: int, valid: bool, is_zero: bool, mixed_zero_is_raw: bool
) -> int:
    """vm_normal_page() without the bit: the pfn decides (rules N2 to N6).

    ``linear_pfn`` is vm_pgoff plus the page's offset in the VMA.
    """
    if vm_flags & VM_MIXEDMAP:
        if not valid or (is_zero and mixed_zero_is_raw):
            return RAW
        return NORMAL
    if vm_flags & VM_PFNMAP and (pfn == linear_pfn or not is_cow_mapping(vm_flags)):
        return RAW
    if is_zero:
        return RAW
    return NORMAL if valid else BAD


def fork_needs_copy(vm_flags: int, has_anon_vma: bool, copies_mixed: bool) -> bool:
    """Whether fork copies this VMA's PTEs rather than let the child fault (rule K1)."""
    if vm_flags & (VM_PFNMAP | VM_INSERTPAGE) or has_anon_vma:
        return True
    return copies_mixed and bool(vm_flags & VM_MIXEDMAP)


def wants_writenotify(
    vm_flags: int, has_mkwrite: bool, can_writeback: bool, skips_insertpage: bool
) -> bool:
    """Whether a shared writable VMA starts read-only to see the first write (rule F9)."""
    if vm_flags & (VM_WRITE | VM_SHARED) != VM_WRITE | VM_SHARED:
        return False
    if has_mkwrite:
        return True
    if vm_flags & VM_PFNMAP or (skips_insertpage and vm_flags & VM_INSERTPAGE):
        return False
    return can_writeback


def anon_may_be_reused_by_count(refcount: int, in_swap_cache: bool) -> bool:
    """Whether a page that is not flagged exclusive has no other user (rule F20, 6.12)."""
    return refcount == 1 + in_swap_cache
