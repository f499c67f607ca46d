"""What a budget says, whether it is kept, and whether it can be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import every
from torch import Tensor, nn

from budgetnet import Budget, Edge, SuperNetwork
from budgetnet.budgets import TOLERANCE, check_reachable, cost_name, parse_cost
from budgetnet.costs import CostModel, MACs, Memory, Params, Steps
from budgetnet.errors import ConfigError, UnreachableBudget
from budgetnet.spaces import conv_fabric

NETWORK = conv_fabric(width=2, depth=3, channels=3, classes=2, image_size=8)
BOUND = [Budget(MACs(), **{kind: 1000}).bind(NETWORK) for kind in ("at_most", "target")]
FULL = float(MACs().bind(NETWORK)(NETWORK.used(NETWORK.architecture("full")))[0])


@pytest.mark.parametrize(
    ("text", "cost", "at_most", "target"),
    [
        ("macs<=40.9M", MACs(), "40.9M", None),
        (" macs <= 25% ", MACs(), "25%", None),
        ("macs:paper<=1G", MACs("paper"), "1G", None),
        ("params~=1e5", Params(), None, "1e5"),
        ("steps:2<=20", Steps(2), "20", None),
        ("steps[workers=4]~=20", Steps(4), None, "20"),
        ("steps[ workers = 4 ]<=20", Steps(4), "20", None),
        ("macs[counting=paper]<=5", MACs("paper"), "5", None),
    ],
)
def test_budgets_are_read_as_they_are_written(text, cost, at_most, target):
    assert Budget.parse(text) == Budget(cost, at_most=at_most, target=target)


@pytest.mark.parametrize(
    "text", ["macs<=40.9M", "steps:2~=20", "macs:paper<=25%", "params<=1e5", "steps<=3", "macs[gates=false]<=40%"]
)
def test_a_budget_is_written_as_it_is_read(text: str):
    assert str(Budget.parse(text)) == text


@pytest.mark.parametrize("cost", [MACs(), MACs("paper"), MACs(gates=False), Params(), Steps(), Steps(3)])
def test_a_cost_is_named_as_it_is_read(cost):
    assert parse_cost(cost_name(cost)) == cost


@pytest.mark.parametrize(
    ("given", "limit"),
    [
        (40.9e6, 40.9e6),
        (7, 7),
        ("40.9M", 40.9e6),
        ("3K", 3000),
        ("1.5G", 1.5e9),
        ("2e3", 2000),
        ("2.5e-1K", 250),
        ("25%", FULL / 4),
        ("100%", FULL),
    ],
)
def test_limits_are_numbers_in_the_costs_unit_or_shares_of_the_full_network(given, limit):
    bound = Budget(MACs(), at_most=given).bind(NETWORK)
    assert bound.limit == pytest.approx(limit, rel=1e-12)
    assert (bound.full, bound.unit, bound.name, bound.upper) == (FULL, "MAC", "macs", True)


@pytest.mark.parametrize(
    ("given", "limit"), [("2KB", 2000), ("50MB", 5e7), ("1GB", 1e9), ("8B", 8), ("8", 8), ("3K", 3000)]
)
def test_limits_on_memory_are_bytes(given, limit):
    assert Budget(Memory(), at_most=given).bind(NETWORK).limit == limit


@pytest.mark.parametrize("given", [0, -3, "0", "-3M", "abc", "", "%", "5X", "1.2.3", "nan", float("inf"), "1e999", "."])
def test_limits_that_are_no_number_above_zero(given):
    with pytest.raises(ConfigError, match="a limit in MAC must be a number > 0"):
        Budget(MACs(), at_most=given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("macs", "a budget reads COST<=LIMIT or COST~=LIMIT, such as macs<=25%, got 'macs'"),
        ("macs<25%", "a budget reads"),
        ("<=5", "a budget reads"),
        ("watts<=5", "costs are macs, params, memory, steps, schedule, transfer, activation, layers.*, got 'watts'"),
        ("layers:2<=5", "layers takes no option, got 'layers:2'"),
        ("steps[cores=2]<=5", "steps has the options workers, got 'cores'"),
        ("steps[workers=two]<=5", "workers must be a whole number, got 'two'"),
        ("steps:0<=5", "workers must be a whole number >= 1, got 0"),
        ("macs:free<=5", "macs are counted true or paper, got 'free'"),
    ],
)
def test_texts_that_are_no_budget(text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        Budget.parse(text)


@pytest.mark.parametrize("limits", [{}, {"at_most": 5, "target": 5}])
def test_a_budget_has_one_limit(limits):
    with pytest.raises(ConfigError, match="a budget needs one limit: at_most or target"):
        Budget(MACs(), **limits)


@given(st.floats(1, 1e6), st.floats(1, 1e6))
def test_a_penalty_counts_what_is_over_an_upper_limit_and_the_distance_to_a_target(cost: float, limit: float):
    upper, target = BOUND
    costs = torch.tensor([cost], dtype=torch.float64)
    assert upper.penalty(costs, limit).item() == pytest.approx(max(0.0, cost / limit - 1))
    assert target.penalty(costs, limit).item() == pytest.approx((cost / limit - 1) ** 2)


def test_an_upper_limit_is_met_up_to_itself_and_a_target_within_its_tolerance():
    upper, target = BOUND
    costs = torch.tensor([1.0, 949, 951, 1000, 1001, 1049, 1051], dtype=torch.float64)
    assert upper.met(costs).tolist() == [True, True, True, True, False, False, False]
    assert target.met(costs).tolist() == [False, False, True, True, True, True, False]
    assert TOLERANCE == 0.05


def test_what_can_be_reached_is_told_before_training():
    """The smallest by enumeration; the expected cost within 4 standard errors of 1,024 samples."""
    used = NETWORK.used(every(NETWORK.gate_count))
    costs = MACs().bind(NETWORK)(used)
    probability = NETWORK.gates.logits.detach().double().sigmoid()
    bits = every(NETWORK.gate_count, torch.float64)
    weight = (bits * probability + (1 - bits) * (1 - probability)).prod(dim=1)
    mean, square = float(weight @ costs), float(weight @ costs**2)
    budgets = [Budget.parse(text).bind(NETWORK) for text in ("macs<=50%", "steps:2~=9")]
    first, second = check_reachable(NETWORK, budgets)
    assert first.pop("expected") == pytest.approx(mean, abs=4 * ((square - mean**2) / 1024) ** 0.5)
    alike = max(float(weight[costs == one].sum()) for one in costs.unique())
    assert first.pop("alike") == pytest.approx(alike, abs=4 * (alike * (1 - alike) / 1024) ** 0.5)
    smallest = float(costs[used.any(dim=1)].min())
    assert first == {
        "cost": "macs",
        "unit": "MAC",
        "limit": FULL / 2,
        "smallest": smallest,
        "bound": True,
        "full": FULL,
    }
    assert (second["cost"], second["unit"], second["limit"], second["smallest"]) == ("steps:2", "step", 9, 6)


def test_limits_out_of_reach_say_what_binds():
    used = NETWORK.used(every(NETWORK.gate_count))
    costs = MACs().bind(NETWORK)(used)
    smallest = float(costs[used.any(dim=1)].min())
    check_reachable(NETWORK, [Budget(MACs(), at_most=smallest).bind(NETWORK)])
    message = (
        rf"macs must be at most .* MACs, but the smallest network of conv_fabric takes {smallest:.6g}: input \d+, "
    )
    with pytest.raises(UnreachableBudget, match=message):
        check_reachable(NETWORK, [Budget(MACs(), at_most=smallest - 1).bind(NETWORK)])
    for limit in (smallest / (1 + TOLERANCE) - 1, FULL / (1 - TOLERANCE) + 1):
        with pytest.raises(UnreachableBudget, match=r"macs must (be near|come to)"):
            check_reachable(NETWORK, [Budget(MACs(), target=limit).bind(NETWORK)])
    for limit in (smallest / (1 + TOLERANCE) + 1, FULL / (1 - TOLERANCE) - 1):
        check_reachable(NETWORK, [Budget(MACs(), target=limit).bind(NETWORK)])


class Modules(CostModel):
    """A cost of the user's: how many modules there are. It cannot say what an edge costs."""

    key, unit = "modules", "module"

    def bind(self, network: SuperNetwork) -> Modules:
        return self

    def __call__(self, used: Tensor) -> Tensor:
        return used.sum(dim=1)


