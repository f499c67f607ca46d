"""Datasets: published layouts, divisions, the cache, and an error line for each thing that can be wrong."""

import os
import pickle
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from budgetnet import data
from budgetnet.data import cache, cifar, decode
from budgetnet.data.dataset import Split, evenly, held_out, take
from budgetnet.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("BUDGETNET_CACHE", str(folder))
    return folder


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)


def random_picture(seed, height=8, width=8, channels=3):
    shape = (height, width, channels) if channels == 3 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def class_folders(base, counts, channels=3):
    """`{part: {class: images}}` as png files of 8 x 8 pixels; returns the picture of each path."""
    pictures = {}
    for part, classes in counts.items():
        for name, count in classes.items():
            for number in range(count):
                path = base / part / name / f"{number}.png"
                pictures[path] = random_picture(len(pictures), channels=channels)
                save(path, pictures[path])
    return pictures


def mask_folders(base, counts, values=3):
    """`{part: images}` of 6 x 8 pixels with masks of 0..values-1."""
    for part, count in counts.items():
        for number in range(count):
            picture = random_picture(number, 6, 8)
            save(base / part / "images" / f"{number}.png", picture)
            mask = picture[:, :, 0] % values
            mask[0, 0] = values - 1
            save(base / part / "masks" / f"{number}.png", mask)


def rows(split):
    return {image.tobytes() for image in split.images}


def disjoint(dataset):
    parts = [rows(part) for part in (dataset.train, dataset.validation, dataset.test)]
    together = sum(len(part) for part in (dataset.train, dataset.validation, dataset.test))
    return len(set.union(*parts)) == together


# Divisions


def test_held_out_is_in_proportion_to_the_strata():
    strata = np.repeat([0, 1, 2], [60, 30, 10])
    kept, held = held_out(strata, 10, seed=0)
    assert np.bincount(strata[held]).tolist() == [6, 3, 1]
    assert sorted([*kept, *held]) == list(range(100))


def test_held_out_follows_the_seed():
    strata = np.zeros(50, np.int64)
    assert np.array_equal(held_out(strata, 9, 1)[1], held_out(strata, 9, 1)[1])
    assert not np.array_equal(held_out(strata, 9, 1)[1], held_out(strata, 9, 2)[1])


@pytest.mark.parametrize("count", [0, 4, 5])
def test_held_out_needs_images_on_both_sides(count):
    with pytest.raises(DataError, match="more images are needed"):
        held_out(np.zeros(4, np.int64), count, 0)


def test_evenly_gives_equal_shares_while_they_last():
    strata = np.repeat([0, 1, 2], [50, 50, 2])
    assert np.bincount(strata[evenly(strata, 22, 0)]).tolist() == [10, 10, 2]
    assert max(np.bincount(strata[evenly(strata, 4, 0)])) == 2


def test_subset_keeps_targets_with_their_images():
    images = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1)
    split = Split(images, np.arange(40) % 4)
    part = split.subset(8, seed=3)
    assert np.bincount(part.targets).tolist() == [2, 2, 2, 2]
    assert np.array_equal(part.images[:, 0, 0, 0] % 4, part.targets)
    assert np.array_equal(part.images, split.subset(8, seed=3).images)


def test_a_dataset_is_augmented_and_seen_in_another_way():
    own = data.load("digits")
    other = own.augmented(pad=3, flip=True).normalised([0.25], [2.0])
    assert other.augmentation == data.Augmentation(pad=3, flip=True)
    assert own.augmented().augmentation == own.augmentation == data.Augmentation(pad=1)
    assert [split.normalisation.mean for split in (other.train, other.validation, other.test)] == [(0.25,)] * 3
    assert other.subset(9, seed=0).normalisation.std == (2.0,), "it goes with the images"
    with pytest.raises(ConfigError, match="pad must be less than an image's side of 8 pixels, got 8"):
        own.augmented(pad=8)


@pytest.mark.parametrize("n", [0, -1, 41])
def test_subset_of_an_impossible_size_is_refused(n):
    split = Split(np.zeros((40, 1, 1, 1), np.uint8), np.zeros(40, np.int64))
    with pytest.raises(ConfigError, match=f"1 to 40 of them, got {n}"):
        split.subset(n, seed=0)


