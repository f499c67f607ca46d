"""Part Labels: faces of Labeled Faces in the Wild with hair, skin and background marked."""

from pathlib import Path

import numpy as np
from PIL import Image

from budgetnet.data.dataset import Augmentation, Dataset, Split
from budgetnet.data.decode import Convert, Files, decode, headers, picture, pixels, stretched
from budgetnet.errors import DataError

SIDE = 256  # pixels, after padding
COLOURS = {"hair": (255, 0, 0), "skin": (0, 255, 0), "background": (0, 0, 255)}
BACKGROUND = list(COLOURS).index("background")
IMAGES, MASKS = "lfw_funneled", "parts_lfw_funneled_gt_images"
LISTS = {"train": "parts_train.txt", "validation": "parts_validation.txt", "test": "parts_test.txt"}


def load_part_labels(root: Path, image_size: int | None = None, ignore: int | None = None) -> Dataset:
    """Part Labels from `root/part-labels`, with its published lists of training, validation and test images.

    Images of 250 x 250 pixels are zero-padded in the middle of 256 x 256. The padding is labelled background, which
    it is; give `ignore` (255, say) to label it with that value instead and leave it out of loss and metrics.

    Args:
        root: folder of the datasets.
        image_size: side in pixels to which the padded images are stretched; 256 when None.
        ignore: mask value of the padding.

    Raises:
        DataError: a list is missing or malformed, a listed file is missing or damaged, or a mask has a fourth colour.

    Source: Kae et al., "Augmenting CRFs with Boltzmann machine shape priors for image labeling", CVPR 2013;
    padding and flip as in Budgeted Super Networks.
    """
    base = root / "part-labels"
    for name in (IMAGES, MASKS, *LISTS.values()):
        if not (base / name).exists():
            wanted = f"{IMAGES}/, {MASKS}/, {', '.join(LISTS.values())}"
            raise DataError(f"{base / name} is not there: expected in {base}: {wanted}")
    side = SIDE if image_size is None else image_size
    padding = BACKGROUND if ignore is None else ignore
    splits = {}
    for part, listing in LISTS.items():
        images, masks = _listed(base, listing)
        _check_sizes(images, masks)
        splits[part] = Split(
            decode(images, (3, side, side), _picture_of(side), f"part-labels {side}"),
            decode(masks, (side, side), _mask_of(side, padding), f"part-labels mask {side} {padding}"),
        )
    return Dataset(
        name="part-labels",
        **splits,
        classes=tuple(COLOURS),
        task="segmentation",
        ignore=ignore,
        augmentation=Augmentation(flip=True, fill=padding),
    )


def _listed(base: Path, listing: str) -> tuple[Files, Files]:
    """The images and masks of a list whose lines are `<Name> <number>`."""
    names = []
    try:
        lines = (base / listing).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{base / listing} cannot be read: {error}") from error
    for place, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or not words[1].isdecimal() or "/" in words[0]:
            raise DataError(f"{base / listing}:{place}: expected <Name> <number>, got {line!r}")
        names.append((words[0], f"{words[0]}_{int(words[1]):04d}"))
    if not names:
        raise DataError(f"{base / listing} lists no image")
    images = Files(base / IMAGES, tuple(f"{person}/{name}.jpg" for person, name in names))
    masks = Files(base / MASKS, tuple(f"{name}.ppm" for _, name in names))
    for files in (images, masks):
        missing = [row for row in range(len(files)) if not files.path(row).is_file()]
        if missing:
            first = files.path(missing[0])
            raise DataError(f"{first} is not there: {len(missing)} of the {len(files)} files of {listing} are missing")
    return images, masks


def _check_sizes(images: Files, masks: Files) -> None:
    sizes, mask_sizes = headers(images)[:, 1:], headers(masks)[:, 1:]
    other = np.flatnonzero((sizes != mask_sizes).any(1))
    if len(other):
        (height, width), (mask_height, mask_width) = sizes[other[0]], mask_sizes[other[0]]
        path = masks.path(int(other[0]))
        raise DataError(f"{path} is {mask_width} x {mask_height} pixels, its image {width} x {height}")
    large = np.flatnonzero((sizes > SIDE).any(1))
    if len(large):
        height, width = sizes[large[0]]
        path = images.path(int(large[0]))
        raise DataError(f"{path} is {width} x {height} pixels, expected at most {SIDE} x {SIDE}")


def _picture_of(side: int) -> Convert:
    def convert(image: Image.Image) -> np.ndarray:
        canvas = Image.new("RGB", (SIDE, SIDE))
        canvas.paste(picture(image, 3), _corner(image))
        return pixels(canvas if side == SIDE else stretched(canvas, side))

    return convert


def _mask_of(side: int, padding: int) -> Convert:
    def convert(image: Image.Image) -> np.ndarray:
        colours = np.asarray(image.convert("RGB"))
        classes = np.full(colours.shape[:2], 255, np.uint8)
        for index, colour in enumerate(COLOURS.values()):
            classes[(colours == colour).all(2)] = index
        if classes.max() == 255:
            red, green, blue = colours[classes == 255][0]
            raise DataError(f"colour ({red}, {green}, {blue}) is none of {COLOURS}")
        canvas = Image.new("L", (SIDE, SIDE), padding)
        canvas.paste(Image.fromarray(classes), _corner(image))
        return np.asarray(canvas if side == SIDE else canvas.resize((side, side), Image.Resampling.NEAREST))

    return convert


def _corner(image: Image.Image) -> tuple[int, int]:
    """Where the image lies in the middle of the canvas."""
    return (SIDE - image.width) // 2, (SIDE - image.height) // 2
