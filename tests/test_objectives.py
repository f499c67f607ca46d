"""Penalties and prices by closed form; the gradient estimators by summing over every outcome."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import every, random_graph, reachable
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.func import grad, vmap
from torch.nn import functional as F

from budgetnet.errors import ConfigError
from budgetnet.graph import Graph
from budgetnet.objectives import (
    Price,
    annealed,
    example_losses,
    hinge,
    per_architecture,
    score_function_loss,
    squared,
)
from budgetnet.sites import log_prob


class Enumerated:
    """All 2**E architectures of a small graph, a loss for each set of used edges, and the logits of their edges.

    An estimate from the pair (i, j) of architectures has probability `p_i p_j`, so means and
    variances are finite sums.
    """

    def __init__(self, graph: Graph, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.kept = every(len(graph.edges), torch.float64)
        used, outcome = graph.used(self.kept).unique(dim=0, return_inverse=True)
        self.total = torch.randn(len(used), dtype=torch.float64, generator=generator)[outcome]
        self.logits = 1.5 * torch.randn(len(graph.edges), dtype=torch.float64, generator=generator)
        self.probability = log_prob(self.logits, self.kept, torch.ones_like(self.kept)).exp()
        self.pairs = torch.cartesian_prod(torch.arange(len(self.kept)), torch.arange(len(self.kept)))
        self.relevant = graph.relevant(self.kept)
        self.reached = torch.tensor(
            [[float(start in reachable(graph, bits)[0]) for start, _ in graph.edges] for bits in self.kept.tolist()],
            dtype=torch.float64,
        )

    def exact(self) -> Tensor:
        """Gradient of the expected loss in the logits."""

        def expected(logits: Tensor) -> Tensor:
            return log_prob(logits, self.kept, torch.ones_like(self.kept)).exp() @ self.total

        return grad(expected)(self.logits)

    def estimates(self, counted: Tensor, baseline: str | float = "leave-one-out") -> tuple[Tensor, Tensor]:
        """What each pair of architectures estimates, `(P, E)`, and its probability `(P,)`."""
        scores = jacobian(lambda logits: log_prob(logits, self.kept, counted), self.logits)  # (2**E, E)

        def surrogate(log_probs: Tensor, total: Tensor) -> Tensor:
            return score_function_loss(torch.zeros_like(total), total, log_probs, baseline=baseline)

        weights = vmap(grad(surrogate))(torch.zeros(self.pairs.shape).double(), self.total[self.pairs])  # (P, 2)
        estimates = torch.einsum("pb,pbe->pe", weights, scores[self.pairs])
        return estimates, self.probability[self.pairs].prod(dim=1)

    def variance(self, counted: Tensor, baseline: str = "leave-one-out", scale: float = 1.0) -> float:
        """Trace of the covariance of an estimate from two samples."""
        estimates, probability = self.estimates(counted, baseline)
        estimates = scale * estimates
        mean = probability @ estimates
        return float(probability @ ((estimates - mean) ** 2).sum(dim=1))


SMALL = [random_graph(seed, nodes=4, extra=2) for seed in range(6)]
ENUMERATED = [Enumerated(graph, seed) for seed, graph in enumerate(SMALL)]


@pytest.mark.parametrize("case", ENUMERATED, ids=[f"{len(graph.edges)} edges" for graph in SMALL])
def test_score_function_gradient_is_unbiased_whichever_irrelevant_decisions_count(case: Enumerated):
    """All decisions, those that the input reaches (the paper's sampling), and those that matter: one expectation."""
    for counted in (torch.ones_like(case.kept), case.reached, case.relevant):
        estimates, probability = case.estimates(counted)
        torch.testing.assert_close(probability @ estimates, case.exact())


@pytest.mark.parametrize("case", ENUMERATED)
def test_the_batch_mean_shrinks_the_gradient_by_one_part_in_b(case: Enumerated):
    """A sample's own loss is half of a batch of two, so the estimate is half of what it should be."""
    estimates, probability = case.estimates(case.relevant, "batch-mean")
    torch.testing.assert_close(2 * probability @ estimates, case.exact())


@pytest.mark.parametrize("baseline", [0.0, -1.3])
@pytest.mark.parametrize("case", ENUMERATED)
def test_a_baseline_that_does_not_look_at_the_samples_is_unbiased(case: Enumerated, baseline: float):
    estimates, probability = case.estimates(case.relevant, baseline)
    torch.testing.assert_close(probability @ estimates, case.exact())


@pytest.mark.parametrize("case", ENUMERATED)
def test_decisions_that_do_not_matter_only_add_variance(case: Enumerated):
    """Never less with them, and strictly more wherever one can be irrelevant.

    The reference counts every decision and subtracts the batch mean, own sample included; times
    B / (B - 1) its expectation is ours.
    """
    ours = case.variance(case.relevant)
    reached = case.variance(case.reached)
    all_decisions = case.variance(torch.ones_like(case.kept))
    reference = case.variance(torch.ones_like(case.kept), "batch-mean", scale=2)
    assert bool((case.relevant == 0).any())
    assert ours < reached < all_decisions or ours < all_decisions == pytest.approx(reached)
    assert reference == pytest.approx(all_decisions)


@pytest.mark.parametrize("case", ENUMERATED)
def test_the_variance_saved_is_that_of_the_irrelevant_scores(case: Enumerated):
    """`1/2 E[(D_1 - D_2)^2 sum_e (1 - relevant_1e) s_1e^2]`: cross terms vanish, as the mean score is 0."""
    saved = case.variance(torch.ones_like(case.kept)) - case.variance(case.relevant)
    score = case.kept - case.logits.sigmoid()
    gap = (case.total[:, None] - case.total) ** 2
    irrelevant = ((1 - case.relevant) * score**2).sum(dim=1)
    expected = 0.5 * case.probability @ (gap @ case.probability * irrelevant)
    assert saved == pytest.approx(float(expected))


def test_score_function_loss_by_hand():
    """Totals 1, 3, 8: less the mean of the others they are -4.5, -1.5, 6; the weights follow the mean loss."""
    loss = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    log_probs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    value = score_function_loss(loss, torch.tensor([0.0, 1.0, 5.0]), log_probs)
    value.backward()
    assert value.item() == pytest.approx(2 + (4.5 + 3 - 18) / 3)
    torch.testing.assert_close(loss.grad, torch.full((3,), 1 / 3))
    torch.testing.assert_close(log_probs.grad, torch.tensor([-1.5, -0.5, 2.0]))


def test_a_penalty_gets_no_gradient():
    penalty = torch.ones(2, requires_grad=True)
    score_function_loss(torch.ones(2, requires_grad=True), penalty, torch.ones(2, requires_grad=True)).backward()
    assert penalty.grad is None


def test_baselines_that_cannot_be():
    with pytest.raises(ConfigError, match="leave-one-out or batch-mean or a number, got 'none'"):
        score_function_loss(torch.ones(2), torch.ones(2), torch.ones(2), baseline="none")
    with pytest.raises(ConfigError, match="needs at least 2 architectures a batch, got 1"):
        score_function_loss(torch.ones(1), torch.ones(1), torch.ones(1))


@given(st.floats(0, 100), st.floats(0.1, 100))
def test_hinge_is_what_is_over_the_limit_and_squared_the_distance_from_either_side(cost: float, limit: float):
    excess = torch.tensor([cost / limit - 1], dtype=torch.float64)
    assert hinge(excess).item() == pytest.approx(max(0.0, cost - limit) / limit)
    assert squared(excess).item() == pytest.approx(((cost - limit) / limit) ** 2)


@given(st.floats(1, 1e9), st.floats(1, 1e9), st.floats(0, 1))
def test_annealed_limits_fall_in_a_straight_line_and_never_below_the_limit(start: float, limit: float, progress: float):
    value = annealed(start, limit, progress)
    assert value >= limit
    assert value == pytest.approx(max(limit, (1 - progress) * start + progress * limit))


def test_annealed_ends_at_the_limit():
    assert [annealed(10, 4, progress) for progress in (0, 0.5, 1)] == [10, 7, 4]


@given(st.lists(st.floats(-1, 2), max_size=20), st.floats(0, 20), st.floats(0, 1))
def test_the_price_is_the_clipped_sum_of_excesses_and_never_negative(excesses, proportional, integral):
    price, total = Price(proportional=proportional, integral=integral), 0.0
    for excess in excesses:
        price.update(excess)
        total = max(0.0, total + integral * excess)
        assert price.accumulated == total
        assert price.value == max(0.0, total + proportional * excess)


@given(st.floats(0.01, 3))
def test_the_price_rises_over_the_limit_and_falls_back_to_nothing_under_it(excess: float):
    price, values = Price(proportional=10.0, integral=0.05), []
    for _ in range(10):
        price.update(excess)
        values.append(price.value)
    assert values == sorted(set(values))  # strictly rising
    for _ in range(10):
        price.update(-excess)
        assert price.value < values[-1]
    for _ in range(10):
        price.update(-excess)
    assert (price.accumulated, price.value) == (pytest.approx(0), 0)


@given(st.lists(st.floats(-1, 2), max_size=20), st.floats(0, 20), st.floats(0, 1))
def test_the_price_of_a_target_is_the_sum_of_excesses_with_its_sign(excesses, proportional, integral):
    price, total = Price(proportional=proportional, integral=integral, signed=True), 0.0
    for excess in excesses:
        price.update(excess)
        total += integral * excess
        assert price.accumulated == total
        assert price.value == total + proportional * excess


def test_a_fixed_price_stays():
    price = Price(proportional=10.0, integral=0.05, fixed=0.25)
    price.update(5.0)
    assert (price.value, price.accumulated) == (0.25, 0)


@pytest.mark.parametrize("option", ["proportional", "integral", "fixed"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_gains_outside_their_range(option: str, value: float):
    with pytest.raises(ConfigError, match=f"{option} must be >= 0, got {value}"):
        Price(**{"proportional": 10.0, "integral": 0.05, option: value})


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 20))
def test_losses_are_averaged_over_the_slices_that_architectures_serve(examples: int, architectures: int):
    """K architectures of B examples: the first B mod K slices are one longer."""
    architectures = min(examples, architectures)
    loss, expected, start = torch.arange(examples).double() ** 2, [], 0
    for k in range(architectures):
        size = examples // architectures + (k < examples % architectures)
        expected.append(loss[start : start + size].mean())
        start += size
    torch.testing.assert_close(per_architecture(loss, architectures), torch.stack(expected))


def test_a_loss_for_each_image_is_its_cross_entropy():
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 1, 2, 2, 1])
    expected = torch.stack([-row.log_softmax(0)[label] for row, label in zip(logits, target, strict=True)])
    torch.testing.assert_close(example_losses(logits, target, None), expected)


@pytest.mark.parametrize("ignore", [None, 1, 255])
def test_a_loss_for_each_mask_is_the_mean_over_its_pixels_that_count(ignore: int | None):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 3, 2, 4, generator=generator)
    target = torch.randint(0, 3, (3, 2, 4), generator=generator)
    if ignore == 255:
        target[0, 0] = 255
    expected = []
    for example in range(3):
        pixels = [
            F.cross_entropy(logits[example, :, i, j], target[example, i, j])
            for i in range(2)
            for j in range(4)
            if target[example, i, j] != ignore
        ]
        expected.append(torch.stack(pixels).mean())
    torch.testing.assert_close(example_losses(logits, target, ignore), torch.stack(expected))


def test_a_mask_without_a_pixel_that_counts_has_no_loss():
    logits = torch.ones(1, 2, 2, 2, requires_grad=True)
    loss = example_losses(logits, torch.full((1, 2, 2), 255), 255)
    assert loss.tolist() == [0]


def test_losses_are_taken_in_float32_of_a_bfloat16_output():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert example_losses(logits, torch.tensor([0, 1, 2, 0]), None).dtype == torch.float32
