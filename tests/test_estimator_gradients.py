"""Gradients of every estimator where all of 3 or 4 gates can be summed over, and the noise integrated over."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch
from small import every
from torch import Tensor, nn
from torch.distributions import Bernoulli
from torch.nn import functional as F

from budgetnet import Budget, Edge, Node, SearchOptions, SuperNetwork
from budgetnet.budgets import BoundBudget
from budgetnet.gated import ChannelGate, GatedSequential
from budgetnet.objectives import score_function_loss
from budgetnet.sites import ConditionalGates, Fixed, Policy, log_prob, rows
from budgetnet.steering import Steering, Sums

PRICE = 0.7


class Case(NamedTuple):
    """A network, and what it computes and costs by hand: of `(N, C, H, W)` examples and `(N, G)` gates in [0, 1].

    What is closed altogether, or not reached, hands on nothing, and no gradient.
    """

    network: SuperNetwork
    output: Callable[[Tensor, Tensor], Tensor]
    macs: Callable[[Tensor], Tensor]
    x: Tensor  # (2, 2, 2, 2)
    y: Tensor  # (2,)

    @property
    def all(self) -> Tensor:
        """The A = 2^G architectures, `(A, G)`."""
        return every(self.network.gate_count, torch.float64)

    def logits(self) -> Tensor:
        """`(2, G)` of each example, differentiable in all parameters."""
        network = self.network
        given = [network.gates.logits.expand(2, -1)]
        given += [head(part(network, "stem")(self.x)) for head in network.heads.values()]
        return torch.cat(given, dim=1)

    def totals(self, kept: Tensor, budgets: list[BoundBudget], price: float = PRICE) -> Tensor:
        """Loss and priced penalties of each example, `(N, 2)`, under `(N, G)` gates for all or `(N, 2, G)` for each."""
        each = kept.unsqueeze(1).expand(-1, 2, -1) if kept.ndim == 2 else kept
        flat = each.flatten(0, 1)
        copies = len(each)
        losses = cross_entropy(self.output(self.x.repeat(copies, 1, 1, 1), flat), self.y.repeat(copies))
        penalties = sum(budget.penalty(self.macs(flat), budget.limit) for budget in budgets)
        return (losses + price * penalties).reshape(-1, 2)

    def named(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, value) for name, value in self.network.named_parameters() if value.numel()]

    def gradient(self, value: Tensor) -> Tensor:
        """With respect to all parameters in a row."""
        parameters = [value for _, value in self.named()]
        found = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
        return torch.cat([each.flatten() for each in found])


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Of each example, in the type of the output."""
    return F.cross_entropy(output, target, reduction="none")


def part(network: SuperNetwork, name: str) -> nn.Module:
    return network.modules_on_edges[network.edge_names.index(name)]


def gate(network: SuperNetwork, kept: Tensor, unit: str) -> Tensor:
    """`(N,)` values of a unit's gate, 1 where it has none."""
    column = network.gate_of[network.unit_names().index(unit)]
    return torch.ones_like(kept[:, 0]) if column is None else kept[:, column]


def images(value: Tensor) -> Tensor:
    return value[..., None, None]


def any_open(*gates: Tensor) -> Tensor:
    return torch.stack(gates).detach().gt(0).any(dim=0).double()


