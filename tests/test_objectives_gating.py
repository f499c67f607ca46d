"""Losses on activation rates by summing over every outcome of the gates; their targets by recursion; distillation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small import every
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from budgetnet.errors import ConfigError
from budgetnet.objectives import (
    MovingTarget,
    SteppedTarget,
    batch_activation,
    const_quad,
    distillation,
    gate_weight_decay,
    per_gate,
)

EXACT = settings(deadline=None, derandomize=True)
SHARES = st.floats(0, 1)
UNDECIDED = st.floats(0.01, 0.99)


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def outcomes(probability: Tensor) -> tuple[Tensor, Tensor]:
    """All `(2**(B G), B, G)` outcomes of independent gates of `(B, G)` probabilities, and how probable each is."""
    kept = every(probability.numel(), torch.float64).view(-1, *probability.shape)
    return kept, torch.where(kept == 1, probability, 1 - probability).flatten(1).prod(dim=1)


def expected(loss: Callable[[Tensor], Tensor], probability: Tensor) -> float:
    """The expected loss of `(B, G)` gates."""
    kept, weight = outcomes(probability)
    return float(weight @ vmap(loss)(kept))


@st.composite
def tables(draw: st.DrawFn, values: st.SearchStrategy[float] = SHARES) -> list[list[float]]:
    """A row for each sample: as each input has it (conditional gates), or one and the same for all (pruning)."""
    rows, gates = draw(st.sampled_from([(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 3), (3, 2)]))
    if draw(st.booleans()):
        return [draw(st.lists(values, min_size=gates, max_size=gates)) for _ in range(rows)]
    return [draw(st.lists(values, min_size=gates, max_size=gates))] * rows


@EXACT
@given(tables(), SHARES, st.lists(st.integers(1, 9), min_size=4, max_size=4))
def test_the_expected_loss_is_the_squared_distance_of_the_mean_plus_the_variance(table, target, macs):
    """Section 3.1, for gates that cost alike and for gates that cost what they cost (section 3.4)."""
    p = tensor(table)
    for cost in (torch.ones(p.shape[1]).double(), tensor(macs[: p.shape[1]])):
        share = cost / cost.sum()
        mean, variance = (p @ share).mean(), (p * (1 - p) @ share**2).sum() / len(p) ** 2
        value = expected(lambda kept, share=share: batch_activation(kept @ share, target), p)
        assert value == pytest.approx(float((target - mean) ** 2 + variance), abs=1e-15)


@EXACT
@given(tables(st.sampled_from([0.0, 1.0]) | UNDECIDED), SHARES)
@example([[0.5, 0.5]], 0.5)  # on target, undecided
@example([[1.0, 0.0], [1.0, 0.0]], 0.5)
@example([[1.0, 0.0], [0.0, 1.0]], 0.5)
@example([[1.0, 1.0]], 0.5)  # decided, off target
def test_the_expected_loss_is_0_only_if_every_gate_is_decided(table, target):
    """Property 3.1. Deciding is not enough: the decided gates must also be on target."""
    p = tensor(table)
    value = expected(lambda kept: batch_activation(kept.mean(dim=1), target), p)
    undecided = ((p > 0) & (p < 1)).sum().item()
    assert value >= undecided * 0.01 * 0.99 / p.numel() ** 2 * (1 - 1e-9)
    if value == 0:
        assert undecided == 0
    if undecided == 0:
        assert value == pytest.approx((target - float(p.mean())) ** 2, abs=1e-15)


def test_the_batch_loss_leaves_many_networks_at_0_and_the_loss_of_each_gate_none_that_is_decided():
    """Of 2k = 4 gates that are always on or always off, any k can be on: 6 networks of 16."""
    networks = every(4).unsqueeze(1).expand(-1, 3, -1)  # (16, B, G): all rows alike
    by_batch = torch.stack([batch_activation(kept.mean(dim=1), 0.5) for kept in networks])
    by_gate = torch.stack([per_gate(kept, 0.5) for kept in networks])
    assert (by_batch == 0).sum() == math.comb(4, 2)
    assert by_gate.tolist() == [0.25] * 16


def test_one_gate_always_on_and_one_always_off():
    """What the batch loss allows at t = 1/2, the loss of each gate punishes; gates that alternate please both."""
    fixed, alternating = tensor([[1, 0], [1, 0]]), tensor([[1, 0], [0, 1]])
    assert batch_activation(fixed.mean(dim=1), 0.5) == 0
    assert per_gate(fixed, 0.5) == 0.25
    assert batch_activation(alternating.mean(dim=1), 0.5) == 0 == per_gate(alternating, 0.5)


@EXACT
@given(st.floats(-10, 10), st.floats(-10, 10))
def test_weight_decay_on_two_logits_draws_their_gate_to_one_half(off: float, on: float):
    """Eq. 2, with p the softmax of (w_0, w_1)."""
    q, p = tensor([off, on]).softmax(dim=0).tolist()
    assert off**2 + on**2 == pytest.approx(0.5 * ((off + on) ** 2 + math.log(q / p) ** 2), abs=1e-9)


def test_the_decay_of_gates_adds_up_to_the_same_however_many_they_are():
    """10^-4 is what the paper finds right for 10 to 20 gates; the share of a gate falls as their number grows."""
    assert gate_weight_decay(20) == 1e-4
    assert gate_weight_decay(1000) == pytest.approx(2e-6)
    for gates in (1, 16, 7000):
        logits = torch.full((gates, 2), 3.0, dtype=torch.float64)
        assert gate_weight_decay(gates) * float((logits**2).sum()) == pytest.approx(20 * 1e-4 * 18)


UNITS = st.fractions(0, 1, max_denominator=100)


@EXACT
@given(p=UNITS, one=UNITS, both=UNITS, weight=st.fractions(0, 4, max_denominator=100))
@example(p=Fraction(1, 2), one=Fraction(3, 10), both=Fraction(7, 10), weight=Fraction(0))  # a_2 / a_1 > 2
@example(p=Fraction(1, 2), one=Fraction(4, 10), both=Fraction(7, 10), weight=Fraction(0))  # a_2 / a_1 < 2
@example(p=Fraction(1, 2), one=Fraction(3, 10), both=Fraction(6, 10), weight=Fraction(0))  # a_2 / a_1 = 2
def test_of_two_layers_with_one_on_in_the_mean_a_decided_network_is_more_accurate_unless_two_are_twice_as_good(
    p: Fraction, one: Fraction, both: Fraction, weight: Fraction
):
    """Observation 4.2, in exact fractions, over the 4 outcomes; a network without layers is never right.

    Printed is "if and only if a_2 / a_1 >= 2", but the derivation below it ends in 2 < a_2 / a_1 as what an
    *undecided* network needs: the sentence has the direction reversed. A decided one is better iff a_2 < 2 a_1.
    With a weight on the batch activation loss it is better iff a_2 < 2 a_1 + weight / 2: always from 2 on.
    """

    def objective(first: Fraction, weight: Fraction) -> Fraction:
        value = Fraction(0)
        for on in product((0, 1), repeat=2):
            probability = (first if on[0] else 1 - first) * (1 - first if on[1] else first)
            loss = Fraction(batch_activation(tensor(on).mean(dim=0, keepdim=True), 0.5).item())
            value += probability * ((Fraction(0), one, both)[sum(on)] - weight * loss)
        return value

    assert objective(Fraction(0), weight) == objective(Fraction(1), weight) == one
    assert objective(p, Fraction(0)) == (1 - 2 * p + 2 * p**2) * one + p * (1 - p) * both
    if 0 < p < 1:
        assert (one > objective(p, Fraction(0))) == (both < 2 * one)
        assert (one > objective(p, weight)) == (both < 2 * one + weight / 2)


def test_rates_by_hand():
    """A mean of 1/2: beyond a target of 1/4, below one of 3/4, where the piecewise loss asks nothing."""
    for target, loss, free, slope, free_slope in (
        (0.25, 0.0625, 0.0625, 0.25, 0.25),
        (0.5, 0, 0, 0, 0),
        (0.75, 0.0625, 0, -0.25, 0),
    ):
        for function, value, gradient in ((batch_activation, loss, slope), (const_quad, free, free_slope)):
            rate = tensor([0.25, 0.75]).requires_grad_()
            result = function(rate, target)
            assert (result.shape, result.item()) == ((), value)
            (found,) = torch.autograd.grad(result, rate)
            assert found.tolist() == [gradient, gradient]  # 2 (mean - t) / B


@EXACT
@given(st.lists(st.floats(0, 1.5), min_size=1, max_size=6), SHARES)
def test_losses_of_a_batch_against_sums(rates: list[float], target: float):
    mean = sum(rates) / len(rates)
    assert batch_activation(tensor(rates), target).item() == pytest.approx((target - mean) ** 2, abs=1e-15)
    assert const_quad(tensor(rates), target).item() == pytest.approx(max(0, mean - target) ** 2, abs=1e-15)


@EXACT
@given(tables(), st.lists(SHARES, min_size=4, max_size=4))
def test_the_loss_of_each_gate_against_sums(table, targets):
    rows, gates = len(table), len(table[0])
    means = [sum(row[g] for row in table) / rows for g in range(gates)]
    one = sum((targets[0] - mean) ** 2 for mean in means) / gates
    each = sum((t - mean) ** 2 for t, mean in zip(targets, means, strict=False)) / gates
    assert per_gate(tensor(table), targets[0]).item() == pytest.approx(one, abs=1e-15)
    assert per_gate(tensor(table), tensor(targets[:gates])).item() == pytest.approx(each, abs=1e-15)


def test_the_loss_of_each_gate_by_hand_and_its_gradient():
    """Gates on in 1/2 and in all of the batch, against 1/2 for both and against their own rates."""
    kept = torch.tensor([[0.0, 1.0], [1.0, 1.0]], requires_grad=True)
    assert per_gate(kept, torch.tensor([0.5, 1.0])) == 0
    assert per_gate(kept, torch.tensor([1, 0])) == (0.25 + 1) / 2
    value = per_gate(kept, 0.5)
    assert (value.shape, value.item()) == ((), 0.125)
    value.backward()
    assert kept.grad.tolist() == [[0, 0.25], [0, 0.25]]  # 2 (mean - t) / (B G)


def test_an_exit_may_be_taken_more_often_than_it_is_asked_to_be():
    """Rates 1/2 and 1 of two gates each, one of which is an exit: 0 above its target, the square below it."""
    kept = torch.tensor([[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]], requires_grad=True)
    value = per_gate(kept, torch.tensor([0.25, 0.25, 1.0, 0.0]), at_least=[0, 3])
    assert value == 0.25**2 / 4
    value.backward()
    assert kept.grad.tolist() == [[0, 0.0625, 0, 0]] * 2  # 2 (mean - t) / (B G)
    assert per_gate(kept, torch.tensor([0.75, 0.5, 1.0, 1.0]), at_least=[0, 3]) == 0.25**2 / 4


def test_a_stepped_target_falls_as_the_paper_has_it():
    """By 0.05 every 5 epochs from 1: not inside an epoch, not at the first, and never below the target."""
    target = SteppedTarget(0.8)
    assert [target(epoch) for epoch in range(25)] == pytest.approx([1 - 0.05 * (epoch // 5) for epoch in range(25)])
    assert [target(epoch) for epoch in (0, 4.99, 5, 9.99)] == [1, 1, 0.95, 0.95]
    assert [SteppedTarget(0.87)(epoch) for epoch in (10, 15, 20, 1e6)] == [0.9, 0.87, 0.87, 0.87]
    assert SteppedTarget(0.3)(70) == 0.3  # where 1 - 14 * 0.05 rounds to less


def test_a_stepped_target_starts_falls_and_waits_as_told():
    """Figure 23's .8 .7 .6, and each option by itself."""
    told = [SteppedTarget(0.6, start=0.8, fall=0.1, every=2)(epoch) for epoch in range(6)]
    assert told == pytest.approx([0.8, 0.8, 0.7, 0.7, 0.6, 0.6])
    assert SteppedTarget(0.1, start=0.75)(5) == pytest.approx(0.7)
    assert SteppedTarget(0.1, fall=0.25)(5) == 0.75
    assert [SteppedTarget(0.1, every=1)(epoch) for epoch in (0.9, 1, 2)] == pytest.approx([1, 0.95, 0.9])
    assert SteppedTarget(0.5, start=0.5)(0) == 0.5


