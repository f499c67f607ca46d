"""Bytes alive while a module or a network runs: a value lives from when it is computed until its last reader has run.

Sequences and traced modules are seen into, layer by layer; any other module is one operator, and what it takes
inside itself is not seen. While an operator runs its inputs and its output are alive. What shares the memory
of its input, as a flattened value does, takes nothing new.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from budgetnet.extraction import fold_batch_norm
from budgetnet.gated import ChannelGate, GatedSequential
from budgetnet.shapes import Shape, evaluating, output_shape
from budgetnet.streams import Stream
from budgetnet.supernet import SuperNetwork

FLOAT = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class Life:
    """A value in memory: from which operator to which it is alive, by their places.

    Attributes:
        born: the one that computes it.
        last: the last one that reads it, or a view of it.
        size: in bytes.
    """

    born: int
    last: int
    size: int


def peak_activations(network: nn.Module, example: Tensor) -> int:
    """Most bytes of activations alive at once while a plain network runs, counted on its own values.

    The input is alive until it was read last, the output until the end.

    Args:
        network: any that `torch.fx` can trace, such as what `extract` returns; it is run in evaluation mode.
        example: `(1, C, H, W)`, in the network's type.
    """
    found, end = lives(network, example)
    return max(_alive(found, place) for place in range(end + 1))


def lives(module: nn.Module, example: Tensor) -> tuple[list[Life], int]:
    """When each value of a module is alive, that of `example` first, and the place of the output."""
    whole = nn.Sequential(module)
    with evaluating(whole), torch.no_grad():
        graph = _IntoSequences().trace(whole)
        run = fx.Interpreter(fx.GraphModule(whole, graph), garbage_collect_values=False)
        run.run(example)
    memory = {
        node: [value.untyped_storage() for value in tree_leaves(run.env[node]) if isinstance(value, Tensor)]
        for node in graph.nodes
        if node.op not in ("get_attr", "output")
    }
    born: dict[int, int] = {}
    last: dict[int, int] = {}
    size: dict[int, int] = {}
    for place, node in enumerate(graph.nodes):
        for storage in memory.get(node, ()):
            born.setdefault(storage._cdata, place)
            last[storage._cdata], size[storage._cdata] = place, storage.nbytes()
        for source in node.all_input_nodes:
            last |= {storage._cdata: place for storage in memory.get(source, ())}
    return [Life(born[key], last[key], size[key]) for key in born], len(graph.nodes) - 1


@dataclass(frozen=True, eq=False)
class Footprint:
    """Bytes that a module takes beside the value it reads: numbers, or `(B,)` of B architectures.

    Attributes:
        first: most at once while the value it reads is still needed.
        rest: most at once afterwards.
        held: of the output when it is done, 0 where it passes.
        passes: whether the output is the value it reads, or a view of it.
    """

    first: Tensor | float
    rest: Tensor | float
    held: Tensor | float
    passes: Tensor | bool


@dataclass(frozen=True, eq=False)
class Step:
    """A layer of an edge whose channels have gates, or what gathers or scatters its channels.

    Attributes:
        footprint: for each channel that it writes, or for all where no site decides on them.
        site: of the channels that it writes; S where there is none, S + 1 for those that the edge's start holds, S + 2
            for those that its end holds.
        more: channels that it writes beside the open ones.
        cut: a site and S + 1 or S + 2; it runs only where fewer channels are open at the site. None: it runs always.
    """

    footprint: Footprint
    site: int
    more: int = 0
    cut: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class ChannelFootprint:
    """Footprint of an edge whose channels have gates.

    Attributes:
        units: first unit of the edge's groups and the one behind the last.
        sizes: `(groups, S + 1)` channels that each group opens at each of the S sites; the last column is 0.
        steps: what runs, in order.
        ends: of the edge's start and end the stream, None where the node holds all channels, and the channels.
    """

    units: tuple[int, int]
    sizes: Tensor
    steps: tuple[Step, ...]
    ends: tuple[tuple[Stream | None, int], tuple[Stream | None, int]]

    def __call__(self, used: Tensor) -> Footprint:
        """The footprint in each of `(B, U)` float64 used units, differentiable."""
        count = used[:, slice(*self.units)] @ self.sizes
        held_by = torch.stack([held_channels(stream, used, channels) for stream, channels in self.ends], dim=1)
        count = torch.cat([count[:, :-1], torch.ones_like(count[:, :1]), held_by], dim=1)  # (B, S + 3)
        first, rest, held = (torch.zeros(len(used), dtype=torch.float64) for _ in range(3))
        passes = torch.ones(len(used), dtype=torch.bool)
        for step in self.steps:
            part, channels = step.footprint, count[:, step.site] + step.more
            runs = torch.ones_like(passes)
            if step.cut is not None:
                open_here, held_there = count.detach()[:, list(step.cut)].unbind(dim=1)
                runs = open_here < held_there
            new = channels * part.first
            first = torch.where(runs & passes, torch.maximum(first, new), first)
            after = torch.maximum(torch.where(passes, 0.0, held + new), channels * part.rest)
            rest = torch.where(runs, torch.maximum(rest, after), rest)
            if not part.passes:
                held, passes = torch.where(runs, channels * part.held, held), passes & ~runs
        return Footprint(first, rest, held, passes)


def footprints(network: SuperNetwork) -> list[Footprint | ChannelFootprint]:
    """The footprint of each edge, as it is extracted and its batch norms folded."""
    found: list[Footprint | ChannelFootprint] = []
    for edge, module in enumerate(network.modules_on_edges):
        plain = folded(module)
        if isinstance(plain, GatedSequential) and plain.sites:
            found.append(channel_footprint(plain, network, edge))
        else:
            found.append(footprint(plain, network.shapes[network.graph.edges[edge][0]]))
    return found


def held_channels(stream: Stream | None, used: Tensor, channels: int) -> Tensor:
    """`(B,)` float64 channels that a node of so many holds, in a stream or in none, where `(B, U)` units are used."""
    if stream is None:
        return torch.full((len(used),), float(channels), dtype=torch.float64, device=used.device)
    return channels * stream.share(used)


def footprint(module: nn.Module, shape: Shape) -> Footprint:
    """The footprint of a module in float32, found on the meta device, without computing."""
    on_meta = copy.deepcopy(module).to("meta").float()
    (source, *others), end = lives(on_meta, torch.empty(1, *shape, device="meta"))
    alive = [float(_alive(others, place)) for place in range(end + 1)]
    if source.last == end:
        return Footprint(max(alive), 0.0, 0.0, True)
    return Footprint(max(alive[: source.last + 1]), max(alive[source.last + 1 :]), alive[end], False)


def channel_footprint(module: GatedSequential, network: SuperNetwork, edge: int) -> ChannelFootprint:
    """The footprint of an edge by its open channels; `module` is the edge's, folded."""
    ends = network.graph.edges[edge]
    start, end = (network.shapes[node] for node in ends)
    none, (into, out) = len(module.sites), module.end_sites
    steps = [] if into is None else [Step(_copy(start[1:]), into, cut=(into, none + 1))]
    shape = start
    for layer in module.layout:
        part, site = footprint(module[layer.index], shape), layer.behind
        count = 1 if site is None else module.sites[site].channels
        each = Footprint(part.first / count, part.rest / count, part.held / count, part.passes)
        steps.append(Step(each, none if site is None else site))
        shape = output_shape(module[layer.index], shape, f"layer {layer.index}")
    if out is not None:  # a channel of zeros is put behind, which each closed one reads
        cut = (out, none + 2)
        steps += [Step(_copy(end[1:]), out, more=1, cut=cut), Step(_copy(end[1:]), none + 2, cut=cut)]
    held = (network.stream_of(ends[0]), start[0]), (network.stream_of(ends[1]), end[0])
    return ChannelFootprint(network.span(edge), channel_table(module), tuple(steps), held)


