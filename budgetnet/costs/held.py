"""The bytes that an extracted network holds: its parameters, and the numbers of channels that it gathers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from budgetnet.costs.additive import ChannelCost, EdgeCost, as_cost
from budgetnet.costs.footprints import FLOAT, channel_table, folded, held_channels, least_open
from budgetnet.gated import GatedSequential
from budgetnet.streams import Stream
from budgetnet.supernet import SuperNetwork

INDEX = 8
"""Bytes of the number of a channel that is gathered."""


@dataclass(frozen=True, eq=False)
class HeldChannels(ChannelCost):
    """Bytes of an edge whose channels have gates, with the numbers of those that it gathers and scatters.

    Attributes:
        into, out: sites of the channels that it reads and writes, None for all.
        start, end: streams that it reads from and writes to, None where the node holds all channels.
    """

    into: int | None
    out: int | None
    start: Stream | None
    end: Stream | None

    def __call__(self, used: Tensor) -> Tensor:
        """Maps `(B, U)` used units to the `(B,)` bytes of this edge, where it is used; differentiable."""
        cost = super().__call__(used)
        for _, count, held, all_of_them in self.moved(used):
            cost = cost + torch.where(count.detach() < held.detach(), INDEX * (held if all_of_them else count), 0.0)
        return cost

    def moved(self, used: Tensor) -> Iterator[tuple[int, Tensor, Tensor, bool]]:
        """Of each end with a site: that site, `(B,)` channels open there and held by the node, and whether it writes.

        Where the node holds more, those that are read are gathered, or those that are written scattered.
        """
        bits = used[:, slice(*self.units)].to(torch.float64)
        for site, stream, writes in ((self.into, self.start, False), (self.out, self.end, True)):
            if site is not None:
                sizes = self.sizes[:, site].to(bits.device)
                yield site, bits @ sizes, held_channels(stream, used, int(sizes.sum())), writes


def held_bytes(network: SuperNetwork) -> EdgeCost:
    """The bytes of the folded extracted network's state."""
    edges = [folded(module) for module in network.modules_on_edges]
    return EdgeCost(
        network.graph,
        as_cost([sum(bytes_of(module).values()) for module in edges]),
        as_cost([0] * len(network.graph.nodes)),
        as_cost([sum(bytes_of(folded(module)).values()) for module in network.activations]),
        "B",
        {
            edge: channels_of_edge(module, network, edge)
            for edge, module in enumerate(edges)
            if isinstance(module, GatedSequential) and module.sites
        },
    )


def channels_of_edge(module: GatedSequential, network: SuperNetwork, edge: int) -> HeldChannels:
    """The bytes of an edge by its open channels; `module` is the edge's, folded."""
    none, sizes = len(module.sites), channel_table(module)
    channels = [site.channels for site in module.sites] + [1]
    terms: list[tuple[float, int, int]] = [(0.0, none, none)]
    for layer in module.layout:
        before, behind = (none if site is None else site for site in (layer.before, layer.behind))
        for name, size in bytes_of(module[layer.index]).items():
            into = before if layer.mixes and name == "weight" else none
            out = none if name == "num_batches_tracked" else behind
            terms.append((size / (channels[into] * channels[out]), into, out))
    weights, reads, writes = zip(*terms, strict=True)
    return HeldChannels(
        network.span(edge),
        sizes,
        torch.tensor(weights, dtype=torch.float64),
        torch.tensor(reads),
        torch.tensor(writes),
        torch.cat([least_open(site) for site in module.sites]),
        *module.end_sites,
        *map(network.stream_of, network.graph.edges[edge]),
    )


def bytes_of(module: nn.Module) -> dict[str, int]:
    """Bytes of all that a module holds, in float32 where they are no whole numbers."""
    return {
        name: value.numel() * (FLOAT if value.is_floating_point() else value.element_size())
        for name, value in module.state_dict().items()
    }
