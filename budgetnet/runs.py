"""A run folder: what was asked, what happened, where it stands, what came out. Files are data, never code."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from budgetnet.errors import ConfigError, FileError


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
            ConfigError: the folder holds a run already and `resume` is off, or that run had other options.
        """
        if not (self.path / "options.json").exists():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise ConfigError(f"a new run needs a new or empty folder, got {self.path}")
            self.path.mkdir(parents=True, exist_ok=True)
            self.write("options.json", options)
            return
        if not resume:
            raise ConfigError(f"{self.path} holds a run already: resume it (--resume) or choose another folder (--out)")
        before = self.read("options.json")
        for key in ("space", "data", "budgets", "architecture", "search"):
            name, old, new = _first_difference(key, before.get(key), json.loads(json.dumps(options[key])))
            if name:
                raise ConfigError(f"{self.path} was begun with {name} {old!r}; to resume it give the same, got {new!r}")

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file whole or not at all."""
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        replace(self.path / name, text.encode())

    def read(self, name: str) -> dict[str, Any]:
        """Reads a JSON file that holds one object.

        Raises:
            FileError: it is missing or holds something else.
        """
        path = self.path / name
        try:
            content = json.loads(path.read_bytes())
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
        lines = [json.dumps(entry, allow_nan=False) + "\n" for entry in (*kept, line)]
        replace(self.path / "metrics.jsonl", "".join(lines).encode())

    def metrics(self) -> list[dict[str, Any]]:
        """The epochs so far.

        Raises:
            FileError: a line is not JSON with an epoch.
        """
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [_metrics_line(path, number, line) for number, line in enumerate(lines, start=1)]

    def save_checkpoint(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Writes where the run stands: tensors, and `state` as JSON beside them in the same file."""
        folder = self.path / "checkpoint"
        folder.mkdir(exist_ok=True)
        part = folder / "latest.safetensors.part"
        contiguous = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        save_file(contiguous, part, metadata={"state": json.dumps(state, allow_nan=False)})
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(folder / "latest.safetensors")
        _sync_folder(folder)

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
                state = json.loads((file.metadata() or {})["state"])
                return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise FileError(f"{path} is no checkpoint: {str(error).splitlines()[0]}") from error


def load_tensors(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copies checkpoint tensors into those of a network, after names, shapes and types have been compared.

    Raises:
        FileError: one is missing, left over, or of another shape or type; nothing is copied then.
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
    for name, target in targets.items():
        target.data.copy_(tensors[name])


def replace(path: Path, content: bytes) -> None:
    """Writes a file so that, whenever the process or the machine stops, the old or the new one is there."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    _sync_folder(path.parent)


def next_folder(parent: Path, name: str) -> Path:
    """The first of parent/name-1, parent/name-2, ... that does not exist."""
    number = 1
    while (parent / f"{name}-{number}").exists():
        number += 1
    return parent / f"{name}-{number}"


def _metrics_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        if isinstance(entry, dict) and isinstance(entry.get("epoch"), int):
            return entry
    except ValueError:
        pass
    raise FileError(f"{path} line {number} must hold one epoch as JSON, got {line[:40]!r}")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    if isinstance(old, dict) and isinstance(new, dict):
        differing = _differing(old, new)
        return next((_first_difference(f"{name}.{key}", old.get(key), new.get(key)) for key in differing), ("", 0, 0))
    return ("", old, new) if old == new else (name, old, new)


def _differing(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    return (key for key in {**old, **new} if old.get(key) != new.get(key))
