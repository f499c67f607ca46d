"""The Pareto front by brute force; what is chosen keeps every budget and cannot be enlarged."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import every, graphs, network_on

from budgetnet import Budget, SuperNetwork
from budgetnet.errors import UnreachableBudget
from budgetnet.projection import filled, keeps, mend, probable, trimmed
from budgetnet.selection import check_together, pareto_front
from budgetnet.spaces import conv_fabric, densenet_exits, resnet, resnet_fabric

NETWORK = conv_fabric(width=2, depth=3, channels=3, classes=2, image_size=8)
BUDGETS = ["macs<=40%", "params<=60%", "steps:2<=12", "macs:paper<=50%", "macs~=70%", "params~=90%"]


def learned(seed: int, network: SuperNetwork = NETWORK, scale: float = 2.0) -> SuperNetwork:
    """The network with gates as a search could have left them."""
    with torch.no_grad():
        network.gates.values.copy_(
            scale * torch.randn(network.gate_count, generator=torch.Generator().manual_seed(seed))
        )
    return network


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12)


@given(points)
def test_the_pareto_front_is_what_no_point_beats(points: list[tuple[int, int]]):
    """With ties: two points of the same cost and quality are both on it."""
    cost, quality = (torch.tensor([float(point[i]) for point in points]) for i in (0, 1))
    front = [
        not any(c <= cost_ and q >= quality_ and (c, q) != (cost_, quality_) for c, q in points)
        for cost_, quality_ in points
    ]
    assert pareto_front(cost, quality).tolist() == front


@given(points.filter(bool))
def test_along_the_pareto_front_quality_costs(points: list[tuple[int, int]]):
    cost, quality = (torch.tensor([float(point[i]) for point in points]) for i in (0, 1))
    front = pareto_front(cost, quality)
    assert front.any()
    ordered = sorted(set(zip(cost[front].tolist(), quality[front].tolist(), strict=True)))
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(ordered))


def test_keeps_asks_for_a_connection_and_for_every_budget():
    bits = every(NETWORK.gate_count)
    used = NETWORK.used(bits)
    budgets = [Budget.parse(text).bind(NETWORK) for text in ("macs<=60%", "steps:2<=12")]
    expected = used.any(dim=1)
    for budget in budgets:
        expected &= budget.model(used) <= budget.limit
    assert torch.equal(keeps(NETWORK, budgets, bits), expected)
    assert 0 < expected.sum() < used.any(dim=1).sum()


@pytest.mark.parametrize("target", ["params~=30%", "params~=60%", "params~=90%", "steps:2~=10"])
@pytest.mark.parametrize("limit", ["macs<=30%", "macs<=60%", "macs<=85%"])
def test_budgets_that_contradict_each_other_are_refused_and_no_others(limit: str, target: str):
    budgets = [Budget.parse(text).bind(NETWORK) for text in (limit, target)]
    possible = bool(keeps(NETWORK, budgets, every(NETWORK.gate_count)).any())
    with nullcontext() if possible else pytest.raises(UnreachableBudget, match=r"keeps them together: macs<=\d"):
        check_together(NETWORK, budgets)


def test_trimming_drops_just_what_is_not_used():
    bits = every(NETWORK.gate_count)
    rest = trimmed(NETWORK, bits)
    assert torch.equal(NETWORK.used(rest), torch.where(NETWORK.used(bits).any(dim=1)[:, None], NETWORK.used(bits), 0))
    assert torch.equal(rest, NETWORK.used(bits)[:, list(NETWORK.choices)])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("texts", [*([text] for text in BUDGETS), ["macs<=60%", "steps:2<=12"]], ids=" and ".join)
def test_candidates_keep_all_budgets_and_differ(texts: list[str], seed: int):
    network = learned(seed)
    budgets = [Budget.parse(text).bind(network) for text in texts]
    found = probable(network, budgets, count=8, generator=generator())
    assert 1 <= len(found) <= 8
    assert keeps(network, budgets, found).all()
    assert len({tuple(row) for row in found.tolist()}) == len(found)
    assert torch.equal(found, trimmed(network, found))


@pytest.mark.parametrize("seed", range(6))
def test_the_most_probable_architecture_is_the_first_candidate_where_it_fits(seed: int):
    network = learned(seed)
    with torch.no_grad():
        network.gates.values[:5].abs_()  # so that it connects
    mode = (network.gates.logits > 0).float()[None]
    if not network.used(mode).any():
        mode = torch.ones_like(mode)
        network.gates.values.data.abs_()
    budgets = [Budget.parse("macs<=100%").bind(network)]
    assert keeps(network, budgets, mode).all()
    first = probable(network, budgets, count=1, generator=generator())
    assert torch.equal(first, trimmed(network, mode))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("text", ["macs<=60%", "macs<=100%", "steps:2<=12"])
def test_a_candidate_lacks_no_wanted_gate_that_fits(text: str, seed: int):
    """Wanted are the gates of the mode, or all of them where the mode does not fit."""
    network = learned(seed)
    budgets = [Budget.parse(text).bind(network)]
    mode = (network.gates.logits > 0).float()[None]
    wanted = mode[0].bool() if keeps(network, budgets, mode)[0] else torch.ones(network.gate_count, dtype=torch.bool)
    for row in probable(network, budgets, count=8, generator=generator()):
        for gate in ((row == 0) & wanted).nonzero().flatten().tolist():
            more = row[None].clone()
            more[0, gate] = 1
            useful = network.used(more)[0, network.choices[gate]] > 0
            assert not (useful and keeps(network, budgets, more)[0])


@pytest.mark.parametrize("texts", [["macs<=40%"], ["macs<=50%", "params<=60%"], ["macs<=100%"]])
@pytest.mark.parametrize("middle", [-0.5, -3.0, 0.0])
def test_where_a_limit_closed_all_gates_together_it_is_used_all_the_same(texts: list[str], middle: float):
    """The likeliest channels come first, however unlikely they are; no limit that presses is left unused."""
    network = learned(0, resnet(depth=8, channels=4, image_size=8), scale=0.1)
    network.gates.values.data.add_(middle)
    budgets = [Budget.parse(text).bind(network) for text in texts]
    for pressed in (False, True):
        found = probable(network, budgets, count=6, generator=generator(), pressed=pressed)
        assert keeps(network, budgets, found).all()
        assert torch.equal(found, trimmed(network, found))
        left = [1 - budget.model(network.used(found)) / budget.limit for budget in budgets]
        tightest = torch.stack(left).amin(dim=0)
        if pressed:
            assert (tightest < 0.05).all()
            assert len(found) == (1 if texts == ["macs<=100%"] else 6)
        elif middle < -0.5:
            assert (tightest > 0.5).any()


@pytest.mark.parametrize("seed", range(3))
def test_under_a_limit_that_presses_channels_open_by_their_logits_while_they_fit(seed: int):
    network = resnet(depth=8, channels=8, image_size=8)
    order = torch.randn(network.gate_count, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        network.gates.values.copy_(order - 20)
    budget = Budget.parse("macs<=60%").bind(network)
    kept = torch.zeros(1, network.gate_count)
    for gate in order.argsort(descending=True).tolist():
        kept[0, gate] = 1
        if float(budget.model(network.used(kept))[0]) > budget.limit:
            kept[0, gate] = 0
    assert torch.equal(probable(network, [budget], count=1, generator=generator(), pressed=True), kept)


@pytest.mark.parametrize(("first", "second"), [(-4.0, 3.0), (-8.0, 4.0), (-5.0, 5.0)])
def test_a_limit_that_presses_opens_no_exit_that_is_unlikely(first: float, second: float):
    """What an exit spares makes all the rest fit, so that the threshold would never be low enough."""
    network = densenet_exits(
        depth=10, growth=4, image_size=8, in_channels=1, conditional=False, exit_channels=4, exit_pool=2
    )
    with torch.no_grad():
        network.gates.values.copy_(torch.tensor([first, second]))
    budgets = [Budget.parse("macs<=97%").bind(network)]
    for pressed in (False, True):
        found = probable(network, budgets, count=1, generator=generator(), pressed=pressed)
        assert found.tolist() == [[0, 1]]


@pytest.mark.parametrize("text", ["macs<=30%", "macs<=50%", "macs<=60%", "macs<=65%"])
@pytest.mark.parametrize("seed", range(2))
def test_a_block_comes_back_with_those_of_its_channels_that_fit(text: str, seed: int):
    """Its own gate is the first to be cut, and alone is of no use."""
    network = resnet(depth=8, channels=8, image_size=8, in_channels=1, gates="both")
    logits = 1 + torch.randn(network.gate_count, generator=torch.Generator().manual_seed(seed))
    logits[:3] = torch.tensor([-2.0, -1.0, -1.5])
    with torch.no_grad():
        network.gates.values.copy_(logits)
    budget = Budget.parse(text).bind(network)
    found = probable(network, [budget], count=1, generator=generator(), pressed=True)
    assert 0.9 < float(budget.model(network.used(found))[0]) / budget.limit <= 1


@pytest.mark.parametrize("seed", range(3))
def test_channels_shared_by_blocks_are_opened_where_one_of_these_uses_them(seed: int):
    network = resnet(depth=20, channels=4, image_size=8, in_channels=1, gates="both", lock=True)
    with torch.no_grad():
        network.gates.values.copy_(torch.randn(network.gate_count, generator=torch.Generator().manual_seed(seed)))
    budget = Budget.parse("macs<=50%").bind(network)
    found = probable(network, [budget], count=4, generator=generator(), pressed=True)
    assert (budget.model(network.used(found)) / budget.limit > 0.95).all()


@settings(max_examples=20, deadline=None)
@given(graphs(nodes=5, extra=4), st.integers(0, 2**16), st.integers(0, 100), st.sampled_from(["macs", "params"]))
def test_filling_a_cut_architecture_leaves_no_room_for_another_edge(graph, seed: int, percent: int, cost: str):
    """Between its own layers no gate can be added. The limit lies between the smallest network and the full one."""
    network = learned(seed, network_on(graph, seed=seed))
    budget = Budget.parse(f"{cost}<=100%").bind(network)
    least = float(budget.model(network.used(budget.cheapest(network)))[0])
    limit = least + (budget.full - least) * percent / 100
    budgets = [Budget.parse(f"{cost}<={max(limit, 1e-9)!r}").bind(network)]
    logits = network.gates.logits.detach()
    cut = mend(network, budgets, (logits > 0).float()[None], logits)
    full = filled(network, budgets, cut, logits, torch.ones_like(logits, dtype=torch.bool))
    for found in (cut, full):
        assert keeps(network, budgets, found).all()
        assert torch.equal(found, trimmed(network, found))
    assert (full >= cut).all()
    for gate in (full[0] == 0).nonzero().flatten().tolist():
        more = full.clone()
        more[0, gate] = 1
        grown = network.used(more)[0, network.choices[gate]] > 0
        assert not (grown and keeps(network, budgets, more)[0])


@pytest.mark.parametrize("text", ["macs<=30%", "params<=40%", "steps:2<=8", "params~=70%", "macs~=90%", "params~=100%"])
@pytest.mark.parametrize("mode", ["nothing", "a path", "everything"])
def test_a_budget_is_kept_wherever_the_gates_stand(mode: str, text: str):
    """Also where no sample ever keeps it: an upper limit by cutting, a target by cutting from the full network."""
    network = learned(0, scale=0.1)
    network.gates.values.data.add_(20.0 if mode == "everything" else -20.0)
    if mode == "a path":
        for column, edge in enumerate(network.choices):
            if network.edge_names[edge] in ("l0.s0>l1.s1", "l1.s1>l1.s2"):
                network.gates.values.data[column] = 20.0
    budgets = [Budget.parse(text).bind(network)]
    assert keeps(network, budgets, probable(network, budgets, count=4, generator=generator())).all()


def test_budgets_that_cannot_be_kept_together_are_told():
    """Each can be kept alone: few parameters, but a cost that only many modules reach."""
    network = learned(0)
    few, many = (Budget.parse(text).bind(network) for text in ("params<=50%", "macs~=95%"))
    bits = every(network.gate_count)
    assert keeps(network, [few], bits).any()
    assert keeps(network, [many], bits).any()
    assert not keeps(network, [few, many], bits).any()
    keeps_none = r"^no architecture of conv_fabric was found that keeps "
    message = keeps_none + r"params at [\d.]+ parameters and macs at [\d.]+ MACs together$"
    with pytest.raises(UnreachableBudget, match=message):
        probable(network, [few, many], count=4, generator=generator())
    much = replace(many, limit=2 * many.full)  # which no network comes to, though of the other a smaller share is left
    with pytest.raises(UnreachableBudget, match=keeps_none + r"macs at [\d.]+ MACs$"):
        probable(network, [few, much], count=4, generator=generator())


def test_candidates_are_a_function_of_the_generator():
    network = learned(3, resnet_fabric(width=1, channels=2, image_size=8), scale=1)
    budgets = [Budget.parse("macs<=70%").bind(network)]
    first, second = (probable(network, budgets, count=16, generator=generator()) for _ in range(2))
    assert torch.equal(first, second)


def test_without_a_budget_every_connected_architecture_may_be_chosen():
    network = learned(0)
    found = probable(network, [], count=5, generator=generator())
    assert network.used(found).any(dim=1).all()
