"""Nodes that hold fewer channels than their shape says, as nothing but gated layers writes them and reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce

import torch
from torch import Tensor, nn

from budgetnet.gated import KEEPS_ZERO, ChannelGate, GatedSequential
from budgetnet.graph import Graph, both, either


@dataclass(frozen=True)
class End:
    """Where an edge writes to a stream, or reads from it.

    Attributes:
        edge: whose module it is.
        units: first unit of the site that decides on the channels there, and the one behind the last.
        sizes: channels of each group of that site.
        gates: what ends have in common that the same gates decide on.
    """

    edge: int
    units: tuple[int, int]
    sizes: tuple[int, ...]
    gates: str

    def opened(self, used: Tensor) -> Tensor:
        """`(B, U)` used units to the `(B, C)` channels that are open here, 0 where the edge is not used."""
        groups = both(used[:, slice(*self.units)], used[:, self.edge : self.edge + 1])
        return groups if max(self.sizes) == 1 else groups[:, self._group_of.to(used.device, non_blocking=True)]

    def in_groups(self, channels: Tensor) -> Tensor:
        """`(B, C)` channels to the `(B, G)` groups here: a group is open where any of its channels is."""
        if len(set(self.sizes)) == 1:
            return channels.reshape(len(channels), len(self.sizes), -1).amax(dim=2)
        return torch.stack([group.amax(dim=1) for group in torch.split(channels, list(self.sizes), dim=1)], dim=1)

    @cached_property
    def _group_of(self) -> Tensor:
        return torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))


@dataclass(frozen=True)
class Stream:
    """Nodes joined by identities that else only gated layers enter and leave: all hold the channels that these open.

    A channel that nobody reads is not written, one that nobody writes is not read, and what is left is all there is:
    only where the ends open different channels are some gathered before a layer, or scattered behind it.

    Attributes:
        nodes: of the graph.
        channels: C, of each node with all groups open.
        writers, readers: of the stream.
    """

    nodes: frozenset[int]
    channels: int
    writers: tuple[End, ...]
    readers: tuple[End, ...]

    def live(self, used: Tensor) -> Tensor:
        """Closes what is written and not read, or read and not written, in `(B, U)` units; differentiable.

        Where nothing would be left of an end it stays as it is: a layer makes something even of zeros.
        """
        places, left = [], []
        for ends, others in ((self.writers, self.readers), (self.readers, self.writers)):
            alike: dict[tuple[str, tuple[int, ...]], list[End]] = {}  # what the other side opens is the same to them
            for end in ends:
                gates = end.gates if end.gates in {other.gates for other in others} else ""
                alike.setdefault((gates, end.sizes), []).append(end)
            for (gates, _), each in alike.items():
                matters = each[0].in_groups(_any(others, partial(self._across, gates=gates, used=used)))
                groups = torch.stack([used[:, slice(*end.units)] for end in each], dim=1)
                rest = both(groups, matters[:, None])
                some = (rest.detach() > 0).any(dim=2, keepdim=True)
                left.append(torch.where(some, rest, groups).flatten(1))
                places += [torch.arange(*end.units) for end in each]
        return used.index_copy(1, torch.cat(places).to(used.device, non_blocking=True), torch.cat(left, dim=1))

    def held(self, used: Tensor) -> Tensor:
        """`(B, C)` channels that the nodes hold where `(B, U)` units are used, those that `live` has left."""
        written, read = (_any(ends, partial(End.opened, used=used)) for ends in (self.writers, self.readers))
        # what is read is written, too, but where nothing would be left
        return torch.where(written.detach() > 0, written, read)

    def share(self, used: Tensor) -> Tensor:
        """`(B,)` float64 share of the channels that the nodes hold; differentiable."""
        return self.held(used).to(torch.float64).mean(dim=1)

    def _across(self, other: End, gates: str, used: Tensor) -> Tensor:
        """What an end opens to one of those gates: where they are its own it is enough that its edge is used."""
        own = used[:, other.edge : other.edge + 1]
        return own.expand(-1, self.channels) if other.gates == gates else other.opened(used)


def _any(ends: Iterable[End], opened: Callable[[End], Tensor]) -> Tensor:
    """What any of the ends opens; those of the same gates count once, so that products stay linear in each gate."""
    alike: dict[str, list[Tensor]] = {}
    for end in ends:
        alike.setdefault(end.gates, []).append(opened(end))
    return reduce(either, [torch.stack(each).amax(dim=0) for each in alike.values()])


def streams(
    graph: Graph,
    modules: Sequence[nn.Module],
    activations: Sequence[nn.Module],
    channels: Sequence[int],
    units: Sequence[int],
) -> tuple[Stream, ...]:
    """The streams of a network whose gates do not look at the input.

    Args:
        graph: its E edges and N nodes.
        modules: on the edges.
        activations: of the nodes.
        channels: of each node.
        units: of each edge the first unit of its channel groups.
    """
    group = list(range(len(graph.nodes)))  # nodes joined by identities have one number
    for (start, end), module in zip(graph.edges, modules, strict=True):
        if isinstance(module, nn.Identity):
            group = [group[start] if each == group[end] else each for each in group]
    wide = {group[node] for node in (graph.source, graph.sink)}
    wide |= {group[node] for node, layer in enumerate(activations) if type(layer) not in KEEPS_ZERO}
    ends: dict[tuple[int, bool], list[End]] = {}
    for edge, module in enumerate(modules):
        for node, reads in zip(graph.edges[edge], (True, False), strict=True):
            if isinstance(module, nn.Identity):
                continue
            found = _end(edge, module, units[edge], reads=reads)
            if found is None or sum(found.sizes) != channels[node]:
                wide.add(group[node])
            else:
                ends.setdefault((group[node], reads), []).append(found)
    return tuple(
        Stream(
            frozenset(node for node, each in enumerate(group) if each == number),
            channels[number],
            tuple(ends[number, False]),
            tuple(ends[number, True]),
        )
        for number in dict.fromkeys(group)
        if number not in wide
    )


def _end(edge: int, module: nn.Module, unit: int, *, reads: bool) -> End | None:
    """Where a module reads its input, or writes its output, None where it does so with all channels.

    A layer that makes something of a channel of zeros before channels are mixed reads all of them, too. And
    where little is open, a channel has to be open at all ends: the first group stays open, or is among the smallest.
    """
    if not isinstance(module, GatedSequential) or (place := module.end_sites[0 if reads else 1]) is None:
        return None
    mixing = [layer.index for layer in module.layout if layer.mixes]
    if not mixing:  # it reads the channels that it writes
        return None
    site = module.sites[place]
    ahead = [layer for layer in list(module)[: mixing[0]] if not isinstance(layer, ChannelGate)]
    if reads and not all(isinstance(layer, KEEPS_ZERO) for layer in ahead):
        return None
    if len(set(site.sizes)) > 1 and not site.always_open:
        return None
    first = unit + sum(other.groups for other in module.sites[:place])
    gates = f"{edge} {place}" if site.lock is None else f"locked {site.lock}"
    return End(edge, (first, first + site.groups), tuple(site.sizes), gates)
