"""Every analytic number of the papers' tables that can be computed, digit by digit, and how far off the others are."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import ROUND_DOWN, ROUND_HALF_EVEN, Decimal
from functools import cache
from math import ceil, prod
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

from budgetnet import SuperNetwork
from budgetnet.cli import main
from budgetnet.costs import MACs, Params, Steps
from budgetnet.measure import measure_network
from budgetnet.sites import ConditionalGates
from budgetnet.spaces import BY_NAME
from budgetnet.spaces.mobilenet_v2 import PAPER, STAGES

GOLDEN: list[dict[str, Any]] = json.loads((Path(__file__).parent / "golden.json").read_text())
"""A row a number: `value` exactly, in `unit`; `paper` as it is printed, less padding zeros, or null.

`cost` is what `budgetnet measure` takes, the difference of two of them, or one of `READINGS`. Where `paper` is not ours
rounded it says "cut off", or by how many percent ours is more.
"""
BY_ID = {row["id"]: row for row in GOLDEN}

THROUGH_THE_COMMAND = ["resnet20.macs", "resnet32.cifar100.macs", "resnet20.params", "resnet44.steps4",
                       "cnf2.macs_paper", "cnf2.macs", "cnf1.params", "cnf2.steps2", "cnf8.part_labels.macs_paper",
                       "fabric3.macs", "fabric3.cifar100.params", "fabric3.steps2", "fabric3.s.macs",
                       "herrmann.resnet56.macs", "herrmann.mobilenet_v2.96.w0.5.macs_without_sums"]  # fmt: skip


@cache
def network(space: str, options: str) -> SuperNetwork:
    """Without values: shapes and counts need none."""
    with torch.device("meta"):
        return BY_NAME[space](**json.loads(options))


@cache
def measured(space: str, options: str, architecture: str) -> dict[str, Any]:
    """All costs that the rows ask of one architecture, measured together."""
    built, here = network(space, options), (space, options, architecture)
    asked = {
        row["cost"] for row in GOLDEN if (row["space"], json.dumps(row["options"]), row["architecture"]) == here
    } - set(READINGS)
    terms = sorted({term for cost in asked for term in cost.split(" - ")})
    return measure_network(built, built.architecture(architecture), terms)


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: row["id"])
def test_number(row: dict[str, Any]):
    place = (row["space"], json.dumps(row["options"]))
    if reading := READINGS.get(row["cost"]):
        built = network(*place)
        assert reading(built, built.used(built.architecture(row["architecture"]))) == row["value"]
        return
    found = measured(*place, row["architecture"])
    first, *less = row["cost"].split(" - ")
    value = found["costs"][first] - sum(found["costs"][term] for term in less)
    assert value == row["value"]
    assert isinstance(value, int)
    assert {found["units"][term] for term in (first, *less)} == {row["unit"]}


@pytest.mark.parametrize("row", [row for row in GOLDEN if row["paper"]], ids=lambda row: row["id"])
def test_what_is_printed_is_the_number_rounded_or_as_far_off_as_the_row_says(row: dict[str, Any]):
    match = re.fullmatch(r"([\d.]+)([MG]?)(?:, (cut off)|: ([+-][\d.]+) %)?", row["paper"])
    assert match is not None
    shown, scale = Decimal(match[1]), {"": 1, "M": 10**6, "G": 10**9}[match[2]]
    value = Decimal(row["value"]) / scale
    if match[4]:
        assert value.quantize(shown, ROUND_HALF_EVEN) != shown
        assert ((value / shown - 1) * 100).quantize(Decimal(match[4]), ROUND_HALF_EVEN) == Decimal(match[4])
    else:
        assert value.quantize(shown, ROUND_DOWN if match[3] else ROUND_HALF_EVEN) == shown


@pytest.mark.parametrize("row", [row for row in GOLDEN if row["id"] in THROUGH_THE_COMMAND], ids=lambda row: row["id"])
def test_number_through_the_command_line(row: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    options = [word for name, value in row["options"].items() for word in (f"--space.{name}", str(value))]
    asked = ["--architecture", row["architecture"], "--costs", row["cost"], "--json"]
    assert main(["measure", row["space"], *options, *asked]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"costs": {row["cost"]: row["value"]}, "units": {row["cost"]: row["unit"]}}


def test_rows_are_told_apart_and_all_named_ones_exist():
    names = [row["id"] for row in GOLDEN]
    assert len(set(names)) == len(names)
    assert set(THROUGH_THE_COMMAND) <= set(names)
    keys = {"id", "source", "space", "options", "architecture", "cost", "value", "paper", "unit"}
    assert all(set(row) == keys for row in GOLDEN)


# ------------------------------------------------------------------------- what a number may mean that is printed


def pools(network: SuperNetwork) -> dict[int, int]:
    """What gates by the input average, for each edge that has some: height x width x channels."""
    return {edge: prod(network.gate_shape(edge)) for edge in map(int, network.heads)}


def beside_identities(network: SuperNetwork) -> list[int]:
    """Blocks that have an identity beside them."""
    ends = network.graph.edges
    identities = {ends[edge] for edge, kind in enumerate(network.kinds) if kind == "identity"}
    return [edge for edge, kind in enumerate(network.kinds) if kind == "block" and ends[edge] in identities]


def bottleneck(network: SuperNetwork, used: Tensor) -> float:
    """MACs of the blocks beside an identity, if all have the same."""
    (macs,) = set(MACs().bind(network).per_edge[beside_identities(network)].tolist())
    return macs


def stride_first(network: SuperNetwork, used: Tensor) -> float:
    """MACs of a ResNet whose bottlenecks have their stride in the first convolution ("v1")."""
    other = copy.deepcopy(network)
    for edge, kind in enumerate(other.kinds):
        if kind == "block":
            first, second, _ = (part for part in other.modules_on_edges[edge] if isinstance(part, nn.Conv2d))
            first.stride, second.stride = second.stride, first.stride
    return float(MACs(additions=False).bind(other)(used)[0])


def only_beside_identities(network: SuperNetwork, used: Tensor) -> float:
    """MACs of the gates in blocks beside an identity, and of all pools."""
    heads, gated = MACs().bind(network).per_head, beside_identities(network)
    return sum(heads[edge] if edge in gated else pool for edge, pool in pools(network).items())


def by_the_table(gates: Callable[[int, int], int], *, inputs: bool = True) -> Callable[[SuperNetwork, Tensor], float]:
    """MACs of a MobileNetV2's gates and pools, by a reading of the table of section 4.2.

    Args:
        gates: how many there are at a site, by its channels and its column of the table.
        inputs: whether there are any on a block's input.
    """

    def macs(network: SuperNetwork, used: Tensor) -> float:
        other = copy.deepcopy(network)
        for edge in map(int, network.heads):
            stage = int(network.edge_names[edge].partition(".")[0][1:])
            into, out = (network.shapes[node][0] for node in network.graph.edges[edge])
            sites = list(zip((into, into * STAGES[stage][0], out), PAPER[stage], strict=True))
            other.heads[str(edge)] = ConditionalGates(into, sum(gates(*site) for site in sites[0 if inputs else 1 :]))
        return sum(MACs().bind(other).per_head.values())

    return macs


def static_sums(network: SuperNetwork, used: Tensor) -> float:
    """MACs with a sum at each node of all edges that enter it, used or not, as the reference counts."""
    sums = zip(network.graph.incoming, network.shapes, strict=True)
    return float(MACs(additions=False).bind(network)(used)[0]) + sum(
        (len(entering) - 1) * prod(shape) for entering, shape in sums if entering
    )


def params_without(kind: type[nn.Module], name: str) -> Callable[[SuperNetwork, Tensor], float]:
    """Parameters without those of one kind of layer whose names begin so."""

    def params(network: SuperNetwork, used: Tensor) -> float:
        layers = [part for edge in used[0].nonzero().flatten() for part in network.modules_on_edges[edge].modules()]
        own = [part.named_parameters() for part in layers if isinstance(part, kind)]
        left_out = [value.numel() for each in own for key, value in each if key.startswith(name)]
        return float(Params().bind(network)(used)[0]) - sum(left_out)

    return params


TABLE = "macs of gates, the table of section 4.2 read as"
READINGS: Mapping[str, Callable[[SuperNetwork, Tensor], float]] = {
    "average pools of gates": lambda network, used: sum(pools(network).values()),
    "average pool of the classifier": lambda network, used: prod(network.shapes[network.graph.edges[-1][0]]),
    "macs of a bottleneck beside an identity": bottleneck,
    "macs with the stride in the 1x1 convolution": stride_first,
    "macs of gates in blocks beside an identity alone": only_beside_identities,
    f"{TABLE} filters, with a gate on every group": by_the_table(lambda channels, column: ceil(channels / column)),
    f"{TABLE} numbers of gates": by_the_table(lambda channels, column: column),
    f"{TABLE} numbers of gates, none on inputs": by_the_table(lambda channels, column: column, inputs=False),
    "macs with the sums of the full network": static_sums,
    "params without biases of convolutions": params_without(nn.Conv2d, "bias"),
    "params without batch norms": params_without(nn.BatchNorm2d, ""),
}  # fmt: skip
"""What is no cost of this package: how else the papers' numbers may have been counted."""


