"""The loop that makes hint faults: a few mapped pages at a time lose their PTEs in the kernel.

``-o hint=PAGES_PER_S`` bounds the rate. Pages are invalidated as for a migration (a page that is
dirty comes home first), so a hint costs the program one fault and, the kernel having no copy any
more, one READ. What the faults say is accounting's to judge.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from xipfs.accounting.accountant import Accountant
from xipfs.accounting.causes import HINT
from xipfs.fuse.notify import Notifier

log = logging.getLogger(__name__)

_INTERVAL_S: Final = 0.1


class HintScanner:
    """Spends an allowance of pages a second; ``pages_hinted`` is how many it has invalidated."""

    def __init__(
        self,
        accountant: Accountant,
        notifier: Notifier,
        drain: Callable[[], Awaitable[int]],
        pages_per_s: int,
        note: Callable[..., None],
    ) -> None:
        self._accountant = accountant
        self._notifier = notifier
        self._drain = drain
        self._pages_per_s = pages_per_s
        self._note = note
        self._allowance = 0.0
        self.pages_hinted = 0

    async def run(self) -> None:
        """Scan for as long as the mount lives."""
        while True:
            await trio.sleep(_INTERVAL_S)
            # What a slow kernel could not take is not saved up: a burst would be no sample.
            earned = self._pages_per_s * _INTERVAL_S
            self._allowance = min(self._allowance + earned, max(earned, 1.0))
            if self._allowance >= 1:
                await self._hint(int(self._allowance))

    async def _hint(self, count: int) -> None:
        # What has faulted until now is charged first: it was no answer to this hint.
        await self._drain()
        pages = self._accountant.mark_hints(count)
        self._note("hint", marked=pages)
        self._allowance -= len(pages)
        try:
            await self._notifier.invalidate_all(pages, HINT)
        except OSError:
            # The marks stay; a page that was kept makes no fault, and its mark goes with the next.
            log.exception("%d hinted pages not invalidated", len(pages))
        self.pages_hinted += len(pages)
