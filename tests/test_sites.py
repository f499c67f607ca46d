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
from budgetnet.sites import (
    AlwaysOn,
    AnswerGate,
    Certainty,
    ConditionalGates,
    FeatureGate,
    Fixed,
    Gates,
    Gumbel,
    Sample,
    Threshold,
    entropy,
    log_prob,
)

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
        (lambda: Gumbel(0), "architectures must be >= 1, got 0"),
        (lambda: Gumbel(temperature=0), "temperature must be > 0, got 0"),
        (lambda: Gumbel(temperature=math.nan), "temperature must be > 0, got nan"),
        (lambda: Threshold(1.1), r"tau must lie in \[0, 1\], got 1.1"),
        (lambda: Threshold(-0.1), r"tau must lie in \[0, 1\], got -0.1"),
    ],
)
def test_policies_outside_their_range(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_gumbel_decisions_are_bernoulli_variables(temperature: float):
    """Whatever the temperature: `sigmoid((logit + noise) / T)` is over 1/2 where the logit and its noise are over 0."""
    draws, logits = 20_000, torch.tensor([-2.0, 0.0, 0.7, 4.0])
    kept = Gumbel(draws, temperature, generator=generator())(logits, WHOLE)
    probability = logits.sigmoid()
    error = (probability * (1 - probability) / draws).sqrt()
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert ((kept.mean(dim=0) - probability).abs() <= 4 * error).all()
    together = float((kept[:, 1] * kept[:, 2]).mean())
    assert together == pytest.approx(float(probability[1] * probability[2]), abs=4 * 0.5 / math.sqrt(draws))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_hard_gumbel_decisions_have_the_gradient_of_soft_ones(temperature: float):
    """`soft = sigmoid((logit + noise) / T)` of the same noise, whose derivative is `soft (1 - soft) / T`."""
    logits = torch.randn(5, generator=generator()).double().requires_grad_()
    hard, soft = (Gumbel(3, temperature, way, generator(1))(logits, WHOLE) for way in (True, False))
    assert torch.equal(hard, (soft > 0.5).double())
    noise = torch.logit(torch.rand(3, 5, generator=generator(1)), eps=1e-7)
    torch.testing.assert_close(soft, torch.sigmoid((logits + noise) / temperature))
    weight = torch.randn(3, 5, generator=generator(2)).double()
    gradients = [torch.autograd.grad((kept * weight).sum(), logits)[0] for kept in (hard, soft)]
    assert torch.equal(*gradients)
    torch.testing.assert_close(gradients[0], (weight * soft * (1 - soft) / temperature).sum(dim=0).detach())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_gumbel_without_noise_decides_as_a_threshold_does_and_learns_on(temperature: float):
    logits = torch.randn(2, 5, generator=generator()).double().requires_grad_()
    kept, soft = (Gumbel(2, temperature, hard, None, noisy=False)(logits, WHOLE) for hard in (True, False))
    assert torch.equal(kept.detach(), Threshold(0.5)(logits.detach(), WHOLE))
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    probability = torch.sigmoid(logits / temperature)
    torch.testing.assert_close(soft, probability)
    (gradient,) = torch.autograd.grad(kept.sum(), logits)
    torch.testing.assert_close(gradient, (probability * (1 - probability) / temperature).detach())


def test_soft_gumbel_decisions_come_to_bits_as_the_temperature_falls():
    logits = torch.randn(6, generator=generator())
    warm, cold = (Gumbel(2000, temperature, False, generator(1))(logits, WHOLE) for temperature in (1.0, 1e-3))
    bits = Gumbel(2000, generator=generator(1))(logits, WHOLE)
    assert ((warm > 0) & (warm < 1)).all()
    assert float((cold - bits).abs().mean()) < 1e-3 < float((warm - bits).abs().mean())


def test_gumbel_stays_finite_where_a_probability_rounds_to_one():
    logits = torch.tensor([80.0, -80.0], requires_grad=True)
    kept = Gumbel(1000, generator=generator())(logits, slice(0, 2))
    kept.sum().backward()
    assert torch.equal(kept.detach(), torch.tensor([1.0, 0.0]).expand(1000, 2))
    assert torch.isfinite(logits.grad).all()


def test_gumbel_samples_of_conditional_logits_have_their_rows():
    logits = torch.tensor([[50.0, -50.0], [-50.0, 50.0], [50.0, 50.0]])
    assert Gumbel(1, generator=generator())(logits, slice(0, 2)).tolist() == [[1, 0], [0, 1], [1, 1]]


def smooth(kept: torch.Tensor) -> torch.Tensor:
    """A loss of `(..., n)` decisions that is linear in none of them, nor a sum over them."""
    return (kept * torch.tensor([0.8, -1.3], dtype=kept.dtype)[: kept.shape[-1]]).sum(dim=-1).exp() + kept[..., 0] ** 3


def integral_gradient(logits: torch.Tensor, temperature: float, hard: bool) -> torch.Tensor:
    """Of the expected `smooth` loss, by the midpoint rule on the `(n,)` uniform variables behind the noise.

    Soft: the derivative of `E[f(soft)]`. Straight-through: `E[f'(hard) d soft / d logit]`, each derived for itself.
    """
    points = 200_000 if len(logits) == 1 else 2000
    middles = (torch.arange(points).double() + 0.5) / points
    uniform = torch.cartesian_prod(*[middles] * len(logits)).reshape(-1, len(logits))
    logits = logits.double().requires_grad_()
    reached = logits + uniform.log() - (-uniform).log1p()
    if not hard:
        return torch.autograd.grad(smooth((reached / temperature).sigmoid()).mean(), logits)[0]
    bits = (reached.detach() > 0).double().requires_grad_()
    slope = torch.autograd.grad(smooth(bits).sum(), bits)[0]
    soft = (reached.detach() / temperature).sigmoid()
    return (slope * soft * (1 - soft) / temperature).mean(dim=0)


@pytest.mark.parametrize("pairs", [False, True], ids=["one logit", "two logits"])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "straight-through"])
@pytest.mark.parametrize("temperature", [0.7, 2.0])
@pytest.mark.parametrize("starts", [[0.6], [-0.9, 0.4]], ids=["one gate", "two gates"])
def test_gumbel_gradients_have_the_mean_that_integrals_give(starts, temperature, hard, pairs):
    """Within 5 standard errors of 40,000 draws, the errors a hundredth of the gradient or so."""
    draws, gates, logits = 40_000, Gates(len(starts), pairs=pairs), torch.tensor(starts)
    with torch.no_grad():
        gates.values.copy_(torch.stack([0.3 - logits / 4, 0.3 + 3 * logits / 4]) if pairs else logits)
    each = gates.logits.expand(draws, -1)
    each.retain_grad()
    smooth(Gumbel(1, temperature, hard, generator())(each, slice(0, len(starts)))).sum().backward()
    found, error = each.grad.mean(dim=0), each.grad.std(dim=0) / math.sqrt(draws)
    exact = integral_gradient(logits, temperature, hard)
    assert ((found - exact).abs() <= 5 * error).all()
    assert (error < 0.02 * exact.abs() + 1e-3).all()
    shared = gates.values.grad / draws
    torch.testing.assert_close(shared, torch.stack([-found, found]) if pairs else found, rtol=1e-3, atol=1e-5)


