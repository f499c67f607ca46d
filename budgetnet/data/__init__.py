"""Where the method meets data: datasets in memory or on disk, and batches of them on a device."""

import os
from pathlib import Path

from budgetnet.data.batches import Batches
from budgetnet.data.cifar import load_cifar
from budgetnet.data.dataset import Augmentation, Dataset, Split
from budgetnet.data.digits import load_digits
from budgetnet.data.folders import classification, load_imagenet, split_folders
from budgetnet.data.masks import has_masks, segmentation
from budgetnet.data.part_labels import load_part_labels
from budgetnet.errors import ConfigError

__all__ = ["NAMES", "Augmentation", "Batches", "Dataset", "Split", "load"]

NAMES = ("digits", "cifar10", "cifar100", "part-labels", "imagenet")


def load(
    name: str,
    *,
    root: str | Path = "data",
    image_size: int | None = None,
    ignore: int | None = None,
    seed: int = 0,
) -> Dataset:
    """The dataset of this name, or in this folder, decoded and divided.

    Nothing is downloaded. Decoded images are kept in `$BUDGETNET_CACHE` (`~/.cache/budgetnet`).

    Args:
        name: one of `NAMES`, or the path of a folder: `{train,val,test}/<class>/<image>`, or
            `{train,val,test}/images/<image>` with `{train,val,test}/masks/<image>`.
        root: folder of the named datasets.
        image_size: side in pixels of square images; as they are, all of one size, when None (ImageNet: 224).
        ignore: mask value, 0..255, left out of loss and metrics.
        seed: >= 0, of the division between train and validation where that is not published.

    Raises:
        ConfigError: an option is outside its range, or the name is neither known nor a folder.
        DataError: the data are missing, incomplete or damaged.
    """
    if image_size is not None and image_size < 1:
        raise ConfigError(f"image_size must be >= 1 pixel, got {image_size}")
    if ignore is not None and not 0 <= ignore <= 255:
        raise ConfigError(f"ignore must be in 0..255, got {ignore}")
    if seed < 0:
        raise ConfigError(f"seed must be >= 0, got {seed}")
    root = Path(root)
    if name == "part-labels":
        return load_part_labels(root, image_size, ignore)
    if name not in NAMES:
        return _folder(name, image_size, ignore, seed)
    _refuse(ignore, name)
    if name == "digits":
        return load_digits(image_size, seed)
    if name == "imagenet":
        return load_imagenet(root, image_size, seed)
    return load_cifar(name, root, image_size, seed)


def _folder(name: str, image_size: int | None, ignore: int | None, seed: int) -> Dataset:
    path = Path(name)
    if not path.is_dir() and os.sep not in name:
        raise ConfigError(f"unknown dataset {name!r}: expected {', '.join(NAMES)}, or the path of a folder")
    parts = split_folders(path)
    label = path.resolve().name
    if has_masks(parts):
        return segmentation(label, path, parts, image_size, ignore, seed)
    _refuse(ignore, name)
    return classification(label, parts, image_size, seed)


def _refuse(ignore: int | None, name: str) -> None:
    if ignore is not None:
        raise ConfigError(f"ignore is a value of masks, and {name} has none")
