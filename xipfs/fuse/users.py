"""Which processes may map a file of the mount: those that opened it and those known to map it."""

from __future__ import annotations

from collections import Counter

from xipfs.accounting.accountant import Accountant


class Users:
    """By inode the processes that have it open, as OPEN and RELEASE told; and who maps it."""

    def __init__(self, accountant: Accountant) -> None:
        self._accountant = accountant
        self._openers: dict[int, Counter[int]] = {}

    def opened(self, ino: int, pid: int) -> None:
        """Hear of an OPEN by a thread of the process (0: outside our pid namespace)."""
        if pid > 0:
            self._openers.setdefault(ino, Counter())[pid] += 1

    def closed(self, ino: int, pid: int) -> None:
        """Hear of the RELEASE of what ``pid`` had opened; mappings keep a file open, too."""
        openers = self._openers.get(ino)
        if openers is None:
            return
        openers[pid] -= 1
        if openers[pid] <= 0:
            del openers[pid]
        if not openers:
            del self._openers[ino]

    def of(self, ino: int) -> set[int]:
        """Return the processes; one that is not observed and inherited it by fork is not known."""
        return {*self._openers.get(ino, ()), *self._accountant.pids_mapping(ino)}