def stirred(network: SuperNetwork, seed: int, scale: float) -> SuperNetwork:
    """In float64, with random weights and logits, and heads that decide differently for different images."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.double().eval().named_parameters():
            fan_in = 1 if name.startswith("gates") or value.ndim < 2 else value[0].numel()
            value.copy_(torch.randn(value.shape, generator=generator, dtype=value.dtype) / math.sqrt(fan_in))
        part(network, "head")[1].weight.mul_(scale)
        for head in network.heads.values():
            head.decide.weight.mul_(2)
            head.decide.bias.zero_()
    return network


def case(network: SuperNetwork, output, macs, seed: int, scale: float = 2.0) -> Case:
    x = torch.randn(2, 2, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Case(stirred(network, seed, scale), output, macs, x, torch.tensor([0, 2]))


def classifier() -> Edge:
    return Edge(start="b", end="y", module=nn.Sequential(nn.Flatten(), nn.Linear(8, 3)), name="head", fixed=True)


def conv(into: int = 2, out: int = 2) -> nn.Module:
    return nn.Conv2d(into, out, 1)


def channels() -> Case:
    """Gates on the hidden channels and on the output of one branch."""
    layers = [conv(2, 3), nn.ReLU(), ChannelGate(3, 2), conv(3, 2), ChannelGate(2, always_open=1, name="out")]
    edges = [
        Edge(start="x", end="b", module=conv(), name="skip", fixed=True),
        Edge(start="x", end="b", module=GatedSequential(*layers), name="block", fixed=True),
        classifier(),
    ]
    network = SuperNetwork(edges, input_shape=(2, 2, 2), nodes=[Node(name="b", activation=nn.Tanh())])

    def bits(kept: Tensor) -> list[Tensor]:
        return [gate(network, kept, f"block.{unit}") for unit in ("hidden[0]", "hidden[1]", "out[1]")]

    def output(x: Tensor, kept: Tensor) -> Tensor:
        a, b, c = bits(kept)
        first, relu, _, second, _ = part(network, "block")
        value = second(relu(first(x)) * images(torch.stack([a, a, b], 1))) * images(
            torch.stack([torch.ones_like(c), c], 1)
        )
        value = images(any_open(a, b)[:, None]) * value
        return part(network, "head")(torch.tanh(part(network, "skip")(x) + value))

    def macs(kept: Tensor) -> Tensor:
        a, b, c = bits(kept)
        hidden, out = 2 * a + b, 1 + c
        return 16 + 24 + any_open(a, b) * (8 * hidden + 4 * hidden * out + 8)

    return case(network, output, macs, 20)


def edges() -> Case:
    """Gates on parallel edges and on one behind them; input and output may be unconnected."""
    names = ("one", "two", "more")
    network = SuperNetwork(
        [
            *(Edge(start="x", end="a", module=conv(), name=name) for name in names[:2]),
            Edge(start="a", end="b", module=nn.Identity(), name="same", fixed=True),
            Edge(start="a", end="b", module=conv(), name="more"),
            classifier(),
        ],
        input_shape=(2, 2, 2),
        nodes=[Node(name=name, activation=nn.Tanh()) for name in "ab"],
    )

    def output(x: Tensor, kept: Tensor) -> Tensor:
        one, two, more = (images(gate(network, kept, name)[:, None]) for name in names)
        reached = any_open(one, two)
        value = torch.tanh(one * part(network, "one")(x) + two * part(network, "two")(x))
        value = value + more * part(network, "more")(value)
        return reached[:, 0, 0] * part(network, "head")(torch.tanh(reached * value))

    def macs(kept: Tensor) -> Tensor:
        one, two, more = (gate(network, kept, name) for name in names)
        return 16 * (one + two) + 8 * one * two + any_open(one, two) * (24 * more + 24)

    return case(network, output, macs, 41)


def blocks(by_input: bool, affine: bool = False) -> Case:
    """A branch with a gate of its own and gates on its channels, and another gated edge beside it.

    Args:
        by_input: a head decides on the branch and on its channels.
        affine: the output is affine in each gate: some channels are always open, and no activation follows.
    """
    groups = ("block.hidden[1]", "block.hidden[2]") if affine else ("block.hidden[0]", "block.hidden[1]")
    site = ChannelGate(3, 1, always_open=1) if affine else ChannelGate(3, 2)
    decides = partial(ConditionalGates, hidden=2) if by_input else None
    module = GatedSequential(conv(2, 3), nn.ReLU(), site, conv(3, 2))
    network = SuperNetwork(
        [
            Edge(start="x", end="a", module=conv(), name="stem", fixed=True),
            Edge(start="a", end="b", module=nn.Identity(), name="skip", fixed=True),
            Edge(start="a", end="b", module=module, name="block", gate=decides),
            Edge(start="a", end="b", module=conv(), name="side"),
            classifier(),
        ],
        input_shape=(2, 2, 2),
        nodes=[Node(name="b", activation=None if affine else nn.Tanh())],
    )

    def bits(kept: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        block, side, a, b = (gate(network, kept, unit) for unit in ("block", "side", *groups))
        return block, [torch.ones_like(a), a, b] if affine else [a, a, b], side

    def output(x: Tensor, kept: Tensor) -> Tensor:
        block, hidden, side = bits(kept)
        value = part(network, "stem")(x)
        first, relu, _, second = part(network, "block")
        inside = second(relu(first(value)) * images(torch.stack(hidden, 1)))
        own = images((block * any_open(*hidden))[:, None])
        value = value + own * inside + images(side[:, None]) * part(network, "side")(value)
        return part(network, "head")(value if affine else torch.tanh(value))

    def macs(kept: Tensor) -> Tensor:
        block, hidden, side = bits(kept)
        # the head: a pool of 8 values, 2 x 6 and 6 x 2 weights
        fixed = 16 + 24 + by_input * (8 + 12 + 12)
        return fixed + block * any_open(*hidden) * (16 * sum(hidden) + 8) + 24 * side

    one = case(network, output, macs, 2, 0.4 if affine else 2.0)
    with torch.no_grad():
        module[-1].weight.mul_(2)  # so that the channels matter
    return one


CASES = {
    "channels": channels,
    "edges": edges,
    "both": partial(blocks, by_input=False),
    "by input": partial(blocks, by_input=True),
}
every_case = pytest.mark.parametrize("name", CASES)


# ---------------------------------------------------------------------------------------------------- what is exact


def chance(logits: Tensor) -> Tensor:
    """Of each of the A architectures, in the order of `every`, for each example, `(A, 2)`."""
    kept = every(logits.shape[1], torch.float64)
    return Bernoulli(logits=logits).log_prob(kept[:, None]).sum(dim=2).exp()


def exact(one: Case, budgets: list[BoundBudget]) -> Tensor:
    """Gradient of the expected loss and penalty, by the sum over all architectures."""
    return one.gradient((chance(one.logits()) * one.totals(one.all, budgets)).sum(dim=0).mean())


def gauss_legendre(count: int) -> tuple[Tensor, Tensor]:
    """Points in (0, 1) and their weights."""
    points, weights = np.polynomial.legendre.leggauss(count)
    return torch.from_numpy(points + 1) / 2, torch.from_numpy(weights) / 2


def relaxed(one: Case, budgets: list[BoundBudget], temperature: float) -> Tensor:
    """Gradient of the expectation with soft gates, by quadrature over the uniform variables behind the noise."""
    points, weights = gauss_legendre(12)
    noise, weight = (torch.cartesian_prod(*[each] * one.network.gate_count) for each in (points.logit(), weights))
    soft = torch.sigmoid((one.logits() + noise[:, None]) / temperature)
    return one.gradient((weight.prod(dim=1) @ one.totals(soft, budgets)).mean())


def slopes_of_soft(logits: Tensor, temperature: float) -> Tensor:
    """`E[d soft / d logit]` over the noise with which a gate of these logits is closed, and open, `(2, ...)`."""
    points, weights = gauss_legendre(64)
    closed = torch.sigmoid(-logits)[..., None]  # the uniform variables below close the gate
    found = []
    for low, width in ((torch.zeros_like(closed), closed), (closed, 1 - closed)):
        soft = torch.sigmoid((logits[..., None] + (low + width * points).logit()) / temperature)
        found.append((width * weights * soft * (1 - soft) / temperature).sum(dim=-1))
    return torch.stack(found)


def straight_through(one: Case, budgets: list[BoundBudget], temperature: float) -> Tensor:
    """What straight-through Gumbel estimates: `E[df / d kept * d soft / d logit]`, the first at the architecture drawn.

    The loss that weights learn by is that of the architectures that are drawn.
    """
    logits, kept = one.logits(), one.all[:, None].repeat(1, 2, 1).requires_grad_()
    (slope,) = torch.autograd.grad(one.totals(kept, budgets).sum(), kept)  # (A, 2, G)
    drawn, own = chance(logits).detach(), logits.detach()
    softened = slopes_of_soft(own, temperature) / torch.stack([torch.sigmoid(-own), torch.sigmoid(own)])
    given = torch.where(kept.detach() > 0, softened[1], softened[0])  # of d soft / d logit, how the gate is decided
    of_logits = (drawn[..., None] * slope * given).sum(dim=0)
    value = (drawn * one.totals(one.all, budgets)).sum(dim=0).mean() + (of_logits * logits).sum(dim=1).mean()
    return one.gradient(value)


# --------------------------------------------------------------------------------------------------- what is estimated


def bind(one: Case, *texts: str) -> list[BoundBudget]:
    return [Budget.parse(text).bind(one.network) for text in texts]


def steering(one: Case, budgets: list[BoundBudget], estimator: str, **options: float) -> Steering:
    given = {"price": PRICE, "target": "constant", "exploration": 0.0, "architectures": "example"} | options
    return Steering(one.network, budgets, SearchOptions(estimator=estimator, **given))


def estimates(
    one: Case, budgets: list[BoundBudget], estimator: str, *, copies: int, batches: int = 20, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Mean over batches of what a step of the search differentiates, and its standard error."""
    steers, found = steering(one, budgets, estimator, temperature=temperature), []
    x, y = one.x.repeat(copies, 1, 1, 1), one.y.repeat(copies)
    for seed in range(batches):
        output, kept = one.network(x, steers.policy("search", len(x), torch.Generator().manual_seed(seed)))
        found.append(one.gradient(steers.search_objective(cross_entropy(output, y), kept, 1.0, 0.0, Sums(), x)))
    each = torch.stack(found)
    return each.mean(dim=0), each.std(dim=0) / math.sqrt(batches)