# ------------------------------------------------------------------------- what follows from several numbers


def in_steps(tasks: nx.DiGraph, order: Sequence[int], takes: Sequence[int], workers: int) -> int:
    """Steps of list scheduling by any list, also one in which a task stands before what it needs."""
    left, steps = list(order), 0
    while left:
        ready = [task for task in left if not any(before in left for before in tasks.predecessors(task))]
        free = [task for task in ready if not takes[task]]
        steps += not free
        left = [task for task in left if task not in (free or ready[:workers])]
    return steps


def last_in_first_out(tasks: nx.DiGraph) -> list[int]:
    waits = dict(tasks.in_degree())
    ready, order = [task for task in tasks if not waits[task]], []
    while ready:
        order.append(ready.pop())
        for task in tasks.successors(order[-1]):
            waits[task] -= 1
            ready += [task] * (not waits[task])
    return order


@pytest.mark.parametrize(
    ("order", "steps"),
    [
        (lambda tasks: Steps().bind(network("conv_fabric", '{"width": 8}')).tasks, (90, 53)),
        (list, (91, 53)),
        (lambda tasks: [task for each in nx.topological_generations(tasks) for task in each], (92, 54)),
        (last_in_first_out, (98, 59)),
    ],
    ids=["ours", "added", "generations", "last_in_first_out"],
)
def test_the_order_of_the_list_decides_the_steps(order: Callable[[nx.DiGraph], Sequence[int]], steps: tuple[int, int]):
    """Of the convolutional fabric of width 8 on 2 and 4 workers, in the order of the table in docs/counting.md."""
    fabric = network("conv_fabric", '{"width": 8}')
    tasks, nodes = nx.DiGraph(), len(fabric.graph.nodes)
    for edge, (start, end) in enumerate(fabric.graph.edges):
        nx.add_path(tasks, (start, nodes + edge, end))
    takes = (*fabric.node_steps, *fabric.edge_steps)
    assert tuple(in_steps(tasks, order(tasks), takes, workers) for workers in (2, 4)) == steps


