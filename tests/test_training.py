"""One step of the learner in each phase: what it changes, and what it leaves."""

import pytest
import torch
from torch import Tensor

import budgetnet as bn
from budgetnet.errors import DivergenceError
from budgetnet.sites import entropy, log_prob
from budgetnet.training import Learner, Sums


def learner(*budgets: str, **options: object) -> Learner:
    torch.manual_seed(0)
    network = bn.spaces.resnet_fabric(width=1, channels=4, in_channels=1, image_size=8)
    bound = [bn.Budget.parse(text).bind(network) for text in budgets or ("macs<=50%",)]
    chosen = bn.SearchOptions(**{"precision": "float32", "architectures": 4, **options})  # type: ignore[arg-type]
    return Learner(network, bound, chosen, ignore=None, device=torch.device("cpu"), dtype=torch.float32)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 1, 8, 8, generator=generator), torch.randint(10, (16,), generator=generator)


def step(one: Learner, phase: str = "search", *, seed: int = 0, progress: float = 1.0, rate: float = 0.1) -> Sums:
    sums = Sums()
    generator = torch.Generator().manual_seed(seed)
    one.step(*batch(seed), phase, generator=generator, rate=rate, progress=progress, sums=sums)
    return sums


def weights(one: Learner) -> Tensor:
    return torch.cat([value.detach().flatten().clone() for value in one.network.modules_on_edges.parameters()])


@pytest.mark.parametrize("phase", ["warmup", "finetune"])
def test_without_sampling_only_weights_are_learned(phase):
    one = learner()
    one.chosen = one.network.architecture("resnet")
    gates, before = one.network.gates.logits.detach().clone(), weights(one)
    sums = step(one, phase)
    assert torch.equal(one.network.gates.logits, gates)
    assert not torch.equal(weights(one), before)
    assert (sums.images, sums.samples) == (16, 0)


def test_a_dropped_edge_keeps_its_weights():
    """Neither gradient nor weight decay nor momentum reaches a module that no sample used."""
    one = learner()
    one.chosen = one.network.architecture("resnet")
    used = one.network.used(one.chosen)[0].bool().tolist()
    before = [[value.detach().clone() for value in module.parameters()] for module in one.network.modules_on_edges]
    step(one, "finetune")
    step(one, "finetune", seed=1)
    for kept, module, values in zip(used, one.network.modules_on_edges, before, strict=True):
        same = all(torch.equal(a, b) for a, b in zip(module.parameters(), values, strict=True))
        assert same != kept or not values


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_gates_have_no_weight_decay(optimizer):
    """With equal losses and no penalty nothing pulls the logits anywhere."""
    one = learner("macs<=100%", gate_optimizer=optimizer, weight_decay=0.5, exploration=0.0)
    one.begin_search()
    for module in one.network.modules_on_edges:
        for value in module.parameters():
            value.data.zero_()
    before = one.network.gates.logits.detach().clone()
    step(one, rate=0.0)
    torch.testing.assert_close(one.network.gates.logits.detach(), before, rtol=0, atol=1e-6)


def test_a_gate_step_of_sgd_is_the_rate_times_the_score_function_gradient():
    """`logits -= rate * mean_b (D_b - mean of the others) grad log_prob_b`, with every piece formed by hand."""
    one = learner(gate_optimizer="sgd", gate_rate=0.7, price=2.0, exploration=0.0)
    one.begin_search()
    network = one.network
    network.eval()
    logits = network.gates.logits.detach().clone().requires_grad_()
    kept = torch.bernoulli(logits.detach().sigmoid().expand(4, -1), generator=torch.Generator().manual_seed(3))
    x, y = batch(3)
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(network.run(x, network.used(kept)), y, reduction="none")
    cost = one.budgets[0].model(network.used(kept)).float()
    total = losses.reshape(4, 4).mean(dim=1) + 2.0 * (cost / one.budgets[0].limit - 1).clamp(min=0)
    advantage = torch.stack([total[b] - total[[i for i in range(4) if i != b]].mean() for b in range(4)])
    (advantage * log_prob(logits, kept, network.relevant(kept))).mean().backward()
    step(one, seed=3, rate=0.0)
    torch.testing.assert_close(network.gates.logits.detach(), logits.detach() - 0.7 * logits.grad)


