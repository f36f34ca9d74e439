"""The observer's machine code: made before anything is served, once for an installation.

numba keeps what it compiled on disk. Compiling takes some 20 s of a processor, and a daemon that
does it while programs fault falls behind by more than its buffers hold. So ``xipfs mount`` looks
here first, and what is missing is compiled by a process of its own, which may fail or take too
long: the mount then works without, by Python. ``tools/setup`` runs the same.

Loading numba to ask whether its files are there takes most of a second, and importing the modules
it compiles a part of one. So a note beside the files says which they are, and what they were made
from.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import xipfs

_NOTE: Final = "xipfs-compiled.json"
_MAX_S: Final = 300.0
_CHILD: Final = """
import sys
sys.path.insert(0, sys.argv[1])
from xipfs.cli.compiling import compile_missing
compile_missing()
"""
_TRACING: Final = "/sys/kernel/tracing"
_PACKAGE: Final = Path(xipfs.__path__[0])
_PARTS: Final = ("trace", "accounting", "mm", "memory")
WITHOUT: Final = "faults are decoded and charged by Python, some 30 times slower"


def why_not() -> str:
    """Return why nothing can be compiled here; empty if it can."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    if _directory() is None:
        return "no directory for compiled code can be written (NUMBA_CACHE_DIR names one)"
    return ""


def is_ready() -> bool:
    """Return whether what the next mount loads is on disk."""
    directory = _directory()
    if directory is None:
        return False
    try:
        note = json.loads((directory / _NOTE).read_text())
        return bool(note["made_from"] == _made_from() and all(map(os.path.exists, note["files"])))
    except (ImportError, OSError, ValueError, KeyError, TypeError):
        return False


def is_used(observe: str) -> bool:
    """Return whether a mount with that observer runs compiled code."""
    return observe == "tracefs" or (observe == "auto" and os.access(_TRACING, os.W_OK))


def prepare(tell: Callable[[str], None]) -> None:
    """Compile what is not on disk; say so, and what is lost if that fails. Raises nothing."""
    if reason := why_not():
        tell(f"{reason}: {WITHOUT}")
        return
    if is_ready():
        return
    tell("compiling the observer's code, once for this installation (some 20 s) ...")
    start_s = time.monotonic()
    try:
        done = subprocess.run(
            # Of this very package, and with nothing of the current directory, in which somebody
            # else's files may be called like ours.
            [sys.executable, "-P", "-c", _CHILD, str(_PACKAGE.parent)],
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_MAX_S,
            check=False,
        )
        failure = "" if done.returncode == 0 else (done.stderr.strip() or "it failed")
    except subprocess.TimeoutExpired:
        failure = f"not done within {_MAX_S:.0f} s"
    except OSError as error:
        failure = str(error)
    if failure:
        tell(f"not compiled ({failure.splitlines()[-1]}): until it is, {WITHOUT}")
    else:
        tell(f"compiled in {time.monotonic() - start_s:.0f} s")


def _directory() -> Path | None:
    """Return where numba keeps what it compiled; None where it can write nowhere.

    It takes the first of these that it can write to, and the same one for all of our modules.
    """
    given = os.environ.get("NUMBA_CACHE_DIR")
    of_user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    choice = [_PACKAGE / "trace/__pycache__"]
    if not of_user.startswith("~"):  # a user without a home
        choice.append(Path(of_user, "numba"))
    for directory in [Path(given), *choice] if given else choice:
        above = (directory, *directory.absolute().parents)
        # Not Path.exists, which raises where a directory above may not be searched.
        there = next(path for path in above if os.path.exists(path))
        if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
            return directory
    return None


def _made_from() -> str:
    """Return a digest of all that decides what the code is: sources, versions, the processor."""
    digest = hashlib.sha256()
    for part in _PARTS:
        for path in sorted((_PACKAGE / part).glob("*.py")):
            digest.update(bytes(path) + b"\0" + path.read_bytes())
    settings = {name: value for name, value in os.environ.items() if name.startswith("NUMBA_")}
    with open("/proc/cpuinfo") as cpuinfo:
        processor = {line for line in cpuinfo if line.startswith(("model name", "flags"))}
    told = [sys.version, version("numba"), version("numpy")]
    digest.update(repr([*told, sorted(settings.items()), sorted(processor)]).encode())
    return digest.hexdigest()


def _compile() -> None:
    """Compile all, and note which files hold it."""
    from xipfs.accounting import charge_code
    from xipfs.trace import machine_code, plain_code
    from xipfs.trace.compiled import CompiledDecoder
    from xipfs.trace.formats import PageFormat
    from xipfs.trace.ring import Plan

    CompiledDecoder(Plan([], PageFormat(8, 16, 4096)))
    functions: list[Any] = [
        machine_code.decode,
        machine_code.merge,
        plain_code.run,
        charge_code.run,
        charge_code.zap,
    ]
    files = []
    for function in functions:
        where, name = Path(function.stats.cache_path), function.__name__
        module = function.__module__.rpartition(".")[2]
        found = sorted(map(str, where.glob(f"{module}.*{name}*")))
        if not any(path.endswith(".nbc") for path in found):
            raise OSError(f"numba kept nothing of {module}.{name} in {where}")
        files += found
    directory = _directory()
    assert directory is not None, "numba has written"
    note = directory / f"{_NOTE}.{os.getpid()}"
    note.write_text(json.dumps({"made_from": _made_from(), "files": files}))
    note.replace(directory / _NOTE)


def compile_missing() -> None:
    """Compile what is not on disk, in this process."""
    if not is_ready():
        _compile()


if __name__ == "__main__":
    compile_missing()
