"""``policy=off``: no page moves unless somebody asks for it by hand.

Signals used: none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from xipfs.migrate.policy import Move, Seen, Signal


@dataclass
class Off:
    """Hears nothing."""

    SIGNALS: ClassVar[frozenset[str]] = frozenset()

    def plan(self, _signal: Signal, _seen: Seen) -> Iterable[Move]:
        """Return nothing."""
        return ()
