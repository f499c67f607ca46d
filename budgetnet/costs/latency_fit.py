"""Latency as a table of times predicts it: of modules by themselves, weighed by whole networks that were measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from budgetnet.assembly import Assembler, Run
from budgetnet.costs.additive import ChannelCost, EdgeCost, MACs
from budgetnet.costs.channel_time import ChannelTime, channel_time, counts_key, openings
from budgetnet.costs.model import CostModel
from budgetnet.costs.timetable import Timetable, Whole, fitted
from budgetnet.errors import FileError
from budgetnet.gated import ChannelGate, GatedSequential
from budgetnet.supernet import SuperNetwork


class LatencyFit(CostModel):
    """Latency of a network's architectures: `T(H) = w_0 + sum_g w_g S_g(H)` over kinds g of modules and sums.

    `S_g` is what the table has for all used modules of that kind. The weights are fitted to the whole networks of the
    space that the table has. Nothing is measured here.

    Args:
        network: the space.
        quantile: that is told of whole networks.
        modules: of the network; says what the table calls them.
        table: of times.
        file: the table's, as an error names it.

    Attributes:
        parts: the table's milliseconds of what is used, for each kind.
        space: what the table calls the space and the quantile.
        error: median relative error of predictions for networks that they were not fitted to.
    """

    unit = "ms"
    parts: dict[str, EdgeCost]

    def __init__(self, network: SuperNetwork, quantile: str, modules: Assembler, table: Timetable, file: str) -> None:
        self.network, self.modules, self.table, self.file = network, modules, table, file
        channels = MACs().bind(network).channels
        self.sites = {edge: inside for edge, inside in channels.items() if isinstance(inside, ChannelCost)}
        self.space = self._space(quantile)

    def __call__(self, used: Tensor) -> Tensor:
        """Maps `(B, U)` used units to `(B,)` float64 milliseconds, with a gradient where `used` has one."""
        return self.base + self.times(used)

    @property
    def along_path(self) -> list[float]:
        """What each edge and the node it enters add at least on a path of their own."""
        source = self.network.graph.source
        starts = [start for start, _ in self.network.graph.edges]
        return [own + self.base * (start == source) for own, start in zip(self.times.along_path, starts, strict=True)]

    @property
    def known(self) -> list[Whole]:
        """The whole networks in the table that are of this space and quantile."""
        return [whole for whole in self.table.networks if whole.space == self.space]

    def missing(self) -> dict[tuple[str, str], Callable[[], Run]]:
        """What the table would need beside what it has, by kind and numbers of open channels, and what builds it."""
        network, modules, times = self.network, self.modules, self.table.times
        found: dict[tuple[str, str], Callable[[], Run]] = {}
        for edge in modules.edges:
            kind, site = self._edge_kind(edge), self.sites.get(edge)
            for bits in [torch.zeros(0)] if site is None else openings(site):
                key = "" if site is None else counts_key(bits, site)
                found[kind, key] = partial(modules.alone, edge, bits)
        for node in modules.nodes:
            found[modules.kind(network.activations[node], network.shapes[node]), ""] = partial(modules.activation, node)
        for node, entering in enumerate(network.graph.incoming):
            if len(entering) > 1:
                found[addition_kind(network, node), ""] = partial(modules.addition, node)
        return {(kind, key): build for (kind, key), build in found.items() if key not in times.get(kind, {})}

    def fit(self, slowness: float = 1.0) -> None:
        """Weighs the kinds by the whole networks that were measured.

        Args:
            slowness: how many times as long all takes as the table says.
        """
        names, self.fitted_at = list(self.parts), slowness
        try:
            parts = np.array([[whole.parts[name] for name in names] for whole in self.known])
        except KeyError as error:
            raise FileError(f"{self.file} must have all parts of the networks it knows, lacks {error}") from error
        weights, self.error = fitted(parts, np.array([whole.seen for whole in self.known]))
        weights = weights * self.fitted_at
        self.base = float(weights[0])
        pairs = list(zip(self.parts.values(), weights[1:], strict=True))

        def total(name: str) -> Tensor:
            return torch.stack([getattr(part, name) * float(weight) for part, weight in pairs]).sum(dim=0)

        channels = {
            edge: inside.scaled(float(weight))
            for part, weight in pairs
            for edge, inside in part.channels.items()
            if isinstance(inside, ChannelTime)
        }
        self.times = EdgeCost(
            *(self.network.graph, total("per_edge"), total("per_addition"), total("per_node"), "ms", channels),
            streams=self.network.streams,
        )

    def _space(self, quantile: str) -> str:
        """What tells spaces apart whose whole networks differ, and the quantile that is told of them."""
        network, modules = self.network, self.modules
        edges = [[*ends, modules.edge_kind(edge) if edge in modules.folded else ""]
                 for edge, ends in enumerate(network.graph.edges)]  # fmt: skip
        nodes = [modules.kind(network.activations[node], shape) for node, shape in enumerate(network.shapes)]
        sites = [[site.edge, site.name, *site.sizes] for site in network.sites]
        content = json.dumps([quantile, edges, nodes, sites])
        return f"{quantile} of {network.name} {hashlib.sha256(content.encode()).hexdigest()[:16]}"

    def _edge_kind(self, edge: int) -> str:
        """What the table calls an edge: a module, and between which of its layers channels can be closed."""
        kind, module = self.modules.edge_kind(edge), self.network.modules_on_edges[edge]
        if not isinstance(module, GatedSequential):
            return kind
        places = [place for place, layer in enumerate(module) if isinstance(layer, ChannelGate)]
        return f"{kind} gated at {','.join(map(str, places))}"

    def _parts(self) -> dict[str, EdgeCost]:
        """The table's milliseconds of what is used, for each kind, once nothing is missing."""
        network, modules, times = self.network, self.modules, self.table.times
        edges, nodes = len(network.graph.edges), len(network.graph.nodes)
        found: dict[str, EdgeCost] = {}

        def part(kind: str) -> EdgeCost:
            none, still = torch.zeros(edges, dtype=torch.float64), torch.zeros(nodes, dtype=torch.float64)
            empty = EdgeCost(
                *(network.graph, none, still, still.clone(), "ms", dict[int, ChannelTime]()), streams=network.streams
            )
            return found.setdefault(kind, empty)

        for edge in modules.edges:
            kind, site = self._edge_kind(edge), self.sites.get(edge)
            cost = part(kind)
            if site is None:
                cost.per_edge[edge] = times[kind][""]
            else:
                inside = channel_time(site, times[kind])
                cost.channels[edge] = inside  # type: ignore[index]
                cost.per_edge[edge] = float(inside(torch.ones(1, network.units))[0])
        for node in modules.nodes:
            kind = modules.kind(network.activations[node], network.shapes[node])
            part(kind).per_node[node] = times[kind][""]
        for node, entering in enumerate(network.graph.incoming):
            if len(entering) > 1:
                part(addition_kind(network, node)).per_addition[node] = times[addition_kind(network, node)][""]
        return found


def addition_kind(network: SuperNetwork, node: int) -> str:
    """What the table calls the sum of two values of a node's shape."""
    return f"sum on {'x'.join(map(str, network.shapes[node]))}"
