"""What search learns from: images and targets in three splits, as plain arrays."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from mmap import mmap
from pathlib import Path

import numpy as np

from budgetnet.data import cache
from budgetnet.data.cache import cached, digest, size
from budgetnet.errors import ConfigError, DataError

CHUNK = 1024  # images copied at once between two arrays on disk


@dataclass(frozen=True)
class Normalisation:
    """How pixels become numbers: `(pixel / 255 - mean) / std`, by default in [-1, 1].

    Attributes:
        mean, std: of pixels in [0, 1], one number for all channels or one for each; std > 0.

    Raises:
        ConfigError: a number is outside its range, or the two are of unlike length.
    """

    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std):
            raise ConfigError(f"mean and std must be of one length, got {len(self.mean)} and {len(self.std)} numbers")
        for mean, std in zip(self.mean, self.std, strict=True):
            if not 0 <= mean <= 1:
                raise ConfigError(f"mean must be of pixels in [0, 1], got {mean}")
            if not 0 < std < inf:
                raise ConfigError(f"std must be > 0, of pixels in [0, 1], got {std}")


@dataclass(frozen=True, eq=False)
class Split:
    """N images with their targets.

    Attributes:
        images: `(N, C, H, W)` uint8, in memory or a read-only `np.memmap`.
        targets: `(N,)` int64 class indices, or `(N, H, W)` uint8 masks.
        normalisation: how a network sees the pixels.

    Raises:
        DataError: N is 0, or the arrays are not of these shapes and types.
        ConfigError: the normalisation is of another number of channels.
    """

    images: np.ndarray
    targets: np.ndarray
    normalisation: Normalisation = Normalisation()

    def __post_init__(self) -> None:
        images, targets = self.images, self.targets
        if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
            raise DataError(f"images must be (N, C, H, W) uint8 with N >= 1, got {_described(images)}")
        labels = targets.dtype == np.int64 and targets.shape == images.shape[:1]
        masks = targets.dtype == np.uint8 and targets.shape == (len(images), *images.shape[2:])
        if not labels and not masks:
            expected = f"({len(images)},) int64 or {(len(images), *images.shape[2:])} uint8"
            raise DataError(f"targets must be {expected}, got {_described(targets)}")
        if len(self.normalisation.mean) not in (1, channels := images.shape[1]):
            expected = "1 number" if channels == 1 else f"1 number or {channels}, one for each channel"
            raise ConfigError(f"mean and std must be {expected}, got {len(self.normalisation.mean)}")

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, n: int, seed: int) -> "Split":
        """`n` of the images in their present order, the same for the same seed.

        Classes get as equal a share as they have images for; masks are drawn at random.

        Raises:
            ConfigError: `n` is not in 1..N, or `seed` is negative.
        """
        if not 1 <= n <= len(self):
            raise ConfigError(f"a subset of {len(self)} images has 1 to {len(self)} of them, got {n}")
        strata = self.targets if self.targets.ndim == 1 else np.zeros(len(self), np.int64)
        return self.rows(evenly(strata, n, seed))

    def rows(self, rows: np.ndarray) -> "Split":
        """The images at `rows`, `(n,)` indices; what is too large for memory is copied on disk."""
        return replace(self, images=take(self.images, rows), targets=take(self.targets, rows))


@dataclass(frozen=True)
class Augmentation:
    """What is done at random to the images of a training batch.

    Attributes:
        pad: pixels of value 0 added on each side before a random crop back to size.
        flip: mirror left and right with probability 1/2.
        fill: value that padding gives a mask; images always get 0.
    """

    pad: int = 0
    flip: bool = False
    fill: int = 0

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise ConfigError(f"pad must be >= 0 pixels, got {self.pad}")
        if not 0 <= self.fill <= 255:
            raise ConfigError(f"fill must be in 0..255, got {self.fill}")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three splits of images of one shape.

    Attributes:
        name: as it is printed.
        train: learns weights and architecture.
        validation: chooses among candidates.
        test: gives the reported figures, nothing else.
        classes: a name for each class index.
        task: "classification" or "segmentation".
        ignore: mask value left out of loss and metrics.
        augmentation: of training batches.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    task: str
    ignore: int | None
    augmentation: Augmentation

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)`, the same in every split."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """Outputs that a network needs for an image, or for each of its pixels."""
        return len(self.classes)

    def subset(self, train_images: int, seed: int) -> "Dataset":
        """The same dataset with fewer training images, see `Split.subset`."""
        return replace(self, train=self.train.subset(train_images, seed))

    def augmented(self, *, pad: int | None = None, flip: bool | None = None) -> "Dataset":
        """The same dataset, its training images shifted or mirrored in another way; None leaves that as it is.

        Raises:
            ConfigError: `pad` is negative, or no smaller than an image.
        """
        if pad is not None and pad >= (side := min(self.image_shape[1:])):
            raise ConfigError(f"pad must be less than an image's side of {side} pixels, got {pad}")
        own = self.augmentation
        pad, flip = own.pad if pad is None else pad, own.flip if flip is None else flip
        return replace(self, augmentation=replace(own, pad=pad, flip=flip))

    def normalised(self, mean: Sequence[float], std: Sequence[float]) -> "Dataset":
        """The same dataset, seen as `(pixel / 255 - mean) / std`, such as pretrained weights expect.

        Args:
            mean: of pixels in [0, 1], one number or one for each channel.
            std: likewise.

        Raises:
            ConfigError: a number is outside its range, or their count is not 1 or C.
        """
        seen = Normalisation(tuple(mean), tuple(std))
        train, validation, test = (
            replace(split, normalisation=seen) for split in (self.train, self.validation, self.test)
        )
        return replace(self, train=train, validation=validation, test=test)

    @property
    def normalisation(self) -> Normalisation:
        """How a network sees the pixels, the same in every split."""
        return self.train.normalisation


def evenly(strata: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Sorted indices of `count` of the `(N,)` items, as many of each stratum as of any other while they last."""
    shuffled, rank = _ranked(strata, seed)
    return np.sort(shuffled[np.argsort(rank, kind="stable")[:count]])


