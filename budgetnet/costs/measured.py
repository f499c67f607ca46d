"""Costs that only a real network shows: what is seen when one is measured, beside what was predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class Measured:
    """A cost as it was measured.

    Attributes:
        value: in the cost's unit.
        low, high: between which a repeated measurement is expected to lie.
    """

    value: float
    low: float
    high: float


@runtime_checkable
class MeasuredModel(Protocol):
    """A cost whose own value is seen on the extracted network only.

    Calling it predicts, which is what training, cutting and filling up go by; what is handed over keeps its limit
    by `measure`.
    """

    @property
    def unit(self) -> str:
        """What the numbers count."""

    def __call__(self, used: Tensor) -> Tensor:
        """Maps `(B, U)` used units to `(B,)` predicted costs."""

    def measure(self, kept: Tensor) -> list[Measured]:
        """What the extracted networks of `(n, G)` architectures cost, measured side by side."""
