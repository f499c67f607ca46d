"""Batches: augmentation against a loop over images, and an order that only seed and epoch decide."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from budgetnet.data import Augmentation, Batches, Split, cache
from budgetnet.data.batches import shifted
from budgetnet.data.dataset import Normalisation
from budgetnet.errors import ConfigError


def split_of(count=23, channels=3, height=5, width=7, masks=False, seed=0):
    """Images whose first value is their index."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, channels, height, width), np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    targets = random.integers(0, 9, (count, height, width), np.uint8) if masks else np.arange(count)
    return Split(images, targets)


def by_hand(image, down, right, mirrored, pad, fill):
    """Pad, crop and mirror one `(C, H, W)` array."""
    _, height, width = image.shape
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), constant_values=fill)
    crop = padded[:, down : down + height, right : right + width]
    return crop[:, :, ::-1] if mirrored else crop


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_crop_and_flip_are_those_of_a_loop_over_images(data):
    whole = st.integers(1, 6)
    count, channels, height, width = (data.draw(whole) for _ in range(4))
    pad, fill = data.draw(st.integers(0, 8)), data.draw(st.integers(0, 255))
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    images = random.integers(0, 256, (count, channels, height, width), np.uint8)
    down, right = random.integers(0, 2 * pad + 1, (2, count))
    mirrored = random.random(count) < 0.5
    found = shifted(*map(torch.from_numpy, (images, down, right, mirrored)), pad, fill)
    expected = [by_hand(*each, pad, fill) for each in zip(images, down, right, mirrored, strict=True)]
    assert np.array_equal(found.numpy(), np.stack(expected))


def test_batches_take_shifts_from_seed_epoch_and_index():
    """The second batch of epoch 3, from the documented streams by hand."""
    split, pad = split_of(masks=True), 2
    order = np.random.default_rng([5, 3, 0]).permutation(23)[8:16]
    random = np.random.default_rng([5, 3, 2])
    down, right = random.integers(0, 2 * pad + 1, (2, 8))
    mirrored = random.random(8) < 0.5
    batches = Batches(split, batch_size=8, augmentation=Augmentation(pad, True, fill=11), seed=5)
    images, masks = next(batches.epoch(3, start=1))
    for i, row in enumerate(order):
        shift = down[i], right[i], mirrored[i], pad
        expected = by_hand(split.images[row], *shift, 0).astype(np.float32)
        assert np.array_equal(images[i].numpy(), expected / np.float32(127.5) - np.float32(1))
        assert np.array_equal(masks[i].numpy(), by_hand(split.targets[row][None], *shift, 11)[0])


def test_images_run_from_minus_one_to_one():
    values = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    images, targets = next(Batches(Split(values, np.array([4])), batch_size=1).epoch(0))
    assert images.dtype == torch.float32
    torch.testing.assert_close(images.flatten(), torch.linspace(-1, 1, 256))
    assert (targets.dtype, targets.tolist()) == (torch.int64, [4])
    assert values.flatten().tolist() == list(range(256))


@pytest.mark.parametrize("stats", [((0.2,), (0.4,)), ((0.5, 0.25, 1.0), (0.1, 2.0, 0.3))])
def test_images_are_seen_less_a_mean_over_a_deviation(stats):
    split = replace(split_of(), normalisation=Normalisation(*stats))
    images, _ = next(Batches(split, batch_size=9, shuffle=False).epoch(0))
    mean, std = (np.array(numbers).reshape(-1, 1, 1) for numbers in stats)
    np.testing.assert_allclose(images.numpy(), (split.images[:9] / 255 - mean) / std, rtol=1e-5, atol=1e-5)


def test_masks_come_as_whole_numbers():
    split = split_of(masks=True)
    _, masks = next(Batches(split, batch_size=4, shuffle=False).epoch(0))
    assert masks.dtype == torch.int64
    assert np.array_equal(masks.numpy(), split.targets[:4])


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_an_epoch_goes_on_from_any_batch(shuffle, start):
    options = {"batch_size": 5, "augmentation": Augmentation(1, True), "shuffle": shuffle, "drop_last": False}
    whole = list(Batches(split_of(), **options).epoch(2))
    rest = list(Batches(split_of(), **options).epoch(2, start))
    assert len(rest) == len(whole) - start
    for found, expected in zip(chain.from_iterable(rest), chain.from_iterable(whole[start:]), strict=True):
        assert torch.equal(found, expected)


def order_of(epoch, **options):
    batches = Batches(split_of(), batch_size=4, drop_last=False, **options)
    return torch.cat([targets for _, targets in batches.epoch(epoch)]).tolist()