def assert_mean(found: tuple[Tensor, Tensor], expected: Tensor, one: Case, share: float) -> None:
    """Within 5 standard errors, which are for what decides the gates together less than a share of the gradient."""
    mean, error = found
    assert ((mean - expected).abs() <= 5 * error + 1e-9).all()
    decides = [torch.full((value.numel(),), name.startswith(("gates.", "heads."))) for name, value in one.named()]
    assert error[torch.cat(decides)].norm() < share * expected[torch.cat(decides)].norm()


def priced(one: Case, budgets: list[BoundBudget]) -> Tensor:
    """What the budgets take for each architecture, `(A,)`."""
    used = one.network.used(one.all)
    return PRICE * sum(budget.penalty(budget.model(used), budget.limit) for budget in budgets)


def over_pairs(logits: Tensor, estimate: Callable[[list[int]], Tensor]) -> Tensor:
    """The expectation of an estimate from two architectures, each drawn for an example of its own."""
    drawn = chance(logits).detach()
    pairs = product(range(len(drawn)), repeat=2)
    return torch.stack([drawn[i, 0] * drawn[j, 1] * estimate([i, j]) for i, j in pairs]).sum()


@every_case
def test_what_is_summed_and_integrated_is_what_the_network_computes_and_costs(name: str):
    """Of each architecture, where no gradient is asked for and where one is."""
    one = CASES[name]()
    model = Budget.parse("macs<=50%").bind(one.network).model
    torch.testing.assert_close(one.macs(one.all), model(one.network.used(one.all)))
    for kept in one.all.split(1):
        expected = one.output(one.x, kept.expand(2, -1))
        torch.testing.assert_close(one.network(one.x, Fixed(kept))[0], expected)
        torch.testing.assert_close(one.network(one.x, Fixed(kept.clone().requires_grad_()))[0], expected)


