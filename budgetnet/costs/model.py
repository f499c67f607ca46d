"""A cost of one network's architectures, and what it may know of itself beside what one of them costs."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class CostModel(ABC):
    """A cost of one network's architectures.

    Attributes:
        unit: what the numbers count.
        full: cost of the full network, where calling the model does not give it.
    """

    unit: str
    full: float | None = None

    @abstractmethod
    def __call__(self, used: Tensor) -> Tensor:
        """Maps `(B, U)` used units to `(B,)` costs."""

    @property
    def monotone(self) -> bool:
        """Whether a module more never costs less, so that the smallest network is known."""
        return True

    @property
    def along_path(self) -> list[float] | None:
        """What each edge and the node it enters cost at least on a path of their own; None where unknown."""
        return None

    def of_edges(self, used: Tensor) -> list[float] | None:
        """What each edge and the node it enters cost in an architecture, `(1, U)`, or else `along_path`."""
        return self.along_path

    def smallest(self) -> Tensor | None:
        """The architecture of least cost that connects input and output, `(1, G)`; None where edges tell it."""
        return None

    def binding(self, used: Tensor) -> str | None:
        """Why an architecture, `(1, U)`, costs what it costs, in words; None where edges tell it."""
        return None

    def decided(self) -> CostModel:
        """The same cost of what is extracted, which has nothing left to decide."""
        return self
