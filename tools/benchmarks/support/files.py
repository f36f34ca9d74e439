"""What the filesystems hold: the same bytes as plain files on tmpfs and in an image beside them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.support.context import SEED, Context
from benchmarks.support.system import run

_CHUNK_BYTES = 1 << 20
#: Beyond the files' bytes an image needs room for its metadata and whole free sections.
_IMAGE_SLACK_BYTES = 64 << 20


def make_files(context: Context, sizes_bytes: Mapping[str, int]) -> tuple[Path, Path]:
    """Write files of seeded random bytes; return (directory on tmpfs, image that holds them too).

    ``sizes_bytes``: whole MiB by file name.
    """
    total_bytes = sum(sizes_bytes.values())
    image_bytes = total_bytes + _IMAGE_SLACK_BYTES
    context.require_space(total_bytes + image_bytes)
    source = context.work / "source"
    source.mkdir()
    random = np.random.default_rng(SEED)
    for name, size_bytes in sizes_bytes.items():
        assert size_bytes % _CHUNK_BYTES == 0, "a file is whole MiB"
        with open(source / name, "wb") as file:
            for _ in range(size_bytes // _CHUNK_BYTES):
                file.write(random.bytes(_CHUNK_BYTES))
    image = context.work / "bench.img"
    size = ["--size", str(image_bytes)]
    run([sys.executable, "-m", "xipfs", "mkfs", image, *size, "--root-dir", source])
    return source, image


def digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
