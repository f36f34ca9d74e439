"""From samples to figures: medians, extremes, and ratios taken round by round.

The machine may be busy with other things, so an absolute time says little and a ratio of two
medians not much more. The candidates of one round run right after each other; the ratio of a
round therefore sees the same disturbance in both, and what is told is the median of these ratios
with the lowest and the highest.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

#: What one run of one candidate gave: figures by name, the unit at the end of the name.
Sample = Mapping[str, float]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, low and high of ``values`` (at least one)."""
    if not values:
        raise ValueError("no values; expected one per round")
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def compare(
    title: str,
    samples: Mapping[str, Sequence[Sample]],
    *,
    metric: str,
    baseline: str,
    command: str,
    also: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the comparison of ``metric`` over the candidates of ``samples``, JSON-ready.

    ``samples[candidate][round]`` holds the figures of a run; every candidate has the same rounds.
    ``ratio`` is candidate by ``baseline``: above 1 the candidate's figure is the larger one.
    ``also`` names figures that are told beside it, where a candidate has them.
    """
    base = samples[baseline]
    candidates = {}
    for name, rounds in samples.items():
        if len(rounds) != len(base):
            raise ValueError(f"{name} has {len(rounds)} rounds, expected {len(base)}")
        values = [float(sample[metric]) for sample in rounds]
        ratios = [value / float(of[metric]) for value, of in zip(values, base, strict=True)]
        candidates[name] = {
            "samples": values,
            **spread(values),
            "ratio": spread(ratios),
            "also": {
                figure: spread([float(sample[figure]) for sample in rounds])
                for figure in also
                if all(figure in sample for sample in rounds)
            },
        }
    return {
        "title": title,
        "metric": metric,
        "baseline": baseline,
        "command": command,
        "candidates": candidates,
    }
