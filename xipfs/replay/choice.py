"""What a replay is asked to change, and what it alone can count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from xipfs.memory.profiles import Profile

#: From a plan to its move on a mount at rest: an invalidation and a drain of what has settled.
DELAY_NS: Final = 5_000_000


@dataclass(frozen=True)
class Choice:
    """What to replay with; None: as recorded."""

    policy: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    ram_bytes: int | None = None
    profile: Profile | None = None
    delay_ns: int = DELAY_NS


@dataclass
class Replayed:
    """Counts of what the trace alone does not tell; a *touch* is an access that it shows."""

    touches: int = 0
    touches_in_ram: int = 0
    faults_left_out: int = 0
    faults_made: int = 0
    ptes_taken: int = 0
    requests_failed: int = 0
    moves_differ: int = 0
