"""Learning gates on channels, layers and exits: estimators, penalties, targets, distillation, checkpoints."""

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import budgetnet as bn
from budgetnet import objectives
from budgetnet.errors import ConfigError
from budgetnet.gated import memory_format
from budgetnet.inference import Inference
from budgetnet.runs import RunFolder
from budgetnet.sites import AlwaysOn, Fixed, Gumbel, entropy, log_prob
from budgetnet.steering import prepare
from budgetnet.training import Learner, Sums

small_resnet = partial(bn.spaces.resnet, depth=8, channels=4, image_size=8, in_channels=1)
small_exits = partial(bn.spaces.densenet_exits, depth=10, growth=4, image_size=8, in_channels=1, exit_channels=8)


def learner(space, *budgets: str, seed: int = 0, **options) -> Learner:
    torch.manual_seed(seed)
    network = space()
    bound = [bn.Budget.parse(text).bind(network) for text in budgets or ("macs<=50%",)]
    chosen = bn.SearchOptions(**{"precision": "float32"} | options)
    return Learner(network, bound, chosen, ignore=None, device=torch.device("cpu"), dtype=torch.float32)


def step(one: Learner, phase: str = "search", *, seed: int = 0, progress: float = 1.0, epochs: float = 0.0) -> Sums:
    sums, data = Sums(), torch.Generator().manual_seed(seed)
    x, y = torch.randn(16, 1, 8, 8, generator=data), torch.randint(10, (16,), generator=data)
    generator = torch.Generator().manual_seed(100 + seed)
    one.step(x, y, phase, generator=generator, rate=0.05, progress=progress, sums=sums, epochs=epochs)
    return sums


