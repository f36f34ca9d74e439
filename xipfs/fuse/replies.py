"""Answers that have the kernel take pages out of page tables, until it has done so.

A reply with another size or modification time than the last one makes the kernel drop the file's
pages (fuse_change_attributes, fuse_do_setattr: truncate_pagecache, invalidate_inode_pages2). The
thread that asked does it, on its way out of its system call: it may be anybody's, and while it
gets no processor nothing is dropped. What it unmaps makes no record until the page itself goes, and
what it unmaps of private copies none at all.

READDIRPLUS tells attributes too, but not to which thread: what follows from that is not known.

That it is done is proven by the thread being in another system call than the one it asked from, or
gone; /proc does not tell that of one that runs.

Used from the trio thread, but for what says that it may block: that reads /proc and no more.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from xipfs.fs.types import Attr
from xipfs.trace import proc

#: A thread that has just asked is seen to wait within some microseconds, if it gets a processor.
_LOOKS_MAX: Final = 50
_PAUSE_S: Final = 0.0001


@dataclass
class Asker:
    """A thread that acts on an answer; ``call`` is what it asked from, None until that is read."""

    tid: int
    call: str | None = None


class Replies:
    """By file: what was answered last, and the threads that may be acting on it.

    Only files that somebody maps are kept. ``is_mapped(ino)`` tells that, ``call_of(tid)`` which
    call a thread is in (see ``trace.proc``). ``serials`` counts answers that had to be acted on.
    """

    def __init__(
        self, is_mapped: Callable[[int], bool], call_of: Callable[[int], str] = proc.call_of
    ) -> None:
        self._is_mapped = is_mapped
        self._call_of = call_of
        self._told: dict[int, tuple[int, int]] = {}
        self._askers: dict[int, list[Asker]] = {}
        self.serials: Counter[int] = Counter()

    def to_act_on(self, tid: int, attr: Attr) -> Callable[[], None] | None:
        """Note what thread ``tid`` is about to be told; None if nothing follows from it.

        Else return what is to be done before the answer leaves, which reads /proc and may block.
        """
        ino = attr.ino
        if not self._is_mapped(ino):
            self._forget(ino)
            return None
        told = (attr.size_bytes, attr.mtime_ns)
        if tid <= 0 or self._told.get(ino) == told:
            return None
        self._told[ino] = told
        self.serials[ino] += 1
        asker = Asker(tid)
        # Whoever asks again has done with what it asked before.
        others = [each for each in self._askers.get(ino, ()) if each.tid != tid]
        self._askers[ino] = [*others, asker]

        def look() -> None:
            # It waits for our answer, or is about to.
            for _ in range(_LOOKS_MAX):
                call = self._call_of(tid)
                if call != proc.RUNNING:
                    asker.call = call
                    return
                time.sleep(_PAUSE_S)

        return look

    def _forget(self, ino: int) -> None:
        for table in (self._told, self._askers, self.serials):
            table.pop(ino, None)

    def forget_unmapped(self) -> None:
        """Keep nothing of files that nobody maps any more."""
        for ino in self._told.keys() | self._askers.keys() | self.serials.keys():
            if not self._is_mapped(ino):
                self._forget(ino)

    def emptied(self, ino: int) -> None:
        """The kernel sets size and time by itself (O_TRUNC): any next answer may be news to it."""
        self._told.pop(ino, None)

    def askers(self) -> list[tuple[int, Asker]]:
        """Return who may be acting on an answer, each with the file it is of."""
        return [(ino, asker) for ino, askers in self._askers.items() for asker in askers]

    def over(self, askers: list[tuple[int, Asker]]) -> list[bool]:
        """Tell of each of ``askers`` whether it has acted. May block; changes nothing."""
        return [self._is_over(asker) for _, asker in askers]

    def unfinished(self, askers: list[tuple[int, Asker]], over: list[bool]) -> set[int]:
        """Return the files whose pages may be being dropped, by what ``over`` said of ``askers``.

        The others' were dropped before it looked.
        """
        left = set()
        for (ino, asker), is_over in zip(askers, over, strict=True):
            if not is_over:
                left.add(ino)
            elif ino in self._askers:
                self._askers[ino] = [each for each in self._askers[ino] if each is not asker]
        return left

    def _is_over(self, asker: Asker) -> bool:
        now = self._call_of(asker.tid)
        # Gone, or its call is known and it waits in another one.
        return now == "" or (asker.call is not None and now not in (asker.call, proc.RUNNING))