EPOCHS = st.lists(st.lists(SHARES, max_size=8), min_size=1, max_size=3)


@EXACT
@given(SHARES, EPOCHS)
def test_a_moving_target_is_the_mean_of_its_start_and_the_rates_of_its_epoch(start: float, epochs):
    target = MovingTarget(start)
    for rates in epochs:
        target.begin_epoch()
        assert (target.value, target.seen) == (start, 0)
        for count in range(1, len(rates) + 1):
            target.update(rates[count - 1])
            assert target.value == pytest.approx((start + sum(rates[:count])) / (1 + count), abs=1e-12)
            assert 0 <= target.value <= 1
            assert target.seen == count


@EXACT
@given(SHARES, st.floats(0, 0.99), EPOCHS)
def test_an_exponential_target_forgets_its_start_and_the_rates_of_its_epoch(start: float, decay: float, epochs):
    target = MovingTarget(start, kind="exponential", decay=decay)
    for rates in epochs:
        target.begin_epoch()
        assert (target.value, target.seen) == (start, 0)
        weights = [decay ** len(rates)] + [(1 - decay) * decay**age for age in reversed(range(len(rates)))]
        for rate in rates:
            target.update(rate)
            assert 0 <= target.value <= 1
        whole = sum(weight * value for weight, value in zip(weights, [start, *rates], strict=True))
        assert target.value == pytest.approx(whole, abs=1e-12)