@given(st.integers(0, 2**16), st.floats(0.5, 6))
def test_gates_of_two_logits_behave_as_gates_of_their_difference(seed: int, bound: float):
    """Probability, gradient, start and bounds, wherever the two logits stand."""
    values = 4 * torch.randn(2, 5, generator=generator(seed))
    one, two = Gates(5), Gates(5, pairs=True)
    torch.testing.assert_close(two.logits, one.logits)
    with torch.no_grad():
        two.values.copy_(values)
        one.values.copy_(values[1] - values[0])
    assert torch.equal(two.logits, one.logits)
    # a probability of either is softmax over the pair
    torch.testing.assert_close(one.logits.sigmoid(), values.softmax(dim=0)[1])
    for gates in (one, two):
        entropy(gates.logits).sum().backward()
    assert torch.equal(two.values.grad, torch.stack([-one.values.grad, one.values.grad]))
    for gates in (one, two):
        gates.clamp(bound)
    torch.testing.assert_close(two.logits, one.logits)
    assert (two.logits.abs() <= bound + 1e-5).all()
    torch.testing.assert_close(two.values.sum(dim=0), values.sum(dim=0), rtol=1e-4, atol=1e-4)
    for start in (-1.5, 0.0, bound):
        for gates in (one, two):
            gates.reset(start)
            torch.testing.assert_close(gates.logits, torch.full((5,), start))
        assert not two.values.sum(dim=0).any()


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_conditional_gates_start_at_their_bias_and_look_at_the_average_of_each_channel(pairs, memory, count):
    torch.manual_seed(0)
    gates = ConditionalGates(5, count, hidden=4, pairs=pairs, memory=memory, start=1.5)
    x = torch.randn(6, 5, 4, 3)
    logits = gates(x)
    assert logits.shape == (6, count)
    assert (logits - 1.5).abs().max() < 0.5  # weights of standard deviation 0.01 on 4 normalised features
    torch.testing.assert_close(gates.average.detach(), torch.full((count,), 1.5))
    gates.reset(-2.0)
    torch.testing.assert_close(gates.average.detach(), torch.full((count,), -2.0))
    gates.eval()
    torch.testing.assert_close(gates(x), gates(x.mean(dim=(2, 3), keepdim=True).expand_as(x)))
    learned = sum(value.numel() for value in gates.parameters())
    recall = 2 * (count * count + count) + 2 * count if memory else 0
    assert learned == (5 + 1) * 4 * count + 2 * 4 * count + (4 + 1) * (1 + pairs) * count + recall