@every_case
def test_the_score_functions_mean_over_all_pairs_of_architectures_is_exact(name: str):
    """Under two budgets, one architecture for each of two examples: gates, heads and weights, but for rounding."""
    one = CASES[name]()
    kept, logits = one.all, one.logits()
    budgets = bind(one, "macs<=60%", "steps:2<=70%")
    penalties, relevant = priced(one, budgets), one.network.relevant(kept)
    losses = torch.stack([cross_entropy(one.network(one.x, Fixed(row))[0], one.y) for row in kept.split(1)])
    steers = None if one.network.heads else steering(one, budgets, "score")
    assert len(penalties.unique()) > 3

    def estimate(pair: list[int]) -> Tensor:
        loss = losses[pair, [0, 1]]
        if steers is None:  # a search learns gates by the input by Gumbel alone
            return score_function_loss(loss, penalties[pair], log_prob(logits, kept[pair], relevant[pair]))
        return steers.search_objective(loss, kept[pair], 1.0, 0.0, Sums(), one.x)

    expected = (chance(logits) * (losses + penalties[:, None])).sum(dim=0).mean()
    torch.testing.assert_close(one.gradient(over_pairs(logits, estimate)), one.gradient(expected))


def test_under_gumbel_the_mean_of_a_cost_without_a_gradient_is_exact():
    """It enters through the score function of what was drawn; the losses by their own gradient, which ends here."""
    one = edges()
    budgets = bind(one, "steps:2<=70%")
    steers, logits = steering(one, budgets, "gumbel"), one.logits()

    def estimate(pair: list[int]) -> Tensor:
        kept = one.all[pair].requires_grad_()
        return steers.search_objective(kept.sum(dim=1), kept, 1.0, 0.0, Sums(), one.x)

    expected = one.gradient(chance(logits)[:, 0] @ priced(one, budgets))
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(one.gradient(over_pairs(logits, estimate)), expected)


