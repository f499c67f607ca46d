"""Times of functions, measured in turn so that what befalls the machine befalls them all alike."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from budgetnet.errors import ConfigError

try:
    import resource
except ImportError:  # not on Windows, where nothing says that a call was interrupted
    resource = None  # type: ignore[assignment]

BURST = 10
"""Calls of one function in a row; the first `COLD` of them, which find another's data in the caches, do not count."""
COLD = 2
ENOUGH = 10
STEADY, AGREE = 5, 0.03
"""The fastest bursts of a function that have to agree, and by which share."""


@dataclass(frozen=True, eq=False)
class Timing:
    """How long the calls of one function took.

    Attributes:
        calls: milliseconds of each, in order, of those during which no other job took the processor away; of all
            where fewer than `ENOUGH` were spared.
        disturbed: share of the calls to which it happened.
        bursts: number of the burst that each call was in; unless it is given so many follow each other as a burst has.
    """

    calls: np.ndarray
    disturbed: float
    bursts: np.ndarray = field(default_factory=lambda: np.zeros(0, int))

    def __post_init__(self) -> None:
        if len(self.bursts) != len(self.calls):
            object.__setattr__(self, "bursts", np.arange(len(self.calls)) // (BURST - COLD))

    def quantile(self, share: float) -> float:
        """Milliseconds that this share of the calls stays within."""
        return float(np.quantile(self.calls, share))

    def interval(self, share: float) -> tuple[float, float]:
        """Between which milliseconds that quantile lies with 95 % confidence, from the calls' order alone."""
        ordered, n = np.sort(self.calls), len(self.calls)
        around = 1.96 * math.sqrt(n * share * (1 - share))
        low, high = math.floor(n * share - around), math.ceil(n * share + around)
        return float(ordered[max(0, low)]), float(ordered[min(n - 1, high)])

    @property
    def unrest(self) -> float:
        """By which share the slowest of the `STEADY` fastest bursts took longer than the fastest; 0 for one burst."""
        ordered = np.sort(self._medians()[0])
        return float(ordered[min(STEADY, len(ordered)) - 1] / max(ordered[0], 1e-9) - 1)

    @property
    def settled(self) -> bool:
        """Whether the `STEADY` fastest bursts agree."""
        return len(np.unique(self.bursts)) >= STEADY and self.unrest <= AGREE

    def fastest(self, least: int) -> Timing:
        """The calls of the fastest bursts: of `STEADY` of them, or of as many as have that many calls."""
        return self.within(self.quickest(least))

    def quickest(self, least: int) -> np.ndarray:
        """Numbers of the bursts that `fastest` takes."""
        medians, numbers, sizes = self._medians()
        order = np.argsort(medians, kind="stable")
        return numbers[order[: max(STEADY, int(np.searchsorted(np.cumsum(sizes[order]), least)) + 1)]]

    def within(self, bursts: np.ndarray) -> Timing:
        """The calls of the bursts with these numbers; all where none of them was spared."""
        inside = np.isin(self.bursts, bursts)
        if not inside.any():
            return self
        return Timing(self.calls[inside], self.disturbed, self.bursts[inside])

    def joined(self, other: Timing, after: int) -> Timing:
        """The calls of both, one after the other; the other's bursts are numbered from `after` on."""
        a, b = len(self.calls), len(other.calls)
        bursts = np.concatenate([self.bursts, other.bursts + after])
        disturbed = (a * self.disturbed + b * other.disturbed) / (a + b)
        return Timing(np.concatenate([self.calls, other.calls]), disturbed, bursts)

    def _medians(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Median milliseconds of each burst, `(n,)`, the bursts' numbers, and of how many calls they are."""
        numbers, starts, sizes = np.unique(self.bursts, return_index=True, return_counts=True)
        ordered = self.calls[np.lexsort((self.calls, self.bursts))]
        return (ordered[starts + (sizes - 1) // 2] + ordered[starts + sizes // 2]) / 2, numbers, sizes


def interleaved(
    ways: Sequence[Callable[[], object]],
    *,
    calls: int = 200,
    seconds: float = 0.0,
    finish: Callable[[], object] | None = None,
) -> list[Timing]:
    """Times functions in turns of `BURST` calls each.

    Args:
        ways: called without arguments.
        calls: at least so many of each function count.
        seconds: at least so long it goes on: a machine that others use changes its speed within a second.
        finish: called behind each call, and part of it: waits for a device that works on by itself.
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
                if finish is not None:
                    finish()
                milliseconds = (time.perf_counter_ns() - start) / 1e6
                if turn and call >= COLD:  # the first turn warms up
                    taken.append(milliseconds)
                    interrupted.append(_switches() > before)
    return [_timing(np.array(taken), np.array(marks)) for taken, marks in zip(times, switched, strict=True)]


def rested(
    look: Callable[[], Sequence[Timing]],
    *,
    calls: int,
    seconds: float,
    patience: float,
    at_rest: Callable[[Sequence[Timing]], bool] = lambda _: True,
    tail: bool = False,
) -> list[Timing]:
    """Looks at functions again until the machine shows its own speed: until the fastest bursts of each agree.

    What else runs on a machine slows down all calls for tenths of seconds, or for minutes, and never speeds them up.

    Args:
        look: times the functions, for a second or so.
        calls: of each function that count at least, where so many there are.
        seconds: at least so long it goes on.
        patience: seconds after which it is as it is.
        at_rest: says of what was seen whether the machine was at rest besides.
        tail: take, of all functions, the half of the turns in which the last one was fastest. A function's own fastest
            bursts leave out the slow calls that a high quantile is about; another's say when the machine was at rest.

    Returns:
        For each function the calls of its fastest bursts, or of those turns.
    """
    began, seen = time.perf_counter(), list(look())
    while (spent := time.perf_counter() - began) < patience:
        if spent >= seconds and all(one.settled for one in seen) and at_rest(seen):
            break
        turns = 1 + max(int(one.bursts[-1]) for one in seen)  # one of them may have lost its last burst
        seen = [before.joined(after, turns) for before, after in zip(seen, look(), strict=True)]
    if tail:
        at_rest_then = seen[-1].quickest(max(calls, len(seen[-1].calls) // 2))
        return [one.within(at_rest_then) for one in seen]
    return [one.fastest(calls) for one in seen]


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
    counted = ~interrupted if np.sum(~interrupted) >= ENOUGH else np.ones(len(calls), bool)
    bursts = np.arange(len(calls)) // (BURST - COLD)
    return Timing(calls[counted], float(interrupted.mean()), bursts[counted])


def _switches() -> int:
    """How often the processor was taken from this process."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