def test_each_conditional_gate_has_features_of_its_own_and_memory_shows_it_the_others():
    """Seen from the gradient of one gate's logit to what leads to the other's."""
    torch.manual_seed(0)
    x = torch.randn(6, 5, 4, 3)
    for memory in (False, True):
        gates = ConditionalGates(5, 2, hidden=4, pairs=False, memory=memory)
        if memory:  # as after its first step
            torch.nn.init.normal_(gates.recall[-1].weight)
        (gradient,) = torch.autograd.grad(gates(x)[:, 0].square().sum(), gates.decide.weight)
        assert gradient[0].any()
        assert bool(gradient[1].any()) == memory


def test_exit_gates_may_look_at_averages_of_squares():
    torch.manual_seed(0)
    whole, pooled = FeatureGate(3, hidden=4).eval(), FeatureGate(3, hidden=4, pool=2).eval()
    with torch.no_grad():
        for ours, theirs in zip(pooled.parameters(), whole.parameters(), strict=True):
            ours.copy_(theirs)
    x = torch.randn(5, 3, 16, 16)
    small = x.unflatten(3, (8, 2)).mean(dim=4).unflatten(2, (8, 2)).mean(dim=3)
    torch.testing.assert_close(pooled(x), whole(small))
    assert not torch.allclose(pooled(x), whole(x))


def test_how_sure_an_answer_is():
    x = torch.tensor([[math.log(3.0), 0.0, 0.0], [50.0, 0.0, 0.0], [1.0, 1.0, 1.0]], requires_grad=True)
    seen = Certainty()(x)
    entropy = -(0.6 * math.log(0.6) + 0.4 * math.log(0.2))
    expected = torch.tensor([[0.6, 0.4, entropy], [1.0, 1.0, 0.0], [1 / 3, 0.0, math.log(3.0)]])
    torch.testing.assert_close(seen, expected)
    assert not seen.requires_grad, "to be sure is no aim of its own"


def test_the_gate_of_an_answer_leaves_where_it_is_sure():
    gate = AnswerGate(4, start=0.0).eval()
    with torch.no_grad():
        gate.decide.weight.copy_(torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, -1.0]]))
    sure, unsure = gate(torch.tensor([[9.0, 0, 0, 0], [0.1, 0, 0, 0]])).flatten().tolist()
    assert sure > 0 > unsure
    with pytest.raises(ConfigError, match="how sure an answer is shows from 2 classes on, got 1"):
        AnswerGate(1)


def test_exit_gates_look_at_more_than_averages():
    torch.manual_seed(0)
    gates = FeatureGate(3, hidden=4, start=-1.0).eval()
    x = torch.randn(5, 3, 8, 8)
    assert gates(x).shape == (5, 1)
    assert not torch.allclose(gates(x), gates(x.mean(dim=(2, 3), keepdim=True).expand_as(x)))
    torch.testing.assert_close(gates.average.detach(), torch.tensor([-1.0]))
    gates.reset(2.5)
    torch.testing.assert_close(gates.average.detach(), torch.tensor([2.5]))


@pytest.mark.parametrize(
    "build",
    [
        lambda: ConditionalGates(3, 4),
        lambda: ConditionalGates(3, 4, pairs=False),
        lambda: ConditionalGates(3, 4, memory=True),
        lambda: FeatureGate(3, hidden=4),
    ],
)
def test_gates_that_look_at_the_input_are_shifted_whatever_it_is(build):
    torch.manual_seed(0)
    gates, x = build().eval(), torch.randn(5, 3, 8, 8)
    for value in gates.parameters():  # what starts at 0 must not hide a path
        torch.nn.init.normal_(value)
    before = gates(x)
    gates.shift(1.5)
    torch.testing.assert_close(gates(x), before + 1.5)


@pytest.mark.parametrize("pairs", [False, True])
def test_gates_of_their_own_are_shifted(pairs):
    gates = Gates(3, start=-0.5, pairs=pairs)
    gates.shift(2.0)
    torch.testing.assert_close(gates.logits, torch.full((3,), 1.5))
    assert not pairs or torch.equal(gates.values[0], -gates.values[1])
