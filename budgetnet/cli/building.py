"""A space from the words of the command line, or from what a run says of its own."""

from __future__ import annotations

import inspect
import re
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


def build(space: str, given: Any, arguments: list[str], defaults: dict[str, Any]) -> SuperNetwork:
    """Builds a space from what was given, else from what the data need, else from its own defaults."""
    builder = builder_of(space)
    names = inspect.signature(builder).parameters
    told = vars(given.space) if hasattr(given, "space") else {}
    typed = {name for name in names if any(re.match(rf"--space\.{name}(=|$)", word) for word in arguments)}
    options = {**told, **{name: value for name, value in defaults.items() if name in names and name not in typed}}
    lacking = [name for name in names if options.get(name) is None and names[name].default is inspect.Parameter.empty]
    if lacking:
        raise ConfigError(f"{space} needs --space.{lacking[0]}, got nothing for it")
    return _built(space, builder, options)


def space_of_run(run: RunFolder, own: str) -> SuperNetwork:
    """The space that a run says it was learned in, or the user's `own` with the run's options."""
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
    return _built(own or space["name"], builder, options)


def _built(space: str, builder: Callable[..., SuperNetwork], options: dict[str, Any]) -> SuperNetwork:
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
