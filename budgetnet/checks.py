"""What spaces and costs check of their options, in one line each."""

from __future__ import annotations

from collections.abc import Sequence

from budgetnet.errors import ConfigError

Size = int | tuple[int, int]


def at_least(least: int, **options: int) -> None:
    """Raises ConfigError where an option is not a whole number >= `least`."""
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name} must be a whole number >= {least}, got {value!r}")


def positive(**options: float) -> None:
    """Raises ConfigError where an option is not a finite number > 0."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ConfigError(f"{name} must be a number > 0, got {value!r}")


def one_of(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ConfigError where `value` is not one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{name} must be {' or '.join(choices)}, got {value!r}")


def image_shape(in_channels: int, image_size: Size, *, divisor: int = 1) -> tuple[int, int, int]:
    """`(C, H, W)` of an image given as one side or (height, width).

    Raises:
        ConfigError: a side is not a whole number >= 1 that `divisor` divides.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or any(not isinstance(side, int) or side < 1 or side % divisor for side in sides):
        raise ConfigError(f"image_size must be one side or (height, width), divisible by {divisor}, got {image_size}")
    return in_channels, sides[0], sides[1]