def folded(module: nn.Module) -> nn.Module:
    """A module as it is in the extracted network, with its gates, its batch norms folded."""
    if not isinstance(module, GatedSequential):
        return fold_batch_norm(module)
    plain = nn.Sequential(*[layer for layer in module if not isinstance(layer, nn.Identity)])
    return GatedSequential(*fold_batch_norm(plain))


def channel_table(module: GatedSequential) -> Tensor:
    """`(groups, S + 1)` channels that each group opens at each of the S sites; the last column is 0."""
    table = torch.zeros(module.groups, len(module.sites) + 1, dtype=torch.float64)
    for place, rows in enumerate(module.split(torch.arange(module.groups))):
        table[rows, place] = torch.tensor(module.sites[place].sizes, dtype=torch.float64)
    return table


def least_open(site: ChannelGate) -> Tensor:
    """`(groups,)` 1 for the fewest groups of a site with which it is not closed altogether."""
    bits = torch.zeros(site.groups, dtype=torch.float64)
    bits[range(site.always_open) if site.always_open else [site.sizes.index(min(site.sizes))]] = 1
    return bits


def _alive(found: Sequence[Life], place: int) -> int:
    return sum(life.size for life in found if life.born <= place <= life.last)


def _copy(shape: Shape) -> Footprint:
    return Footprint(float(FLOAT * prod(shape)), 0.0, float(FLOAT * prod(shape)), False)


class _IntoSequences(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, nn.Sequential | fx.GraphModule)
