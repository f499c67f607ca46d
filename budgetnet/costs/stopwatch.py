"""What extracted networks take on this machine, timed in turns with two fixed ones, which show how fast it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf, isfinite
from typing import NamedTuple

import numpy as np
from torch import Tensor

from budgetnet.assembly import Assembler, Run
from budgetnet.costs.measured import Measured
from budgetnet.errors import FileError
from budgetnet.timing import AGREE, BURST, COLD, STEADY, Timing, enough, quantile_share, rested

ALONE, BRIEF, CALLS = 24, 64, 200
"""Timed calls in a look at a module, at a network that predictions learn from, and at one for what it takes."""
COUNTED = STEADY * (BURST - COLD)
"""Calls that count of them at least."""
LOOK, SECONDS, PATIENCE = 1.0, 5.0, 60.0
"""Seconds of a look; that a network is looked at for its result; and at most, while the machine is not at rest.

At most a third of that is spent on candidates, and a few seconds on what predictions learn from.
"""
BUILDS = {"compiled": 1}
"""Times that a network is built to be measured for what it takes: one that takes long is built once, others 3 times.

Where its weights come to lie in memory makes the same network up to a sixth slower or faster.
"""
FAST, MANY = 1.0, 9
"""Where a call of a network takes fewer milliseconds, it is built so often for its result.

