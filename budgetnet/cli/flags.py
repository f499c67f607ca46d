"""What is typed: flags that depend on other flags, lists in one word, and a parser's complaint as one line."""

from __future__ import annotations

import inspect
import re
import shlex
from typing import Any

import jsonargparse

from budgetnet import spaces
from budgetnet.building import builder_of, built
from budgetnet.errors import ConfigError
from budgetnet.supernet import SuperNetwork


def parser_of(command: str, description: str, space: str, first: str) -> jsonargparse.ArgumentParser:
    """A command's parser, with a flag for each argument of the space, where one is named; `first` is what it takes."""
    parser = jsonargparse.ArgumentParser(
        prog=f"budgetnet {command} {first}",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        epilog=f"spaces: {', '.join(spaces.BY_NAME)}, or path/to/file.py:function"
        if "SPACE" in first or space
        else None,
    )
    if space:
        builder = builder_of(space)
        kinds = inspect.get_annotations(builder, eval_str=True)
        for name, parameter in inspect.signature(builder).parameters.items():
            default = None if parameter.default is parameter.empty else parameter.default
            parser.add_argument(f"--space.{name}", type=kinds.get(name, str), default=default)
    return parser


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
    return built(space, builder, options)


def show_space(parser: jsonargparse.ArgumentParser) -> None:
    """Lists in a command's help the flag that `take` has taken already."""
    parser.add_argument("--space", metavar="FILE.py:FUNCTION", help="of a run that was learned in a space of its own")


def take(arguments: list[str], flag: str, default: str) -> tuple[str, list[str]]:
    """The value of a flag that decides which other flags there are, and the arguments without it."""
    value, rest, words = default, [], iter(arguments)
    for word in words:
        if word == flag:
            value = next(words, "")
            if not value or value.startswith("-"):
                raise ConfigError(f"{flag} needs a value")
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return value, rest


def positional(arguments: list[str], usage: str) -> tuple[str, list[str]]:
    """What a command is about, its first word, and the other words."""
    if arguments and arguments[0] in ("-h", "--help"):
        return "", arguments
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(f"expected: budgetnet {usage}, got {shlex.join(arguments) or 'nothing'}")
    return arguments[0], arguments[1:]


def costs_in(text: str) -> list[str]:
    """Costs with commas between them; those inside brackets part a cost's options."""
    return [cost.strip() for cost in re.split(r",(?![^\[]*\])", text)]


def numbers_in(flag: str, text: str) -> list[float]:
    """Numbers with commas between them."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} must be numbers with commas between them, got {text!r}") from None


def one_line(message: str) -> str:
    """What the parser complains of, in the words of our own errors."""
    text = " ".join(message.split())
    text = re.sub(r"^Parser key \"([\w.]+)\": ", r"--\1: ", text)
    text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("typing.", "")
    union = re.fullmatch(r"(--[\w.]+): Does not validate.* Errors: - (.*) Given value type: .* Given value: (.*)", text)
    if union:
        kinds = re.findall(r"Expected an? (.+?)(?= - |$)", union[2])
        return f"{union[1]}: expected {' or '.join(kinds)}, got {union[3]}"
    return re.sub(r"Expected an? (.*?)\. Got value: ", r"expected \1, got ", text)[:300]
