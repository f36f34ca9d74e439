"""The observer's own threads: a defect in one is told and leaves whoever comes later served."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from xipfs.errors import ObserverError
from xipfs.trace.observer import Observer
from xipfs.trace.pids import PidFilter
from xipfs.trace.rings import Rings


@pytest.fixture
def child() -> Iterator[int]:
    process = subprocess.Popen(["sleep", "60"])
    yield process.pid
    process.kill()
    process.wait()


def test_the_pid_filter_tells_who_asked_and_serves_the_next(
    tmp_path: Path, child: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = tmp_path / "set_event_pid"
    listing.touch()
    filter_ = PidFilter(tmp_path, 0, lambda _adoption: None)
    append = PidFilter._append
    failures = [RuntimeError("a defect"), OSError(22, "refused")]

    def failing(self: PidFilter, tids: Iterable[int]) -> None:
        if failures:
            raise failures.pop(0)
        append(self, set(tids))

    monkeypatch.setattr(PidFilter, "_append", failing)
    try:
        for said in ("RuntimeError.'a defect'.", "refused"):
            with pytest.raises(ObserverError, match=said):
                filter_.add((child,), 30)
        filter_.add((child,), 30)
        assert str(child) in listing.read_text().split()
    finally:
        filter_.close()


@pytest.mark.expects_log
def test_a_pump_that_fails_says_so_and_leaves_the_rings_to_drains(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail() -> None:
        raise MemoryError("injected")

    observer = object.__new__(Observer)
    observer._closing = threading.Event()
    observer._rings = cast(Rings, SimpleNamespace(pump=fail))
    observer._pump_until_closed()
    (record,) = caplog.records
    assert record.getMessage() == "the trace's rings are emptied by drains only from now on"
