"""Costs that add up over what is used: MACs and parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from budgetnet.errors import ConfigError
from budgetnet.graph import Graph, either
from budgetnet.supernet import Shape, SuperNetwork, evaluating, on_meta


@dataclass(frozen=True, eq=False)
class EdgeCost:
    """Sum over used edges, over the additions where they meet, and over the activations behind them.

    `C(H) = sum_e used_e(H) c_e + sum_n max(0, inputs_n(H) - 1) a_n + sum_n alive_n(H) b_n`

    Attributes:
        graph: the E edges and N nodes being priced.
        per_edge: `(E,)` float64 cost of one forward pass on one example, in `unit`.
        per_addition: `(N,)` float64 cost of adding one more input into each node.
        per_node: `(N,)` float64 cost of each node's activation, paid where anything enters.
        unit: what the numbers count: "MAC", "parameter".
    """

    graph: Graph
    per_edge: Tensor
    per_addition: Tensor
    per_node: Tensor
    unit: str

    def __call__(self, used: Tensor) -> Tensor:
        """Maps `(B, E)` used edges, bits or in [0, 1], to `(B,)` float64 costs in `unit`, differentiably."""
        ends = torch.tensor([end for _, end in self.graph.edges])
        columns = used.t().contiguous()  # (E, B): bits stay bits until they are weighed
        # every used input pays its addition, then each live node gets its first one back
        cost = weigh(self.per_edge + self.per_addition[ends], columns)
        by_node = self.per_node - self.per_addition
        if by_node.any():
            entered = [node for node, entering in enumerate(self.graph.incoming) if entering]
            alive = [reduce(either, [columns[edge] for edge in self.graph.incoming[node]]) for node in entered]
            cost = cost + weigh(by_node[entered], torch.stack(alive))
        return cost

    @property
    def along_path(self) -> list[float]:
        """What each edge and the node it enters cost on a path of their own, where nothing is added.

        The smallest network is such a path.
        """
        ends = [end for _, end in self.graph.edges]
        return [float(cost) for cost in self.per_edge + self.per_node[ends]]


@dataclass(frozen=True)
class MACs:
    """Multiply-adds of one forward pass on one example: convolutions, linear layers, and the sums at nodes.

    Nothing is counted for bias, normalisation, activation, pooling and upsampling.

    Attributes:
        counting: "true", or "paper": an upsampling convolution is charged at the resolution before
            upsampling, a quarter of its work, as in the tables of BSN.

    Source: BSN, section 4.1 ("computation cost"); docs/counting.md says which printed digits show this reading.
    """

    counting: str = "true"
    key: ClassVar[str] = "macs"
    unit: ClassVar[str] = "MAC"

    def __post_init__(self) -> None:
        if self.counting not in ("true", "paper"):
            raise ConfigError(f"macs are counted true or paper, got {self.counting!r}")

    def bind(self, network: SuperNetwork) -> EdgeCost:
        """The cost of this network's architectures."""

        def count(module: nn.Module, shape: Shape) -> int:
            macs = module_macs(module, shape)
            for part in module.modules() if self.counting == "paper" else ():
                if isinstance(part, nn.Upsample) and isinstance(part.scale_factor, int | float):
                    macs //= int(part.scale_factor) ** 2
            return macs

        additions = [prod(shape) for shape in network.shapes]
        return EdgeCost(
            network.graph, per_edge(network, count), as_cost(additions), per_node(network, count), self.unit
        )


@dataclass(frozen=True)
class Params:
    """Learned numbers of the network: weights, biases and the batch norms' affine terms; not the gates.

    Source: BSN, section 4.1 ("memory consumption cost"), Table 3.
    """

    key: ClassVar[str] = "params"
    unit: ClassVar[str] = "parameter"

    def bind(self, network: SuperNetwork) -> EdgeCost:
        """The cost of this network's architectures."""

        def count(module: nn.Module, shape: Shape) -> int:
            return sum(value.numel() for value in module.parameters())

        additions = [0] * len(network.graph.nodes)
        return EdgeCost(
            network.graph, per_edge(network, count), as_cost(additions), per_node(network, count), self.unit
        )


def module_macs(module: nn.Module, shape: Shape) -> int:
    """MACs of one forward pass on one example of `shape`, counted by torch on the meta device."""
    counter = FlopCounterMode(display=False)
    with evaluating(module), torch.no_grad(), counter:
        functional_call(module, on_meta(module), torch.empty(1, *shape, device="meta"))
    return int(counter.get_total_flops()) // 2  # torch counts a multiply-add as two


def per_edge(network: SuperNetwork, count: Callable[[nn.Module, Shape], int]) -> Tensor:
    """`(E,)` of `count(module, shape of its input)`."""
    starts = [network.shapes[start] for start, _ in network.graph.edges]
    return as_cost([count(module, shape) for module, shape in zip(network.modules_on_edges, starts, strict=True)])


def per_node(network: SuperNetwork, count: Callable[[nn.Module, Shape], int]) -> Tensor:
    """`(N,)` of `count(activation, shape of the node)`; an activation keeps the shape it is given."""
    return as_cost([count(module, shape) for module, shape in zip(network.activations, network.shapes, strict=True)])


def weigh(weights: Tensor, columns: Tensor) -> Tensor:
    """`(n,)` weights of `(n, B)` columns, summed to `(B,)` float64."""
    return weights.to(columns.device) @ columns.to(torch.float64)


def as_cost(values: list[int]) -> Tensor:
    """Whole numbers as float64, exact up to 2**53."""
    return torch.tensor(values, dtype=torch.float64)
