"""JSON of a run folder, read with suspicion: what is missing or of the wrong type is one clear line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, TypeVar

from budgetnet.errors import FileError

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """A JSON object that is asked for its keys one by one.

    Every question raises FileError, with the file and the key, where the key is missing or holds
    something else; those that start with `maybe` take a missing key or null for None.

    Attributes:
        values: the object.
        file: the file it comes from.
        place: where in the file it stands, such as "budgets[0].".
    """

    values: dict[str, Any]
    file: str
    place: str = ""

    def number(self, key: str) -> float:
        """A finite number."""
        return self._read(key, "a finite number", lambda value: _is_number(value) and isfinite(value), float)

    def whole(self, key: str) -> int:
        """A whole number."""
        return self._read(key, "a whole number", lambda value: _is_number(value) and value == int(value), int)

    def share(self, key: str) -> float:
        """A number in [0, 1]."""
        return self._read(key, "a number in [0, 1]", lambda value: _is_number(value) and 0 <= value <= 1, float)

    def text(self, key: str) -> str:
        """A string."""
        return self._read(key, "a text", lambda value: isinstance(value, str), str)

    def flag(self, key: str) -> bool:
        """True or false."""
        return self._read(key, "true or false", lambda value: isinstance(value, bool), bool)

    def record(self, key: str) -> Record:
        """An object."""
        return self._read(key, "an object", lambda value: isinstance(value, dict), lambda value: self._at(key, value))

    def records(self, key: str) -> list[Record]:
        """A list of objects."""
        return [self._at(f"{key}[{place}]", value) for place, value in enumerate(self._list(key, dict, "objects"))]

    def texts(self, key: str) -> list[str]:
        """A list of strings."""
        return self._list(key, str, "texts")

    def numbers(self, key: str, length: int | None = None) -> tuple[float, ...]:
        """A list of finite numbers, `length` of them where it is given."""
        return tuple(item.number(key) for item in self._items(key, length, "numbers"))

    def flags(self, key: str, length: int) -> tuple[bool, ...]:
        """A list of so many times true or false."""
        return tuple(item.flag(key) for item in self._items(key, length))

    def maybe_shares(self, key: str, length: int) -> tuple[float | None, ...]:
        """A list of so many numbers in [0, 1], each of which may be null."""
        return tuple(item.maybe_share(key) for item in self._items(key, length))

    def costs(self, key: str) -> dict[str, float]:
        """An object whose values are numbers; other values are left out."""
        inner = self.record(key)
        return {name: inner.number(name) for name, value in inner.values.items() if _is_number(value)}

    def maybe_number(self, key: str) -> float | None:
        """A finite number, or None; a loss that is no longer a number is None, too."""
        value = self.values.get(key)
        if value is None or (isinstance(value, float) and not isfinite(value)):
            return None
        return self.number(key)

    def maybe_whole(self, key: str) -> int | None:
        """A whole number, or None."""
        return None if self.values.get(key) is None else self.whole(key)

    def maybe_share(self, key: str) -> float | None:
        """A number in [0, 1], or None."""
        return None if self.values.get(key) is None else self.share(key)

    def maybe_record(self, key: str) -> Record | None:
        """An object, or None."""
        return None if self.values.get(key) is None else self.record(key)

    def _read(self, key: str, kind: str, fits: Callable[[Any], bool], convert: Callable[[Any], T]) -> T:
        if key not in self.values:
            raise FileError(f"{self._where(key)} is missing")
        value = self.values[key]
        try:
            if fits(value):
                return convert(value)
        except (OverflowError, ValueError):  # a whole number beyond every float, or infinity as a whole number
            pass
        raise FileError(f"{self._where(key)} must be {kind}, got {shortened(value)}")

    def _list(self, key: str, kind: type[T], of: str) -> list[T]:
        def fits(value: Any) -> bool:
            return isinstance(value, list) and all(isinstance(item, kind) for item in value)

        return self._read(key, f"a list of {of}", fits, list)

    def _items(self, key: str, length: int | None, of: str = "values") -> list[Record]:
        """Each item of a list, of that length where it is given, as a record that holds it under the same key."""
        items: list[object] = self._list(key, object, of)
        if length not in (None, len(items)):
            raise FileError(f"{self._where(key)} must be {length} {of}, got {len(items)}")
        return [Record({key: item}, self.file, self.place) for item in items]

    def _at(self, key: str, values: dict[str, Any]) -> Record:
        return Record(values, self.file, f"{self.place}{key}.")

    def _where(self, key: str) -> str:
        return f'{self.file}: "{self.place}{key}"'


def read_json(path: Path) -> Record:
    """The one JSON object a file holds.

    Raises:
        FileError: the file cannot be read or holds anything else.
    """
    return _parse(_read_text(path), str(path))


def read_lines(path: Path) -> list[Record]:
    """The JSON objects of a file, one a line; a last line that was cut off when the run was killed is left out.

    Raises:
        FileError: the file cannot be read, or a line before the last holds anything else.
    """
    lines = [(number, line) for number, line in enumerate(_read_text(path).split("\n"), 1) if line.strip()]
    records = []
    for number, line in lines:
        try:
            records.append(_parse(line, f"{path}, line {number}"))
        except FileError:
            if number < lines[-1][0]:
                raise
    return records


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        raise FileError(f"{path} is missing") from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from None


def _parse(text: str, file: str) -> Record:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{file} must hold JSON: {error}") from None
    if not isinstance(values, dict):
        raise FileError(f"{file} must hold a JSON object, got {shortened(values)}")
    return Record(values, file)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