@pytest.mark.parametrize(
    ("images", "targets", "line"),
    [
        (np.zeros((0, 1, 2, 2), np.uint8), np.zeros(0, np.int64), "N >= 1"),
        (np.zeros((2, 1, 2, 2)), np.zeros(2, np.int64), "got .* float64"),
        (np.zeros((2, 1, 2, 2), np.uint8), np.zeros(3, np.int64), "targets must be"),
        (np.zeros((2, 1, 2, 2), np.uint8), np.zeros((2, 2, 3), np.uint8), "targets must be"),
        (np.zeros((2, 1, 2, 2), np.uint8), np.zeros(2, np.int32), "targets must be"),
    ],
)
def test_arrays_of_a_wrong_shape_or_type_are_refused(images, targets, line):
    with pytest.raises(DataError, match=line):
        Split(images, targets)


# The named datasets


def test_digits_are_divided_in_proportion_and_tested_alike_for_every_seed():
    first, second = data.load("digits", seed=0), data.load("digits", seed=1)
    assert (len(first.train), len(first.validation), len(first.test)) == (1257, 180, 360)
    assert first.image_shape == (1, 8, 8)
    assert first.num_classes == 10
    assert np.array_equal(first.test.images, second.test.images)
    assert not np.array_equal(first.validation.targets, second.validation.targets)
    assert np.ptp(np.bincount(first.test.targets)) <= 2
    assert first.train.images.max() == 255
    assert not first.augmentation.flip


def test_digits_can_be_enlarged_and_cut():
    digits = data.load("digits", image_size=16)
    assert digits.image_shape == (1, 16, 16)
    assert np.bincount(digits.subset(50, seed=0).train.targets).tolist() == [5] * 10


def cifar_records(kind, count, seed):
    random = np.random.default_rng(seed)
    labels = [i % kind.classes for i in range(count)]
    return random.integers(0, 256, (count, 3072), np.uint8), labels


def write_binary(folder, kind, per_file=20):
    """The binary version: [coarse] fine 3072 x pixel, record after record."""
    folder.mkdir(parents=True)
    written = {}
    for seed, name in enumerate((*kind.train, kind.test)):
        images, labels = cifar_records(kind, per_file, seed)
        head = np.zeros((per_file, kind.label_bytes), np.uint8)
        head[:, -1] = labels
        (folder / f"{name}.bin").write_bytes(np.hstack([head, images]).tobytes())
        written[name] = images
    (folder / kind.binary_names).write_text("\n".join(f"class{i}" for i in range(kind.classes)) + "\n\n")
    return written


def write_python(folder, kind, per_file=20, protocol=2):
    """The python version, pickled by this Python."""
    folder.mkdir(parents=True)
    written = {}
    for seed, name in enumerate((*kind.train, kind.test)):
        images, labels = cifar_records(kind, per_file, seed)
        content = {"data": images, kind.label_key: labels, "filenames": ["x.png"] * per_file}
        (folder / name).write_bytes(pickle.dumps(content, protocol))
        written[name] = images
    file, key = kind.python_names
    (folder / file).write_bytes(pickle.dumps({key: [f"class{i}" for i in range(kind.classes)]}, protocol))
    return written