def held_out(strata: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits `(N,)` items in two, both in proportion to the strata.

    Args:
        strata: `(N,)` integers; items of one value make a stratum.
        count: items held out, in 1..N-1.
        seed: same seed, same split.

    Returns:
        `(N - count,)` indices kept and `(count,)` held out, each sorted.

    Raises:
        DataError: there are not enough items.
    """
    if not 1 <= count < len(strata):
        raise DataError(f"cannot hold {count} of {len(strata)} images out: more images are needed")
    shuffled, rank = _ranked(strata, seed)
    sizes = np.bincount(strata)[strata[shuffled]]
    first = np.argsort((rank + 0.5) / sizes, kind="stable")  # each stratum advances in step with its size
    return np.sort(shuffled[first[count:]]), np.sort(shuffled[first[:count]])


def take(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`array[rows]`; of a memory map a large part is copied to the cache rather than to memory."""
    shape = (len(rows), *array.shape[1:])
    small = size(shape, array.dtype.type) <= cache.LARGE
    if small or not isinstance(array, np.memmap) or not isinstance(array.base, mmap):  # a view has no name of its own
        return np.asarray(array[rows])
    path = Path(str(array.filename))

    def fill(out: np.ndarray) -> None:
        for part in _chunks(len(rows)):
            out[part] = array[rows[part]]

    key = digest(["rows", str(path.absolute()), path.stat().st_mtime_ns, digest(rows.tolist())])
    return cached(key, shape, array.dtype.type, fill)


def _ranked(strata: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A random order of the items, and for each item in it how many of its stratum came before."""
    if seed < 0:
        raise ConfigError(f"seed must be >= 0, got {seed}")
    shuffled = np.random.default_rng(seed).permutation(len(strata))
    grouped = np.argsort(strata[shuffled], kind="stable")
    sizes = np.bincount(strata)
    starts = np.cumsum(sizes) - sizes
    rank = np.empty(len(strata), np.int64)
    rank[grouped] = np.arange(len(strata)) - np.repeat(starts, sizes)
    return shuffled, rank


def _chunks(count: int) -> Iterator[slice]:
    return (slice(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK))


def _described(array: np.ndarray) -> str:
    return f"{array.shape} {array.dtype}"