def test_order_changes_with_seed_and_epoch_and_with_nothing_else():
    assert order_of(0) == order_of(0)
    assert order_of(0) != order_of(1)
    assert order_of(0, seed=0) != order_of(0, seed=1)
    assert order_of(0) == order_of(0, augmentation=Augmentation(2, True))
    assert sorted(order_of(7)) == list(range(23))
    assert order_of(3, shuffle=False) == list(range(23))


def test_reading_an_epoch_leaves_global_randomness_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    list(Batches(split_of(), batch_size=4, augmentation=Augmentation(2, True)).epoch(0))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


@pytest.mark.parametrize(
    ("batch_size", "options", "sizes"),
    [
        (8, {}, [8, 8]),
        (8, {"drop_last": False}, [8, 8, 7]),
        (8, {"shuffle": False}, [8, 8, 7]),
        (8, {"shuffle": False, "drop_last": True}, [8, 8]),
        (23, {}, [23]),
        (100, {}, [23]),
        (100, {"shuffle": False}, [23]),
    ],
)
def test_batch_sizes(batch_size, options, sizes):
    batches = Batches(split_of(), batch_size=batch_size, **options)
    assert [len(images) for images, _ in batches.epoch(0)] == sizes
    assert len(batches) == len(sizes)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("start", [0, 2, 6])
def test_batches_from_disk_are_those_from_memory(tmp_path, monkeypatch, masks, start):
    monkeypatch.setenv("BUDGETNET_CACHE", str(tmp_path))
    split = split_of(masks=masks)
    monkeypatch.setattr(cache, "LARGE", 1)

    def mapped(name, array):
        return cache.cached(name, array.shape, array.dtype.type, lambda out: out.__setitem__(slice(None), array))

    targets = mapped("targets", split.targets) if masks else split.targets
    on_disk = Split(mapped("images", split.images), targets)
    assert isinstance(on_disk.images, np.memmap)
    options = {"batch_size": 4, "augmentation": Augmentation(2, True), "drop_last": False}
    expected = chain.from_iterable(Batches(split, **options).epoch(1, start))
    found = chain.from_iterable(Batches(on_disk, **options).epoch(1, start))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_an_epoch_from_disk_can_be_left_early(tmp_path, monkeypatch):
    monkeypatch.setenv("BUDGETNET_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "LARGE", 1)
    split = split_of()
    images = cache.cached(
        "images", split.images.shape, np.uint8, lambda out: out.__setitem__(slice(None), split.images)
    )
    epoch = Batches(Split(images, split.targets), batch_size=4).epoch(0)
    next(epoch)
    epoch.close()


@pytest.mark.parametrize(
    ("build", "line"),
    [
        (lambda: Batches(split_of(), batch_size=0), "batch_size must be >= 1 image, got 0"),
        (lambda: Batches(split_of(), batch_size=1, seed=-1), "seed must be >= 0, got -1"),
        (lambda: Batches(split_of(), batch_size=8).epoch(-1), "epoch must be >= 0, got -1"),
        (lambda: Batches(split_of(), batch_size=8).epoch(0, 3), "an epoch of 2 batches starts at 0 to 2, got 3"),
        (lambda: Batches(split_of(), batch_size=8).epoch(0, -1), "an epoch of 2 batches starts at 0 to 2, got -1"),
        (lambda: Augmentation(pad=-1), "pad must be >= 0 pixels, got -1"),
        (lambda: Augmentation(fill=256), "fill must be in 0..255, got 256"),
        (lambda: Normalisation(mean=(1.5,)), r"mean must be of pixels in \[0, 1\], got 1.5"),
        (lambda: Normalisation(std=(0.0,)), r"std must be > 0, of pixels in \[0, 1\], got 0.0"),
        (lambda: Normalisation(std=(1.0, 1.0)), "mean and std must be of one length, got 1 and 2 numbers"),
        (
            lambda: replace(split_of(), normalisation=Normalisation((0.5,) * 2, (0.5,) * 2)),
            "mean and std must be 1 number or 3, one for each channel, got 2",
        ),
    ],
)
def test_a_wrong_option_is_one_clear_line(build, line):
    with pytest.raises(ConfigError, match=line):
        build()


def test_several_batches_go_on_with_the_epochs_behind():
    batches = Batches(split_of(), batch_size=8, seed=1)
    expected = [*batches.epoch(3), *batches.epoch(4), next(batches.epoch(5))]
    found = list(batches.several(5, 3))
    assert len(found) == 5
    for (x, y), (images, classes) in zip(found, expected, strict=True):
        assert torch.equal(x, images)
        assert torch.equal(y, classes)
    assert not list(batches.several(0))
