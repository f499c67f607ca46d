"""A space by its name, or the user's by file and function, and the one that a run was learned in."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from budgetnet import spaces
from budgetnet.costs.function import module_at
from budgetnet.errors import BudgetnetError, ConfigError, FileError
from budgetnet.runs import RunFolder
from budgetnet.supernet import SuperNetwork


def builder_of(space: str) -> Callable[..., SuperNetwork]:
    """The function that builds a space: a named one, or the user's by file and name, whose file is read anew."""
    if space in spaces.BY_NAME:
        return spaces.BY_NAME[space]
    file, _, function = space.rpartition(":")
    if not file:
        raise ConfigError(f"spaces are {', '.join(spaces.BY_NAME)}, or path/to/file.py:function, got {space!r}")
    module = module_at(file)
    if not callable(getattr(module, function, None)):
        raise ConfigError(f"{file} has no function {function!r}")
    builder: Callable[..., SuperNetwork] = getattr(module, function)
    return builder


def space_of_run(run: RunFolder, own: str = "") -> SuperNetwork:
    """The space that a run says it was learned in, or the user's `own` with the run's options.

    Raises:
        ConfigError: the run was learned in a space of one's own and `own` is none, or what it names builds none.
        FileError: the run's options.json is missing or damaged.
    """
    space = run.read("options.json").get("space")
    if not isinstance(space, dict) or [type(space.get(key)) for key in ("name", "options")] != [str, dict]:
        raise FileError(f"{run.path / 'options.json'} must name its space and the space's options")
    if space["name"] not in spaces.BY_NAME and not own:
        raise ConfigError(f"{run.path} was learned in a space of its own: name it again with --space file.py:function")
    builder = builder_of(own or space["name"])
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in space["options"].items()}
    try:
        inspect.signature(builder).bind(**options)
    except TypeError as error:
        raise FileError(
            f"{run.path / 'options.json'} has options that {space['name']} does not take: {error}"
        ) from error
    return built(own or space["name"], builder, options)


def built(space: str, builder: Callable[..., SuperNetwork], options: dict[str, Any]) -> SuperNetwork:
    """What the builder makes of its options, whatever the user's own code does."""
    try:
        network = builder(**options)
    except BudgetnetError:
        raise
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise ConfigError(f"{space} raised {type(error).__name__}: {error}") from error
    if not isinstance(network, SuperNetwork):
        raise ConfigError(f"{space} must return a SuperNetwork, got {type(network).__name__}")
    return network