def test_exploration_pulls_undecided_and_fades_with_the_falling_limit():
    """At progress 1 it is gone; before, its gradient is that of the relevant gates' mean entropy."""
    steps = {}
    for weight, progress in ((0.0, 0.25), (0.8, 0.25), (0.8, 1.0), (0.0, 1.0)):
        one = learner(gate_optimizer="sgd", gate_rate=1.0, price=0.0, exploration=weight)
        one.begin_search()
        step(one, progress=progress, rate=0.0)
        steps[weight, progress] = one.network.gates.logits.detach().clone()
    assert torch.equal(steps[0.8, 1.0], steps[0.0, 1.0])
    one = learner()
    logits = torch.full_like(one.network.gates.logits, 3.0).detach().requires_grad_()
    kept = torch.bernoulli(logits.detach().sigmoid().expand(4, -1), generator=torch.Generator().manual_seed(0))
    (one.network.relevant(kept) @ entropy(logits)).mean().backward()
    torch.testing.assert_close(steps[0.8, 0.25] - steps[0.0, 0.25], 0.8 * 0.75 * logits.grad)


def test_one_architecture_a_batch_is_compared_with_earlier_batches():
    """The first batch has nothing to be compared with; then the average moves by a tenth."""
    one = learner(architectures=1, baseline="moving-average", gate_optimizer="sgd", price=0.0, exploration=0.0)
    one.begin_search()
    before = one.network.gates.logits.detach().clone()
    first = step(one).loss / 16
    assert torch.equal(one.network.gates.logits, before)
    assert one.average == pytest.approx(first)
    second = step(one, seed=1).loss / 16
    assert not torch.equal(one.network.gates.logits, before)
    assert one.average == pytest.approx(0.9 * first + 0.1 * second)


def test_logits_stay_within_the_gate_limit():
    one = learner(gate_rate=100.0, gate_limit=4.0)
    one.begin_search()
    step(one)
    assert one.network.gates.logits.abs().max() == 4


def test_the_limit_falls_from_the_expected_cost():
    one = learner("macs<=25%", "params<=50%")
    one.begin_search()
    expected = [0.9 * budget.full < start <= budget.full for budget, start in zip(one.budgets, one.starts, strict=True)]
    assert all(expected)
    for budget, start, begin, half, end in zip(
        one.budgets, one.starts, one.limits(0.0), one.limits(0.5), one.limits(1.0), strict=True
    ):
        assert begin == pytest.approx(start)
        assert half == pytest.approx((start + budget.limit) / 2)
        assert end == budget.limit


def test_the_price_rises_while_the_samples_cost_too_much():
    one = learner("macs<=25%")
    one.begin_search()
    sums = step(one)
    over = sums.costs[0] / sums.samples / one.budgets[0].limit - 1
    assert over > 1
    assert one.prices[0].value == pytest.approx((one.options.integral + one.options.proportional) * over)


def test_the_log_says_what_a_step_paid_for_each_budget():
    one = learner("macs<=25%", "params<=100%")
    one.begin_search()
    first, paid = step(one), one.prices[0].value
    second = step(one, seed=1)
    assert first.prices == [0.0, 0.0]  # no price was known before
    assert second.prices == [pytest.approx(second.samples * paid), 0.0]  # a limit that everything keeps has no price
    assert paid > 0


@pytest.mark.parametrize(("ignored", "right"), [(4, False), (3, True)])
def test_images_without_a_class_are_neither_right_nor_wrong(ignored: int, right: bool):
    torch.manual_seed(0)
    network = bn.spaces.conv_fabric(width=2, depth=2, channels=3, classes=2, image_size=8, task="segmentation")
    bound, options = bn.Budget.parse("macs<=60%").bind(network), bn.SearchOptions(architectures=2, precision="float32")
    one = Learner(network, [bound], options, ignore=255, device=torch.device("cpu"), dtype=torch.float32)
    masks, sums = torch.full((4, 8, 8), 255), Sums()
    masks[ignored:] = 0
    x, generator = torch.randn(4, 3, 8, 8), torch.Generator()
    one.step(x, masks, "warmup", generator=generator, rate=0.0, progress=1.0, sums=sums)
    assert (0 < sums.right <= 4) if right else sums.right == 0
    assert (sums.loss > 0) is right


def test_a_loss_that_is_not_finite_changes_nothing():
    one = learner()
    before = weights(one)
    x, y = batch()
    with pytest.raises(DivergenceError, match=r"the loss must stay finite, got nan at learning rate 0\.1"):
        one.step(x * float("nan"), y, "warmup", generator=torch.Generator(), rate=0.1, progress=0.0, sums=Sums())
    assert torch.equal(weights(one), before)
