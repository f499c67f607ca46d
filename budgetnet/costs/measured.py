"""Costs that only a real network shows: what is seen when one is measured, beside what was predicted."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from budgetnet.costs.model import CostModel


@dataclass(frozen=True)
class Measured:
    """A cost as it was measured.

    Attributes:
        value: in the cost's unit.
        low, high: between which a repeated measurement is expected to lie.
        p10, p90: between which 8 of 10 of its calls took; None where it is no time.
        slowness: how many times as slow the machine was as the one that all this is of: `value * slowness` was seen.
    """

    value: float
    low: float
    high: float
    p10: float | None = None
    p90: float | None = None
    slowness: float = 1.0

    @staticmethod
    def middle(found: Sequence[Measured]) -> Measured:
        """The middle one of several, an odd number; what others say is expected again as well.

        But for a quarter at each end: the middle one of as many others hardly lies there.
        """
        ordered, aside = sorted(found, key=lambda each: each.value), len(found) // 4
        return ordered[len(found) // 2].among(ordered[aside : len(found) - aside])

    def among(self, found: Sequence[Measured]) -> Measured:
        """The same, but what others say is expected again as well."""
        values = [each.value for each in found]
        return replace(self, low=min(self.low, *values), high=max(self.high, *values))

    def slower(self, times: float) -> Measured:
        """The same as seen on a machine that is so many times as slow as the one that it is of."""
        numbers = {**self.told(), "value": self.value}
        return replace(
            self, **{name: number / times for name, number in numbers.items()}, slowness=self.slowness * times
        )

    def told(self) -> dict[str, float]:
        """`{"low", "high"}`, and `{"p10", "p90"}` of a time, as in result.json."""
        given = {"low": self.low, "high": self.high, "p10": self.p10, "p90": self.p90}
        return {name: value for name, value in given.items() if value is not None}


class MeasuredModel(CostModel):
    """A cost whose own value is seen on the extracted network only.

    Calling it predicts, which is what training, cutting and filling up go by; what is handed over keeps its limit
    by `measure`.
    """

    @abstractmethod
    def measure(self, kept: Tensor) -> list[Measured]:
        """What the extracted networks of `(n, G)` architectures cost, measured side by side."""

    @abstractmethod
    def report(self, kept: Tensor) -> Measured:
        """What the extracted network of an architecture, `(1, G)`, is said to cost: measured with more care."""

    def beforehand(self, kept: Tensor) -> Measured:
        """What the extracted network of an architecture, `(1, G)`, costs once it is trained."""
        return self.measure(kept)[0]


class LearningModel(MeasuredModel):
    """A measured cost whose predictions are corrected by what is measured.

    Attributes:
        error: median relative error of predictions for networks that were not known to them.
        each_epoch: architectures to measure after each epoch of a search.
    """

    error: float
    each_epoch: int

    @property
    @abstractmethod
    def notes(self) -> dict[str, str]:
        """What was noticed about the machine, or the predictions, by kind."""

    @abstractmethod
    def refit(self, kept: Tensor) -> None:
        """Measures the networks of `(n, G)` architectures and corrects the predictions."""

    @abstractmethod
    def save(self) -> None:
        """Writes what is known to its file, if it has one."""
