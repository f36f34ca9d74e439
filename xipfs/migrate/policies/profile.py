"""``policy=profile``: the pages that a file names earn RAM at their first touch.

Signals used: faults, hint faults, READ and WRITE requests. The ``file`` (an absolute path) is JSON
with a list ``hottest`` of objects with ``ino`` and ``index``: what ``xipfs stat DIR --hottest N
--json`` prints after a run. With the pages that a run used most, N of them for N frames of RAM, it
finds more pages in RAM than FIFO when the run comes again; pages that the file does not name stay
where they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from xipfs.errors import UsageError
from xipfs.migrate.policy import TOUCHES, Move, Page, PteKind, Seen, Signal, promote


@dataclass
class Profile:
    """Reads the file once, when it is made."""

    SIGNALS: ClassVar[frozenset[str]] = TOUCHES
    file: str
    _pages: frozenset[Page] = field(default=frozenset(), init=False)

    def __post_init__(self) -> None:
        path = Path(self.file)
        if not path.is_absolute():
            raise UsageError(f"file={self.file} is not absolute", expected="file=/PATH")
        try:
            hottest = json.loads(path.read_bytes())["hottest"]
            self._pages = frozenset(_page(entry["ino"], entry["index"]) for entry in hottest)
        except OSError as error:
            raise UsageError(f"the profile {path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(
                f"the profile {path} is not one: {error!r}",
                expected='{"hottest": [{"ino": N, "index": N}, ...]}',
                remedy="make one with: xipfs stat DIR --hottest N --json",
            ) from None

    def plan(self, signal: Signal, _seen: Seen) -> Iterable[Move]:
        """Return the promotion of a page that the file names."""
        if signal.kind is PteKind.XIP and signal.page in self._pages:
            yield promote(signal.page, f"named in {Path(self.file).name[:100]}")


def _page(ino: object, index: object) -> Page:
    # JSON has true, 1.0 and (in Python) Infinity beside whole numbers.
    if type(ino) is not int or type(index) is not int or ino < 1 or index < 0:
        raise ValueError(f"ino {ino!r:.40}, index {index!r:.40}")
    return ino, index
