"""Folders of images with a mask each: a class for every pixel."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from budgetnet.data.dataset import Augmentation, Dataset, Split
from budgetnet.data.decode import Convert, Files, headers, picture, pixels, stretched
from budgetnet.data.folders import allot, image_shape, names_in, split_pixels
from budgetnet.errors import DataError

LAYOUT = "images/<name>.jpg with masks/<name>.png, one byte a pixel"


def has_masks(parts: Mapping[str, Path]) -> bool:
    """Whether these split folders hold images with masks rather than classes."""
    return any((folder / "masks").is_dir() for folder in parts.values())


def segmentation(
    name: str, path: Path, parts: Mapping[str, Path], image_size: int | None, ignore: int | None, seed: int
) -> Dataset:
    """A dataset from folders with `images/<name>.<any>` and `masks/<name>.<any>`, one mask for each image.

    A mask has one byte a pixel, the class, in grey or as a palette's index. Class names are the lines of
    `path/classes.txt`; without it, the numbers up to the largest in any mask are the names.

    Args:
        name: of the dataset.
        path: where classes.txt may be.
        parts: folders by split, "train" and perhaps "validation" and "test"; see `allot` for what is missing.
        image_size: side in pixels to which images and masks are stretched; as they are, all of one size, when None.
        ignore: mask value that is no class.
        seed: of the division between train and validation.

    Raises:
        DataError: an image or mask lacks the other, their sizes differ, a mask value is no class, sizes differ and
            `image_size` is None, or a file is no image.
    """
    images, masks = {}, {}
    for part, folder in parts.items():
        images[part], masks[part] = _paired(folder)
        sizes, mask_sizes = headers(images[part])[:, 1:], headers(masks[part])[:, 1:]
        other = np.flatnonzero((sizes != mask_sizes).any(1))
        if len(other):
            row = int(other[0])
            (height, width), (mask_height, mask_width) = sizes[row], mask_sizes[row]
            raise DataError(
                f"{masks[part].path(row)} is {mask_width} x {mask_height} pixels, its image {width} x {height}"
            )
    shape = image_shape(images, image_size)
    rows = allot({part: np.zeros(len(each), np.int64) for part, each in images.items()}, seed)
    found = split_pixels(images, rows, shape, _picture_of(shape[0], image_size), f"stretch {image_size}")
    targets = split_pixels(masks, rows, shape[1:], mask_of(image_size), f"mask {image_size}")
    named = _class_names(path)
    largest = -1
    for part, (source, chosen) in rows.items():
        largest = max(largest, _largest(targets[part], masks[source].rows(chosen), ignore, named))
    if largest < 0:
        raise DataError(f"{path}: every pixel of every mask is {ignore}, the value left out")
    return Dataset(
        name=name,
        **{part: Split(found[part], targets[part]) for part in rows},
        classes=named or tuple(map(str, range(largest + 1))),
        task="segmentation",
        ignore=ignore,
        augmentation=Augmentation(flip=True, fill=ignore or 0),
    )


def mask_of(image_size: int | None) -> Convert:
    """Maps an opened mask to `(H, W)` uint8 classes, by the nearest pixel if `image_size` is given."""

    def convert(mask: Image.Image) -> np.ndarray:
        if mask.mode not in ("L", "P"):
            raise DataError(f"a mask has one byte a pixel (mode L or P), got mode {mask.mode}")
        if image_size is not None:
            mask = mask.resize((image_size, image_size), Image.Resampling.NEAREST)
        return np.asarray(mask)

    return convert


def _picture_of(channels: int, image_size: int | None) -> Convert:
    def convert(image: Image.Image) -> np.ndarray:
        image = picture(image, channels)
        return pixels(image if image_size is None else stretched(image, image_size))

    return convert


def _paired(folder: Path) -> tuple[Files, Files]:
    """The images of a split and, in the same order, their masks."""
    for inner in ("images", "masks"):
        if not (folder / inner).is_dir():
            raise DataError(f"{folder / inner} is not there: expected {LAYOUT}")
    images, masks = _by_stem(folder / "images"), _by_stem(folder / "masks")
    for stem in sorted(images.keys() ^ masks.keys()):
        if stem in images:
            raise DataError(f"{folder / 'images' / images[stem]} has no mask in {folder / 'masks'}")
        raise DataError(f"{folder / 'masks' / masks[stem]} has no image in {folder / 'images'}")
    if not images:
        raise DataError(f"{folder / 'images'} holds no image")
    stems = sorted(images)
    return (
        Files(folder / "images", tuple(images[stem] for stem in stems)),
        Files(folder / "masks", tuple(masks[stem] for stem in stems)),
    )


def _by_stem(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names_in(folder):
        stem = Path(name).stem
        if stem in found:
            raise DataError(f"{folder} holds both {found[stem]} and {name}: expected one file a name")
        found[stem] = name
    return found


def _class_names(path: Path) -> tuple[str, ...]:
    """The lines of classes.txt; none if there is no such file."""
    file = path / "classes.txt"
    if not file.is_file():
        return ()
    try:
        names = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if not names or not all(names):
        raise DataError(f"{file}: expected one class name a line, got an empty line or none at all")
    return names


def _largest(masks: np.ndarray, files: Files, ignore: int | None, names: tuple[str, ...]) -> int:
    """The largest class in `(N, H, W)` masks, -1 if there is none."""
    largest = -1
    for row, mask in enumerate(masks):
        present = np.bincount(mask.ravel(), minlength=256).astype(bool)
        if ignore is not None:
            present[ignore] = False
        here = int(present.nonzero()[0].max(initial=-1))
        if names and here >= len(names):
            raise DataError(f"{files.path(row)} holds {here}, but classes.txt names {len(names)} classes, from 0 on")
        largest = max(largest, here)
    return largest