def test_moving_targets_by_hand():
    """Rates 0.5 and 0.25 after a start of 1; and an epoch that begins as it did."""
    for target, values in (
        (MovingTarget(1.0), [0.75, (1 + 0.5 + 0.25) / 3]),
        (MovingTarget(1.0, kind="exponential"), [0.95, 0.88]),
        (MovingTarget(1.0, kind="exponential", decay=0.5), [0.75, 0.5]),
    ):
        for _ in range(2):
            assert target.value == 1
            for rate, value in zip((0.5, 0.25), values, strict=True):
                target.update(rate)
                assert target.value == pytest.approx(value)
            target.begin_epoch()


def test_a_rate_above_1_moves_the_target_no_further_than_1():
    target = MovingTarget(0.5)
    target.update(1.5)
    assert target.value == 0.75


@pytest.mark.parametrize("kind", ["moving", "exponential"])
def test_a_moving_target_goes_on_from_a_checkpoint_bit_for_bit(kind: str):
    """Its state is a float and an int, and survives JSON."""
    rates = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    whole = MovingTarget(0.9, kind=kind)
    for rate in rates[:7]:
        whole.update(rate)
    assert (type(whole.value), type(whole.seen)) == (float, int)
    state = json.loads(json.dumps([whole.value, whole.seen]))
    resumed = MovingTarget(0.9, kind=kind)
    resumed.value, resumed.seen = state
    for rate in rates[7:]:
        whole.update(rate)
        resumed.update(rate)
        assert resumed == whole