def sampled(one: Learner, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of a batch, and the decisions that carry its gradient."""
    data = torch.Generator().manual_seed(seed)
    x, y = torch.randn(16, 1, 8, 8, generator=data), torch.randint(10, (16,), generator=data)
    output, kept = one.network(x, one.policy("search", 16, torch.Generator().manual_seed(100 + seed)))
    return objectives.example_losses(output, y, None), kept


def test_what_is_left_open_follows_from_what_has_gates():
    assert bn.SearchOptions().resolved().estimator == "score"
    gated = bn.SearchOptions().resolved(gated=True)
    assert (gated.estimator, gated.gate_start, gated.finetune, gated.architectures) == ("gumbel", 2.0, 0.7, "example")
    assert bn.SearchOptions(gate_start=1.0).resolved(gated=True).gate_start == 1.0
    assert bn.SearchOptions().resolved(conditional=True, gated=True).finetune == 0
    assert bn.SearchOptions(estimator="score").resolved(gated=True).architectures == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "score"}, "gates that look at the input are learned by the estimator gumbel, got score"),
        ({"architectures": 4}, "gates that look at the input decide for each example, got 4"),
        ({"finetune": 0.2}, "gates that look at the input leave nothing to fine-tune, got finetune 0.2"),
    ],
)
def test_what_gates_that_look_at_the_input_cannot_do(options, message):
    with pytest.raises(ConfigError, match=message):
        bn.SearchOptions(**options).resolved(conditional=True)


def test_the_score_function_needs_samples_to_the_end():
    with pytest.raises(ConfigError, match=r"the score function needs samples to the end, got noiseless 0\.2"):
        bn.SearchOptions(estimator="score", noiseless=0.2).resolved()


@pytest.mark.parametrize("options", [{"conditional": True}, {}])
def test_the_last_part_of_a_search_decides_without_noise(options):
    """From then on nothing is random, and gates learn on."""
    space, given = partial(small_resnet, **options), {"epochs": 10, "warmup": 0.2, "noiseless": 0.5}
    given |= {} if options else {"finetune": 0.0}
    one = learner(space, **given)
    one.begin_search()
    other = copy.deepcopy(one)
    x, y = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
    for epochs, alike in ((4.0, True), (3.9, False)):
        before = every_gate(one.network)
        for each, seed in ((one, 0), (other, 1)):
            generator = torch.Generator().manual_seed(seed)
            each.step(x, y, "search", generator=generator, rate=0.05, progress=1.0, sums=Sums(), epochs=epochs)
        assert torch.equal(every_weight(one.network), every_weight(other.network)) is alike
        assert not torch.equal(every_gate(one.network), before)


@pytest.mark.parametrize("options", [{}, {"memory": True}, {"gates": "both", "logits": 1}])
def test_gates_that_look_at_the_input_cost_without_noise_what_they_cost_with_it(options):
    """With probabilities near .45 all would close; they are moved together, and nothing else is."""
    one = learner(partial(small_resnet, conditional=True, granularity=1, **options))
    for head in one.network.heads.values():
        nn.init.normal_(head.decide.weight, std=0.1, generator=torch.Generator().manual_seed(0))
        head.reset(-0.2)
    others = {name: value.clone() for name, value in one.network.state_dict().items() if not name.endswith(".bias")}
    images, generator = torch.randn(4, 256, 1, 8, 8), torch.Generator().manual_seed(0)

    @torch.no_grad()
    def cost(noisy: bool) -> float:
        network = copy.deepcopy(one.network)
        used = [network.used(network(x, Gumbel(256, generator=generator, noisy=noisy))[1]) for x in images]
        return float(one.budgets[0].model(torch.cat(used)).mean())

    drawn = cost(noisy=True)
    assert cost(noisy=False) < 0.8 * drawn
    one.end_noise(images, generator)
    assert cost(noisy=False) == pytest.approx(drawn, rel=0.09)  # three deviations of two draws for 1,024 images
    after = one.network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in others.items())


@pytest.mark.usefixtures("no_files")
@pytest.mark.parametrize(("noiseless", "times"), [(None, 1), (0.0, 0)])
def test_noise_ends_once_in_a_search(noiseless, times, monkeypatch, tmp_path):
    ended = []
    monkeypatch.setattr(Learner, "end_noise", lambda self, batches, *_: ended.append(len(list(batches))))
    digits = bn.data.load("digits").subset(256, seed=0)
    options = bn.SearchOptions(epochs=4, warmup=0.25, noiseless=noiseless, recalibration=2)
    bn.search(small_resnet(conditional=True), digits, ["macs<=90%"], options, out=tmp_path / "run")
    assert ended == [2] * times


def every_gate(network: bn.SuperNetwork) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in (*network.gates.parameters(), *network.heads.parameters())])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", 0), ("temperature", True), ("target_every", 0), ("target_fall", -1), ("gate_decay", "much")),
        *(("estimator", "reinforce"), ("penalty", "hinge"), ("target", "cosine"), ("distillation", -0.5)),
        ("exit_supervision", -1),
        *(("distillation_temperature", 0.0), ("distillation_temperature", float("inf"))),
    ],
)
def test_options_of_gates_are_checked_when_they_are_made(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be"):
        bn.SearchOptions(**{name: value})


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        ("price", lambda cost, full, limit, kept: objectives.hinge(cost / limit - 1).mean()),
        ("batch-activation", lambda cost, full, limit, kept: objectives.batch_activation(cost / full, limit / full)),
        ("const-quad", lambda cost, full, limit, kept: objectives.const_quad(cost / full, limit / full)),
        ("per-gate", lambda cost, full, limit, kept: objectives.per_gate(kept, limit / full)),
    ],
)
@pytest.mark.parametrize("limit", ["50%", "95%"], ids=["over", "under"])
def test_under_gumbel_loss_and_differentiable_costs_enter_as_they_are(penalty, expected, limit):
    """The objective and its gradient are those of the formula on the same sample, over the limit and under it."""
    one = learner(small_resnet, f"macs<={limit}", penalty=penalty, price=3.0)
    one.begin_search()
    losses, kept = sampled(one)
    value = one.search_objective(losses, kept, 1.0, 0.0, Sums())
    (gradient,) = torch.autograd.grad(value, one.network.gates.values, retain_graph=True)
    budget = one.budgets[0]
    cost = budget.model(one.network.pathwise(kept))
    assert (cost.mean() > budget.limit) == (limit == "50%")
    by_hand = losses.mean() + 3.0 * expected(cost, budget.full, budget.limit, kept)
    (reference,) = torch.autograd.grad(by_hand, one.network.gates.values)
    torch.testing.assert_close(value, by_hand)
    torch.testing.assert_close(gradient, reference)
    assert gradient.abs().sum() > 0


def test_layers_may_have_rates_of_their_own():
    """An edge with all that is in it, a place in it, or several by a pattern; the last that fits a gate decides."""
    rates = {"g1.0.block": 1, "*.block.hidden0": 0.25, "g2.?.block": 0.0, "g0.0.block.hidden0": 0.75}
    one = learner(partial(small_resnet, gates="both"), penalty="per-gate", price=3.0, target_rates=rates)
    network, losses, kept = one.network, *sampled(one)
    one.begin_search()
    names = ["g0.0.block", "g1.0.block", "g2.0.block"]
    assert [network.edge_names[edge] for edge in network.choices] == names
    own = {None: [0.5, 1.0, 0.0], "g0.0.block": [0.75] * 4, "g1.0.block": [0.25] * 8, "g2.0.block": [0.0] * 16}
    asked = torch.tensor([rate for given in own.values() for rate in given])
    value = one.search_objective(losses, kept, 1.0, 0.0, Sums())
    torch.testing.assert_close(value, losses.mean() + 3.0 * objectives.per_gate(kept, asked))


def test_layers_are_drawn_to_the_rates_that_are_asked_of_them():
    one = learner(small_resnet, penalty="per-gate", price=50.0, gate_rate=0.3, target_rates={"g0.*": 1, "g2.*": 0.2})
    one.begin_search()
    for place in range(60):
        step(one, seed=place)
    opened = one.network.probabilities().split([4, 8, 16])
    assert [float(part.mean()) for part in opened] == pytest.approx([1, 0.5, 0.2], abs=0.1)


def test_each_exit_is_asked_for_its_share_of_the_images_at_least():
    """Gates that start at 0.27 stay where less is asked, and open where more is."""
    rates = {"d0.exit": 0.1, "d1.exit": 0.75}
    one = learner(small_exits, "layers<=80%", penalty="per-gate", price=100.0, target_rates=rates)
    one.begin_search()
    losses, kept = sampled(one)
    objective = one.search_objective(losses, kept, 1.0, 0.0, Sums()) - losses.mean()
    seen, (first, second) = kept.detach().mean(dim=0), (one.network.heads[str(edge)] for edge in one.network.exits)
    assert seen[0] > 0.1
    assert seen[1] < 0.75
    assert objective.item() == pytest.approx(100 * (0.75 - float(seen[1])) ** 2 / 2, rel=1e-4)
    objective.backward()
    assert first.decide.bias.grad is None or not first.decide.bias.grad.any()
    assert second.decide.bias.grad[1] < 0


def test_const_quad_asks_nothing_of_a_batch_below_its_target():
    """Eq. 3 is 0 there, where Eq. 1 pulls gates open."""
    gradients = []
    for penalty in ("const-quad", "batch-activation"):
        one = learner(small_resnet, "macs<=95%", penalty=penalty, price=100.0)
        one.begin_search()
        losses, kept = sampled(one)
        objective = one.search_objective(losses, kept, 1.0, 0.0, Sums()) - losses.mean()
        gradients.append(torch.autograd.grad(objective, one.network.gates.values)[0])
    assert not gradients[0].any()
    assert (gradients[1] < 0).all()


def test_a_cost_without_a_gradient_enters_through_the_score_function():
    """Steps on 2 workers under Gumbel: the objective is the loss and the score function of the penalty alone."""
    space = partial(bn.spaces.resnet_fabric, width=1, channels=4, image_size=8, in_channels=1)
    one = learner(space, "steps:2<=60%", estimator="gumbel", architectures=4, price=2.0)
    one.begin_search()
    losses, kept = sampled(one)
    assert kept.requires_grad
    value = one.search_objective(losses, kept, 1.0, 0.0, Sums())
    budget, hard = one.budgets[0], kept.detach()
    penalty = 2.0 * budget.penalty(budget.model(one.network.used(hard)), budget.limit).float()
    score = log_prob(one.network.gates.logits, hard, one.network.relevant(hard))
    by_hand = losses.mean() + objectives.score_function_loss(torch.zeros(4), penalty, score)
    gradients = [torch.autograd.grad(v, one.network.gates.values, retain_graph=True)[0] for v in (value, by_hand)]
    torch.testing.assert_close(*gradients)
    assert penalty.std() > 0


@pytest.mark.parametrize("wanted", ["more", "fewer"])
def test_a_search_comes_to_its_target_from_either_side_and_stays(wanted: str):
    """A squared distance at a price that only ever rises ends where its slope is that of the loss, 7 to 15 % away."""
    one = learner(small_resnet, "macs~=50%", gate_start=1.0)
    network, (budget,) = one.network, one.budgets
    one.begin_search()
    costs, params, steps = list[float](), bn.costs.Params().bind(network), 200
    full = float(params(network.used(network.architecture("full")))[0])
    for place in range(steps):
        policy = one.policy("search", 64, torch.Generator().manual_seed(place))
        kept = policy(network.gates.logits, slice(0, network.gate_count))
        share = params(network.pathwise(kept)).float() / full
        sums, losses = Sums(), 1 - share if wanted == "more" else 1 + share
        one.gate_optimizer.zero_grad()
        one.search_objective(losses, kept, min(1.0, 2 * place / steps), 0.0, sums).backward()
        one.step_gates()
        costs.append(sums.costs[0] / sums.samples / budget.limit)
    assert sum(costs[-30:]) / 30 == pytest.approx(1, abs=0.03)
    assert all(abs(cost - 1) < 0.08 for cost in costs[-30:])
    assert (one.prices[0].accumulated > 0) == (wanted == "more")


def test_exploration_pulls_gates_under_gumbel_too():
    losses_of = {}
    for weight in (0.0, 0.8):
        one = learner(small_resnet, price=0.0, exploration=weight)
        one.begin_search()
        losses, kept = sampled(one)
        losses_of[weight] = one.search_objective(losses, kept, 0.25, 0.0, Sums())
    hard, gates = (kept.detach() > 0.5).float(), one.network.gates.logits
    undecided = (one.network.relevant(hard) @ entropy(gates)).mean()
    torch.testing.assert_close(losses_of[0.8] - losses_of[0.0], -0.8 * 0.75 * undecided.double())


small_fabric = partial(bn.spaces.resnet_fabric, width=1, channels=4, image_size=8, in_channels=1, classes=10)
by_input = partial(small_resnet, conditional=True)


@pytest.mark.parametrize(
    ("space", "budgets", "options", "message"),
    [
        (by_input, ["steps:2<=90%"], {}, "need a cost with a gradient, such as macs, got steps:2"),
        (small_fabric, ["macs<=50%"], {"penalty": "const-quad"}, "const-quad needs .*, got macs under score"),
        (small_fabric, ["macs<=50%"], {"penalty": "per-gate"}, "per-gate needs .*, got macs under score"),
        (small_resnet, ["steps:2<=90%"], {"penalty": "batch-activation"}, "needs .*, got steps:2 under gumbel"),
        (by_input, ["macs<=50%"], {"gate_rate": 5.0}, "gate_rate is of gates that do not look at the input, got 5.0"),
        (by_input, ["macs<=50%"], {"gate_optimizer": "sgd"}, "gate_optimizer is of gates that do not look"),
        (by_input, ["macs<=50%"], {"gate_limit": 1.0}, "gate_limit is of gates that do not look"),
        (by_input, ["macs<=50%"], {"exploration": 0.1}, "exploration is of gates that do not look"),
        (
            small_resnet,
            ["macs<=50%"],
            {"penalty": "per-gate", "target_rates": {"g0.*": 1, "*.skip": 0.5}},
            r"target_rates must name layers with gates, such as 'g0\.0\.block', got '\*\.skip'",
        ),
        (
            small_exits,
            ["layers<=80%"],
            {"penalty": "per-gate", "target_rates": {"d0.exit": 0.3}},
            "per-gate needs the rate of each exit in target_rates, got none for 'd1.exit'",
        ),
        (small_exits, ["activation<=0.5"], {"penalty": "const-quad"}, "penalty const-quad is of .* activation is 0"),
        (small_exits, ["activation<=0.5"], {"target": "stepped"}, "target stepped is of .* activation is 0"),
        (small_resnet, ["macs<=50%"], {"target": "stepped"}, "come down to macs's limit, 50 % of .*, got 100 %"),
        (small_resnet, ["macs<=50%"], {"exit_supervision": 0.5}, "exit_supervision is of networks with exits, got 0.5"),
        (small_resnet, ["macs<=50%", "macs~=48%"], {}, "a cost has one budget, got 2 of macs"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_is_said_before_anything_begins(space, budgets, options, message, tmp_path):
    data, out = bn.data.load("digits"), tmp_path / "run"
    with pytest.raises(ConfigError, match=message):
        bn.search(space(), data, budgets, bn.SearchOptions(epochs=2, **options), out=out)
    assert not out.exists()


@pytest.mark.parametrize("kind", ["score", "gated", "conditional"])
@pytest.mark.parametrize("epochs", range(1, 12))
def test_default_phases_fit_into_every_run(kind, epochs):
    found = bn.SearchOptions(epochs=epochs).resolved(conditional=kind == "conditional", gated=kind == "gated")
    phases = [found.phase(epoch) for epoch in range(epochs)]
    assert "search" in phases
    assert found.resolved(conditional=kind == "conditional", gated=kind == "gated") == found
    assert bn.SearchOptions(epochs=4, warmup=0.5).resolved(conditional=True).warmup_epochs == 2


@pytest.mark.parametrize("estimator", ["score", "gumbel"])
def test_open_gates_are_counted_over_all_samples(estimator):
    one = learner(small_resnet, estimator=estimator)
    one.begin_search()
    sums, opened = Sums(), torch.zeros(one.network.gate_count)
    for seed in range(2):
        losses, kept = sampled(one, seed)
        one.search_objective(losses, kept, 1.0, 0.0, sums)
        opened += kept.detach().sum(dim=0)
    assert sums.opened == opened.tolist()
    assert sums.samples == 32


def test_the_score_function_learns_channel_gates():
    """REINFORCE on channels: several architectures a batch, each masked for its own examples."""
    one = learner(small_resnet, estimator="score", architectures=4)
    one.begin_search()
    before = one.network.gates.logits.detach().clone()
    sums = step(one)
    assert sums.samples == 4
    assert not torch.equal(one.network.gates.logits, before)


def test_soft_gumbel_and_temperature_change_the_sample():
    hard, soft = learner(small_resnet), learner(small_resnet, estimator="soft-gumbel")
    warm = learner(small_resnet, estimator="soft-gumbel", temperature=5.0)
    bits = [sampled(one)[1].detach() for one in (hard, soft, warm)]
    assert set(bits[0].unique().tolist()) <= {0.0, 1.0}
    assert ((bits[1] > 0) & (bits[1] < 1)).all()
    assert torch.equal(bits[1] > 0.5, bits[0] > 0.5)  # the same noise
    assert (bits[2] - 0.5).abs().mean() < (bits[1] - 0.5).abs().mean()


def test_each_target_comes_down_in_its_own_way():
    linear = learner(small_resnet)
    linear.begin_search()
    start, limit, full = linear.starts[0], linear.budgets[0].limit, linear.budgets[0].full
    assert linear.limits(0.0) == [start]
    assert linear.limits(0.5) == [pytest.approx((start + limit) / 2)]
    constant = learner(small_resnet, target="constant")
    constant.begin_search()
    assert [constant.limits(*at) for at in ((0.0, 0.0), (0.5, 3.0), (1.0, 60.0))] == [[limit]] * 3
    step(constant)
    stepped = learner(small_resnet, target="stepped", target_fall=0.2, target_every=2)
    stepped.begin_search()
    shares = [stepped.limits(0.0, epochs)[0] / full for epochs in (0, 1.9, 2, 4, 6, 60)]
    assert shares == pytest.approx([1.0, 1.0, 0.8, 0.6, 0.5, 0.5])
    for kind, decay in (("moving", None), ("exponential", 0.9), ("exponential", 0.25)):
        one = learner(small_resnet, target=kind, **({} if decay in (None, 0.9) else {"target_decay": decay}))
        one.begin_search()
        assert one.limits(0.0) == [limit]
        sums = step(one)
        rate = sums.costs[0] / sums.samples / full
        followed = (0.5 + rate) / 2 if decay is None else decay * 0.5 + (1 - decay) * rate
        assert one.limits(0.0) == [pytest.approx(followed * full)]
        one.begin_epoch()
        assert one.limits(0.0) == [limit]


def test_a_stepped_target_has_to_reach_its_limit_while_there_is_an_epoch_left():
    """It is at half after five of its steps, in the sixth five epochs of the search."""
    stepped = {"target": "stepped", "target_fall": 0.1, "warmup": 0.0, "finetune": 0.0}
    prepare(small_resnet(), ["macs<=50%", "params<=120%"], bn.SearchOptions(epochs=26, **stepped))
    with pytest.raises(ConfigError, match=r"50 % of the full cost, in the search, got 60 %: search for longer"):
        prepare(small_resnet(), ["macs<=50%"], bn.SearchOptions(epochs=25, **stepped))


@pytest.mark.parametrize("target", ["moving", "exponential", "stepped"])
def test_a_limit_above_the_full_cost_is_the_full_cost_for_targets_of_shares(target):
    one = learner(small_resnet, "macs<=120%", target=target)
    one.begin_search()
    assert one.limits(0.0) == [one.budgets[0].full]
    step(one)


def test_where_targets_start_can_be_said():
    """A stepped one falls from there, a moving one begins each epoch there."""
    stepped = learner(small_resnet, "macs<=50%", target="stepped", target_fall=0.1, target_every=1, target_start=0.8)
    full = stepped.budgets[0].full
    assert [stepped.limits(0.0, epochs)[0] / full for epochs in range(5)] == pytest.approx([0.8, 0.7, 0.6, 0.5, 0.5])
    moving = learner(small_resnet, "macs<=50%", target="moving", target_start=0.3)
    assert moving.limits(0.0)[0] == pytest.approx(0.3 * full)
    moving.begin_search()
    step(moving)
    assert moving.limits(0.0)[0] > 0.3 * full
    moving.begin_epoch()
    assert moving.limits(0.0)[0] == pytest.approx(0.3 * full)
    for options in (
        {"target_start": 0.5},
        {"target_start": 0.5, "target": "constant"},
        {"target_start": 1.5, "target": "stepped"},
    ):
        with pytest.raises(ConfigError, match="target_start must be a share of the full cost, of a stepped or moving"):
            bn.SearchOptions(**options)


def test_weight_decay_of_gates_follows_the_rule():
    assert learner(small_resnet).gate_optimizer.param_groups[0]["weight_decay"] == 0
    one = learner(small_resnet, gate_decay="papers")
    assert one.gate_optimizer.param_groups[0]["weight_decay"] == pytest.approx(20 / one.network.gate_count * 1e-4)
    conditional = learner(partial(small_resnet, conditional=True), gate_decay=0.3)
    assert {group["weight_decay"] for group in conditional.optimizer.param_groups} == {5e-4, 0.3}


def test_a_limit_on_what_the_full_network_has_nothing_of():
    """It takes no exit, so none of its gates is open."""
    one = learner(small_exits, "layers<=80%", "activation<=0.5")
    assert one.budgets[1].full == 0
    one.begin_search()
    assert step(one).costs[1] > 0
    assert all(torch.isfinite(value).all() for value in one.network.parameters())


def test_the_last_layer_of_a_head_learns_slower_the_more_it_sums():
    one = learner(small_exits, "layers<=80%")
    one.begin_search()
    step(one)
    rates = {group["lr"] / 0.05 for group in one.optimizer.param_groups}
    fan_in = next(iter(one.network.heads.values())).decide.weight[0].numel()
    assert rates == {1.0, 1 / fan_in}


def test_a_search_begins_with_layers_open_and_exits_closed():
    one = learner(partial(small_exits), "layers<=80%", gate_start=3.0)
    one.begin_search()
    assert one.network.probabilities().tolist() == pytest.approx([torch.tensor(-1.0).sigmoid().item()] * 2)
    conditional = learner(partial(small_resnet, conditional=True), gate_start=3.0)
    conditional.begin_search()
    expected = torch.full((conditional.network.gate_count,), 3.0).sigmoid()
    torch.testing.assert_close(conditional.network.probabilities(), expected)


def test_warm_up_teaches_every_way_out():
    one = learner(small_exits, "layers<=80%")
    ways = one.network.ways()
    assert len(ways) == 3
    full = one.network.used(one.network.architecture("full"))
    assert torch.equal(one.network.used(ways[2:]), full)
    exits = [edge for edge in one.network.visits if edge in one.network.exits]
    assert [one.network.used(ways)[row, edge].item() for row, edge in enumerate(exits)] == [1, 1]
    step(one, "warmup")
    heads = [one.network.modules_on_edges[edge] for edge in exits]
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for head in heads for value in head.parameters())


def test_the_full_network_teaches_its_samples_and_then_the_chosen_one_with_weights_of_its_own():
    plain, taught = learner(small_resnet), learner(small_resnet, distillation=2.0)
    for one in (plain, taught):
        one.begin_search()
        step(one)
    assert not torch.equal(every_weight(plain.network), every_weight(taught.network))
    kept = (torch.rand(1, taught.network.gate_count) > 0.3).float()
    alone, untaught = copy.deepcopy(taught), copy.deepcopy(taught)
    untaught.options = replace(untaught.options, distillation=0.0)
    for one in (taught, untaught):
        one.choose(kept)
    assert untaught.teacher is None
    assert taught.teacher is not None
    for seed in (1, 2):
        step(taught, "finetune", seed=seed)
        step(untaught, "finetune", seed=seed)
        step(alone, "warmup", seed=seed)
        assert torch.equal(every_weight(taught.teacher), every_weight(alone.network)), "it learns on as if alone"
    assert not torch.equal(every_weight(taught.network), every_weight(untaught.network))


def every_weight(network: bn.SuperNetwork) -> torch.Tensor:
    return torch.cat([value.flatten() for value in network.modules_on_edges.parameters()])


@pytest.mark.usefixtures("no_exports")
@pytest.mark.parametrize(("weight", "epochs"), [(0.0, 0), (1.0, 3)])
def test_images_that_the_full_network_saw_to_teach_are_counted(weight, epochs, tmp_path):
    """It takes part in all but the warm-up."""
    digits = bn.data.load("digits").subset(256, seed=0)
    options = bn.SearchOptions(epochs=4, warmup=0.25, finetune=0.25, distillation=weight, candidates=1)
    found = bn.search(small_resnet(), digits, ["macs<=70%"], options, out=tmp_path / "run")
    assert (found.result["images_seen"], found.result["images_taught"]) == (4 * 256, epochs * 256)
    assert ("768 of them by the full network" in (found.run / "report.html").read_text()) == bool(weight)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_classifiers_behind_an_exit_that_all_examples_take_learn_on(weight):
    """The loss of all ways out on all images stands beside that of the gates' choice."""
    one = learner(small_exits, exit_supervision=weight)
    one.begin_search()
    first, last = (one.network.modules_on_edges[one.network.edge_names.index(name)] for name in ("d0.exit", "output"))
    one.network.heads[str(one.network.edge_names.index("d0.exit"))].reset(50.0)
    step(one)

    def learns(module: nn.Module) -> bool:
        return any(value.grad is not None and bool(value.grad.abs().sum() > 0) for value in module.parameters())

    assert learns(first)
    assert learns(last) is bool(weight)


def test_the_loss_of_all_ways_out_is_weighed():
    alone, both = learner(small_exits, exit_supervision=0.0), learner(small_exits, exit_supervision=0.5)
    for one in (alone, both):
        one.begin_search()
    before = copy.deepcopy(both.network)
    x, y = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    for one, generator in zip((alone, both), generators, strict=True):
        one.step(x, y, "search", generator=generator, rate=0.0, progress=1.0, sums=Sums())
    for way in before.ways():
        output, _ = before(x, Fixed(way[None]))
        (nn.functional.cross_entropy(output, y) / 3).backward()
    name = "output"
    place = before.edge_names.index(name)
    ours, theirs, beside = (
        list(one.modules_on_edges[place].parameters()) for one in (both.network, alone.network, before)
    )
    for mine, other, extra in zip(ours, theirs, beside, strict=True):
        torch.testing.assert_close(mine.grad, other.grad + 0.5 * extra.grad, rtol=1e-4, atol=1e-6)


def test_gates_of_exits_choose_between_losses():
    """The loss is that of the way taken, and its gradient to a gate what the other decision would have cost."""
    network = small_exits().eval()
    x, y = torch.randn(6, 1, 8, 8), torch.randint(10, (6,))
    one = learner(lambda: network, "layers<=80%")
    first, second = (network.heads[str(edge)] for edge in network.visits if edge in network.exits)
    first.reset(0.5), second.reset(-0.3)
    ways = torch.stack(
        [nn.functional.cross_entropy(network(x, Fixed(way[None]))[0], y, reduction="none") for way in network.ways()], 1
    )
    for taken in ([1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]):
        gates = torch.tensor([taken]).repeat(6, 1).requires_grad_()
        _, losses, every, kept = one._of_all_ways(x, y, Fixed(gates))
        torch.testing.assert_close(every, ways, rtol=1e-5, atol=1e-6)
        assert torch.equal(kept, gates)
        a, b = taken
        torch.testing.assert_close(losses, a * ways[:, 0] + (1 - a) * (b * ways[:, 1] + (1 - b) * ways[:, 2]))
        losses.sum().backward()
        behind = b * ways[:, 1] + (1 - b) * ways[:, 2]
        expected = torch.stack([ways[:, 0] - behind, (1 - a) * (ways[:, 1] - ways[:, 2])], 1)
        torch.testing.assert_close(gates.grad, expected, rtol=1e-4, atol=1e-6)


def test_what_connects_nothing_knows_nothing_also_where_there_are_exits():
    edges = [
        bn.Edge(start="x", end="a", module=nn.Flatten(), name="input"),
        bn.Edge(start="a", end="y", module=nn.Linear(64, 10), name="exit", exit=True),
        bn.Edge(start="a", end="y", module=nn.Linear(64, 10), name="end", fixed=True),
    ]
    network = bn.SuperNetwork(edges, input_shape=(1, 8, 8))
    one = learner(lambda: network, "layers<=80%")
    x, y = torch.randn(3, 1, 8, 8), torch.randint(10, (3,))
    for taken in (0.0, 1.0):
        output, losses, _, _ = one._of_all_ways(x, y, Fixed(torch.tensor([[0.0, taken]])))
        assert not output.any()
        torch.testing.assert_close(losses, torch.full((3,), 10.0).log())


def test_a_temperature_without_distillation_is_refused():
    with pytest.raises(ConfigError, match=r"distillation_temperature is of distillation, got 4\.0 without it"):
        bn.SearchOptions(distillation_temperature=4.0)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_the_divergence_from_the_full_network(temperature):
    one = learner(small_resnet, distillation=2.0, distillation_temperature=temperature)
    x, y = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
    output, _ = one.network(x, Gumbel(16, generator=torch.Generator().manual_seed(0)))
    full, _ = one.network(x, AlwaysOn())
    apart = objectives.distillation(output, full, temperature).mean()
    expected = nn.functional.cross_entropy(full, y) + 2.0 * apart
    torch.testing.assert_close(one._distillation(x, y, output, "search"), expected)


@pytest.mark.parametrize(
    ("space", "given"),
    [
        (small_resnet, {"distillation": 1.0}),
        (small_resnet, {"target": "exponential"}),
        (partial(small_resnet, logits=2), {"gate_decay": "papers"}),
        (partial(small_resnet, conditional=True, memory=True), {}),
        (small_exits, {"penalty": "const-quad"}),
    ],
)
def test_a_checkpoint_of_gates_brings_everything_back_bit_for_bit(space, given, tmp_path):
    first, second = learner(space, **given), learner(space, seed=1, **given)
    first.begin_search()
    for seed in range(2):
        step(first, seed=seed)
    if not first.network.heads:
        first.choose(first.network.architecture("full"))
    tensors, state = first.state()
    RunFolder(tmp_path).save_checkpoint(tensors, state)
    second.load_state(*RunFolder(tmp_path).load_checkpoint())
    phase = "search" if first.network.heads else "finetune"
    for again in range(2):
        (tensors, state), (others, other) = first.state(), second.state()
        assert tensors.keys() == others.keys()
        assert all(torch.equal(value, others[name]) for name, value in tensors.items()), again
        assert state == other
        step(first, phase, seed=7)
        step(second, phase, seed=7)


def test_memory_keeps_clear_of_strided_convolutions_that_read_few_channels():
    assert memory_format(bn.spaces.resnet_fabric(width=1, channels=16)) == torch.channels_last
    assert memory_format(bn.spaces.resnet_fabric(width=1, channels=4)) == torch.contiguous_format
    assert memory_format(nn.Conv2d(4, 8, 1)) == torch.channels_last


def assert_rates_are_drawn(space: bn.SuperNetwork, rates: list[float], run: Path) -> None:
    """architecture.json has for how many validation images each gate was open, and the page says so."""
    told = json.loads((run / "architecture.json").read_text())
    shown = [edge["probability"] for edge in told["edges"]]
    shown += [share for site in told["sites"] for share in site["probability"]]
    assert shown == [None if column is None else rates[column] for column in space.gate_of]
    assert "count with the share of validation images that open them" in (run / "report.html").read_text()


@pytest.mark.parametrize("options", [{"conditional": True, "gates": "both", "granularity": 2}, {"gates": "both"}])
def test_a_search_with_gates_keeps_its_budget_and_hands_over_what_it_found(options, tmp_path):
    """Real digits, from the search to the file that onnxruntime runs."""
    torch.manual_seed(0)
    digits = bn.data.load("digits").subset(512, seed=0)
    searching = bn.SearchOptions(epochs=10, candidates=2, validate_every=3, recalibration=2)
    found = bn.search(small_resnet(**options), digits, ["macs<=70%"], searching, out=tmp_path / "run")
    result = found.result
    assert result["budgets"][0]["met"]
    assert result["budgets"][0]["value"] <= result["budgets"][0]["limit"]
    assert max(result["equivalence"].values()) < 1e-4
    assert result["test"]["accuracy"] > 0.3
    x = torch.randn(5, 1, 8, 8)
    assert found.network()(x).shape == (5, 10)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["activation"] for line in lines if line["phase"] == "search"]
    assert all(0 <= rate <= 1 for line in rates for rate in line.values())
    assert set(rates[0]) >= {"g0.0.block", "g0.0.block.hidden0"}
    assert (tmp_path / "run" / "report.html").exists()
    if options.get("conditional"):
        assert [point["tau"] for point in result["inference"]["curve"]] == [0.1, 0.3, 0.5, 0.7, 0.9]
        assert_rates_are_drawn(found.supernet, result["inference"]["rates"], tmp_path / "run")
        with torch.no_grad():
            masked = found.supernet.masked(
                x, Inference(tau=result["inference"]["tau"]).deciders(5, torch.Generator())[0]
            )
        torch.testing.assert_close(found.network()(x), masked[0], atol=1e-4, rtol=1e-4)
