"""The bytes that an extracted network holds: its parameters, and the numbers of channels that it gathers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from budgetnet.costs.additive import ChannelCost, EdgeCost, as_cost
from budgetnet.costs.footprints import FLOAT, channel_table, end_sites, folded, least_open
from budgetnet.gated import GatedSequential
from budgetnet.supernet import SuperNetwork

INDEX = 8
"""Bytes of the number of a channel that is gathered."""


@dataclass(frozen=True, eq=False)
class HeldChannels(ChannelCost):
    """Bytes of an edge whose channels have gates, with the numbers of those that it gathers and scatters.

    Attributes:
        into, out: sites of the channels that it reads and writes, None for all.
    """

    into: int | None
    out: int | None

    def __call__(self, used: Tensor) -> Tensor:
        """Maps `(B, U)` used units to the `(B,)` bytes of this edge, where it is used; differentiable."""
        cost, bits = super().__call__(used), used[:, slice(*self.units)].to(torch.float64)
        for site, all_of_them in ((self.into, False), (self.out, True)):
            if site is not None:
                sizes = self.sizes[:, site].to(bits.device)
                count, channels = bits @ sizes, sizes.sum()
                copied = channels if all_of_them else count
                cost = cost + torch.where(count.detach() < channels, INDEX * copied, 0.0)
        return cost


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
            edge: held_channels(module, network.span(edge))
            for edge, module in enumerate(edges)
            if isinstance(module, GatedSequential) and module.sites
        },
    )


def held_channels(module: GatedSequential, units: tuple[int, int]) -> HeldChannels:
    """The bytes of an edge by its open channels.

    Args:
        module: of the edge, folded.
        units: first unit of its groups and the one behind the last.
    """
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
        units,
        sizes,
        torch.tensor(weights, dtype=torch.float64),
        torch.tensor(reads),
        torch.tensor(writes),
        torch.cat([least_open(site) for site in module.sites]),
        *end_sites(module),
    )


def bytes_of(module: nn.Module) -> dict[str, int]:
    """Bytes of all that a module holds, in float32 where they are no whole numbers."""
    return {
        name: value.numel() * (FLOAT if value.is_floating_point() else value.element_size())
        for name, value in module.state_dict().items()
    }
