"""Fixtures and rules of every level: what a test may need, and what no test may leave behind."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from acting import open_the_way, reference
from calltables import Table
from live import ROOT, Mounts, mounts_below

from xipfs.cli import compiling


def _missing(need: str) -> str | None:
    if need == "root":
        return None if os.geteuid() == 0 else "not root"
    if need == "fuse":
        return None if os.access("/dev/fuse", os.R_OK | os.W_OK) else "/dev/fuse is not usable"
    if need == "tracefs":
        return None if Path("/sys/kernel/tracing").is_dir() else "the kernel has no tracefs"
    raise ValueError(f"unknown need {need!r}")


def needs(*what: str) -> pytest.MarkDecorator:
    """Skip the test, saying why, where one of root, fuse, tracefs is not there: a decorator."""
    reasons = [reason for need in what if (reason := _missing(need)) is not None]
    return pytest.mark.skipif(bool(reasons), reason=f"needs {', '.join(what)}: {reasons}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-levels",
        metavar="FIRST-LAST",
        help="fail if one of these levels ran no test or skipped one, as CI demands",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        match = re.match(r"t(\d)_", item.path.name)
        if match:
            item.add_marker(pytest.mark.level(int(match[1])))


def pytest_collection_finish(session: pytest.Session) -> None:
    # The first mount of an installation compiles: no test's time limit is made for that.
    if any(re.match(r"t[4-6]_", item.path.name) for item in session.items):
        compiling.prepare(print)


class LevelGuard:
    """Counts what passed and was skipped per level; a silent level is a failed run."""

    def __init__(self, levels: range) -> None:
        self.levels = levels
        self.passed: Counter[str] = Counter()
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed[Path(report.fspath).name[:2]] += 1
        if report.skipped:
            self.skipped.append(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        silent = [f"t{level}" for level in self.levels if not self.passed[f"t{level}"]]
        if silent or self.skipped:
            print(
                f"\n--all-levels: levels without a passed test: {silent}; skipped: {self.skipped}"
            )
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_configure(config: pytest.Config) -> None:
    # A script's "&" ignores SIGINT for what it starts, and we for what we start and interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A worker of pytest-xdist runs a part of them only, and reports to who counts.
    if (levels := config.getoption("--all-levels")) and not hasattr(config, "workerinput"):
        first, last = map(int, levels.split("-"))
        config.pluginmanager.register(LevelGuard(range(first, last + 1)), "level-guard")


@pytest.fixture(autouse=True)
def _no_unexpected_log(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """A warning or worse that the test did not ask for fails it (mark: ``expects_log``)."""
    yield
    if request.node.get_closest_marker("expects_log"):
        return
    unexpected = [
        record.getMessage()
        for when in ("setup", "call")
        for record in caplog.get_records(when)
        if record.levelno >= logging.WARNING
    ]
    assert not unexpected, f"unexpected log lines: {unexpected}"


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Mounts]:
    """Makes mounts for one test and ends them."""
    with mounts_below(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounts]:
    """Makes mounts for the tests of one module, which keep to files of their own."""
    # They live as long as all tests of the module take, on a slow machine too.
    with mounts_below(tmp_path_factory.mktemp("shared"), watchdog_s=600) as made:
        yield made


@pytest.fixture(scope="module", params=["xipfs", "linux"])
def side(request: pytest.FixtureRequest, shared: Mounts) -> Iterator[Path]:
    """An xipfs mount, and then a directory of the kernel's own: both must do what a test says."""
    if request.param == "xipfs":
        mount = shared.mount(shared.image(size_bytes=64 << 20), "allow_other")
        open_the_way(mount.directory)
        yield mount.directory
    else:
        with reference(shared.directory / "linux") as directory:
            yield directory


@pytest.fixture
def place(side: Path, request: pytest.FixtureRequest) -> Path:
    """A directory of the test's own, which only root may change."""
    directory = side / re.sub(r"\W", "-", request.node.name)
    directory.mkdir(mode=0o755)
    return directory


@pytest.fixture
def table(place: Path) -> Iterator[Table]:
    """Runs tables of calls in the test's own directory."""
    made = Table(place)
    yield made
    made.end()


@pytest.fixture
def inside(place: Path) -> Iterator[Path]:
    """The test's own directory, open to all; the working directory meanwhile."""
    os.chmod(place, 0o777)
    with contextlib.chdir(place):
        yield place


@pytest.fixture(scope="session")
def touch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled tools/touch.c."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    program = tmp_path_factory.mktemp("touch") / "touch"
    source = ROOT / "tools" / "touch.c"
    subprocess.run(
        [compiler, "-O1", "-pthread", "-o", str(program), str(source)], check=True, timeout=60
    )
    return program
