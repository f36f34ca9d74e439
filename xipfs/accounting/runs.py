"""What one command and its descendants did (``xipfs run``): pages mapped with and without a fault.

A page that fault-around mapped makes no fault at its first touch, so how often it was touched, and
whether at all, is not known. Exact mode registers a program's mappings with userfaultfd from a
preloaded library, and then the kernel maps one page a fault. The library says when it has done so
(``events.Registered``), hence each page that came without a fault has one of four reasons.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from xipfs.trace import events as ev

#: Commands whose figures are kept; the oldest are forgotten.
KEPT_RUNS: Final = 64
#: Names of programs that are kept apart in one command's figures.
KEPT_NAMES: Final = 256
_OTHER_NAMES: Final = "(others)"


@dataclass
class Run:
    """One command's figures; ``root`` is its process."""

    root: int
    faults: int = 0
    """All faults on the mount's files, later ones on a page included."""
    own: int = 0
    """Pages that a fault of their own mapped."""
    before: int = 0
    """Pages without own fault, in a program that had not registered yet: by exec, the loader."""
    shared: int = 0
    """... in shared mappings of a program that has registered what can be: the others cannot."""
    past: int = 0
    """... in private mappings of such a program, which its library did not see being made."""
    unsure: int = 0
    """Pages of these, and of ``without``, of which no event tells whether they were mapped."""
    spaces: int = 0
    """Address spaces that touched the mount or registered."""
    registered: int = 0
    """Address spaces that registered."""
    without: Counter[str] = field(default_factory=Counter)
    """Pages without own fault of ended programs that never registered, by name."""
    pending: dict[int, int] = field(default_factory=dict)
    """The same by address space, of programs that live and may still register."""


class Runs:
    """The followed commands. ``root_of(pid)`` names the followed process that ``pid`` stems from.

    Costs nothing while no command is followed.
    """

    def __init__(self, root_of: Callable[[int], int | None], comm: Callable[[int], str]) -> None:
        self._root_of = root_of
        self._comm = comm
        self._runs: OrderedDict[int, Run] = OrderedDict()
        #: Of each address space that belongs to a command: the command, and if it is registered.
        self._spaces: dict[int, tuple[Run, bool]] = {}
        self._pids: dict[int, int] = {}

    def follow(self, root: int) -> None:
        """Begin a command's figures."""
        self._runs.pop(root, None)
        self._runs[root] = Run(root)
        if len(self._runs) > KEPT_RUNS:
            self._runs.popitem(last=False)

    def fault(self, event: ev.Fault) -> None:
        """Count a fault, and the page that it mapped."""
        maps = not event.protection and event.verdict in (ev.MAJOR, ev.MINOR)
        self.faults(event.mm, event.pid, 1, int(maps))

    def faults(self, mm: int, pid: int, faults: int, own: int) -> None:
        """Count faults of one address space; ``own`` of them mapped a page that was not mapped."""
        if self._runs and (known := self._space(mm, pid)) is not None:
            known[0].faults += faults
            known[0].own += own

    def around(self, mm: int, pid: int, pages: int, *, shared: bool, unsure: int = 0) -> None:
        """Count ``pages`` that a fault beside them mapped, ``unsure`` of them only perhaps."""
        if not pages or not self._runs:
            return
        known = self._space(mm, pid)
        if known is None:
            return
        run, registered = known
        run.unsure += unsure
        if not registered:
            run.pending[mm] = run.pending.get(mm, 0) + pages
        elif shared:
            run.shared += pages
        else:
            run.past += pages

    def registered(self, event: ev.Registered) -> None:
        """From here on the program's mappings are mapped page by page."""
        known = self._space(event.mm, event.pid) if self._runs else None
        if known is None or known[1]:
            return
        run = known[0]
        run.registered += 1
        run.before += run.pending.pop(event.mm, 0)
        self._spaces[event.mm] = run, True

    def exit(self, mm: int) -> None:
        """An address space ended: it will not register any more."""
        known = self._spaces.pop(mm, None)
        pid = self._pids.pop(mm, 0)
        if known is not None and (pages := known[0].pending.pop(mm, 0)):
            names = known[0].without
            name = self._comm(pid) or f"pid {pid}"
            names[name if name in names or len(names) < KEPT_NAMES else _OTHER_NAMES] += pages

    def describe(self, root: int) -> dict[str, Any] | None:
        """Return a command's figures; None if it is not, or no longer, known."""
        run = self._runs.get(root)
        if run is None:
            return None
        without = run.without.copy()
        for mm, pages in run.pending.items():
            without[self._comm(self._pids[mm]) or f"pid {self._pids[mm]}"] += pages
        return {
            "faults": run.faults,
            "pages_own_fault": run.own,
            "pages_around": run.before + run.shared + run.past + without.total(),
            "pages_unsure": run.unsure,
            "programs": run.spaces,
            "programs_registered": run.registered,
            "programs_living": sum(known[0] is run for known in self._spaces.values()),
            "inexact": {
                "before_library": run.before,
                "shared_read_only": run.shared,
                "past_library": run.past,
                "without_library": without.total(),
            },
            "without_library": dict(sorted(without.items())),
        }

    def _space(self, mm: int, pid: int) -> tuple[Run, bool] | None:
        known = self._spaces.get(mm)
        if known is None:
            root = self._root_of(pid)
            run = None if root is None else self._runs.get(root)
            if run is None:
                return None
            run.spaces += 1
            self._pids[mm] = pid
            known = self._spaces[mm] = run, False
        return known
