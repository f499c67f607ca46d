"""What extracted networks take on this machine at rest, timed beside the full one, which shows whether it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from math import inf
from typing import NamedTuple

import numpy as np
from torch import Tensor

from budgetnet.assembly import Assembler, Run
from budgetnet.costs.measured import Measured
from budgetnet.errors import FileError
from budgetnet.timing import AGREE, BURST, COLD, STEADY, Timing, enough, quantile_share, rested

BRIEF, CALLS = 64, 200
"""Timed calls in a look at a network that predictions learn from, and at one for what it takes."""
COUNTED = STEADY * (BURST - COLD)
"""Calls that count of them at least."""
LOOK, SECONDS, PATIENCE = 1.0, 5.0, 60.0
"""Seconds of a look; that a network is looked at for its result; and at most, while the machine is not at rest.

At most a third of that is spent at the start, a sixth on candidates, and a few seconds on what predictions learn from.
"""
BUILDS = {"compiled": 1}
"""Times that a network is built to be measured for what it takes: one that takes long is built once, others 3 times.

Where its weights come to lie in memory makes the same network up to a sixth slower or faster.
"""
FAST, MANY = 1.0, 9
"""Where a call of a network takes fewer milliseconds, it is built so often for its result.

One build in five of such a network is 3 to 8 % slower.
"""
SLOWER, NOISY = 1.1, 0.25
"""A machine is slower when it takes so many times as long; noisy when so many calls are interrupted."""
REST = 1.05
"""A machine is at rest while the full network takes at most so many times as long as at the start."""
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


class Stopwatch:
    """Measures the networks of architectures, and notes how fast the machine is meanwhile.

    Args:
        assembler: builds them.
        quantile: of the calls: "median", or "p95" and the like.

    Attributes:
        rest: milliseconds of the full network on the machine at rest; infinite before the `start`.
        took: what that one and the yardstick took at the `start`, or since then if the machine was at rest only later.
        slowness: of the machine at rest: time of the yardstick, a fixed network, over what it took when the table of
            times was made.
        notes: what was noticed about the machine in the last measurement, by kind; before a search in any.
    """

    def __init__(self, assembler: Assembler, quantile: str) -> None:
        self.assembler, self.quantile, self.share = assembler, quantile, quantile_share(quantile)
        self.builds = BUILDS.get(assembler.runtime, 3)
        self.beside: list[Run] = []
        self.rest, self.took = inf, Rest(inf, inf)
        self.slowness, self.notes = 1.0, dict[str, str]()

    def start(self) -> tuple[Measured, float]:
        """What the full network takes on the machine at rest, and milliseconds of the yardstick."""
        yardsticks, full = self._references()
        found, _ = self._rested([*yardsticks, *full], self._calls(CALLS), SECONDS, PATIENCE / 3)
        whole, self.took = self._told(found, len(yardsticks))
        self.beside, self.rest = full[:1], found[len(yardsticks)].fastest(COUNTED).quantile(0.5)
        return whole, self.took.yardstick

    def quickly(self, ways: Sequence[Run], calls: int, *, first: bool = False) -> tuple[list[Timing], float]:
        """What functions take, in turns, and how many times as slow as at rest the machine was.

        Args:
            ways: the functions.
            calls: of each in a look.
            first: with more patience, as before a search.
        """
        return self._rested(ways, calls, 0.0, PATIENCE / (6 if first else 24))

    def briefly(self, kept: Tensor, *, first: bool = False) -> list[float]:
        """As `quickly`, what the networks of `(n, G)` architectures take on the machine at rest, each built once."""
        if not first:
            self.notes.clear()
        ways = [self.assembler.whole(row[None]) for row in kept]
        found, slowness = self.quickly(ways, enough(self.share, BRIEF), first=first)
        return [timing.quantile(self.share) / slowness for timing in found]

    def measure(self, kept: Tensor) -> list[Measured]:
        """What the networks of `(n, G)` architectures take on the machine at rest, in turns.

        Each is built several times, and takes what the middle one does; the others widen what is expected again. They
        took as many times too long as the full network.
        """
        self.notes.clear()
        found, slowness = self._rested(self._built(kept), self._calls(CALLS), LOOK, PATIENCE / 6)
        seen = [self._seen(timing, slowness) for timing in found]
        return [Measured.middle(seen[place : place + self.builds]) for place in range(0, len(seen), self.builds)]

    def report(self, kept: Tensor) -> Measured:
        """As `measure`, with more care, of one architecture, `(1, G)`; as it was seen where there was no `start`."""
        return self._report(kept)[0]

    def anew(self, kept: Tensor) -> Measured:
        """As `report` after a `start`, but measured in a new process where that is possible, as `compared` has it."""
        return self.compared(kept, self.took) if self.assembler.runtime == "onnxruntime" else self.report(kept)

    def compared(self, kept: Tensor, then: Rest) -> Measured:
        """What `report` would say on the machine as it was then.

        The full network and the yardstick are timed in turns with the other one, as a machine that others use does not
        stay as it is for seconds. For onnxruntime all are built in a new process: a process that has built hundreds of
        networks places a new one so that it is up to 8 % slower beside the full one.
        """
        apart = self.assembler.runtime == "onnxruntime"
        with self.assembler.apart() if apart else nullcontext(self.assembler) as assembler:
            there = Stopwatch(assembler, self.quantile)
            yardsticks, full = there._references()
            found, beside = there._report(kept, [*yardsticks, *full])
            _, now = there._told(beside, len(yardsticks))
        self.notes = there.notes
        return found.slower(now.slower(then, found.value))

    def baseline(self) -> dict[str, float]:
        """The machine as it was at the start, for a run to go on with: `{"rest", "full", "yardstick", "slowness"}`."""
        return {"rest": self.rest, **self.took._asdict(), "slowness": self.slowness}

    def go_by(self, baseline: Mapping[str, float]) -> None:
        """From now on all milliseconds are of the machine of a `baseline`; FileError where a number is not > 0."""
        own = {name: baseline[name] for name in self.baseline()}
        if min(own.values()) <= 0:
            raise FileError(f"the checkpoint's milliseconds must be > 0, got {min(own.values()):g}")
        self.rest, self.slowness = baseline["rest"], baseline["slowness"]
        self.took = Rest(baseline["full"], baseline["yardstick"])

    def note(self, slowness: float, disturbed: float = 0.0) -> None:
        """Notes how many times as slow the machine is as at first, and the share of calls that were interrupted."""
        if slowness > SLOWER:
            self.notes["slower"] = f"the machine was {slowness:.2f} times as slow as when the modules were timed"
        if disturbed > min(NOISY, 1 - self.share):  # as many as a quantile leaves out may have been the slow ones
            told = f"other jobs interrupted {100 * disturbed:.0f} % of the calls, which are left out"
            self.notes["noisy"] = f"the machine is noisy: {told}"

    def _built(self, kept: Tensor, builds: int | None = None) -> list[Run]:
        """The networks of `(n, G)` architectures, each built so often, or as often as candidates are."""
        times = self.builds if builds is None else builds
        return [self.assembler.whole(row[None]) for row in kept.repeat_interleave(times, dim=0)]

    def _carefully(self, kept: Tensor) -> list[Run]:
        """The network of an architecture, `(1, G)`, built as often as it is for a result."""
        builds = self._built(kept)
        if self.builds == 1 or min(one.quantile(0.5) for one in self.assembler.times(builds, BURST, 0.0)) >= FAST:
            return builds
        return builds + self._built(kept, MANY - len(builds))

    def _references(self) -> tuple[list[Run], list[Run]]:
        """The yardstick and the full network, each built several times."""
        yardsticks = [self.assembler.yardstick() for _ in range(self.builds)]
        return yardsticks, self._carefully(self.assembler.network.architecture("full"))

    def _told(self, found: Sequence[Timing], yardsticks: int) -> tuple[Measured, Rest]:
        """What the full network takes, and how the machine is, of the times of so many yardsticks and those of it."""
        yard = float(np.median([timing.quantile(0.5) for timing in found[:yardsticks]]))
        whole = Measured.middle([self._seen(timing) for timing in found[yardsticks:]])
        return whole, Rest(whole.value, yard)

    def _report(self, kept: Tensor, beside: Sequence[Run] = ()) -> tuple[Measured, list[Timing]]:
        """As `report`, and the times of others, in turns with it."""
        self.notes.clear()
        builds = self._carefully(kept)
        found, slowness = self._rested([*builds, *beside], self._calls(CALLS), SECONDS, PATIENCE)
        unrest = max(timing.unrest for timing in found)
        if unrest > AGREE:
            told = f"the fastest calls lie {100 * unrest:.0f} % apart"
            self.notes["restless"] = f"the machine did not come to rest: {told}"
        self.notes.pop("slower", None)  # what is returned says by how much
        return Measured.middle([self._seen(timing, slowness) for timing in found[: len(builds)]]), found[len(builds) :]

    def _calls(self, calls: int) -> int:
        """Calls of each build in a look, or as many as the quantile needs of each."""
        return enough(self.share, -(-calls // self.builds))

    def _rested(self, ways: Sequence[Run], calls: int, seconds: float, patience: float) -> tuple[list[Timing], float]:
        """The calls of functions while the machine was most at rest, and how many times as slow as at rest it was."""

        def slowness(seen: Sequence[Timing]) -> float:
            return seen[-1].fastest(COUNTED).quantile(0.5) / self.rest if self.beside else 1.0

        found = rested(
            lambda: self.assembler.times([*ways, *self.beside], calls, min(LOOK, seconds)),
            calls=enough(self.share, COUNTED),
            seconds=seconds,
            patience=patience,
            at_rest=lambda seen: slowness(seen) <= REST,
            tail=self.share != 0.5,
        )
        times = slowness(found)
        self.note(self.slowness * times, float(np.mean([timing.disturbed for timing in found])))
        if times < 1 / REST:  # it was not at rest at the start
            self.rest, self.slowness = self.rest * times, self.slowness * times
            self.took = Rest(*(milliseconds * times for milliseconds in self.took))
            times = 1.0
        return found[: len(ways)], times

    def _seen(self, timing: Timing, slowness: float = 1.0) -> Measured:
        """The quantile of one network's calls, and its confidence, on a machine so many times faster.

        A machine that wavered may do so again.
        """
        low, high = timing.interval(self.share)
        by = 1 + min(WAVER, timing.unrest)
        seen = (timing.quantile(self.share), low / by, high * by, timing.quantile(0.1), timing.quantile(0.9))
        return Measured(*seen).slower(slowness)