def python2_pickle(images, labels):
    """As Python 2 wrote them: byte strings for every string, and numpy as `numpy.core`."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    def number(value):
        return b"J" + value.to_bytes(4, "little", signed=True)

    raw = images.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b")
    array += b"\x87R(" + number(1) + number(images.shape[0]) + number(images.shape[1]) + b"\x86"
    array += b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R("
    array += number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    array += b"\x89" + b"T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    listed = b"](" + b"".join(map(number, labels)) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + listed + b"u."


WRITERS = {"python": write_python, "binary": write_binary}


@pytest.mark.parametrize("version", WRITERS)
@pytest.mark.parametrize("name", cifar.SETS)
@pytest.mark.parametrize("inside", ["named", "root", "archive"])
def test_cifar_is_read_as_published(tmp_path, name, version, inside):
    kind = cifar.SETS[name]
    folder = getattr(kind, version)
    base = tmp_path if inside == "root" else tmp_path / name
    per_file = 200 // len(kind.train)
    written = WRITERS[version](base / folder, kind, per_file)
    if inside == "archive":
        archive = base / getattr(kind, f"{version}_archive")
        with tarfile.open(archive, "w:gz") as file:
            file.add(base / folder, folder)
        (base / folder).rename(tmp_path / "elsewhere")
    found = data.load(name, root=tmp_path)
    assert (len(found.train), len(found.validation), len(found.test)) == (180, 20, per_file)
    assert np.array_equal(found.test.images.reshape(-1, 3072), written[kind.test])
    assert found.test.targets.tolist() == [i % kind.classes for i in range(per_file)]
    assert found.classes == tuple(f"class{i}" for i in range(kind.classes))
    assert disjoint(found)
    if name == "cifar10":
        assert np.bincount(found.validation.targets).tolist() == [2] * 10
    assert (found.augmentation.pad, found.augmentation.flip) == (4, True)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_cifar_pickles_of_any_usual_protocol_are_read(tmp_path, protocol):
    write_python(tmp_path / "cifar-10-batches-py", cifar.SETS["cifar10"], protocol=protocol)
    assert len(data.load("cifar10", root=tmp_path).test) == 20


def test_cifar_pickles_of_python_2_are_read(tmp_path):
    kind = cifar.SETS["cifar10"]
    folder = tmp_path / kind.python
    folder.mkdir()
    for seed, name in enumerate((*kind.train, kind.test)):
        (folder / name).write_bytes(python2_pickle(*cifar_records(kind, 20, seed)))
    found = data.load("cifar10", root=tmp_path)
    images, labels = cifar_records(kind, 20, len(kind.train))
    assert np.array_equal(found.test.images.reshape(-1, 3072), images)
    assert found.test.targets.tolist() == labels
    assert found.classes == tuple("0123456789")  # the file with the names is not there


def test_cifar_is_read_from_class_folders(tmp_path):
    counts = {f"class{i}": 10 for i in range(10)}
    class_folders(tmp_path / "cifar10", {"train": counts, "test": counts})
    found = data.load("cifar10", root=tmp_path)
    assert (len(found.train), len(found.validation), len(found.test)) == (90, 10, 100)
    assert np.bincount(found.validation.targets).tolist() == [1] * 10
    assert found.augmentation.pad == 4


class Hostile:
    def __reduce__(self):
        return os.system, ("true",)


class Evaluates:
    def __reduce__(self):
        return eval, ("1 + 1",)


class ObjectArray:
    def __reduce__(self):
        return np.dtype, ("O", False, True)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (pickle.dumps(Hostile()), r"asks for (posix|nt)\.system"),
        (pickle.dumps(Evaluates()), r"asks for (__builtin__|builtins)\.eval"),
        (pickle.dumps(ObjectArray()), "arrays of object are not expected"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}, 2)[:-900], "not a whole CIFAR pickle"),
        (b"", "not a whole CIFAR pickle"),
        (b"no pickle at all", "not a whole CIFAR pickle"),
        (pickle.dumps([1, 2]), "expected a dictionary, got list"),
        (pickle.dumps({"labels": [0]}), r"expected data of \(N, 3072\) uint8"),
        (pickle.dumps({"data": np.zeros((2, 3072)), "labels": [0, 1]}), r"expected data of \(N, 3072\) uint8"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}), "expected 2 whole numbers"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": ["a"]}), "expected 1 whole numbers"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10**30]}), "has label 10+, expected 0..9"),
    ],
)
def test_hostile_and_damaged_cifar_pickles_are_refused_by_name(tmp_path, content, line):
    folder = tmp_path / "cifar-10-batches-py"
    write_python(folder, cifar.SETS["cifar10"])
    (folder / "data_batch_3").write_bytes(content)
    with pytest.raises(DataError, match=f"data_batch_3.*{line}") as caught:
        data.load("cifar10", root=tmp_path)
    assert "\n" not in str(caught.value)


def test_cifar_binaries_cut_short_are_refused(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    write_binary(folder, cifar.SETS["cifar10"])
    file = folder / "data_batch_2.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"data_batch_2.bin has 61459 bytes, expected a multiple of 3073"):
        data.load("cifar10", root=tmp_path)
    file.write_bytes(whole[: -2 * 3073])  # between two records
    with pytest.raises(DataError, match=r"training batches differ in size.*'data_batch_2': 18"):
        data.load("cifar10", root=tmp_path)
    file.write_bytes(b"\x0a" + whole[1:])
    with pytest.raises(DataError, match=r"data_batch_2.bin has label 10, expected 0..9"):
        data.load("cifar10", root=tmp_path)


def test_incomplete_cifar_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"cifar100 was found neither in .* expected cifar-100-python/"):
        data.load("cifar100", root=tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    write_python(folder, cifar.SETS["cifar10"])
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat"]}))
    with pytest.raises(DataError, match=r"batches.meta names 1 classes, expected 10"):
        data.load("cifar10", root=tmp_path)
    (folder / "test_batch").unlink()
    with pytest.raises(DataError, match="cifar-10-batches-py lacks test_batch"):
        data.load("cifar10", root=tmp_path)


def test_cifar_archives_cut_short_are_refused(tmp_path):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    write_binary(tmp_path / "written" / "cifar-10-batches-bin", cifar.SETS["cifar10"])
    with tarfile.open(archive, "w:gz") as file:
        file.add(tmp_path / "written" / "cifar-10-batches-bin", "cifar-10-batches-bin")
    archive.write_bytes(archive.read_bytes()[:-1000])
    with pytest.raises(DataError, match=r"cifar-10-binary.tar.gz (cannot be read|lacks)"):
        data.load("cifar10", root=tmp_path)


def test_cifar_archives_are_read_from_the_published_folder_only(tmp_path):
    write_binary(tmp_path / "written", cifar.SETS["cifar10"])
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as file:
        file.add(tmp_path / "written", "another-folder")
    with pytest.raises(DataError, match=r"cifar-10-binary.tar.gz lacks data_batch_1.bin, .*test_batch.bin"):
        data.load("cifar10", root=tmp_path)


def test_cifar_folders_with_another_number_of_classes_are_refused(tmp_path):
    class_folders(tmp_path / "cifar10", {"train": {"a": 5, "b": 5}, "test": {"a": 1}})
    with pytest.raises(DataError, match="train holds 2 classes, expected 10"):
        data.load("cifar10", root=tmp_path)


def part_labels(root, size=250):
    """Two people in each list of the published layout, hair above skin above background."""
    base = root / "part-labels"
    number = 0
    for part in ("train", "validation", "test"):
        lines = []
        for _ in range(2):
            number += 1
            name = f"Some_Body{number}"
            picture = random_picture(number, size, size)
            mask = np.zeros((size, size, 3), np.uint8)
            mask[:50, :, 0] = mask[50:100, :, 1] = mask[100:, :, 2] = 255
            save(base / "lfw_funneled" / name / f"{name}_0007.jpg", picture)
            save(base / "parts_lfw_funneled_gt_images" / f"{name}_0007.ppm", mask)
            lines.append(f"{name} 7")
        (base / f"parts_{part}.txt").write_text("\n".join(lines) + "\n")
    return base


@pytest.mark.parametrize(("ignore", "padding"), [(None, 2), (255, 255)])
def test_part_labels_are_padded_in_the_middle_of_256_pixels(tmp_path, ignore, padding):
    part_labels(tmp_path)
    found = data.load("part-labels", root=tmp_path, ignore=ignore)
    assert (len(found.train), len(found.validation), len(found.test)) == (2, 2, 2)
    assert found.image_shape == (3, 256, 256)
    assert found.classes == ("hair", "skin", "background")
    expected = np.full((256, 256), padding)
    expected[3:253, 3:253] = 2
    expected[3:53, 3:253] = 0
    expected[53:103, 3:253] = 1
    assert np.array_equal(found.train.targets[0], expected)
    border = np.ones((256, 256), bool)
    border[3:253, 3:253] = False
    assert not found.train.images[0][:, border].any()
    assert found.train.images[0][:, ~border].mean() > 100
    assert found.augmentation == data.Augmentation(pad=0, flip=True, fill=padding)


def test_part_labels_errors_name_the_file(tmp_path):
    with pytest.raises(DataError, match="lfw_funneled is not there: expected in"):
        data.load("part-labels", root=tmp_path)
    base = part_labels(tmp_path)
    mask = base / "parts_lfw_funneled_gt_images" / "Some_Body2_0007.ppm"
    kept = mask.read_bytes()
    save(mask, np.full((250, 250, 3), 9))
    with pytest.raises(DataError, match=r"Some_Body2_0007.ppm cannot be decoded: colour \(9, 9, 9\)"):
        data.load("part-labels", root=tmp_path)
    save(mask, np.full((250, 251, 3), 9))
    with pytest.raises(DataError, match=r"Some_Body2_0007.ppm is 251 x 250 pixels, its image 250 x 250"):
        data.load("part-labels", root=tmp_path)
    mask.unlink()
    with pytest.raises(DataError, match=r"Some_Body2_0007.ppm is not there: 1 of the 2 files of parts_train.txt"):
        data.load("part-labels", root=tmp_path)
    mask.write_bytes(kept)
    (base / "parts_test.txt").write_text("Some_Body5 7\nSome_Body6\n")
    with pytest.raises(DataError, match=r"parts_test.txt:2: expected <Name> <number>, got 'Some_Body6'"):
        data.load("part-labels", root=tmp_path)
    (base / "parts_test.txt").write_text("\n")
    with pytest.raises(DataError, match=r"parts_test.txt lists no image"):
        data.load("part-labels", root=tmp_path)


def test_part_labels_larger_than_the_padding_are_refused(tmp_path):
    part_labels(tmp_path, size=260)
    with pytest.raises(DataError, match="is 260 x 260 pixels, expected at most 256 x 256"):
        data.load("part-labels", root=tmp_path)


def test_imagenet_validation_is_held_out_of_train(tmp_path):
    train = {"n01": 130, "n02": 130}
    class_folders(tmp_path / "imagenet", {"train": train, "val": {"n01": 2, "n02": 2}})
    found = data.load("imagenet", root=tmp_path, image_size=4)
    assert (len(found.train), len(found.validation), len(found.test)) == (240, 20, 4)
    assert np.bincount(found.validation.targets).tolist() == [10, 10]
    assert found.classes == ("n01", "n02")
    (tmp_path / "imagenet" / "val").rename(tmp_path / "imagenet" / "elsewhere")
    with pytest.raises(DataError, match="imagenet/val is not there: expected"):
        data.load("imagenet", root=tmp_path)


# Folders of the user's


@pytest.mark.parametrize("validation", ["val", "valid", "validation"])
def test_a_folder_with_three_splits_is_read_as_it_is(tmp_path, validation):
    counts = {"train": {"b": 3, "a": 2}, validation: {"a": 1, "b": 1}, "test": {"a": 2}}
    pictures = class_folders(tmp_path, counts)
    found = data.load(str(tmp_path))
    assert found.classes == ("a", "b")
    assert found.train.targets.tolist() == [0, 0, 1, 1, 1]
    assert found.test.targets.tolist() == [0, 0]
    first = pictures[tmp_path / "train" / "a" / "0.png"]
    assert np.array_equal(found.train.images[0], first.transpose(2, 0, 1))
    assert len(found.validation) == 2
    assert (found.task, found.name, found.ignore) == ("classification", tmp_path.name, None)


@pytest.mark.parametrize(
    ("parts", "sizes"),
    [
        ({"train": 20, "test": 4}, (36, 4, 8)),
        ({"train": 20, "val": 4}, (36, 4, 8)),
        ({"train": 20}, (32, 4, 4)),
        ({".": 20}, (32, 4, 4)),
    ],
)
def test_missing_splits_are_held_out_of_train(tmp_path, parts, sizes):
    class_folders(tmp_path, {part: {"a": count, "b": count} for part, count in parts.items()})
    found = data.load(str(tmp_path), seed=5)
    again, other = data.load(str(tmp_path), seed=5), data.load(str(tmp_path), seed=6)
    splits = (found.train, found.validation, found.test)
    assert tuple(map(len, splits)) == sizes
    assert all(np.ptp(np.bincount(part.targets)) == 0 for part in splits)
    assert disjoint(found)
    assert rows(found.validation) == rows(again.validation) != rows(other.validation)
    assert rows(found.test) == rows(other.test)


def test_images_stay_grey_only_if_all_of_them_are(tmp_path):
    class_folders(tmp_path, {"train": {"a": 5, "b": 5}, "test": {"a": 1}}, channels=1)
    grey = data.load(str(tmp_path))
    assert grey.image_shape == (1, 8, 8)
    assert not grey.augmentation.flip
    save(tmp_path / "test" / "a" / "colour.png", random_picture(0))
    assert data.load(str(tmp_path)).image_shape == (3, 8, 8)


@pytest.mark.parametrize(("height", "width"), [(8, 24), (24, 8), (8, 8)])
def test_image_size_fits_the_shorter_side_and_cuts_the_longer(tmp_path, height, width):
    picture = random_picture(0, height, width)
    for name in ("a", "b"):
        for number in range(5):
            save(tmp_path / name / f"{number}.png", picture)
    half = Image.fromarray(picture).resize((width // 2, height // 2), Image.Resampling.BILINEAR)
    left, top = (width // 2 - 4) // 2, (height // 2 - 4) // 2
    expected = np.asarray(half.crop((left, top, left + 4, top + 4))).transpose(2, 0, 1)
    found = data.load(str(tmp_path), image_size=4)
    assert np.array_equal(found.train.images[0], expected)


def test_image_size_stretches_images_and_samples_masks(tmp_path):
    mask_folders(tmp_path, {"train": 3, "val": 2, "test": 2})
    found = data.load(str(tmp_path), image_size=3)
    with Image.open(tmp_path / "train" / "images" / "1.png") as image:
        expected = np.asarray(image.resize((3, 3), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    with Image.open(tmp_path / "train" / "masks" / "1.png") as mask:
        nearest = np.asarray(mask)[np.ix_([1, 3, 5], [1, 4, 6])]  # pixels under the centres of the new ones
    assert np.array_equal(found.train.images[1], expected)
    assert np.array_equal(found.train.targets[1], nearest)


def test_hidden_files_are_left_out(tmp_path):
    class_folders(tmp_path, {"train": {"a": 5, "b": 5}, "test": {"a": 1}})
    (tmp_path / "train" / "a" / ".DS_Store").write_bytes(b"x")
    assert len(data.load(str(tmp_path)).train) == 9


def test_masks_are_read_with_their_images(tmp_path):
    mask_folders(tmp_path, {"train": 3, "val": 2, "test": 2})
    found = data.load(str(tmp_path))
    assert (len(found.train), len(found.validation), len(found.test)) == (3, 2, 2)
    assert (found.task, found.classes) == ("segmentation", ("0", "1", "2"))
    assert found.train.targets.dtype == np.uint8
    same = found.train.images[:, 0] % 3 == found.train.targets
    assert same.sum() >= same.size - 3  # each mask has one pixel of its own
    ignoring = data.load(str(tmp_path), ignore=2)
    assert (ignoring.classes, ignoring.ignore, ignoring.augmentation.fill) == (("0", "1"), 2, 2)
    larger = data.load(str(tmp_path), image_size=16)
    assert larger.image_shape == (3, 16, 16)
    assert set(np.unique(larger.train.targets)) <= {0, 1, 2}


def test_mask_folders_without_validation_hold_it_out(tmp_path):
    mask_folders(tmp_path, {"train": 20, "test": 2})
    found = data.load(str(tmp_path))
    assert (len(found.train), len(found.validation), len(found.test)) == (18, 2, 2)
    assert len(found.subset(5, seed=0).train) == 5


def test_palette_masks_are_read_by_index(tmp_path):
    mask_folders(tmp_path, {"train": 3, "val": 2, "test": 2})
    path = tmp_path / "train" / "masks" / "0.png"
    with Image.open(path) as opened:
        values = np.asarray(opened)
    image = Image.fromarray(values).convert("P")
    image.putdata(values.ravel().tolist())
    image.putpalette([90, 80, 70, 60, 50, 40, 30, 20, 10])
    before = data.load(str(tmp_path)).train.targets[0]
    image.save(path)
    assert image.mode == "P"
    assert np.array_equal(data.load(str(tmp_path)).train.targets[0], before)


def test_classes_txt_names_the_classes_and_bounds_the_masks(tmp_path):
    mask_folders(tmp_path, {"train": 3, "val": 2, "test": 2})
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\ntree\n")
    assert data.load(str(tmp_path)).classes == ("sky", "road", "car", "tree")
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    with pytest.raises(DataError, match=r"masks/0.png holds 2, but classes.txt names 2 classes"):
        data.load(str(tmp_path))
    assert data.load(str(tmp_path), ignore=2).classes == ("sky", "road")
    (tmp_path / "classes.txt").write_text("sky\n\nroad\n")
    with pytest.raises(DataError, match="expected one class name a line"):
        data.load(str(tmp_path))


# What can be wrong


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("cifar11", {}, "unknown dataset 'cifar11': expected digits, cifar10"),
        ("digits", {"image_size": 0}, "image_size must be >= 1 pixel, got 0"),
        ("digits", {"seed": -1}, "seed must be >= 0, got -1"),
        ("digits", {"ignore": 256}, "ignore must be in 0..255, got 256"),
        ("digits", {"ignore": -1}, "ignore must be in 0..255, got -1"),
        ("digits", {"ignore": 3}, "ignore is a value of masks, and digits has none"),
    ],
)
def test_a_wrong_request_is_one_clear_line(name, options, line):
    with pytest.raises(ConfigError, match=line):
        data.load(name, **options)


def test_a_missing_folder_says_what_was_expected(tmp_path):
    with pytest.raises(DataError, match=r"nowhere is not a folder: expected train/<class>/"):
        data.load(str(tmp_path / "nowhere"))


def spoil_empty_class(base):
    (base / "train" / "c").mkdir()


def spoil_unknown_class(base):
    save(base / "test" / "c" / "0.png", random_picture(0))


def spoil_one_class(base):
    (base / "train" / "b").rename(base / "elsewhere")


def spoil_no_train(base):
    (base / "train").rename(base / "elsewhere")


def spoil_two_validations(base):
    (base / "val").mkdir()
    (base / "valid").mkdir()


def spoil_sizes(base):
    save(base / "test" / "a" / "0.png", random_picture(0, 9, 7))


def spoil_truncated(base):
    path = base / "train" / "a" / "1.jpg"
    Image.fromarray(random_picture(0)).save(path, quality=90)
    path.write_bytes(path.read_bytes()[:-20])


def spoil_text(base):
    (base / "train" / "a" / "notes.txt").write_text("not an image")


def spoil_deep(base):
    (base / "train" / "a" / "more").mkdir()


def spoil_sixteen_bits(base):
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(base / "train" / "a" / "1.png")


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (spoil_empty_class, "train/c holds no image"),
        (spoil_unknown_class, "test/c is a class that .*train does not have"),
        (spoil_one_class, "train holds 1 class folder, expected 2 or more"),
        (spoil_no_train, "holds test but no train/"),
        (spoil_two_validations, "holds val and valid: expected one of them"),
        (spoil_sizes, r"test/a/0.png is 7 x 9 pixels, .*train/a/0.png 8 x 8: give image_size"),
        (spoil_truncated, "train/a/1.jpg cannot be decoded: .*truncated"),
        (spoil_text, "train/a/notes.txt is not an image"),
        (spoil_deep, "train/a/more is a folder: expected images in"),
        (spoil_sixteen_bits, "train/a/1.png cannot be decoded: expected 8 bits a channel"),
    ],
)
def test_a_spoilt_folder_is_one_clear_line(tmp_path, spoil, line):
    class_folders(tmp_path, {"train": {"a": 5, "b": 5}, "test": {"a": 2}})
    data.load(str(tmp_path))
    spoil(tmp_path)
    with pytest.raises(DataError, match=line) as caught:
        data.load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_empty_folder_says_what_was_expected(tmp_path):
    with pytest.raises(DataError, match="holds no class folder: expected train/<class>/"):
        data.load(str(tmp_path))


def spoil_mask_missing(base):
    (base / "train" / "masks" / "1.png").unlink()


def spoil_image_missing(base):
    (base / "train" / "images" / "1.png").unlink()


def spoil_mask_folder(base):
    (base / "val" / "masks").rename(base / "elsewhere")


def spoil_mask_size(base):
    save(base / "train" / "masks" / "1.png", np.zeros((6, 9)))


def spoil_mask_colour(base):
    save(base / "train" / "masks" / "1.png", np.zeros((6, 8, 3)))


def spoil_twice(base):
    save(base / "train" / "images" / "1.bmp", random_picture(0, 6, 8))


def spoil_all_ignored(base):
    for mask in base.glob("*/masks/*"):
        save(mask, np.full((6, 8), 7))


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (spoil_mask_missing, "train/images/1.png has no mask in"),
        (spoil_image_missing, "train/masks/1.png has no image in"),
        (spoil_mask_folder, "val/masks is not there: expected images/"),
        (spoil_mask_size, "train/masks/1.png is 9 x 6 pixels, its image 8 x 6"),
        (spoil_mask_colour, "train/masks/1.png cannot be decoded: a mask has one byte a pixel .* got mode RGB"),
        (spoil_twice, "holds both 1.(bmp|png) and 1.(bmp|png): expected one file a name"),
        (spoil_all_ignored, "every pixel of every mask is 7"),
    ],
)
def test_a_spoilt_mask_folder_is_one_clear_line(tmp_path, spoil, line):
    mask_folders(tmp_path, {"train": 3, "val": 2, "test": 2})
    data.load(str(tmp_path), ignore=7)
    spoil(tmp_path)
    with pytest.raises(DataError, match=line):
        data.load(str(tmp_path), ignore=7)


# The cache


def counted(monkeypatch):
    """Counts the files that are opened."""
    opened = Counter()
    plain = decode.Image.open

    def counting(path, **options):
        opened[str(path)] += 1
        return plain(path, **options)

    monkeypatch.setattr(decode.Image, "open", counting)
    return opened


def test_images_are_decoded_once(tmp_path, monkeypatch):
    class_folders(tmp_path, {"train": {"a": 5, "b": 5}, "test": {"a": 2}})
    first = data.load(str(tmp_path))
    opened = counted(monkeypatch)
    second = data.load(str(tmp_path))
    assert not opened
    assert np.array_equal(first.train.images, second.train.images)
    data.load(str(tmp_path), image_size=4)
    assert set(opened.values()) == {1}  # sizes are known already, pixels are not


def test_a_file_changed_to_one_of_the_same_size_is_decoded_again(tmp_path):
    class_folders(tmp_path, {"train": {"a": 5, "b": 5}, "test": {"a": 2}})
    path = tmp_path / "test" / "a" / "0.bmp"  # no compression
    save(path, np.zeros((8, 8, 3)))
    before = path.stat()
    data.load(str(tmp_path))
    save(path, np.full((8, 8, 3), 77))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert path.stat().st_size == before.st_size
    assert (data.load(str(tmp_path)).test.images[0] == 77).all()


def test_another_conversion_of_the_same_files_is_another_array(tmp_path):
    part_labels(tmp_path)
    corners = [data.load("part-labels", root=tmp_path, ignore=ignore).test.targets[0, 0, 0] for ignore in (None, 9, 8)]
    assert corners == [2, 9, 8]


@pytest.mark.parametrize("damage", [lambda content: content[:-7], lambda content: b"PK" + content[2:], lambda _: b""])
def test_a_broken_cache_is_made_again(tmp_path, cache_folder, damage):
    class_folders(tmp_path, {"train": {"a": 5, "b": 5}, "test": {"a": 2}})
    first = data.load(str(tmp_path))
    files = sorted(cache_folder.iterdir())
    assert files
    for file in files:
        file.write_bytes(damage(file.read_bytes()))
    again = data.load(str(tmp_path))
    assert np.array_equal(first.train.images, again.train.images)
    assert sorted(cache_folder.iterdir()) == files


def test_a_cache_of_another_shape_is_made_again(cache_folder):
    np.save(cache_folder / "key.npy", np.zeros((2, 3), np.uint8))

    def fill(out):
        out[:] = 5

    assert cache.cached("key", (3, 2), np.uint8, fill).tolist() == [[5, 5]] * 3


def test_a_failed_fill_leaves_nothing_behind(cache_folder, monkeypatch):
    def fill(out):
        out[0] = 1
        raise DataError("a broken image")

    for large in (1 << 30, 4):
        monkeypatch.setattr(cache, "LARGE", large)
        with pytest.raises(DataError, match="a broken image"):
            cache.cached("key", (100,), np.uint8, fill)
        assert not list(cache_folder.iterdir())


def test_small_data_does_without_a_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("BUDGETNET_CACHE", str(tmp_path / "file"))

    def fill(out):
        out[:] = 3

    with pytest.warns(UserWarning, match="not kept in"):
        assert cache.cached("key", (2,), np.uint8, fill).tolist() == [3, 3]
    monkeypatch.setattr(cache, "LARGE", 1)
    with pytest.raises(DataError, match="set BUDGETNET_CACHE"):
        cache.cached("key", (2,), np.uint8, fill)


def test_large_data_stays_on_disk(tmp_path, monkeypatch):
    class_folders(tmp_path, {"train": {"a": 20, "b": 20}, "test": {"a": 4}})
    small = data.load(str(tmp_path), seed=3)
    monkeypatch.setattr(cache, "LARGE", 256)
    large = data.load(str(tmp_path), seed=3)
    for part in ("train", "validation", "test"):
        mapped, plain = getattr(large, part), getattr(small, part)
        assert isinstance(mapped.images, np.memmap)
        assert not mapped.images.flags.writeable
        assert np.array_equal(mapped.images, plain.images)
        assert np.array_equal(mapped.targets, plain.targets)
    part = large.subset(10, seed=0).train
    assert isinstance(part.images, np.memmap)
    assert np.array_equal(part.images, small.subset(10, seed=0).train.images)


def test_a_view_of_a_map_is_copied_to_memory(monkeypatch):
    monkeypatch.setattr(cache, "LARGE", 16)

    def fill(out):
        out[:] = np.arange(100).reshape(50, 2)

    mapped = cache.cached("key", (50, 2), np.uint8, fill)
    chosen = np.arange(20)
    assert isinstance(take(mapped, chosen), np.memmap)
    assert np.array_equal(take(mapped[10:], chosen), mapped[10:30])
