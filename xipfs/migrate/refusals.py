"""Why pages are not moved, and how often that is tried: for the command line too."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Final

#: Why a page was not moved, by what the engine's parts say. Nobody else is told EBUSY: to whoever
#: asked for the move, direct I/O is one more user of the page (see ``ERRNOS``).
REASONS: Final = {
    errno.EAGAIN: "pinned",
    errno.EBUSY: "direct_io",
    errno.ENOMEM: "no_ram",
}
#: The errno that each reason stands for, by its name, as in move_pages(2).
ERRNOS: Final = {
    "pinned": "EAGAIN",
    "direct_io": "EAGAIN",
    "no_ram": "ENOMEM",
    "gone": "ENOENT",
}
#: How often a pinned page is tried before it counts as refused: NR_MAX_MIGRATE_PAGES_RETRY of
#: Linux 6.3 and later (mm/migrate.c; the same 10 passes stand there as a number in 6.1).
PASSES_MAX: Final = 10


def errnos_of(reasons: Iterable[str]) -> dict[str, str]:
    """Return the name of the errno that each of ``reasons`` stands for.

    >>> errnos_of(["direct_io"])
    {'direct_io': 'EAGAIN'}
    """
    return {reason: ERRNOS[reason] for reason in reasons}
