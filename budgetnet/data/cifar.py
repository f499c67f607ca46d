"""CIFAR-10 and CIFAR-100 from the files their authors publish, unpacked or as downloaded."""

import pickle
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import ClassVar

import numpy as np

from budgetnet.data.dataset import Augmentation, Dataset, Split, held_out
from budgetnet.data.decode import resized
from budgetnet.data.folders import classification
from budgetnet.errors import DataError

# 4 pixels a side is the usual choice and that of the first paper's code; its text pads to 36 x 36, 2 a side.
AUGMENTATION = Augmentation(pad=4, flip=True)
PIXELS = 3 * 32 * 32
UNREADABLE = (pickle.UnpicklingError, EOFError, AttributeError, ImportError, LookupError, TypeError, ValueError,
              ArithmeticError, MemoryError, RecursionError)  # fmt: skip

Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Published:
    """How one of the two sets is published: `classes`, file names, and where a record's label is."""

    classes: int
    train: tuple[str, ...]
    test: str
    python: str  # folder of the pickles
    python_archive: str
    python_names: tuple[str, str]  # file and key of the class names
    label_key: str
    binary: str  # folder of the .bin files
    binary_archive: str
    binary_names: str
    label_bytes: int  # the last one is the class


SETS = {
    "cifar10": Published(
        classes=10,
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test="test_batch",
        python="cifar-10-batches-py",
        python_archive="cifar-10-python.tar.gz",
        python_names=("batches.meta", "label_names"),
        label_key="labels",
        binary="cifar-10-batches-bin",
        binary_archive="cifar-10-binary.tar.gz",
        binary_names="batches.meta.txt",
        label_bytes=1,
    ),
    "cifar100": Published(
        classes=100,
        train=("train",),
        test="test",
        python="cifar-100-python",
        python_archive="cifar-100-python.tar.gz",
        python_names=("meta", "fine_label_names"),
        label_key="fine_labels",
        binary="cifar-100-binary",
        binary_archive="cifar-100-binary.tar.gz",
        binary_names="fine_label_names.txt",
        label_bytes=2,  # coarse, then fine
    ),
}


def load_cifar(name: str, root: Path, image_size: int | None = None, seed: int = 0) -> Dataset:
    """CIFAR-10 or CIFAR-100 with its fine labels; a tenth of the training images is held out for validation.

    Looks in `root/name` and in `root` for, in this order, the "python" version, the "binary" version, either of
    them in its .tar.gz, and a folder with `train/<class>/` and `test/<class>/`.

    Args:
        name: "cifar10" or "cifar100".
        root: folder of the datasets.
        image_size: side in pixels; as published, 32, when None.
        seed: of the division between train and validation.

    Raises:
        DataError: nothing is found, or what is found is incomplete or damaged.

    Source: Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
    """
    kind = SETS[name]
    for base in (root / name, root):
        for parse, folder, archive, extra, suffix in (
            (_python, kind.python, kind.python_archive, kind.python_names[0], ""),
            (_binary, kind.binary, kind.binary_archive, kind.binary_names, ".bin"),
        ):
            required = [file + suffix for file in (*kind.train, kind.test)]
            for place in (base / folder, base / archive):
                files = _found(place, folder, required, extra)
                if files is not None:
                    return _dataset(name, place, files, parse, suffix, image_size, seed)
        if (base / "train").is_dir() and (base / "test").is_dir():
            parts = {"train": base / "train", "test": base / "test"}
            found = classification(name, parts, image_size, seed, augmentation=AUGMENTATION)
            if found.num_classes != kind.classes:
                raise DataError(f"{base / 'train'} holds {found.num_classes} classes, expected {kind.classes}")
            return found
    raise DataError(
        f"{name} was found neither in {root / name} nor in {root}: expected {kind.python}/, {kind.binary}/, "
        f"{kind.python_archive}, {kind.binary_archive}, or train/<class>/ and test/<class>/ with images"
    )


Parse = Callable[[Published, Path, Files, str], tuple[np.ndarray, np.ndarray]]


