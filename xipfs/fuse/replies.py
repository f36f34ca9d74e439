"""Answers that have the kernel take pages out of page tables, until it has done so.

A reply with another size or modification time than the last one makes the kernel drop the file's
pages (fuse_change_attributes, fuse_do_setattr: truncate_pagecache, invalidate_inode_pages2). The
thread that asked does it, on its way out of its system call: it may be anybody's, and while it
gets no processor nothing is dropped. What it unmaps makes no record until the page itself goes, and
what it unmaps of private copies none at all.

READDIRPLUS tells attributes too, but not to which thread: what follows from that is not known.

That it is done is proven by the thread being in another system call than the one it asked from, or
gone; /proc does not tell that of one that runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from xipfs.fs.types import Attr
from xipfs.trace import proc


@dataclass
class _Asker:
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
        self._askers: dict[int, list[_Asker]] = {}
        self.serials: Counter[int] = Counter()

    def to_act_on(self, tid: int, attr: Attr) -> Callable[[], None] | None:
        """Note what thread ``tid`` is about to be told; None if nothing follows from it.

        Else return what is to be done before the answer leaves, which reads /proc and may block.
        """
        ino = attr.ino
        if not self._is_mapped(ino):
            self._told.pop(ino, None)
            self._askers.pop(ino, None)
            self.serials.pop(ino, None)
            return None
        told = (attr.size_bytes, attr.mtime_ns)
        if tid <= 0 or self._told.get(ino) == told:
            return None
        self._told[ino] = told
        self.serials[ino] += 1
        asker = _Asker(tid)
        # Whoever asks again has done with what it asked before.
        others = [each for each in self._askers.get(ino, ()) if each.tid != tid]
        self._askers[ino] = [*others, asker]

        def look() -> None:
            asker.call = self._call_of(tid)

        return look

    def emptied(self, ino: int) -> None:
        """The kernel sets size and time by itself (O_TRUNC): any next answer may be news to it."""
        self._told.pop(ino, None)

    def unfinished(self) -> set[int]:
        """Return the files whose pages may be being dropped now. May block.

        The others' were dropped before this call.
        """
        left = set()
        for ino, askers in list(self._askers.items()):
            acting = [asker for asker in askers if not self._is_over(asker)]
            if acting:
                left.add(ino)
            for asker in askers:
                if asker not in acting and asker in self._askers.get(ino, ()):
                    self._askers[ino].remove(asker)
        return left

    def _is_over(self, asker: _Asker) -> bool:
        if asker.call is None:
            return False
        now = self._call_of(asker.tid)
        return now not in (asker.call, proc.RUNNING)
