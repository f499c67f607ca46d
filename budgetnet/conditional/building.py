"""From a network with choices to one that skips: what is decided for all inputs is narrowed away."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from budgetnet.conditional.bodies import Body, Place, folded
from budgetnet.conditional.branches import Branch
from budgetnet.conditional.heads import narrowed_head
from budgetnet.conditional.network import ConditionalNetwork
from budgetnet.costs.additive import module_macs
from budgetnet.errors import ConfigError
from budgetnet.extraction import fold_batch_norm
from budgetnet.gated import ChannelGate, GatedSequential, channels_of, narrowed_module
from budgetnet.shapes import output_shape
from budgetnet.sites import Threshold
from budgetnet.supernet import SuperNetwork

CLOSED = -1
"""Instead of a decision: the group is closed for all inputs."""


@torch.inference_mode(False)
@torch.no_grad()
def conditional(network: SuperNetwork, *, tau: float = 0.5, constants: Tensor | None = None) -> ConditionalNetwork:
    """The network that computes what its gates open and skips the rest.

    Args:
        network: with gates that look at the input; stays as it is.
        tau: a gate is open where its probability is greater.
        constants: `(G,)` gates to decide once and for all: 0 or 1, NaN to leave them to the input, or to their own
            probability; `polarised` makes them from what was observed. Nothing is computed to decide them.

    Returns:
        A network of copies, in evaluation mode, that gives what `network.masked(x, Threshold(tau))` gives for the
        same decisions.

    Raises:
        ConfigError: an argument has another shape or values outside its range, or the gates that are decided leave
            no path from input to output.

    Source: Herrmann et al., sections 3.1, 3.3 and S4.2.
    """
    gates = known_gates(network, Threshold(tau), constants)
    units = [1.0 if column is None else gates[column] for column in network.gate_of]
    close_behind_exits(network, units)
    live = network.graph.used(torch.tensor([[possible(network, edge, units) for edge in range(len(network.fixed))]]))
    if not bool(live.any()):
        raise ConfigError("the gates that are decided for all inputs must leave a path from input to output, got none")
    branches = [branch_of(network, edge, units, gates, tau) for edge in network.visits if live[0, edge]]
    reached = {
        network.graph.source,
        network.graph.sink,
        *(end for branch in branches for end in (branch.start, branch.end)),
    }
    return ConditionalNetwork(
        branches,
        [copy.deepcopy(activation).eval() for activation in network.activations],
        [node for node in network.graph.order if node in reached],
        network.shapes,
        torch.tensor([0.0 if math.isnan(gate) else gate for gate in gates], device=network.gates.values.device),
    )


def polarised(rates: Tensor, margin: float = 0.01) -> Tensor:
    """Gates that are nearly always open, or nearly never, as constants.

    Args:
        rates: `(G,)` share of the examples on which each gate was open, in [0, 1].
        margin: distance from 0 or 1 up to which a gate counts as decided, in [0, 0.5).

    Returns:
        `(G,)` 0, 1, or NaN where the input has to decide.

    Raises:
        ConfigError: a number is outside its range.

    Source: Herrmann et al., sections 3.1 and S4.2 (most gates were at their mode on 99.9 % of the images).
    """
    if not 0 <= margin < 0.5:
        raise ConfigError(f"margin must lie in [0, 0.5), got {margin}")
    if not bool(((rates >= 0) & (rates <= 1)).all()):
        raise ConfigError("rates must lie in [0, 1]")
    constants = torch.full_like(rates, math.nan)
    constants[rates <= margin] = 0.0
    constants[rates >= 1 - margin] = 1.0
    return constants


def known_gates(network: SuperNetwork, threshold: Threshold, constants: Tensor | None) -> list[float]:
    """The G gates as far as they are decided for all inputs, NaN where they are not."""
    gates = torch.full((network.gate_count,), math.nan)
    alone = slice(0, network.independent)
    gates[alone] = threshold(network.gates.logits, alone)[0].float().cpu()
    if constants is not None:
        given = constants.float().cpu()
        if tuple(given.shape) != (network.gate_count,) or not bool(((given == 0) | (given == 1) | given.isnan()).all()):
            raise ConfigError(f"constants must be ({network.gate_count},) of 0, 1 or NaN, got {tuple(given.shape)}")
        gates = torch.where(given.isnan(), gates, given)
    return [float(gate) for gate in gates]


def possible(network: SuperNetwork, edge: int, units: Sequence[float]) -> bool:
    """Whether any input can take an edge: neither it nor all groups of one of its sites are closed for all."""
    sites = [site for site in network.sites if site.edge == edge]
    return units[edge] != 0 and all(any(units[unit] != 0 for unit in range(*site.units)) for site in sites)


def certain(network: SuperNetwork, edge: int, units: Sequence[float]) -> bool:
    """Whether every input that comes to an edge takes it."""
    sites = [site for site in network.sites if site.edge == edge]
    return units[edge] == 1 and all(any(units[unit] == 1 for unit in range(*site.units)) for site in sites)


def close_behind_exits(network: SuperNetwork, units: list[float]) -> None:
    """Closes, in place, the other edges that leave a node by whose exit every input leaves."""
    for edge in network.exits:
        start = network.graph.edges[edge][0]
        by_input = str(edge) in network.heads
        if certain(network, edge, units):
            # exits that the input decides on, and that come first, are asked first
            stay = [other for other in network.exits if other < edge and math.isnan(units[other])]
        elif not by_input and units[edge] == 1:
            # an exit all of whose channels are closed takes nobody, and yet it was decided to end here
            stay = [other for other in network.graph.outgoing[start] if decides_itself(network, other)]
        else:
            continue
        for other in network.graph.outgoing[start]:
            if other != edge and other not in stay:
                units[other] = 0.0


def decides_itself(network: SuperNetwork, edge: int) -> bool:
    """Whether the gate of an edge as a whole looks at the input."""
    return str(edge) in network.heads and network.gate_of[edge] is not None


def branch_of(network: SuperNetwork, edge: int, units: Sequence[float], gates: Sequence[float], tau: float) -> Branch:
    """An edge with what is left to decide on it."""
    columns = network.own_columns(edge)
    is_open = [place for place, column in enumerate(columns) if math.isnan(gates[column])]
    leader = network.leaders.get(edge) if is_open else None
    head = None
    if is_open and leader is None:
        head = narrowed_head(network.heads[str(edge)], is_open, len(columns), tau)
    own = math.isnan(units[edge])
    place = {columns[column]: place - own for place, column in enumerate(is_open)}
    count = len(is_open) - own
    module = network.modules_on_edges[edge]
    start, end = (network.shapes[node] for node in network.graph.edges[edge])
    if isinstance(module, GatedSequential):
        owners = []
        for unit in range(*network.span(edge)):
            column = network.gate_of[unit]
            owners.append(place[column] if column in place else count if units[unit] else CLOSED)
        body = gated_body(module, owners, count, start, end[0], network.edge_names[edge])
    else:
        body = plain_body(module)
    return Branch(
        network.edge_names[edge],
        network.graph.edges[edge],
        body,
        head,
        [columns[column] for column in is_open],
        leader=None if leader is None else network.edge_names[leader],
        own=own,
        exit=edge in network.exits,
        answers=head is not None and edge in network.answers,
    )


def plain_body(module: nn.Module) -> Body:
    """A module without gates, copied, its batch norms folded."""
    new = fold_batch_norm(module)
    layers = list(new) if type(new) is nn.Sequential else [new]
    return Body([Place(layer, None, None) for layer in layers if not isinstance(layer, nn.Identity)])


def gated_body(
    module: GatedSequential, owners: Sequence[int], count: int, shape: Sequence[int], channels: int, name: str
) -> Body:
    """Layers with gates on their channels, copied, without the groups that are closed for all inputs.

    Args:
        module: the layers.
        owners: for each group the decision that opens it, `count` where it is always open, `CLOSED` where never.
        count: decisions.
        shape: of one example before it.
        channels: behind it.
        name: of the edge.
    """
    device = next((value.device for value in module.parameters()), torch.device("cpu"))
    kept = module.indices(torch.tensor([float(owner != CLOSED) for owner in owners], device=device))
    split = iter(owners)
    of_channels = []  # for each site the owner of each channel that is left
    for gate in module.sites:
        of_groups = [next(split) for _ in range(gate.groups)]
        spread = [owner for owner, size in zip(of_groups, gate.sizes, strict=True) for _ in range(size)]
        of_channels.append([owner for owner in spread if owner != CLOSED])
    # the sites on which something is left to decide, by their number among all
    number = {
        site: place
        for place, site in enumerate(site for site, of in enumerate(of_channels) if any(owner < count for owner in of))
    }

    def left(site: int | None) -> int | None:
        return None if site is None else number.get(site)

    places: list[Place] = []
    gates: dict[int, int] = {}
    index = 0
    layout = {layer.index: layer for layer in module.layout}
    for place, layer in enumerate(module):
        if isinstance(layer, ChannelGate):
            if (site := left(index)) is not None:
                gates[len(places)] = site
            index += 1
        else:
            at = layout[place]
            new = narrowed_module(layer, *channels_of(at, kept)).eval()
            places.append(Place(new, left(at.before), left(at.behind)))
    places, gates = folded(places, gates)
    reads, writes = module.ends(kept)
    first, last = module.end_sites
    work, value = [], (shape[0] if reads is None else len(reads), *shape[1:])
    for layer, _, _ in places:
        work.append(float(module_macs(layer, value)))
        value = output_shape(layer, value, name)
    return Body(
        places,
        owners=[of_channels[site] for site in number],
        gates=gates,
        ends=(left(first), left(last)),
        reads=reads,
        writes=writes,
        channels=channels,
        groups=count,
        work=work,
    )