One build in five of such a network is 3 to 8 % slower.
"""
REST = 1.05
"""A machine is at rest while the full network takes at most so many times as long as at the start."""
SLOWER, NOISY = 1.1, 0.25
"""A machine is slower when it takes so many times as long; noisy when so many calls are interrupted."""
WAVER = 0.05
"""At most so much is added to what was measured, as a share, for a machine that did not come to rest."""


class Rest(NamedTuple):
    """What two networks take on a machine at rest, in milliseconds, by which others are compared.

    Attributes:
        full: the full one of a space, of the middle one of its builds and the quantile of its calls.
        yardstick: a fixed small one.
    """

    full: float
    yardstick: float

    def slower(self, other: Rest, milliseconds: float) -> float:
        """How many times as slow as on another machine a network is that takes so many milliseconds on this one.

        From process to process large networks become slower or faster than small ones do: what lies between the two is
        taken to lie between them in this, too.
        """
        by_full, by_yardstick = self.full / other.full, self.yardstick / other.yardstick
        if self.full <= self.yardstick:
            return by_full
        share = min(1.0, max(0.0, (milliseconds - self.yardstick) / (self.full - self.yardstick)))
        return by_yardstick + share * (by_full - by_yardstick)


UNKNOWN = Rest(inf, inf)
"""Where nothing was timed that others are compared by."""


class Look(NamedTuple):
    """What was seen in a measurement.

    Attributes:
        ways: calls of each function.
        now: what the full network and the yardstick took meanwhile; infinite where they were not timed.
        whole: the first of these, with its confidence; None likewise.
        unrest: by which share the fastest calls of any of all these lay apart.
    """

    ways: list[Timing]
    now: Rest
    whole: Measured | None
    unrest: float


class Stopwatch:
    """Measures the networks of architectures, and notes how fast the machine is meanwhile.

    All that is compared is built and timed together, in turns with the full network and the yardstick: what these took
    at the start says what the rest would have taken then. For onnxruntime it is in a new process each time: one that
    has built hundreds of networks, or has trained, places a new one so that it is slower beside the full one.

    Args:
        assembler: builds them.
        quantile: of the calls: "median", or "p95" and the like.
        took: what the full network and the yardstick took on the machine that all milliseconds are of.

    Attributes:
        took: as given, or since the `start`; infinite before: then all is as it is seen.
        slowness: of the machine at rest: time of the yardstick, a fixed network, over what it took when the table of
            times was made.
        notes: what was noticed about the machine in the last measurement, by kind; before a search in any.
    """

    def __init__(self, assembler: Assembler, quantile: str, took: Rest = UNKNOWN) -> None:
        self.assembler, self.quantile, self.share = assembler, quantile, quantile_share(quantile)
        self.builds = BUILDS.get(assembler.runtime, 3)
        self.took, self.slowness, self.notes = took, 1.0, dict[str, str]()

    def start(self) -> Measured:
        """What the full network takes; from now on all milliseconds are of the machine as it is now."""
        found = self._look(lambda _: [], self._calls(CALLS), SECONDS, PATIENCE, first=True)
        assert found.whole is not None
        self.took = found.now
        return found.whole

    def alone(self, build: Callable[[Assembler], Sequence[Run]]) -> list[float]:
        """What functions take that an assembler builds, modules by themselves: milliseconds of the middle call."""
        found = self._look(build, ALONE, 0.0, PATIENCE / 6)
        seen = [timing.quantile(0.5) for timing in found.ways]
        return [milliseconds / found.now.slower(self.took, milliseconds) for milliseconds in seen]

    def briefly(self, kept: Tensor, *, first: bool = False) -> list[float]:
        """What the networks of `(n, G)` architectures take, each built once; with more patience before a search."""
        if not first:
            self.notes.clear()
        calls, patience = enough(self.share, BRIEF), PATIENCE / (6 if first else 24)
        found = self._look(lambda there: self._built(there, kept, 1), calls, 0.0, patience)
        return [self._then(self._seen(timing), found).value for timing in found.ways]

    def measure(self, kept: Tensor) -> list[Measured]:
        """What the networks of `(n, G)` architectures take.

        Each is built several times, and takes what the middle one does; the others widen what is expected again.
        """
        self.notes.clear()
        found = self._look(lambda there: self._built(there, kept), self._calls(CALLS), LOOK, PATIENCE / 3)
        seen = [self._seen(timing) for timing in found.ways]
        middle = [Measured.middle(seen[place : place + self.builds]) for place in range(0, len(seen), self.builds)]
        return [self._then(one, found) for one in middle]

    def report(self, kept: Tensor) -> Measured:
        """As `measure`, with more care, of one architecture, `(1, G)`."""
        self.notes.clear()
        found = self._look(lambda there: self._carefully(there, kept), self._calls(CALLS), SECONDS, PATIENCE)
        if found.unrest > AGREE:
            told = f"the fastest calls lie {100 * found.unrest:.0f} % apart"
            self.notes["restless"] = f"the machine did not come to rest: {told}"
        self.notes.pop("slower", None)  # what is returned says by how much
        return self._then(Measured.middle([self._seen(timing) for timing in found.ways]), found)

    def baseline(self) -> dict[str, float]:
        """The machine as it was at the start, for a run to go on with: `{"full", "yardstick", "slowness"}`."""
        return {**self.took._asdict(), "slowness": self.slowness}

    def go_by(self, baseline: Mapping[str, float]) -> None:
        """From now on all milliseconds are of the machine of a `baseline`; FileError where a number is not > 0."""
        own = {name: baseline[name] for name in self.baseline()}
        if min(own.values()) <= 0:
            raise FileError(f"the checkpoint's milliseconds must be > 0, got {min(own.values()):g}")
        self.took, self.slowness = Rest(baseline["full"], baseline["yardstick"]), baseline["slowness"]

    def note(self, slowness: float, disturbed: float = 0.0) -> None:
        """Notes how many times as slow the machine is as at first, and the share of calls that were interrupted."""
        if slowness > SLOWER:
            self.notes["slower"] = f"the machine was {slowness:.2f} times as slow as when the modules were timed"
        if disturbed > min(NOISY, 1 - self.share):  # as many as a quantile leaves out may have been the slow ones
            told = f"other jobs interrupted {100 * disturbed:.0f} % of the calls, which are left out"
            self.notes["noisy"] = f"the machine is noisy: {told}"

    def _built(self, there: Assembler, kept: Tensor, builds: int = 0) -> list[Run]:
        """The networks of `(n, G)` architectures, each built so often, or as often as candidates are."""
        return [there.whole(row[None]) for row in kept.repeat_interleave(builds or self.builds, dim=0)]

    def _carefully(self, there: Assembler, kept: Tensor) -> list[Run]:
        """The network of an architecture, `(1, G)`, built as often as it is for a result."""
        builds = self._built(there, kept)
        if self.builds == 1 or min(one.quantile(0.5) for one in there.times(builds, BURST, 0.0)) >= FAST:
            return builds
        return builds + self._built(there, kept, MANY - len(builds))

    def _look(
        self,
        build: Callable[[Assembler], Sequence[Run]],
        calls: int,
        seconds: float,
        patience: float,
        *,
        first: bool = False,
    ) -> Look:
        """Builds and times functions, in turns with the full network and the yardstick.

        Args:
            build: what is timed.
            calls: of each in a look.
            seconds: that it is looked at, at least.
            patience: seconds at most, until the fastest calls agree.
            first: with the full network and the yardstick though it is not known what they took before.
        """
        with self.assembler.apart() as there:
            beside: list[Run] = []
            if first or isfinite(self.took.full):
                beside = [there.yardstick() for _ in range(self.builds)]
                beside += self._carefully(there, there.network.architecture("full"))
            ways, least = [*build(there), *beside], enough(self.share, COUNTED)
            own = len(ways) - len(beside)

            def at_rest(seen: Sequence[Timing]) -> bool:
                full = [timing.fastest(least).quantile(self.share) for timing in seen[own + self.builds :]]
                return not full or float(np.median(full)) <= REST * self.took.full

            found = rested(
                lambda: there.times(ways, calls, min(LOOK, seconds)),
                calls=least,
                seconds=seconds,
                patience=patience,
                at_rest=at_rest,
                tail=self.share != 0.5,
            )
        now, whole = UNKNOWN, None
        if beside:
            yardsticks, full = found[own : own + self.builds], found[own + self.builds :]
            whole = Measured.middle([self._seen(timing) for timing in full])
            now = Rest(whole.value, float(np.median([timing.quantile(0.5) for timing in yardsticks])))
        slower = now.yardstick / self.took.yardstick if isfinite(self.took.full) else 1.0
        self.note(self.slowness * slower, float(np.mean([timing.disturbed for timing in found])))
        return Look(found[:own], now, whole, max(timing.unrest for timing in found))

    def _calls(self, calls: int) -> int:
        """Calls of each build in a look, or as many as the quantile needs of each."""
        return enough(self.share, -(-calls // self.builds))

    def _seen(self, timing: Timing) -> Measured:
        """The quantile of one network's calls, and its confidence. A machine that wavered may do so again."""
        low, high = timing.interval(self.share)
        by = 1 + min(WAVER, timing.unrest)
        return Measured(timing.quantile(self.share), low / by, high * by, timing.quantile(0.1), timing.quantile(0.9))

    def _then(self, one: Measured, found: Look) -> Measured:
        """What was seen in a look, on the machine that all milliseconds are of."""
        return one.slower(found.now.slower(self.took, one.value)) if isfinite(self.took.full) else one