def test_the_pools_are_what_gates_of_two_image_sizes_differ_by():
    """Figure 8 prints 2.51 and 1.72 M, each rounded."""
    sizes = [BY_ID[f"herrmann.mobilenet_v2.{size}.gates.pools"]["value"] for size in (224, 96)]
    assert sizes[0] - sizes[1] == 782_080
    assert abs(782_080 - (2_510_000 - 1_720_000)) < 10_000


@pytest.mark.parametrize(("closed", "printed"), [(4, 2_932_012_776), (5, 2_713_646_824), (6, 2_495_280_872)])
def test_rows_of_figure_19_are_whole_bottlenecks_apart(closed: int, printed: int):
    assert 3_805_476_584 - closed * BY_ID["herrmann.resnet50.bottleneck"]["value"] == printed


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (0.8 * 35.614, "28.49"),  # BSN, Table 4: the budgets that its networks were given
        (0.6 * 35.614, "21.37"),
        (40.05 - 1.72, "38.33"),  # where S1.4 prints 38.03
        (30.04 - 1.72, "28.3"),  # section 4.3.1, without gates; with them Figure 4
        (39 + (56 - 39) * (59.54 - 58.8) / (60.3 - 58.8), "47.4"),  # section 4.3.1, at 59.54 %
        (196.85 - 194.352, "2.5"),  # Figures 4 and 15, with and without gates, where Figure 8 prints 2.51
        (147.34 - 144.841, "2.5"),
        (100 * (1 - 2.213 / 4.028), "45"),  # the abstract, in percent
        (100 * (1 - 1.939 / 4.028), "52"),
        (100 * (1 - 65 / 82), "20.7"),  # section 4.4, in percent
        (0.2871 * 96.37 + 0.1156 * 98.53 + 0.5973 * 92.63, "94.39"),  # Figure 7, in percent
        (
            100 * (0.2871 + 0.1156 * 2 + 0.5973 * 3) / 3,
            "77",
        ),  # its layers, of three equal blocks, where 68.4 is printed
    ],
)
def test_printed_numbers_that_follow_from_other_printed_ones(value: float, rounded: str):
    assert Decimal(value).quantize(Decimal(rounded)) == Decimal(rounded)
