"""What a replay prints: the figures of a live mount's ``stat --json``, and what only it knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xipfs import __version__
from xipfs.migrate.refusals import errnos_of
from xipfs.migrate.registry import REPLAY_ONLY
from xipfs.replay.choice import Choice
from xipfs.replay.machine import Replay
from xipfs.replay.trace import Progress, recorded, rows_of, touches_of
from xipfs.stats import snapshot
from xipfs.stats.cost import cost
from xipfs.stats.trace_file import TraceReader


def replay_file(path: Path, choice: Choice, progress: Progress | None = None) -> Replay:
    """Replay the trace at ``path``; raise TraceError for a file that is none, cut or old."""
    with TraceReader(path) as trace:
        replay = Replay(recorded(trace, path), choice)
        if replay.policy in REPLAY_ONLY:
            replay.steering.foresee(touches_of(trace))
        for row in rows_of(trace, progress):
            replay.apply(row)
    replay.finish()
    return replay


def outcome(replay: Replay) -> dict[str, Any]:
    """Return the figures of a finished replay."""
    engine, history = replay.engine.statistics(), replay.history.describe()
    del history["step_ns"]  # nothing takes time
    told, ram_series = replay.recorded, replay.ram_series
    return {
        "schema": snapshot.SCHEMA,
        "version": __version__,
        "vmstat": snapshot.vmstat(replay.fs, replay.accountant, engine.totals()),
        "memory": snapshot.memory(replay.fs),
        "ram_pages_used": None if ram_series is None else ram_series.describe(),
        "cost": cost(replay.fs, replay.profile),
        "migration": {
            **replay.steering.describe(),
            "fail_reasons": engine.fail_reasons,
            "fail_errno": errnos_of(engine.fail_reasons),
            **history,
            "by_process": snapshot.named(replay.accountant, history["by_process"]),
        },
        "processes": snapshot.processes(replay.accountant),
        "replay": {
            "as_recorded": replay.as_recorded,
            "exact": replay.as_recorded and told.is_whole and not replay.files_changed,
            "policy_files_changed": replay.files_changed,
            **vars(replay.counts),
        },
        "recorded": {
            "policy": told.policy,
            "parameters": dict(told.values),
            "ram_bytes": told.ram_bytes,
            "medium": told.medium,
            "lost": dict(told.lost),
        },
    }
