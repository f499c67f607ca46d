"""What a device has to send when the rest of the network runs in the cloud."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from budgetnet.costs.additive import MACs, decided_once
from budgetnet.costs.liveness import Liveness
from budgetnet.costs.model import CostModel
from budgetnet.errors import ConfigError
from budgetnet.supernet import SuperNetwork

CHUNK = 1024  # architectures whose tables of what is alive are made together
SCALES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9}


@dataclass(frozen=True)
class Transfer:
    """Bytes that a device sends to the cloud, where the network is cut best.

    The input is on the device, which runs the network's first operators, in the order of the extracted network, as far
    as it likes and its multiply-adds go; the cloud runs all others. Each value that was there before the cut and is
    read behind it is sent once, in float32. Cuts lie between the modules of edges, the sums and the activations of
    nodes: in front of all of them the input is sent, behind all of them nothing but the output.

    Attributes:
        device: multiply-adds that the device can afford for one example, >= 0, such as "10M".

    Raises:
        ConfigError: `device` is no such number.

    Source: BSN, section 1, names such costs (a network in part on a mobile device, in part in the cloud); the model
    is ours, in the manner of Kang et al., *Neurosurgeon*, 2017.
    """

    device: str = "10M"
    key: ClassVar[str] = "transfer"
    unit: ClassVar[str] = "B"

    def __post_init__(self) -> None:
        _ = self.affords

    @property
    def affords(self) -> float:
        """Multiply-adds that the device can afford.

        Raises:
            ConfigError: `device` is no number >= 0.
        """
        match = re.fullmatch(r"(?P<number>[0-9]+\.?[0-9]*(?:[eE][+-]?[0-9]+)?)(?P<scale>[KMG]?)", str(self.device))
        number = float(match["number"]) * SCALES[match["scale"]] if match else inf
        if number == inf:
            raise ConfigError(f"device must be a number of MACs >= 0, with K, M or G behind it, got {self.device!r}")
        return number

    def bind(self, network: SuperNetwork) -> TransferCost:
        """The cost of this network's architectures.

        Raises:
            ConfigError: gates look at the input: where its examples leave the device is not known.
        """
        decided_once("transfer", network)
        return TransferCost(network, self.affords)


@dataclass(frozen=True)
class Cut:
    """Where one architecture is cut.

    Attributes:
        size: bytes that are sent.
        macs: multiply-adds of the device.
        device: names of the edges whose modules the device runs.
        sent: names of the nodes whose values are sent, or what has been added up of them.
    """

    size: float
    macs: float
    device: list[str]
    sent: list[str]


def cut_of(model: object, used: Tensor) -> Cut | None:
    """Where a cost cuts an architecture, `(1, U)` used units; None where it is no transfer."""
    return model.cut(used) if isinstance(model, TransferCost) else None


class TransferCost(CostModel):
    """Bytes sent from the device, of a network's architectures.

    Args:
        network: the space.
        affords: multiply-adds of the device.
    """

    unit = "B"

    def __init__(self, network: SuperNetwork, affords: float) -> None:
        self.network, self.graph, self.affords = network, network.graph, affords
        self.macs, self.liveness = MACs(gates=False).bind(network), Liveness(network)

    def __call__(self, used: Tensor) -> Tensor:
        """Maps `(B, U)` used units to `(B,)` float64 bytes; 0 where nothing is used."""
        found = []
        for bits in torch.split(used.detach().to("cpu", torch.float64), CHUNK):
            _, sizes, macs = self.cuts(bits)
            found.append(torch.where(macs <= self.affords, sizes, inf).amin(dim=0))
        return torch.cat(found).to(used.device)

    def cuts(self, used: Tensor) -> tuple[list[int], Tensor, Tensor]:
        """Of the C places at which `(B, U)` float64 used units can be cut, the place in `Liveness`, bytes and MACs.

        Returns:
            C places, each in front of an operator and the last one behind all; `(C, B)` bytes that are sent there,
            and `(C, B)` MACs of what is before.
        """
        columns, live = used.t(), self.liveness
        spent, places, before = torch.zeros(len(used), dtype=torch.float64), list[int](), list[Tensor]()
        for node in self.graph.order[1:]:
            begun, stream = torch.zeros_like(spent), self.network.stream_of(node)
            share = 1.0 if stream is None else stream.share(used)
            for edge in self.graph.incoming[node]:
                inside = self.macs.channels.get(edge)
                places += [live.at[edge], live.at[edge] + 2]
                before.append(spent)
                spent = spent + columns[edge] * (self.macs.per_edge[edge] if inside is None else inside(used))
                before.append(spent)
                spent = spent + begun * columns[edge] * self.macs.per_addition[node] * share
                begun = torch.maximum(begun, columns[edge])
            places.append(live.behind[node])
            before.append(spent)
            spent = spent + begun * self.macs.per_node[node]
        places.append(live.places)
        return places, live(used).alive[places], torch.stack([*before, spent])

    def cut(self, used: Tensor) -> Cut:
        """The best cut of an architecture, `(1, U)`: of the least bytes, and of equal ones of the fewest MACs."""
        places, sizes, macs = self.cuts(used.detach().to("cpu", torch.float64))
        choices = zip(sizes[:, 0].tolist(), macs[:, 0].tolist(), places, strict=True)
        size, spent, place = min(choice for choice in choices if choice[1] <= self.affords)
        edges = [edge for edge in range(len(self.graph.edges)) if bool(used[0, edge])]
        device = [edge for edge in edges if self.liveness.at[edge] < place]
        made = {self.graph.source, *(self.graph.edges[edge][1] for edge in device)}
        read = {self.graph.edges[edge][0] for edge in edges if edge not in device}
        unfinished = {self.graph.edges[edge][1] for edge in edges if edge not in device} | {self.graph.sink}
        names = [self.graph.nodes[node] for node in self.graph.order if node in made & (read | unfinished)]
        return Cut(size, spent, [self.network.edge_names[edge] for edge in device], names)

    def smallest(self) -> Tensor:
        """The architecture that sends least, `(1, G)`.

        It is a path: the cheapest way in MACs to some node, which is where it is cut, and any way on. Exact, but for a
        path that brings fixed edges beside it to life.
        """
        network, graph = self.network, self.graph
        ahead = graph.cheapest_to(self.macs.along_path)
        behind: dict[int, tuple[int, ...]] = {graph.sink: ()}
        for node in reversed(graph.order[:-1]):
            edge = graph.outgoing[node][0]
            behind[node] = (edge, *behind[graph.edges[edge][1]])
        found = [network.of_edges((*ahead[node][1], *behind[node])) for node in graph.order]
        if bool(network.connects(network.used(network.of_edges(())))[0]):
            found.append(network.of_edges(()))
        kept = torch.cat(found)
        return kept[self(network.used(kept)).argmin()][None]

    def binding(self, used: Tensor) -> str:
        """Where an architecture, `(1, U)`, is cut."""
        cut = self.cut(used)
        return f"the device sends {', '.join(cut.sent)} after {cut.macs:.6g} of {self.affords:.6g} MAC"
