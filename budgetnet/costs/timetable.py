"""Times of modules as measured on one machine, kept in a file, and what whole networks say about their sum."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from budgetnet.errors import FileError
from budgetnet.files import replace

FORMAT = "budgetnet times of modules, 2"
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of these the one that predicts best what was left out is taken."""

OF_MACHINE = ("version", "processor")
"""What times hold for that is not asked for but found."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What times hold for.

    Attributes:
        runtime: "onnxruntime", "torch" or "compiled".
        version: of the runtime.
        processor: its name, or that of the GPU.
        threads: that the runtime may use.
        batch: examples in the input.
    """

    runtime: str
    version: str
    processor: str
    threads: int
    batch: int

    @classmethod
    def here(cls, runtime: str, threads: int, batch: int, device: str) -> Setting:
        """On this machine."""
        version = onnxruntime.__version__ if runtime == "onnxruntime" else torch.__version__
        name = torch.cuda.get_device_name() if device == "cuda" else processor()
        return cls(runtime=runtime, version=version, processor=name, threads=threads, batch=batch)

    @classmethod
    def anywhere(cls, runtime: str, threads: int, batch: int) -> Setting:
        """On whatever machine."""
        return cls(runtime=runtime, version="", processor="", threads=threads, batch=batch)


@dataclass(frozen=True)
class Whole:
    """A whole network that was measured.

    Attributes:
        space: what it is an architecture of, and the quantile that was taken.
        parts: the table's milliseconds of each kind of module in it.
        seen: its own milliseconds.
    """

    space: str
    parts: dict[str, float]
    seen: float


@dataclass
class Timetable:
    """Milliseconds of modules, each by itself, less what a call takes that computes nothing.

    Attributes:
        setting: where and how they were measured.
        yardstick: milliseconds of a fixed network then, which tells later whether the machine is slower.
        times: of each kind of module, by how many channels are open at its sites: "" where it has none.
        networks: whole networks that were measured, the full one of a space first.
    """

    setting: Setting
    yardstick: float
    times: dict[str, dict[str, float]] = field(default_factory=dict)
    networks: list[Whole] = field(default_factory=list)

    def take_up(self, other: Timetable, *, but: str) -> None:
        """Adds what another table of the same setting has beside it: modules, and networks of all spaces `but` one."""
        scale = self.yardstick / other.yardstick  # both hold for the machine as it was when its yardstick was taken
        for kind, times in other.times.items():
            own = self.times.setdefault(kind, {})
            own |= {key: value * scale for key, value in times.items() if key not in own}
        beside = [
            Whole(each.space, {kind: value * scale for kind, value in each.parts.items()}, each.seen * scale)
            for each in other.networks
            if each.space != but
        ]
        self.networks = beside + [each for each in self.networks if each.space == but]

    def save(self, path: Path) -> None:
        """Writes the file, as a whole or not at all."""
        content = {"format": FORMAT, **vars(self.setting), "yardstick_ms": self.yardstick, "times_ms": self.times}
        content["networks"] = [{"space": each.space, "parts_ms": each.parts, "ms": each.seen} for each in self.networks]
        replace(path, (json.dumps(content, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: Path, setting: Setting, *, elsewhere: bool = False) -> Timetable:
        """Reads a file.

        Args:
            path: of the file.
            setting: that it has to be of.
            elsewhere: whatever its machine and the version of the runtime there.

        Raises:
            FileError: it is no such file, or of another machine, runtime or setting.
        """
        try:
            content: Any = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r}")
            found = Setting(**{name: content[name] for name in vars(setting)})
            for name in OF_MACHINE:
                if not isinstance(content[name], str):
                    raise ValueError(f"a {name} of {content[name]!r}")
            times = {kind: _times(entries) for kind, entries in content["times_ms"].items()}
            for key in (key for entries in times.values() for key in entries):
                if key and not all(part.isdecimal() for part in key.split(",")):
                    raise ValueError(f"{key!r} as numbers of open channels")
            networks = [
                Whole(str(each["space"]), _times(each["parts_ms"]), _time(each["ms"])) for each in content["networks"]
            ]
            table = cls(found, _time(content["yardstick_ms"]), times, networks)
            for name, value in [("yardstick", table.yardstick), *(("network", each.seen) for each in networks)]:
                if value == 0:
                    raise ValueError(f"a {name} of 0 ms")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FileError(f"{path} must hold times of modules that budgetnet wrote, got {error}") from error
        for name, value in vars(setting).items():
            if getattr(found, name) == value or (elsewhere and name in OF_MACHINE):
                continue
            told = f"but {value} was asked for" if elsewhere else f"but here it is {value}"
            if name in OF_MACHINE:
                told += f": latency[table={path},elsewhere=true] predicts what networks take there, and times nothing"
            raise FileError(f"{path} holds times for {name} {getattr(found, name)}, {told}")
        return table


def fitted(parts: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, float]:
    """How much each part weighs in the time of whole networks, and how far predictions lie from what was left out.

    `T = w_0 + sum_g w_g S_g` is fitted to relative errors; each weight is drawn to the one factor that fits best
    for all parts together.

    Args:
        parts: `(n, P)` milliseconds of each of P parts in n networks, as the table has them.
        seen: `(n,)` milliseconds of the networks.

    Returns:
        `(1 + P,)` weights and the median relative error of leave-one-out predictions.
    """
    rows = np.concatenate([np.ones((len(parts), 1)), parts], axis=1) / seen[:, None]
    together = np.stack([rows[:, 0], rows[:, 1:].sum(axis=1)], axis=1)
    base, factor = np.linalg.lstsq(together, np.ones(len(seen)), rcond=None)[0]
    prior = np.concatenate([[max(base, 0.0)], np.full(parts.shape[1], max(factor, 1e-3))])
    own, rest = rows * prior, 1 - rows @ prior
    best: tuple[float, np.ndarray] | None = None
    for ridge in RIDGES:
        inverse = np.linalg.inv(own.T @ own + ridge * len(seen) * np.eye(own.shape[1]))
        moved = inverse @ own.T @ rest
        hat = np.einsum("ij,jk,ik->i", own, inverse, own)
        error = float(np.median(np.abs((rest - own @ moved) / np.maximum(1 - hat, 1e-6))))
        if best is None or error < best[0]:
            best = (error, prior * (1 + moved))
    assert best is not None
    return np.maximum(best[1], 0.0), best[0]


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _time(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"a time of {value!r}")
    return float(value)


def _times(entries: Any) -> dict[str, float]:
    return {str(key): _time(value) for key, value in entries.items()}