def _dataset(
    name: str, place: Path, files: Files, parse: Parse, suffix: str, image_size: int | None, seed: int
) -> Dataset:
    kind = SETS[name]
    batches = [parse(kind, place, files, file + suffix) for file in (*kind.train, kind.test)]
    sizes = {file: len(labels) for file, (_, labels) in zip(kind.train, batches, strict=False)}
    if len(set(sizes.values())) > 1:  # cut between two records, no single file shows it
        raise DataError(f"{place}: training batches differ in size, {sizes}: is one of them cut short?")
    names = _names(kind, place, files)
    *train, test = (Split(resized(images, image_size), labels) for images, labels in batches)
    whole = Split(np.concatenate([part.images for part in train]), np.concatenate([part.targets for part in train]))
    kept, held = held_out(whole.targets, max(1, len(whole) // 10), seed)
    return Dataset(
        name=name,
        train=whole.rows(kept),
        validation=whole.rows(held),
        test=test,
        classes=names,
        task="classification",
        ignore=None,
        augmentation=AUGMENTATION,
    )


def _found(place: Path, folder: str, required: list[str], extra: str) -> Files | None:
    """The bytes of the files of a published folder or archive by name; None if there is no such place."""
    files: dict[str, bytes] = {}
    try:
        if place.is_dir():
            files = {name: (place / name).read_bytes() for name in (*required, extra) if (place / name).is_file()}
        elif place.is_file():
            with tarfile.open(place, "r:gz") as archive:
                for member in archive:  # read in memory: nothing is unpacked to a path an archive names
                    path = Path(member.name)
                    if member.isfile() and path.name in (*required, extra) and path.parent.name == folder:
                        reader = archive.extractfile(member)
                        assert reader is not None  # for a regular file there is one
                        files[path.name] = reader.read()
        else:
            return None
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{place} cannot be read: {error}") from error
    missing = [name for name in required if name not in files]
    if missing:
        raise DataError(f"{place} lacks {', '.join(missing)}")
    return files


def _binary(kind: Published, place: Path, files: Files, name: str) -> tuple[np.ndarray, np.ndarray]:
    record = kind.label_bytes + PIXELS
    content = np.frombuffer(files[name], np.uint8)
    if not len(content) or len(content) % record:
        raise DataError(f"{place / name} has {len(content)} bytes, expected a multiple of {record}: is it cut short?")
    table = content.reshape(-1, record)
    images = np.ascontiguousarray(table[:, kind.label_bytes :]).reshape(-1, 3, 32, 32)
    return images, _classes(kind, place / name, table[:, kind.label_bytes - 1].tolist())


def _python(kind: Published, place: Path, files: Files, name: str) -> tuple[np.ndarray, np.ndarray]:
    content = _unpickled(place / name, files[name])
    data, labels = content.get("data"), content.get(kind.label_key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (PIXELS,) or not len(data):
        raise DataError(f"{place / name}: expected data of (N, {PIXELS}) uint8")
    whole = isinstance(labels, list) and all(type(label) is int for label in labels)
    if not isinstance(labels, list) or not whole or len(labels) != len(data):
        raise DataError(f"{place / name}: expected {len(data)} whole numbers under {kind.label_key}")
    return data.reshape(-1, 3, 32, 32), _classes(kind, place / name, labels)


def _classes(kind: Published, path: Path, labels: list[int]) -> np.ndarray:
    wrong = [label for label in labels if not 0 <= label < kind.classes]
    if wrong:
        raise DataError(f"{path} has label {wrong[0]}, expected 0..{kind.classes - 1}")
    return np.array(labels, np.int64)


def _names(kind: Published, place: Path, files: Files) -> tuple[str, ...]:
    """Class names as published; their numbers if the file with the names was left behind."""
    file, key = kind.python_names
    if file in files:
        listed = _unpickled(place / file, files[file]).get(key)
        names = tuple(map(_text, listed)) if isinstance(listed, list) else ()
    elif kind.binary_names in files:
        names = tuple(files[kind.binary_names].decode("utf-8", "replace").split())
        file = kind.binary_names
    else:
        return tuple(map(str, range(kind.classes)))
    if len(names) != kind.classes:
        raise DataError(f"{place / file} names {len(names)} classes, expected {kind.classes}")
    return names


def _unpickled(path: Path, content: bytes) -> dict[str, object]:
    try:
        found = _Unpickler(BytesIO(content), encoding="bytes").load()  # as Python 2 wrote it
    except UNREADABLE as error:
        raise DataError(f"{path} is not a whole CIFAR pickle: {error or type(error).__name__}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected a dictionary, got {type(found).__name__}")
    return {_text(key): value for key, value in found.items()}


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _empty(*_: object) -> np.ndarray:
    """Stands for numpy's `_reconstruct`: the array whose contents the pickle then sets."""
    return np.ndarray((0,), np.uint8)


def _numeric(code: object, *_: object) -> np.dtype:
    """Stands for `numpy.dtype`, for plain numbers only."""
    dtype = np.dtype(_text(code))
    if dtype.kind not in "uif":
        raise pickle.UnpicklingError(f"arrays of {dtype} are not expected here")
    return dtype


def _latin(text: str, _: str) -> bytes:
    """Stands for `_codecs.encode`, with which Python 3 writes bytes for Python 2."""
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Builds numbers, strings, containers and numeric arrays; a pickle that names anything else is refused."""

    ALLOWED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): _empty,
        ("numpy._core.multiarray", "_reconstruct"): _empty,
        ("numpy", "ndarray"): object,  # only ever an argument of the above
        ("numpy", "dtype"): _numeric,
        ("_codecs", "encode"): _latin,
    }

    def find_class(self, module: str, name: str) -> object:
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no dataset needs") from None
