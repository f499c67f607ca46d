"""Files written so that, whenever the process or the machine stops, the old or the new one is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Where to write a file beside its place, with the same ending; what is written takes the place at the end.

    Each writer has a file of its own. Nothing is left of it where an error comes before.
    """
    part = path.with_name(f".{path.stem}-{uuid4().hex}{path.suffix}")
    try:
        yield part
        put(part, path)
    finally:
        part.unlink(missing_ok=True)


def replace(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    with aside(path) as part:
        part.write_bytes(content)


def put(part: Path, path: Path) -> None:
    """Moves a file that is written to another's place in the same folder, once it is on disk."""
    _sync(part, os.O_RDWR)
    part.replace(path)
    _sync(path.parent, os.O_RDONLY)


def _sync(path: Path, mode: int) -> None:
    handle = os.open(path, mode)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
