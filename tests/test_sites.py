"""Gates are Bernoulli variables, by `torch.distributions`; what each policy decides."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import every
from torch.distributions import Bernoulli

from budgetnet.errors import ConfigError
from budgetnet.sites import AlwaysOn, Fixed, Gates, Sample, Threshold, entropy, log_prob

LOGITS = torch.tensor([-2.0, 0.0, 0.7, 30.0])
WHOLE = slice(0, 4)


def test_log_prob_is_that_of_bernoulli_variables():
    kept = every(4)[:, [1, 2, 3, 0]]
    logits = LOGITS[:3].double()
    expected = Bernoulli(logits=logits).log_prob(kept[:, :3].double()).sum(dim=1)
    torch.testing.assert_close(log_prob(logits, kept[:, :3].double(), torch.ones(16, 3)), expected)


def test_log_prob_leaves_out_what_does_not_count():
    kept, counted = every(3).repeat_interleave(8, dim=0), every(3).repeat(8, 1)
    each = Bernoulli(logits=LOGITS[:3]).log_prob(kept)
    torch.testing.assert_close(log_prob(LOGITS[:3], kept, counted), (each * counted).sum(dim=1))


def test_log_prob_takes_a_row_of_logits_for_each_architecture():
    logits, kept = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), every(3)[:5]
    expected = Bernoulli(logits=logits).log_prob(kept).sum(dim=1)
    torch.testing.assert_close(log_prob(logits, kept, torch.ones(5, 3)), expected)


def test_log_prob_stays_finite_where_a_probability_rounds_to_one():
    """sigmoid(40) is 1 in float32, and log(1 - 1) would be -inf."""
    logits = torch.tensor([40.0], requires_grad=True)
    value = log_prob(logits, torch.zeros(1, 1), torch.ones(1, 1))
    value.backward()
    assert value.item() == pytest.approx(-40)
    assert logits.grad.item() == pytest.approx(-1)


@given(st.floats(-30, 30))
def test_entropy_is_that_of_a_bernoulli_variable(logit: float):
    value = torch.tensor(logit, dtype=torch.float64)
    torch.testing.assert_close(entropy(value), Bernoulli(logits=value).entropy(), rtol=1e-6, atol=1e-9)


def test_entropy_is_ln_2_where_undecided_and_0_where_certain():
    torch.testing.assert_close(entropy(torch.tensor([0.0, 80.0, -80.0])), torch.tensor([math.log(2), 0.0, 0.0]))


def test_gates_start_at_the_papers_probability():
    assert Gates(3).logits.sigmoid().tolist() == pytest.approx([0.9526] * 3, abs=5e-5)


def test_samples_occur_as_often_as_their_probability_says():
    draws = 20_000
    kept = Sample(draws, torch.Generator().manual_seed(0))(LOGITS, WHOLE)
    probability = LOGITS.sigmoid()
    error = (probability * (1 - probability) / draws).sqrt()
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert ((kept.mean(dim=0) - probability).abs() <= 4 * error + 1e-6).all()
    # gates are independent: a pair is kept as often as the product says
    together = float((kept[:, 1] * kept[:, 2]).mean())
    assert together == pytest.approx(float(probability[1] * probability[2]), abs=4 * 0.5 / math.sqrt(draws))


def test_a_sample_is_a_function_of_its_generator():
    draws = [Sample(7, torch.Generator().manual_seed(seed))(LOGITS, WHOLE) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_sample_of_conditional_logits_has_their_rows():
    logits = torch.tensor([[50.0, -50.0], [-50.0, 50.0], [50.0, 50.0]])
    assert Sample(1, torch.Generator())(logits, WHOLE).tolist() == [[1, 0], [0, 1], [1, 1]]


@pytest.mark.parametrize(
    ("tau", "kept"), [(0.5, [0, 0, 1, 1]), (0.49, [0, 1, 1, 1]), (0, [1, 1, 1, 1]), (0.99, [0, 0, 0, 1])]
)
def test_threshold_keeps_what_is_more_probable_than_tau(tau: float, kept: list[int]):
    """At 0.5 a gate of logit 0 is not kept: the inequality is strict."""
    assert Threshold(tau)(LOGITS, WHOLE).tolist() == [kept]


def test_always_on_keeps_all():
    assert AlwaysOn()(LOGITS, WHOLE).tolist() == [[1, 1, 1, 1]]
    assert AlwaysOn()(LOGITS.expand(3, 4), WHOLE).tolist() == [[1, 1, 1, 1]] * 3


def test_fixed_decisions_are_the_columns_of_their_site():
    kept = Fixed(torch.tensor([[True, False, True, True]]))(LOGITS[1:3].double(), slice(1, 3))
    assert (kept.tolist(), kept.dtype) == ([[0.0, 1.0]], torch.float64)


@pytest.mark.parametrize(
    "policy", [Sample(2, torch.Generator().manual_seed(0)), Threshold(), AlwaysOn(), Fixed(torch.ones(1, 4))]
)
def test_decisions_carry_no_gradient(policy):
    assert not policy(LOGITS.clone().requires_grad_(), WHOLE).requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sample(0), "architectures must be >= 1, got 0"),
        (lambda: Threshold(1.1), r"tau must lie in \[0, 1\], got 1.1"),
        (lambda: Threshold(-0.1), r"tau must lie in \[0, 1\], got -0.1"),
    ],
)
def test_policies_outside_their_range(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
