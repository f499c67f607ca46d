"""The stream of training and evaluation: batches on a device, reproducible from any position."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, count, islice

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from budgetnet.data.dataset import Augmentation, Split
from budgetnet.errors import ConfigError


class Batches:
    """Batches of one split on a device, in an order that is a function of (seed, epoch) alone.

    Images in memory are moved to the device once, as uint8; those of a memory map are fetched a batch ahead.

    Args:
        split: N images and their targets.
        batch_size: images a batch, >= 1; the whole split at most.
        device: where the batches are wanted.
        augmentation: of every batch; none when None.
        seed: >= 0, of the order and of the augmentation.
        shuffle: a new order each epoch; otherwise the split's own.
        drop_last: leave out what does not fill a batch; as `shuffle` when None.

    Raises:
        ConfigError: an option is outside its range.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        device: str | torch.device = "cpu",
        augmentation: Augmentation | None = None,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be >= 1 image, got {batch_size}")
        if seed < 0:
            raise ConfigError(f"seed must be >= 0, got {seed}")
        self.split = split
        self.batch_size = min(batch_size, len(split))
        self.device = torch.device(device)
        self.augmentation = augmentation or Augmentation()
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = shuffle if drop_last is None else drop_last
        mean, std = (
            torch.tensor(numbers, dtype=torch.float64, device=self.device).view(-1, 1, 1)
            for numbers in (split.normalisation.mean, split.normalisation.std)
        )
        self._scale, self._shift = (255 * std).float(), (mean / std).float()
        self._images = _moved(split.images, self.device)
        self._targets = _moved(split.targets, self.device)

    def __len__(self) -> int:
        """Batches an epoch, at least 1."""
        whole, rest = divmod(len(self.split), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields batches `start`, `start + 1`, ... of an epoch, the same ones wherever it starts.

        Args:
            epoch: its number, >= 0.
            start: the first batch wanted, in 0..len(self).

        Returns:
            Pairs of `(B, C, H, W)` float32 images, as the split's normalisation has them, and `(B,)` classes or
            `(B, H, W)` masks in int64.

        Raises:
            ConfigError: `epoch` or `start` is outside its range.
        """
        if epoch < 0:
            raise ConfigError(f"epoch must be >= 0, got {epoch}")
        if not 0 <= start <= len(self):
            raise ConfigError(f"an epoch of {len(self)} batches starts at 0 to {len(self)}, got {start}")
        return self._epoch(epoch, start)

    def several(self, number: int, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields so many batches from the start of an epoch on, and of those behind it where it has fewer.

        Args:
            number: of batches, >= 0.
            epoch: the first one's number, >= 0.

        Returns:
            Pairs as `epoch` yields them.
        """
        return islice(chain.from_iterable(map(self.epoch, count(epoch))), number)

    def _epoch(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = np.arange(len(self.split))
        if self.shuffle:
            order = self._random(epoch, 0).permutation(order)
        rows = [order[i * self.batch_size : (i + 1) * self.batch_size] for i in range(len(self))]
        for i, (images, targets) in enumerate(self._fetched(rows[start:]), start):
            images, targets = self._augmented(images, targets, self._random(epoch, 1 + i))
            yield images.float().div_(self._scale).sub_(self._shift), targets.long()

    def _random(self, epoch: int, stream: int) -> np.random.Generator:
        """Stream 0 orders the epoch, stream 1 + i augments its batch i."""
        return np.random.default_rng([self.seed, epoch, stream])

    def _fetched(self, batches: list[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        if self._images is not None and self._targets is not None:
            yield from map(self._fetch, batches)
            return
        with ThreadPoolExecutor(1) as reader:
            ahead = deque(reader.submit(self._fetch, rows) for rows in batches[:1])
            following = iter(batches[1:])
            while ahead:
                ready = ahead.popleft().result()
                ahead.extend(reader.submit(self._fetch, rows) for rows in islice(following, 1))
                yield ready

    def _fetch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        images = self._select(self._images, self.split.images, rows)
        return images, self._select(self._targets, self.split.targets, rows)

    def _select(self, held: Tensor | None, mapped: np.ndarray, rows: np.ndarray) -> Tensor:
        if held is not None:
            return held.index_select(0, torch.from_numpy(rows).to(self.device))
        ascending = np.argsort(rows)  # the disk is read forwards
        found = np.empty((len(rows), *mapped.shape[1:]), mapped.dtype)
        found[ascending] = mapped[rows[ascending]]
        return torch.from_numpy(found).to(self.device)

    def _augmented(self, images: Tensor, targets: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        pad, flip = self.augmentation.pad, self.augmentation.flip
        if not pad and not flip:
            return images, targets
        shift = torch.from_numpy(random.integers(0, 2 * pad + 1, (2, len(images)))).to(images.device)
        mirrored = torch.from_numpy(random.random(len(images)) < (0.5 if flip else 0.0)).to(images.device)
        images = shifted(images, shift[0], shift[1], mirrored, pad, 0)
        if targets.ndim == 3:
            targets = shifted(targets[:, None], shift[0], shift[1], mirrored, pad, self.augmentation.fill)[:, 0]
        return images, targets


def shifted(images: Tensor, down: Tensor, right: Tensor, mirrored: Tensor, pad: int, fill: int) -> Tensor:
    """Pads each image, crops it back to size at its own place, and mirrors it if asked.

    Args:
        images: `(B, C, H, W)`, of any type.
        down: `(B,)` first row of the crop in the padded image, in 0..2 pad.
        right: `(B,)` first column, in 0..2 pad.
        mirrored: `(B,)` booleans; the crop is turned left to right where true.
        pad: pixels added on each side.
        fill: their value.

    Returns:
        `(B, C, H, W)` images of the same type.
    """
    _, channels, height, width = images.shape
    y = torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device)
    rows = down[:, None] + y  # (B, H)
    columns = right[:, None] + torch.where(mirrored[:, None], width - 1 - x, x)  # (B, W)
    padded = functional.pad(images, (pad, pad, pad, pad), value=fill).flatten(2)
    places = rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]  # (B, H, W)
    return padded.gather(2, places.flatten(1)[:, None].expand(-1, channels, -1)).view(images.shape)


def _moved(array: np.ndarray, device: torch.device) -> Tensor | None:
    """The array on the device; None for one that lives on disk. In memory and on a CPU nothing is copied."""
    if isinstance(array, np.memmap):
        return None
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(device)
