"""The smallest real data: 1797 handwritten digits that come with scikit-learn."""

import numpy as np

from budgetnet.data.dataset import Augmentation, Dataset, Split, held_out
from budgetnet.data.decode import resized

TEST, VALIDATION = 360, 180  # images


def load_digits(image_size: int | None = None, seed: int = 0) -> Dataset:
    """8 x 8 grey digits: 1257 to train on, 180 to validate, 360 to test.

    Args:
        image_size: side in pixels; 8 when None.
        seed: of the division between train and validation; the test images are always the same ones.

    Source: scikit-learn's `load_digits`, values 0..16 scaled here to 0..255.
    """
    from sklearn import datasets

    values, labels = datasets.load_digits(return_X_y=True)
    images = np.rint(values.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    whole = Split(resized(images, image_size), labels.astype(np.int64))
    rest, test = held_out(whole.targets, TEST, seed=0)
    train, validation = held_out(whole.targets[rest], VALIDATION, seed)
    return Dataset(
        name="digits",
        train=whole.rows(rest[train]),
        validation=whole.rows(rest[validation]),
        test=whole.rows(test),
        classes=tuple(str(digit) for digit in range(10)),
        task="classification",
        ignore=None,
        augmentation=Augmentation(pad=1),  # two pixels are a quarter of a digit; a mirrored one is another sign
    )
