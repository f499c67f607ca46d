"""Decoded arrays kept on disk, so that a dataset is decoded once: below every loader."""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from budgetnet.errors import DataError
from budgetnet.files import aside

LARGE = 1 << 30  # bytes; a larger array stays on disk and is read through a memory map
VERSION = 1  # of what the arrays hold; a new number leaves the old files unread


def directory() -> Path:
    """The folder of the cache: `$BUDGETNET_CACHE`, or `~/.cache/budgetnet`."""
    return Path(os.environ.get("BUDGETNET_CACHE") or Path.home() / ".cache" / "budgetnet")


def digest(parts: Iterable[object]) -> str:
    """A name for what `parts` determine: 32 hexadecimal digits, the same on every machine."""
    summary = hashlib.sha256(f"{VERSION}".encode())
    for part in parts:
        summary.update(f"\n{part!r}".encode())
    return summary.hexdigest()[:32]


def cached(
    key: str,
    shape: tuple[int, ...],
    dtype: type[np.generic],
    fill: Callable[[np.ndarray], None],
) -> np.ndarray:
    """The array kept under `key`, made by `fill` when it is missing or broken.

    The file is written under another name, synced and renamed: a run killed half-way leaves no array behind that
    a later run could take for a whole one.

    Args:
        key: names the content, see `digest`.
        shape: of the array; a file of another shape or type is made again.
        dtype: of the array.
        fill: writes every element of the array it is given.

    Returns:
        An array in memory or, above `LARGE` bytes, a read-only `np.memmap`.

    Raises:
        DataError: a large array cannot be written; a small one is returned all the same, with a warning.
    """
    path = directory() / f"{key}.npy"
    known = _open(path, shape, dtype)
    if known is not None:
        return known
    if size(shape, dtype) > LARGE:
        try:
            _write(path, lambda file: _write_mapped(file, shape, dtype, fill))
        except OSError as error:
            hint = "set BUDGETNET_CACHE to a folder with more room"
            raise DataError(f"cannot write {size(shape, dtype):,} bytes to {path.parent} ({error}): {hint}") from error
        array = _open(path, shape, dtype)
        if array is None:
            raise DataError(f"{path} changed while it was being read")
        return array
    array = np.empty(shape, dtype)
    fill(array)
    try:
        _write(path, lambda file: np.save(file, array))
    except OSError as error:
        warnings.warn(f"decoded images are not kept in {path.parent}: {error}", stacklevel=2)
    return array


def size(shape: tuple[int, ...], dtype: type[np.generic]) -> int:
    """Bytes that an array of this shape takes."""
    total = np.dtype(dtype).itemsize
    for side in shape:
        total *= int(side)
    return total


def _open(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray | None:
    try:
        array = open_memmap(path, mode="r")  # never unpickles
    except (OSError, ValueError, EOFError):
        return None
    if array.shape != shape or array.dtype != np.dtype(dtype):
        return None
    return array if array.nbytes > LARGE else np.array(array)


def _write(path: Path, write: Callable[[str], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as part:
        write(str(part))


def _write_mapped(
    name: str,
    shape: tuple[int, ...],
    dtype: type[np.generic],
    fill: Callable[[np.ndarray], None],
) -> None:
    array = open_memmap(name, mode="w+", dtype=np.dtype(dtype), shape=shape)
    if hasattr(os, "posix_fallocate"):  # a full disk is an error here, not a crash in the middle of a page
        with open(name, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(name))
    fill(array)
    array.flush()
