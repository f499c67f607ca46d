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
        site: of the channels that it writes, S where there is none.
        more: channels that it writes beside the open ones.
        cut: a site; it runs only where some of its channels are closed. None: it runs always.
    """

    footprint: Footprint
    site: int
    more: int = 0
    cut: int | None = None


@dataclass(frozen=True, eq=False)
class ChannelFootprint:
    """Footprint of an edge whose channels have gates.

    Attributes:
        units: first unit of the edge's groups and the one behind the last.
        sizes: `(groups, S + 1)` channels that each group opens at each of the S sites; the last column is 0.
        steps: what runs, in order.
    """

    units: tuple[int, int]
    sizes: Tensor
    steps: tuple[Step, ...]

    def __call__(self, used: Tensor) -> Footprint:
        """The footprint in each of `(B, U)` float64 used units, differentiable."""
        count = used[:, slice(*self.units)] @ self.sizes
        count = torch.cat([count[:, :-1], torch.ones_like(count[:, :1])], dim=1)  # (B, S + 1) open channels
        cut = count.detach() < self.sizes.sum(dim=0)
        first, rest, held = (torch.zeros(len(used), dtype=torch.float64) for _ in range(3))
        passes = torch.ones(len(used), dtype=torch.bool)
        for step in self.steps:
            part, channels = step.footprint, count[:, step.site] + step.more
            runs = torch.ones_like(passes) if step.cut is None else cut[:, step.cut]
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
        start, end = (network.shapes[node] for node in network.graph.edges[edge])
        plain = folded(module)
        if isinstance(plain, GatedSequential) and plain.sites:
            found.append(channel_footprint(plain, network.span(edge), start, end))
        else:
            found.append(footprint(plain, start))
    return found


def footprint(module: nn.Module, shape: Shape) -> Footprint:
    """The footprint of a module in float32, found on the meta device, without computing."""
    on_meta = copy.deepcopy(module).to("meta").float()
    (source, *others), end = lives(on_meta, torch.empty(1, *shape, device="meta"))
    alive = [float(_alive(others, place)) for place in range(end + 1)]
    if source.last == end:
        return Footprint(max(alive), 0.0, 0.0, True)
    return Footprint(max(alive[: source.last + 1]), max(alive[source.last + 1 :]), alive[end], False)


def channel_footprint(module: GatedSequential, units: tuple[int, int], start: Shape, end: Shape) -> ChannelFootprint:
    """The footprint of an edge by its open channels.

    Args:
        module: of the edge, folded.
        units: first unit of its groups and the one behind the last.
        start: shape of what it reads.
        end: shape of what it writes.
    """
    none, (into, out) = len(module.sites), end_sites(module)
    steps = [] if into is None else [Step(_copy(start[1:]), into, cut=into)]
    shape = start
    for layer in module.layout:
        part, site = footprint(module[layer.index], shape), layer.behind
        count = 1 if site is None else module.sites[site].channels
        each = Footprint(part.first / count, part.rest / count, part.held / count, part.passes)
        steps.append(Step(each, none if site is None else site))
        shape = output_shape(module[layer.index], shape, f"layer {layer.index}")
    if out is not None:  # a channel of zeros is put behind, which each closed one reads
        steps += [Step(_copy(end[1:]), out, more=1, cut=out), Step(_copy(end), none, cut=out)]
    return ChannelFootprint(units, channel_table(module), tuple(steps))


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


def end_sites(module: GatedSequential) -> tuple[int | None, int | None]:
    """The sites of the channels that a sequence reads and writes, None for all."""
    into, out = module.ends([torch.tensor(place) for place in range(len(module.sites))])
    return None if into is None else int(into), None if out is None else int(out)


def _alive(found: Sequence[Life], place: int) -> int:
    return sum(life.size for life in found if life.born <= place <= life.last)


def _copy(shape: Shape) -> Footprint:
    return Footprint(float(FLOAT * prod(shape)), 0.0, float(FLOAT * prod(shape)), False)


class _IntoSequences(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, nn.Sequential | fx.GraphModule)
