"""What deciding costs once some gates are constants."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from budgetnet.conditional.network import ConditionalNetwork
from budgetnet.costs.additive import EdgeCost
from budgetnet.sites import ConditionalGates
from budgetnet.supernet import SuperNetwork


def still_deciding(macs: EdgeCost, network: SuperNetwork, folded: ConditionalNetwork) -> EdgeCost:
    """The same MACs with those of the decisions that `folded` still takes, and of no others.

    Args:
        macs: of the network, its gates counted.
        network: with gates that look at the input.
        folded: what `conditional` made of it, some gates being constants.
    """
    left: dict[int, float] = {}
    for branch in (branch for branch in folded.conditional_branches if branch.head is not None):
        edge = network.edge_names.index(branch.name)
        head, whole = network.heads[str(edge)], macs.per_head.get(edge, 0.0)
        left[edge] = whole
        if type(head) is ConditionalGates and head.recall is None:  # all gates share the average pool, and no more
            pool = prod(network.shapes[branch.start])
            left[edge] = pool + (whole - pool) * len(branch.columns) / head.count
    return replace(macs, per_head=left)