def test_a_cost_of_the_users_needs_no_more_than_a_call_and_a_unit():
    """Its smallest network is the path of the fewest modules: input, two convolutions, output."""
    bound = Budget(Modules(), at_most="50%").bind(NETWORK)
    assert bound.full == len(NETWORK.graph.edges)
    assert bound.limit == bound.full / 2
    [row] = check_reachable(NETWORK, [bound])
    used = NETWORK.used(every(NETWORK.gate_count)).sum(dim=1)
    assert row["smallest"] == float(used[used > 0].min())
    with pytest.raises(UnreachableBudget, match=r"its 4 modules are the shortest path"):
        check_reachable(NETWORK, [Budget(Modules(), at_most=3).bind(NETWORK)])


def test_a_cost_that_cannot_price_an_edge_has_the_path_of_the_fewest_modules_for_its_cheapest():
    pairs = ["xa", "ab", "by", "xc", "cy", "xd", "de", "ey"]
    edges = [Edge(start=start, end=end, module=nn.Identity()) for start, end in pairs]
    network = SuperNetwork(edges, input_shape=(1,))
    kept = Budget(Modules(), at_most=2).bind(network).cheapest(network)
    assert [pair for pair, bit in zip(pairs, kept[0], strict=True) if bit] == ["xc", "cy"]


def test_a_budget_of_a_network_of_one_s_own():
    edges = [Edge(start="x", end="y", module=nn.Conv2d(1, 1, 1), name=name) for name in "ab"]
    network = SuperNetwork(edges, input_shape=(1, 2, 2))
    bound = Budget.parse("macs<=50%").bind(network)
    assert bound.full == 4 + 4 + 4  # two convolutions of 4 pixels and their sum
    assert bound.met(bound.model(network.used(every(2)))).tolist() == [True, True, True, False]


def test_a_measured_cost_is_unsure_where_it_may_turn_out_either_way():
    """Of a target both ends of what counts as met; not where every measurement is the same."""
    network = conv_fabric(width=2, channels=4, image_size=8)
    limit = Budget(MACs(), at_most=100).bind(network)
    assert limit.unsure(99, 101)
    assert not limit.unsure(90, 99)
    assert not limit.unsure(101, 110)
    assert not limit.unsure(100, 100)
    target = Budget(MACs(), target=100).bind(network)
    assert target.unsure(104, 106)
    assert target.unsure(94, 96)
    assert not target.unsure(99, 101)
