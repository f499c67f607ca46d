"""Costs that count choices: open gates and used layers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from math import lcm
from typing import ClassVar

import torch
from torch import Tensor, nn

from budgetnet.costs.additive import EdgeCost, edge_cost
from budgetnet.costs.model import CostModel
from budgetnet.shapes import Shape
from budgetnet.supernet import SuperNetwork


@dataclass(frozen=True)
class Activation:
    """Open gates, each of the same weight: the activation of Herrmann et al., Eq. 1, times the number of gates.

    An edge's gate is open where the edge is used, a channel group's where it is kept and its edge is used. Of a gate
    that several sites share each of its groups counts its part.
    """

    key: ClassVar[str] = "activation"
    unit: ClassVar[str] = "gate"

    def bind(self, network: SuperNetwork) -> OpenGates:
        """The cost of this network's architectures."""
        edges = len(network.graph.edges)
        owners = [*range(edges), *(site.edge for site in network.sites for _ in range(*site.units))]
        gated = [unit for unit, column in enumerate(network.gate_of) if column is not None]
        shared = Counter(network.gate_of)
        counts = [shared[network.gate_of[unit]] for unit in gated]
        parts = lcm(*counts)  # whole numbers, so that their sum is exact
        weights = torch.tensor([parts // count for count in counts], dtype=torch.float64)
        return OpenGates(torch.tensor(gated, dtype=torch.int64), torch.tensor(owners)[gated], weights, parts, edges)


@dataclass(frozen=True, eq=False)
class OpenGates(CostModel):
    """How many gates are open.

    Attributes:
        units: `(n,)` units that have a gate.
        owners: `(n,)` edge that each belongs to.
        weights: `(n,)` whole numbers of the `parts` of a gate that each unit is.
        parts: that a gate has.
        edges: number of edges E.
    """

    units: Tensor
    owners: Tensor
    weights: Tensor
    parts: int
    edges: int
    unit = "gate"

    def __call__(self, used: Tensor) -> Tensor:
        """Maps `(B, U)` used units to `(B,)` float64 numbers of open gates, differentiably."""
        inside = (self.units >= self.edges).to(used.device)
        own = used[:, self.units]
        is_open = torch.where(inside, own * used[:, self.owners], own).to(torch.float64)
        return is_open @ self.weights.to(used.device) / self.parts


@dataclass(frozen=True)
class Layers:
    """Convolutions and linear layers on used edges: the "layers used" of early exits (Herrmann et al., section 5).

    Those of an exit that answers before it is decided on count for all that come there, taken or not; those of the
    gates themselves do not count.
    """

    key: ClassVar[str] = "layers"
    unit: ClassVar[str] = "layer"

    def bind(self, network: SuperNetwork) -> EdgeCost:
        """The cost of this network's architectures."""

        def count(module: nn.Module, shape: Shape) -> int:
            return sum(isinstance(part, nn.Conv2d | nn.Linear) for part in module.modules())

        return replace(edge_cost(network, count, self.unit, heads=dict.fromkeys(network.answers, 0.0)), channels={})