def logits(*shape: int, seed: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 2, 4)], ids=["classes", "masks"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distillation_is_the_divergence_that_torch_computes(shape: tuple[int, ...], temperature: float):
    student, teacher = logits(*shape, seed=0), logits(*shape, seed=1)
    loss = distillation(student, teacher, temperature)
    assert loss.shape == (5,)
    for row, ours, theirs in zip(loss, student, teacher, strict=True):
        pixels = [x.flatten(1).T if x.ndim > 1 else x[None] for x in (ours / temperature, theirs / temperature)]
        reference = F.kl_div(pixels[0].log_softmax(1), pixels[1].softmax(1), reduction="batchmean")
        torch.testing.assert_close(row, temperature**2 * reference)


def test_distillation_by_hand():
    """Teacher (1/2, 1/2), student (1/4, 3/4): ln(2) / 2 + ln(2/3) / 2, from teacher to student; T is 1 unless told."""
    student, teacher = torch.tensor([[1.0, 3.0]]).log(), torch.zeros(1, 2)
    assert distillation(student, teacher).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    backward = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert distillation(teacher, student).item() == pytest.approx(backward)


@EXACT
@given(st.floats(0.1, 20), st.integers(0, 100))
def test_a_student_that_equals_its_teacher_up_to_a_shift_has_nothing_to_learn(temperature: float, seed: int):
    teacher = logits(2, 4, 2, 2, seed=seed)
    assert distillation(teacher, teacher, temperature).tolist() == [0, 0]
    assert distillation(teacher + 1, teacher, temperature).tolist() == pytest.approx([0, 0], abs=1e-3)
    assert distillation(teacher + logits(2, 4, 2, 2, seed=seed + 1), teacher, temperature).min() > 0


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_student_alone_gets_a_gradient(temperature: float):
    """`T (softmax(student / T) - softmax(teacher / T))`, that of the cross-entropy with soft labels times T^2."""
    student, teacher = logits(4, 3, seed=0).requires_grad_(), logits(4, 3, seed=1).requires_grad_()
    distillation(student, teacher, temperature).sum().backward()
    gap = (student / temperature).softmax(1) - (teacher / temperature).softmax(1)
    torch.testing.assert_close(student.grad, (temperature * gap).detach())
    assert teacher.grad is None


def test_distillation_takes_bfloat16_logits_in_float32():
    student, teacher = logits(4, 3, seed=0).bfloat16(), logits(4, 3, seed=1).bfloat16()
    torch.testing.assert_close(distillation(student, teacher), distillation(student.float(), teacher.float()))


RATE, KEPT = torch.ones(2), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        *(
            (lambda loss=loss, rate=rate, target=target: loss(rate, target), line)
            for loss in (batch_activation, const_quad)
            for rate, target, line in (
                (KEPT, 0.5, "rate must be (B,) floats, B >= 1, got (2, 3) torch.float32"),
                (torch.ones(()), 0.5, "rate must be (B,) floats, B >= 1, got () torch.float32"),
                (torch.ones(0), 0.5, "rate must be (B,) floats, B >= 1, got (0,) torch.float32"),
                (RATE.long(), 0.5, "rate must be (B,) floats, B >= 1, got (2,) torch.int64"),
                (RATE, -0.1, "target must lie in [0, 1], got -0.1"),
                (RATE, 40, "target must lie in [0, 1], got 40"),
                (RATE, math.nan, "target must lie in [0, 1], got nan"),
            )
        ),
        (lambda: per_gate(RATE, 0.5), "kept must be (B, G) floats, B and G >= 1, got (2,) torch.float32"),
        (lambda: per_gate(KEPT[:0], 0.5), "kept must be (B, G) floats, B and G >= 1, got (0, 3) torch.float32"),
        (lambda: per_gate(KEPT[:, :0], 0.5), "kept must be (B, G) floats, B and G >= 1, got (2, 0) torch.float32"),
        (lambda: per_gate(KEPT.bool(), 0.5), "kept must be (B, G) floats, B and G >= 1, got (2, 3) torch.bool"),
        (lambda: per_gate(KEPT, 1.5), "target must lie in [0, 1], got 1.5"),
        (lambda: per_gate(KEPT, torch.ones(2)), "target must be a number or (3,) of them, got (2,)"),
        (lambda: per_gate(KEPT, torch.ones(1, 3)), "target must be a number or (3,) of them, got (1, 3)"),
        (lambda: per_gate(KEPT, torch.tensor([0.5, 1, 2])), "target must lie in [0, 1], got 2.0"),
        (lambda: per_gate(KEPT, torch.tensor([0.5, -1, 1])), "target must lie in [0, 1], got -1.0"),
        (lambda: per_gate(KEPT, torch.tensor([0.5, math.nan, 1])), "target must lie in [0, 1], got nan"),
        (lambda: SteppedTarget(0.5)(-1), "epoch must be a number >= 0, got -1"),
        (lambda: SteppedTarget(-0.1), "target must lie in [0, 1], got -0.1"),
        (lambda: SteppedTarget(0.5, start=0.4), "start must lie between the target 0.5 and 1, got 0.4"),
        (lambda: SteppedTarget(0.5, start=1.1), "start must lie between the target 0.5 and 1, got 1.1"),
        (lambda: SteppedTarget(0.5, fall=0.0), "fall must lie in (0, 1], got 0.0"),
        (lambda: SteppedTarget(0.5, fall=2.0), "fall must lie in (0, 1], got 2.0"),
        (lambda: SteppedTarget(0.5, every=0), "every must be a whole number >= 1, got 0"),
        (lambda: SteppedTarget(0.5, every=2.5), "every must be a whole number >= 1, got 2.5"),
        (lambda: SteppedTarget(0.5)(-0.5), "epoch must be a number >= 0, got -0.5"),
        (lambda: SteppedTarget(0.5)(math.inf), "epoch must be a number >= 0, got inf"),
        (lambda: MovingTarget(1.5), "start must lie in [0, 1], got 1.5"),
        (lambda: MovingTarget(0.5, kind="mean"), "kind must be moving or exponential, got 'mean'"),
        (lambda: MovingTarget(0.5, decay=1.0), "decay must be >= 0 and < 1, got 1.0"),
        (lambda: MovingTarget(0.5, decay=-0.1), "decay must be >= 0 and < 1, got -0.1"),
        (lambda: MovingTarget(0.5).update(-0.1), "a batch's rate must be a number >= 0, got -0.1"),
        (lambda: MovingTarget(0.5).update(math.nan), "a batch's rate must be a number >= 0, got nan"),
        (lambda: MovingTarget(0.5).update(math.inf), "a batch's rate must be a number >= 0, got inf"),
        (lambda: gate_weight_decay(0), "gates must be a whole number >= 1, got 0"),
        (lambda: gate_weight_decay(1.5), "gates must be a whole number >= 1, got 1.5"),
        (
            lambda: distillation(KEPT, torch.ones(3, 2)),
            "student and teacher must both be (B, classes) or (B, classes, H, W), got (2, 3) and (3, 2)",
        ),
        (
            lambda: distillation(RATE, RATE),
            "student and teacher must both be (B, classes) or (B, classes, H, W), got (2,) and (2,)",
        ),
        (lambda: distillation(KEPT, KEPT, 0.0), "temperature must be a number > 0, got 0.0"),
        (lambda: distillation(KEPT, KEPT, math.inf), "temperature must be a number > 0, got inf"),
    ],
)
def test_what_is_out_of_range_is_one_clear_line(call: Callable[[], object], line: str):
    with pytest.raises(ConfigError) as caught:
        call()
    assert str(caught.value) == line
