"""From files to pixels: image files decoded once into one uint8 array."""

import os
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from budgetnet.data import cache
from budgetnet.data.cache import cached, digest, size
from budgetnet.errors import DataError

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "GIF", "TIFF", "WEBP")  # decoders that run no other program
BROKEN = (OSError, ValueError, EOFError, SyntaxError, struct.error, zlib.error, Image.DecompressionBombError)
WORKERS = min(16, os.cpu_count() or 1)  # Pillow lets go of the interpreter while it decodes ...
THUMBNAIL = 1 << 14  # ... but threads only get in each other's way over files below this many bytes
BUNCH = 32  # files a worker takes at once

Convert = Callable[[Image.Image], np.ndarray]


@dataclass(frozen=True)
class Files:
    """Image files below one folder.

    Attributes:
        root: the folder.
        names: their paths below it; N of them.
    """

    root: Path
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def path(self, row: int) -> Path:
        """The whole path of file `row`."""
        return self.root / self.names[row]

    def rows(self, rows: np.ndarray) -> "Files":
        """The files at `rows`, `(n,)` indices."""
        return Files(self.root, tuple(self.names[row] for row in rows.tolist()))

    @cached_property
    def fingerprint(self) -> str:
        """Changes when a file is added, removed, renamed, resized or touched.

        Raises:
            DataError: a file is missing.
        """
        root = str(self.root.absolute())
        try:
            states = [os.stat(os.path.join(root, name)) for name in self.names]
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
        kept = ((name, state.st_size, state.st_mtime_ns) for name, state in zip(self.names, states, strict=True))
        return digest([root, *kept])


def headers(files: Files) -> np.ndarray:
    """`(N, 3)` int32 channels, height and width of each file, where only grey images have one channel.

    Raises:
        DataError: a file is no image.
    """

    def fill(out: np.ndarray) -> None:
        def visit(row: int, image: Image.Image) -> None:
            out[row] = 1 if image.mode in ("L", "1") else 3, image.height, image.width

        _each(files, visit)

    return cached(digest(["headers", files.fingerprint]), (len(files), 3), np.int32, fill)


def decode(files: Files, shape: tuple[int, ...], convert: Convert, kind: str) -> np.ndarray:
    """Decodes N files to `(N, *shape)` uint8, in memory or a read-only `np.memmap`.

    Args:
        files: what to decode.
        shape: of one decoded file.
        convert: maps an opened image to an array of that shape.
        kind: names what `convert` does; a part of the cache's key.

    Raises:
        DataError: a file is no image, is cut short, or does not decode to `shape`.
    """

    def fill(out: np.ndarray) -> None:
        def visit(row: int, image: Image.Image) -> None:
            decoded = convert(image)
            if decoded.shape != shape:
                raise DataError(f"expected {shape} values, got {decoded.shape}")
            out[row] = decoded

        _each(files, visit)

    key = digest([kind, shape, files.fingerprint])
    return cached(key, (len(files), *shape), np.uint8, fill)


def decode_parts(
    files: Files, parts: Sequence[np.ndarray], shape: tuple[int, ...], convert: Convert, kind: str
) -> list[np.ndarray]:
    """An array as of `decode` for each of `parts`, rows of `files`.

    Small data is decoded as a whole and then divided, so that every division shares one cache; large data, which
    cannot be divided in memory, is decoded part by part.
    """
    if size((len(files), *shape), np.uint8) > cache.LARGE:
        return [decode(files.rows(rows), shape, convert, kind) for rows in parts]
    whole = decode(files, shape, convert, kind)
    return [whole if len(rows) == len(files) else whole[rows] for rows in parts]


def picture(image: Image.Image, channels: int) -> Image.Image:
    """The image in 8-bit grey (1 channel) or RGB (3).

    Raises:
        DataError: it has more than 8 bits a channel.
    """
    if image.mode.startswith(("I", "F")):
        raise DataError(f"expected 8 bits a channel, got mode {image.mode}")
    return image.convert("L" if channels == 1 else "RGB")


def pixels(image: Image.Image) -> np.ndarray:
    """`(C, H, W)` uint8 of a grey or RGB image."""
    values = np.asarray(image)
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def cropped(image: Image.Image, side: int) -> Image.Image:
    """The central square of the image at `side` x `side` pixels: the shorter side fits, the longer is cut."""
    short = min(image.size)
    left, top = (image.width - short) / 2, (image.height - short) / 2
    return image.resize((side, side), Image.Resampling.BILINEAR, box=(left, top, left + short, top + short))


def stretched(image: Image.Image, side: int) -> Image.Image:
    """The whole image at `side` x `side` pixels."""
    return image.resize((side, side), Image.Resampling.BILINEAR)


def resized(images: np.ndarray, side: int | None) -> np.ndarray:
    """`(N, C, H, W)` decoded images at `side` x `side` pixels; as they are for None."""
    if side is None or images.shape[2:] == (side, side):
        return images
    layout = images[:, 0] if images.shape[1] == 1 else images.transpose(0, 2, 3, 1)
    return np.stack([pixels(cropped(Image.fromarray(np.ascontiguousarray(image)), side)) for image in layout])


def _each(files: Files, visit: Callable[[int, Image.Image], None]) -> None:
    """Calls `visit(row, image)` for every file from a few threads; the first error in file order is raised."""

    def some(rows: range) -> None:
        for row in rows:
            path = os.path.join(root, files.names[row])
            try:
                with Image.open(path, formats=FORMATS) as image:
                    visit(row, image)
            except UnidentifiedImageError:
                raise DataError(f"{path} is not an image: expected one of {', '.join(FORMATS)}") from None
            except BROKEN as error:
                raise DataError(f"{path} cannot be decoded: {error}") from error

    root = str(files.root)
    small = bool(files.names) and os.path.getsize(files.path(0)) < THUMBNAIL
    with ThreadPoolExecutor(1 if small else WORKERS) as pool:
        for _ in pool.map(some, (range(i, min(i + BUNCH, len(files))) for i in range(0, len(files), BUNCH))):
            pass
