"""The newest thing told of each page, where things are told of whole runs of pages.

A run of thousands costs a few array operations, not one entry a page. Each thing told has a number;
by file and stretch of 512 pages an array holds the number of the newest thing told of each page.
What is too old is known by its number: nothing has to be taken out of the arrays for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Final, Generic, TypeVar

import numpy as np
import numpy.typing as npt

_SHIFT: Final = 9
_MASK: Final = (1 << _SHIFT) - 1
T = TypeVar("T")


class PageRuns(Generic[T]):
    """By (inode, page) the newest item told of it, of the newest ``pages_max`` pages told.

    >>> runs = PageRuns(pages_max=100)
    >>> runs.tell(7, range(10, 600), "long")  # more than are remembered: only this one is
    >>> runs.tell(7, range(20, 21), "short")
    >>> runs.get(7, 599), runs.get(7, 20), runs.get(7, 9), runs.get(8, 20)
    (None, 'short', None, None)
    """

    def __init__(self, pages_max: int) -> None:
        self._pages_max = pages_max
        self._pages = 0
        self._items: deque[tuple[T, int, range]] = deque()  # item, inode, pages
        #: Number of the oldest item; 0 stands for none in the arrays.
        self._oldest = 1
        self._stretches: dict[tuple[int, int], npt.NDArray[np.int64]] = {}

    def get(self, ino: int, index: int) -> T | None:
        """Return the newest item told of the page."""
        stretch = self._stretches.get((ino, index >> _SHIFT))
        number = 0 if stretch is None else int(stretch[index & _MASK])
        return self._items[number - self._oldest][0] if number >= self._oldest else None

    def tell(self, ino: int, pages: range, item: T) -> None:
        """Make ``item`` the newest of ``pages``, which ascend by one and are at least one."""
        number = self._oldest + len(self._items)
        for at, where in _stretches(pages):
            stretch = self._stretches.get((ino, at))
            if stretch is None:
                stretch = self._stretches[ino, at] = np.zeros(1 << _SHIFT, np.int64)
            stretch[where] = number
        self._items.append((item, ino, pages))
        self._pages += len(pages)
        while self._pages > self._pages_max:
            self._forget()

    def _forget(self) -> None:
        """Forget the oldest item, and the arrays in which nothing newer is left."""
        _, ino, pages = self._items.popleft()
        self._pages -= len(pages)
        self._oldest += 1
        for at, _ in _stretches(pages):
            stretch = self._stretches.get((ino, at))
            if stretch is not None and int(stretch.max()) < self._oldest:
                del self._stretches[ino, at]


def _stretches(pages: range) -> Iterator[tuple[int, int | slice]]:
    """Yield (number of a stretch, which places in it) for ``pages``."""
    if len(pages) == 1:
        yield pages[0] >> _SHIFT, pages[0] & _MASK
        return
    for at in range(pages[0] >> _SHIFT, (pages[-1] >> _SHIFT) + 1):
        first, last = max(pages[0], at << _SHIFT), min(pages[-1], at << _SHIFT | _MASK)
        yield at, slice(first & _MASK, (last & _MASK) + 1)