@pytest.mark.parametrize("name", ["channels", "edges", "both"])
def test_the_score_function_of_samples_has_the_exact_mean(name: str):
    one = CASES[name]()
    budgets = bind(one, "macs<=60%", "macs~=40%")
    assert_mean(estimates(one, budgets, "score", copies=200), exact(one, budgets), one, 0.12)


SAMPLED = [("channels", 1.0), ("edges", 1.0), ("both", 1.0), ("both", 0.6), ("by input", 1.0)]


@pytest.mark.parametrize(("name", "temperature"), SAMPLED)
def test_soft_gumbel_has_the_mean_that_integrals_give(name: str, temperature: float):
    """The gradient of the expectation with soft gates, of gates, heads and weights."""
    one = CASES[name]()
    budgets = bind(one, "macs~=60%", "macs~=40%")
    found = estimates(one, budgets, "soft-gumbel", copies=400, temperature=temperature)
    assert_mean(found, relaxed(one, budgets, temperature), one, 0.02)


@pytest.mark.parametrize(("name", "temperature"), SAMPLED)
def test_straight_through_gumbel_has_the_mean_that_integrals_give(name: str, temperature: float):
    """Of gates and heads; weights learn what they would from the exact expectation."""
    one = CASES[name]()
    budgets = bind(one, "macs<=60%", "macs~=40%")
    found = estimates(one, budgets, "gumbel", copies=400, temperature=temperature)
    assert_mean(found, straight_through(one, budgets, temperature), one, 0.05)


class Watched:
    """A policy that keeps the logits it is given, a row for each example."""

    blind = False

    def __init__(self, policy: Policy, examples: int) -> None:
        self.policy, self.examples, self.seen = policy, examples, []

    def __call__(self, logits: Tensor, columns: slice) -> Tensor:
        self.seen.append(rows(logits, self.examples))
        return self.policy(self.seen[-1], columns)


@pytest.mark.parametrize("by_input", [False, True])
def test_straight_through_points_where_the_exact_gradient_does(by_input: bool):
    """The cosine, over the logits of each example, is at least what the curvature of the loss leaves of it.

    Where loss and penalty f are affine in a gate, df / d kept is what the gate makes of them, however it is decided:
    the estimate is the exact gradient times `r = E[soft (1 - soft) / T] / (p (1 - p))`, > 0. Here the penalty is, and
    so is the network's output: along a gate that moves the logits of the classes by d the second derivative of the
    cross-entropy is a variance of d, at most `(max d - min d)^2 / 4`. Half of it bounds how far df / d kept is from
    what the gate makes.
    """
    one, price, copies = blocks(by_input, affine=True), 0.02, 10_000
    budgets = bind(one, "macs<=10%")
    assert one.macs(one.all).min() > budgets[0].limit
    x, y, logits = one.x.repeat(copies, 1, 1, 1), one.y.repeat(copies), one.logits()
    expected = (chance(logits) * one.totals(one.all, budgets, price)).sum(dim=0).mean()
    (gradient,) = torch.autograd.grad(expected, logits)
    steers = steering(one, budgets, "gumbel", price=price)
    watched = Watched(steers.policy("search", len(x), torch.Generator().manual_seed(0)), len(x))
    output, kept = one.network(x, watched)
    objective = steers.search_objective(cross_entropy(output, y), kept, 1.0, 0.0, Sums(), x)
    each = torch.cat(torch.autograd.grad(objective, watched.seen), dim=1)
    found = each.reshape(copies, *gradient.shape).sum(dim=0)

    drawn, logits = chance(logits).detach(), logits.detach()
    slope, bends = slopes_of_soft(logits, 1.0).sum(dim=0), torch.zeros_like(gradient)
    with torch.no_grad():
        outputs = torch.stack([one.output(one.x, row.expand(2, -1)) for row in one.all.split(1)])
    for column, bits in enumerate(one.all.t()):
        least, most = (outputs[bits == 1] - outputs[bits == 0]).aminmax(dim=2)
        bends[:, column] = ((drawn[bits == 1] + drawn[bits == 0]) * (most - least) ** 2 / 4).sum(dim=0) / len(one.x)
    scaled, added = slope / (logits.sigmoid() * (1 - logits.sigmoid())) * gradient, (slope * bends / 2).norm()
    bound = ((scaled * gradient).sum() / gradient.norm() - added) / (scaled.norm() + added)
    assert bound > 0.8
    assert F.cosine_similarity(found.flatten(), gradient.flatten(), dim=0) >= bound
