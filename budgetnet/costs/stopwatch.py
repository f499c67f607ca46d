"""What extracted networks take on this machine, timed beside a fixed one that shows how fast the machine is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from budgetnet.assembly import Assembler, Run
from budgetnet.costs.measured import Measured
from budgetnet.timing import AGREE, Timing, enough, quantile_share, steadied

BRIEF, CALLS = 64, 200
"""Timed calls of a network that predictions learn from, and of one for what it takes."""
SECONDS = 1.0
"""Seconds that a network is measured for at least: within less, others on the machine may slow down all calls."""
BUILDS = {"compiled": 1}
"""Times that a network is built to be measured for what it takes: one that takes long is built once, others 3 times.

Where its weights come to lie in memory makes the same network up to a sixth slower or faster.
"""
SLOWER, NOISY = 1.1, 0.25
"""A machine is slower when the yardstick takes so many times as long; noisy when so many calls are interrupted."""
WAVER = 0.05
"""At most so much is added to what was measured, as a share, for a machine that changes its speed."""
AGAIN = 5
"""Times that networks are measured at most where the machine is slower meanwhile, by more than that."""


class Stopwatch:
    """Measures the networks of architectures, and notes how fast the machine is meanwhile.

    Args:
        assembler: builds them.
        quantile: of the calls: "median", or "p95" and the like.

    Attributes:
        usual: milliseconds of the yardstick, a fixed network, that speeds are relative to; 1 until they are known.
        speeds: time of the yardstick over the usual one, whenever it was looked at.
        notes: what was noticed about the machine, by kind.
    """

    def __init__(self, assembler: Assembler, quantile: str) -> None:
        self.assembler, self.share = assembler, quantile_share(quantile)
        self.builds = BUILDS.get(assembler.runtime, 3)
        self.usual, self.speeds, self.notes = 1.0, list[float](), dict[str, str]()

    @property
    def speed(self) -> float:
        """Time of the yardstick over the usual one, as it mostly was."""
        return float(np.median(self.speeds))

    def yard(self) -> Timing:
        """The yardstick's calls where nothing else slows the machine down."""
        way = self.assembler.yardstick()
        return steadied(lambda: self.assembler.times([way], CALLS, SECONDS)[0], lambda one: one.quantile(0.5))[0]

    def briefly(self, kept: Tensor) -> tuple[list[Measured], float]:
        """What the networks of `(n, G)` architectures take, each built once, and how slow the machine was meanwhile."""
        return self._seen(self.assembler.times(self._ways(kept), enough(self.share, BRIEF)))

    def measure(self, kept: Tensor, calls: int = CALLS) -> list[Measured]:
        """What the networks of `(n, G)` architectures take, in turns.

        Each is built several times, and takes what the middle one does; the others widen what is expected again. While
        the machine is slower than it mostly was they are measured again, and it counts when it was fastest.
        """
        ways, looks = self._ways(kept.repeat_interleave(self.builds, dim=0)), list[list[Timing]]()
        while len(looks) < AGAIN and (not looks or self._slowness(looks[-1][-1]) > (1 + WAVER) * self.speed):
            looks.append(self._look(ways, calls))
        found, _ = self._seen(min(looks, key=lambda look: self._slowness(look[-1])))
        return [Measured.middle(found[place : place + self.builds]) for place in range(0, len(found), self.builds)]

    def report(self, kept: Tensor) -> tuple[Measured, float]:
        """What the network of an architecture, `(1, G)`, takes where nothing else slows the machine down.

        Returns:
            That, and how slow the machine was meanwhile.
        """
        ways = self._ways(kept.repeat_interleave(self.builds, dim=0))

        def look() -> tuple[Measured, float]:
            found, speed = self._seen(self._look(ways, CALLS))
            return Measured.middle(found), speed

        looks = steadied(look, lambda seen: seen[0].value)
        found = [one for one, _ in looks]
        apart = found[-1].value / found[0].value - 1
        if apart > AGREE:
            self.notes["restless"] = (
                f"the machine did not come to rest: its fastest looks lie {100 * apart:.0f} % apart"
            )
        return found[0].among(found), looks[0][1]

    def note(self, yard: Timing, disturbed: float) -> float:
        """Notes how slow the machine is by the yardstick, and by the share of calls that were interrupted."""
        ratio = self._slowness(yard)
        self.speeds.append(ratio)
        if ratio > SLOWER:
            self.notes["slower"] = f"the machine was {ratio:.2f} times as slow as when the modules were timed"
        if disturbed > min(NOISY, 1 - self.share):  # as many as a quantile leaves out may have been the slow ones
            told = f"other jobs interrupted {100 * disturbed:.0f} % of the calls, which are left out"
            self.notes["noisy"] = f"the machine is noisy: {told}"
        return ratio

    def _ways(self, kept: Tensor) -> list[Run]:
        """The networks of `(n, G)` architectures, and the yardstick."""
        return [*(self.assembler.whole(row[None]) for row in kept), self.assembler.yardstick()]

    def _look(self, ways: Sequence[Run], calls: int) -> list[Timing]:
        """So many calls of each network in all its builds, or as many as the quantile needs of each."""
        return self.assembler.times(ways, enough(self.share, -(-calls // self.builds)), SECONDS)

    def _seen(self, look: Sequence[Timing]) -> tuple[list[Measured], float]:
        """What networks take, and how slow the machine was meanwhile, by their times and the yardstick's.

        Between which milliseconds they are expected again takes in how fast the machine mostly was, and its waver.
        """
        *timings, yard = look
        speed = self.note(yard, float(np.mean([timing.disturbed for timing in timings])))
        fast, slow = np.clip(np.quantile(self.speeds, (0.1, 0.9)) / self.speed, 1 - WAVER, 1 + WAVER).tolist()
        fast, slow = fast * min(1.0, self.speed / speed), slow * max(1.0, self.speed / speed)
        found = [seen_at(timing, self.share) for timing in timings]
        return [replace(one, low=one.low * fast, high=one.high * slow) for one in found], speed

    def _slowness(self, yard: Timing) -> float:
        """Time of the yardstick over the usual one."""
        return yard.quantile(0.5) / self.usual


def seen_at(timing: Timing, share: float) -> Measured:
    """A quantile of the calls of one network, and its confidence."""
    return Measured(timing.quantile(share), *timing.interval(share), timing.quantile(0.1), timing.quantile(0.9))
