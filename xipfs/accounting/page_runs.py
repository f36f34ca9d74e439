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
        self._items: deque[tuple[T, int, range]] = deque()  # item, inode, its first to last page
        self._sizes: deque[int] = deque()
        #: Number of the oldest item; 0 stands for none in the arrays.
        self._oldest = 1
        self._stretches: dict[tuple[int, int], npt.NDArray[np.int64]] = {}

    def __bool__(self) -> bool:
        return bool(self._items)

    def get(self, ino: int, index: int) -> T | None:
        """Return the newest item told of the page."""
        stretch = self._stretches.get((ino, index >> _SHIFT))
        number = 0 if stretch is None else int(stretch[index & _MASK])
        return self._items[number - self._oldest][0] if number >= self._oldest else None

    def count(self, ino: int, pages: range | list[int]) -> Iterator[tuple[T, int]]:
        """Yield each item that is the newest of some of ``pages`` (ascending), and of how many."""
        if len(pages) == 1:
            item = self.get(ino, pages[0])
            if item is not None:
                yield item, 1
            return
        parts = [
            stretch[where]
            for stretch, where in (
                (self._stretches.get((ino, number)), where) for number, where in _stretches(pages)
            )
            if stretch is not None
        ]
        if parts:
            numbers, counts = np.unique(np.concatenate(parts), return_counts=True)
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
                if number >= self._oldest:
                    yield self._items[number - self._oldest][0], count

    def tell(self, ino: int, pages: range | list[int], item: T) -> None:
        """Make ``item`` the newest of ``pages``, which ascend and are at least one."""
        number = self._oldest + len(self._items)
        for at, where in _stretches(pages):
            stretch = self._stretches.get((ino, at))
            if stretch is None:
                stretch = self._stretches[ino, at] = np.zeros(1 << _SHIFT, np.int64)
            stretch[where] = number
        self._items.append((item, ino, range(pages[0], pages[-1] + 1)))
        self._sizes.append(len(pages))
        self._pages += len(pages)
        while self._pages > self._pages_max:
            self._forget()

    def _forget(self) -> None:
        """Forget the oldest item, and the arrays in which nothing newer is left."""
        _, ino, span = self._items.popleft()
        self._pages -= self._sizes.popleft()
        self._oldest += 1
        for at in range(span.start >> _SHIFT, (span.stop - 1 >> _SHIFT) + 1):
            stretch = self._stretches.get((ino, at))
            if stretch is not None and int(stretch.max()) < self._oldest:
                del self._stretches[ino, at]


def _stretches(
    pages: range | list[int],
) -> Iterator[tuple[int, int | slice | npt.NDArray[np.int64]]]:
    """Yield (number of a stretch, which places in it) for ``pages``."""
    if len(pages) == 1:
        yield pages[0] >> _SHIFT, pages[0] & _MASK
    elif pages[-1] - pages[0] == len(pages) - 1:
        for at in range(pages[0] >> _SHIFT, (pages[-1] >> _SHIFT) + 1):
            first, last = max(pages[0], at << _SHIFT), min(pages[-1], at << _SHIFT | _MASK)
            yield at, slice(first & _MASK, (last & _MASK) + 1)
    else:
        numbers = np.array(pages, np.int64)
        of = numbers >> _SHIFT
        for at in np.unique(of).tolist():
            yield at, numbers[of == at] & _MASK
