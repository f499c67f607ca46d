"""A run folder: what was asked, what happened, where it stands, what came out. Files are data, never code."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from budgetnet.errors import ConfigError, DivergenceError, FileError
from budgetnet.files import aside, replace


class RunFolder:
    """The files of one run, each written so that a kill at any moment leaves the old or the new one.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def create(self, options: Mapping[str, Any], *, resume: bool) -> None:
        """Starts the folder, or takes up one that the same options began.

        Raises:
            ConfigError: the folder cannot be made, or holds a run already and `resume` is off, or that run had
                other options.
            FileError: the run's options.json is damaged.
        """
        self.check(resume=resume)
        if not (self.path / "options.json").exists():
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self.write("options.json", options)
            except OSError as error:
                raise ConfigError(f"a run needs a folder to write to, got {self.path}: {error.strerror}") from error
            return
        before = self.read("options.json")
        missing = [key for key in options if key not in before]
        if missing:
            raise FileError(f"{self.path / 'options.json'} must say what was asked, but lacks {missing[0]!r}")
        for key in ("space", "data", "budgets", "architecture", "search"):
            name, old, new = _first_difference(key, before.get(key), json.loads(json.dumps(options[key])))
            if name:
                raise ConfigError(f"{self.path} was begun with {name} {old!r}; to resume it give the same, got {new!r}")

    @property
    def begun(self) -> bool:
        """Whether it holds a run."""
        return (self.path / "options.json").exists()

    def check(self, *, resume: bool) -> None:
        """Raises ConfigError where no run may be started in the folder, or there is a run and `resume` is off."""
        if not self.begun:
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                what = "a run to resume has its options.json" if resume else "a new run needs a new or empty folder"
                raise ConfigError(f"{what}, got {self.path}")
        elif not resume:
            raise ConfigError(f"{self.path} holds a run already: resume it (--resume) or choose another folder (--out)")

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file whole or not at all."""
        replace(self.path / name, (dumped(content, name, indent=1) + "\n").encode())

    def read(self, name: str) -> dict[str, Any]:
        """Reads a JSON file that holds one object.

        Raises:
            FileError: it is missing or holds something else.
        """
        path = self.path / name
        try:
            content = parsed(path.read_bytes())
        except FileNotFoundError:
            raise FileError(f"expected a run's {name} at {path}, found no file") from None
        except (ValueError, OSError) as error:
            raise FileError(f"{path} must hold JSON: {error}") from error
        if not isinstance(content, dict):
            raise FileError(f"{path} must hold one JSON object, got {type(content).__name__}")
        return content

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Adds an epoch to metrics.jsonl, in place of any that a killed run wrote for it or a later one."""
        kept = [old for old in self.metrics() if old["epoch"] < line["epoch"]]
        lines = [dumped(entry, "metrics.jsonl") + "\n" for entry in (*kept, line)]
        replace(self.path / "metrics.jsonl", "".join(lines).encode())

    def metrics(self) -> list[dict[str, Any]]:
        """The epochs so far.

        Raises:
            FileError: a line is not JSON with an epoch.
        """
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().decode(errors="replace").splitlines() if path.exists() else []
        return [_metrics_line(path, number, line) for number, line in enumerate(lines, start=1)]

    def save_checkpoint(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Writes where the run stands: tensors, and `state` as JSON beside them in the same file."""
        folder = self.path / "checkpoint"
        folder.mkdir(exist_ok=True)
        contiguous = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        metadata = {"state": dumped(state, "the checkpoint"), "tensors": dumped(sorted(contiguous), "the checkpoint")}
        with aside(folder / "latest.safetensors") as part:
            save_file(contiguous, part, metadata=metadata)

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The last checkpoint, None where there is none yet.

        Raises:
            FileError: the file is not one that `save_checkpoint` wrote.
        """
        path = self.path / "checkpoint" / "latest.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                lacking = {"state", "tensors"} - set(metadata)
                if lacking:
                    raise ValueError(f"its metadata lack {min(lacking)!r}")
                state, names = parsed(metadata["state"]), parsed(metadata["tensors"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError, OSError) as error:
            raise FileError(f"{path} is no checkpoint: {str(error).splitlines()[0]}") from error
        if not isinstance(state, dict):
            raise FileError(f"{path} is no checkpoint: its state must be an object, got {type(state).__name__}")
        if names != sorted(tensors):
            raise FileError(f"{path} must hold the tensors it lists, got others")
        return tensors, state


def load_tensors(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copies checkpoint tensors into those of a network, after names, shapes and types have been compared.

    Raises:
        FileError: one is missing, left over, not finite, or of another shape or type; nothing is copied then.
    """
    missing, extra = sorted(set(targets) - set(tensors)), sorted(set(tensors) - set(targets))
    if missing or extra:
        what = f"lacks {missing[0]!r}" if missing else f"has {extra[0]!r}, which the network lacks"
        raise FileError(f"the checkpoint is of another network: it {what}")
    for name, target in targets.items():
        value = tensors[name]
        if value.shape != target.shape or value.dtype != target.dtype:
            raise FileError(
                f"the checkpoint's {name!r} must be {tuple(target.shape)} {target.dtype}, "
                f"got {tuple(value.shape)} {value.dtype}"
            )
        if not bool(value.isfinite().all()):
            raise FileError(f"the checkpoint's {name!r} must be finite numbers, got others")
    for name, target in targets.items():
        target.data.copy_(tensors[name])


def dumped(content: Any, name: str, *, indent: int | None = None) -> str:
    """JSON text of what goes into the file `name`.

    Raises:
        DivergenceError: it holds a number that is not finite.
    """
    try:
        return json.dumps(content, indent=indent, allow_nan=False)
    except ValueError as error:
        raise DivergenceError(
            f"what is measured must stay finite, got infinite numbers or none for {name}: lower the learning rates"
        ) from error


def parsed(text: str | bytes) -> Any:
    """What JSON text holds.

    Raises:
        ValueError: it is no JSON, or holds a number that is not finite.
    """
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


@contextmanager
def next_folder(parent: Path, name: str) -> Iterator[Path]:
    """Makes the first of parent/name-1, parent/name-2, ... that does not exist, so that no other run takes it.

    It is removed again where an error comes before anything is written to it.

    Raises:
        ConfigError: it cannot be made.
    """
    number = 1
    while not _made(path := parent / f"{name}-{number}"):
        number += 1
    try:
        yield path
    except BaseException:
        with suppress(OSError):  # as it holds something
            path.rmdir()
            parent.rmdir()
        raise


def _made(path: Path) -> bool:
    try:
        path.mkdir(parents=True)
    except OSError as error:
        if not path.exists():
            raise ConfigError(f"a run needs a folder to write to, got {path}: {error.strerror}") from error
        return False
    return True


def _metrics_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        entry = parsed(line)
        if isinstance(entry, dict) and isinstance(entry.get("epoch"), int):
            return entry
    except ValueError:
        pass
    raise FileError(f"{path} line {number} must hold one epoch as JSON, got {line[:40]!r}")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"numbers must be finite, got {text}")
    return number


def _first_difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    if isinstance(old, dict) and isinstance(new, dict):
        differing = _differing(old, new)
        return next((_first_difference(f"{name}.{key}", old.get(key), new.get(key)) for key in differing), ("", 0, 0))
    return ("", old, new) if old == new else (name, old, new)


def _differing(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    return (key for key in {**old, **new} if old.get(key) != new.get(key))
