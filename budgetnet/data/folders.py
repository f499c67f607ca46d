"""Folders of images, one sub-folder a class; ImageNet is one."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from budgetnet.data.dataset import Augmentation, Dataset, Split, held_out
from budgetnet.data.decode import Convert, Files, cropped, decode_parts, headers, picture, pixels
from budgetnet.errors import DataError

SPLITS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
LAYOUT = "train/<class>/, val/<class>/ and test/<class>/, or <class>/, with images in each <class>/"
HELD_OUT = 0.1  # of the images, for a split that has no folder
IMAGENET_SIDE = 224  # pixels
IMAGENET_VALIDATION = 10  # training images a class


def load_imagenet(root: Path, image_size: int | None = None, seed: int = 0) -> Dataset:
    """ImageNet from `root/imagenet/{train,val}/<wnid>/`.

    The published validation images, the ones that papers report, are the test split; 10 training images a class on
    average are held out for validation. Decoded images stay on disk; each `seed` has its own copy of them.

    Args:
        root: folder of the datasets.
        image_size: side in pixels of the central square; 224 when None.
        seed: of the division between train and validation.

    Raises:
        DataError: a folder is missing or empty, or a file is no image.
    """
    base = root / "imagenet"
    for part in ("train", "val"):
        if not (base / part).is_dir():
            raise DataError(f"{base / part} is not there: expected {base}/train/<wnid>/ and {base}/val/<wnid>/")
    parts = {"train": base / "train", "test": base / "val"}
    side = IMAGENET_SIDE if image_size is None else image_size
    return classification("imagenet", parts, side, seed, most_held_out=IMAGENET_VALIDATION)


def classification(
    name: str,
    parts: Mapping[str, Path],
    image_size: int | None,
    seed: int,
    *,
    augmentation: Augmentation | None = None,
    most_held_out: int | None = None,
) -> Dataset:
    """A dataset from folders of class folders.

    Args:
        name: of the dataset.
        parts: folders by split, "train" and perhaps "validation" and "test"; see `allot` for what is missing.
        image_size: side in pixels of the central square; images as they are, all of one size, when None.
        seed: of the division between train and validation.
        augmentation: by default a pad of 1/8 of the shorter side, and a flip unless the images are grey, which are
            often characters.
        most_held_out: limit of the held-out validation images, times the number of classes.

    Raises:
        DataError: a class folder is empty or unknown in train, sizes differ and `image_size` is None, or a file is
            no image.
    """
    listed = {part: _listed(folder) for part, folder in parts.items()}
    classes = tuple(sorted(listed["train"]))
    if len(classes) < 2:
        raise DataError(f"{parts['train']} holds {len(classes)} class folder, expected 2 or more")
    files, targets = {}, {}
    for part, by_class in listed.items():
        unknown = sorted(set(by_class) - set(classes))
        if unknown:
            raise DataError(f"{parts[part] / unknown[0]} is a class that {parts['train']} does not have")
        files[part] = Files(parts[part], tuple(file for each in classes for file in by_class.get(each, ())))
        counts = [len(by_class.get(each, ())) for each in classes]
        targets[part] = np.repeat(np.arange(len(classes)), counts)
    shape = image_shape(files, image_size)
    most = None if most_held_out is None else most_held_out * len(classes)
    rows = allot(targets, seed, most)
    images = split_pixels(files, rows, shape, picture_of(shape[0], image_size), f"crop {image_size}")
    splits = {part: Split(images[part], targets[source][chosen]) for part, (source, chosen) in rows.items()}
    return Dataset(
        name=name,
        **splits,
        classes=classes,
        task="classification",
        ignore=None,
        augmentation=augmentation or Augmentation(pad=min(shape[1:]) // 8, flip=shape[0] == 3),
    )


def split_folders(path: Path) -> dict[str, Path]:
    """The folders of `path` by split; `path` itself is "train" when it is not divided.

    Raises:
        DataError: `path` is no folder, or has other splits but no train/.
    """
    if not path.is_dir():
        raise DataError(f"{path} is not a folder: expected {LAYOUT}, or train/images/ and train/masks/ and so on")
    found = {}
    for part, names in SPLITS.items():
        there = [path / name for name in names if (path / name).is_dir()]
        if len(there) > 1:
            raise DataError(f"{path} holds {' and '.join(each.name for each in there)}: expected one of them")
        if there:
            found[part] = there[0]
    if found and "train" not in found:
        raise DataError(f"{path} holds {', '.join(each.name for each in found.values())} but no train/")
    return found or {"train": path}


def allot(strata: Mapping[str, np.ndarray], seed: int, most: int | None = None) -> dict[str, tuple[str, np.ndarray]]:
    """Which rows of which source make each split.

    A missing test split is the validation source if there is one, otherwise a tenth of train, the same for every
    `seed`, so that runs with different seeds are tested alike. A missing validation split is a tenth of train.

    Args:
        strata: for each source, `(N,)` integers to divide it in proportion to.
        seed: of the division between train and validation.
        most: limit of the held-out validation images.

    Returns:
        For train, validation and test, the name of a source and `(n,)` sorted rows of it.
    """
    sources = dict.fromkeys(strata)
    everything = {part: np.arange(len(each)) for part, each in strata.items()}
    train, of_train = everything["train"], strata["train"]
    count = max(1, round(HELD_OUT * len(train)))
    if "test" in sources:
        test = "test", everything["test"]
    elif "validation" in sources:
        test = "validation", everything["validation"]
    else:
        kept, held = held_out(of_train, count, seed=0)
        train, test = train[kept], ("train", train[held])
    if "validation" in sources and test[0] != "validation":
        validation = "validation", everything["validation"]
    else:
        kept, held = held_out(of_train[train], count if most is None else min(count, most), seed)
        train, validation = train[kept], ("train", train[held])
    return {"train": ("train", train), "validation": validation, "test": test}


def image_shape(files: Mapping[str, Files], image_size: int | None) -> tuple[int, int, int]:
    """`(C, H, W)` of the decoded images of all sources; C is 1 if every one of them is grey.

    Raises:
        DataError: sizes differ and `image_size` is None.
    """
    found = {part: headers(each) for part, each in files.items()}
    channels = max(int(each[:, 0].max()) for each in found.values())
    if image_size is not None:
        return channels, image_size, image_size
    first = found["train"][0]
    for part, each in found.items():
        other = np.flatnonzero((each[:, 1:] != first[1:]).any(1))
        if len(other):
            height, width = each[other[0], 1:]
            raise DataError(
                f"{files[part].path(int(other[0]))} is {width} x {height} pixels, "
                f"{files['train'].path(0)} {first[2]} x {first[1]}: give image_size"
            )
    return channels, int(first[1]), int(first[2])


def picture_of(channels: int, image_size: int | None) -> Convert:
    """Maps an opened image to `(C, H, W)`, the central square if `image_size` is given."""
    if image_size is None:
        return lambda image: pixels(picture(image, channels))
    return lambda image: pixels(cropped(picture(image, channels), image_size))


def split_pixels(
    files: Mapping[str, Files],
    rows: Mapping[str, tuple[str, np.ndarray]],
    shape: tuple[int, ...],
    convert: Convert,
    kind: str,
) -> dict[str, np.ndarray]:
    """`(n, *shape)` uint8 for each split, as `allot` made them of the sources."""
    result: dict[str, np.ndarray] = {}
    for source, each in files.items():
        here = {part: chosen for part, (name, chosen) in rows.items() if name == source}
        arrays = decode_parts(each, list(here.values()), shape, convert, kind)
        result.update(zip(here, arrays, strict=True))
    return result


def names_in(folder: Path, *, folders: bool = False) -> list[str]:
    """Sorted names of the files, or folders, in a folder; hidden ones are left out."""
    with os.scandir(folder) as entries:
        return sorted(each.name for each in entries if each.is_dir() == folders and each.name[0] != ".")


def _listed(folder: Path) -> dict[str, list[str]]:
    """For each class folder, its files as paths below `folder`."""
    listed = {}
    for name in names_in(folder, folders=True):
        inner = names_in(folder / name, folders=True)
        if inner:
            raise DataError(f"{folder / name / inner[0]} is a folder: expected images in {folder / name}")
        listed[name] = [f"{name}/{file}" for file in names_in(folder / name)]
        if not listed[name]:
            raise DataError(f"{folder / name} holds no image")
    if not listed:
        raise DataError(f"{folder} holds no class folder: expected {LAYOUT}")
    return listed
