"""The library of exact mode: compiled from ``preload/register.c`` when it is first needed.

It is kept in /var/cache/xipfs (root) or the user's cache directory, under a name made from its
source, so that a new version never meets an old library. The programs it is loaded into may run as
other users, so what root makes is where everybody can read it, and no one else can write.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from xipfs.errors import XipfsError

SOURCE: Final = Path(__file__).parents[1] / "preload" / "register.c"
COMPILERS: Final = ("cc", "gcc", "clang")
#: initfirst: its constructor runs before those of the program's own libraries.
_FLAGS: Final = ("-O2", "-shared", "-fPIC", "-Wl,-z,initfirst")
_LIBRARIES: Final = ("-ldl", "-pthread")


class PreloadError(XipfsError):
    """The library of exact mode cannot be made."""


def compiler() -> str | None:
    """Return the C compiler that would be used, None if there is none."""
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


def cache_directory() -> Path:
    """Return where the library is kept."""
    if os.geteuid() == 0:
        return Path("/var/cache/xipfs")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xipfs"


def library(directory: Path | None = None) -> Path:
    """Return the library, compiling it if it is not there."""
    directory = cache_directory() if directory is None else directory
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(_FLAGS).encode()).hexdigest()[:16]
    path = directory / f"register-{platform.machine()}-{key}.so"
    _make_directory(directory)
    if not path.exists():
        _compile(path)
    return path


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        status = directory.stat()
    except OSError as error:
        raise PreloadError(f"{directory} cannot be made: {error.strerror}") from None
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
        raise PreloadError(
            f"others can write to {directory}: what lies there is not loaded into programs",
            expected=f"a directory of uid {os.geteuid()} that only its owner can write to",
        )


def _compile(path: Path) -> None:
    program = compiler()
    if program is None:
        raise PreloadError(
            "exact mode needs a C compiler to make its library, and there is none",
            expected=" or ".join(COMPILERS),
            remedy="apt-get install gcc libc6-dev",
        )
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        command = [program, *_FLAGS, "-o", str(made), str(SOURCE), *_LIBRARIES]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise PreloadError(
                f"{program} cannot compile {SOURCE}: {done.stderr.strip().splitlines()[:1]}",
                remedy="apt-get install gcc libc6-dev linux-libc-dev",
            )
        made.chmod(0o755)
        # Into place in one step: another run may be doing the same.
        made.rename(path)
