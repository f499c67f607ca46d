"""Times of functions, measured in turn so that what befalls the machine befalls them all alike."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

import numpy as np
import torch

from budgetnet.errors import ConfigError

try:
    import resource
except ImportError:  # not on Windows, where nothing says that a call was interrupted
    resource = None  # type: ignore[assignment]

BURST = 10
"""Calls of one function in a row; the first `COLD` of them, which find another's data in the caches, do not count."""
COLD = 2
ENOUGH = 10
STEADY, AGREE, LOOKS = 5, 0.01, 20
"""The fastest looks at a machine that have to agree, by which share, and how many there are at most."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Timing:
    """How long the calls of one function took.

    Attributes:
        calls: milliseconds of each, in order, of those during which no other job took the processor away; of all
            where fewer than `ENOUGH` were spared.
        disturbed: share of the calls to which it happened.
    """

    calls: np.ndarray
    disturbed: float

    def quantile(self, share: float) -> float:
        """Milliseconds that this share of the calls stays within."""
        return float(np.quantile(self.calls, share))

    def interval(self, share: float) -> tuple[float, float]:
        """Between which milliseconds that quantile lies with 95 % confidence, from the calls' order alone."""
        ordered, n = np.sort(self.calls), len(self.calls)
        around = 1.96 * math.sqrt(n * share * (1 - share))
        low, high = math.floor(n * share - around), math.ceil(n * share + around)
        return float(ordered[max(0, low)]), float(ordered[min(n - 1, high)])


def interleaved(
    ways: Sequence[Callable[[], object]],
    *,
    calls: int = 200,
    seconds: float = 0.0,
    device: torch.device | None = None,
) -> list[Timing]:
    """Times functions in turns of `BURST` calls each.

    Args:
        ways: called without arguments.
        calls: at least so many of each function count.
        seconds: at least so long it goes on: a machine that others use changes its speed within a second.
        device: whose work a call waits for.
    """
    times: list[list[float]] = [[] for _ in ways]
    switched: list[list[bool]] = [[] for _ in ways]
    ends, least = time.perf_counter() + seconds, math.ceil(calls / (BURST - COLD))
    for turn in count():
        if turn > least and time.perf_counter() >= ends:
            break
        for way, taken, interrupted in zip(ways, times, switched, strict=True):
            for call in range(BURST):
                before, start = _switches(), time.perf_counter_ns()
                way()
                if device is not None and device.type == "cuda":
                    torch.cuda.synchronize(device)
                milliseconds = (time.perf_counter_ns() - start) / 1e6
                if turn and call >= COLD:  # the first turn warms up
                    taken.append(milliseconds)
                    interrupted.append(_switches() > before)
    return [_timing(np.array(taken), np.array(marks)) for taken, marks in zip(times, switched, strict=True)]


def steadied(look: Callable[[], T], milliseconds: Callable[[T], float]) -> list[T]:
    """Looks again until the machine shows its own speed: until the `STEADY` fastest looks agree.

    What else runs on a machine slows down all calls of some seconds, and never speeds them up.

    Args:
        look: measures, for a second or so.
        milliseconds: of what a look gave.

    Returns:
        The `STEADY` fastest looks, the fastest first; as they are where they do not agree after `LOOKS` of them.
    """
    looks: list[T] = []
    while len(looks) < LOOKS:
        looks = sorted([*looks, look()], key=milliseconds)
        if len(looks) >= STEADY and milliseconds(looks[STEADY - 1]) <= (1 + AGREE) * milliseconds(looks[0]):
            break
    return looks[:STEADY]


def quantile_share(name: str) -> float:
    """The share that "median" or "p95" stands for.

    Raises:
        ConfigError: it is neither.
    """
    match = re.fullmatch(r"p(\d{1,2}(?:\.\d+)?)", str(name))
    if name != "median" and (match is None or not 0 < float(match[1]) < 100):
        raise ConfigError(f"a quantile is median or p1 to p99, such as latency.p95, got {name!r}")
    return 0.5 if match is None else float(match[1]) / 100


def enough(share: float, calls: int) -> int:
    """At least `calls`, and so many that all of them lie on one side of a quantile in 2 of 100 times only."""
    return max(calls, math.ceil(4 / min(share, 1 - share)))


def _timing(calls: np.ndarray, interrupted: np.ndarray) -> Timing:
    alone = calls[~interrupted]
    return Timing(alone if len(alone) >= ENOUGH else calls, float(interrupted.mean()))


def _switches() -> int:
    """How often the processor was taken from this process."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
