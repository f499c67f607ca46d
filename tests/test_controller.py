"""A loop of one's own beside the engine's, what it hands over, and how it is misused."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import alone
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import budgetnet as bn
from budgetnet.errors import ConfigError, FileError, UnreachableBudget
from budgetnet.sites import Threshold
from budgetnet.steering import Sums, seeded
from budgetnet.training import Learner

ROOT = Path(__file__).parents[1]
PHASES = {"warmup": 0.2, "finetune": 0.3}


def fabric() -> bn.SuperNetwork:
    torch.manual_seed(0)
    return bn.spaces.resnet_fabric(width=1, channels=4, in_channels=1, image_size=8)


def gated() -> bn.SuperNetwork:
    torch.manual_seed(0)
    return bn.spaces.resnet(depth=8, channels=4, in_channels=1, image_size=8, gates="both", granularity=2)


def looking() -> bn.SuperNetwork:
    torch.manual_seed(0)
    return bn.spaces.resnet(depth=8, channels=4, in_channels=1, image_size=8, gates="layers", conditional=True)


def seen() -> list[Tensor]:
    return [batch(50)[0], batch(51, 12)[0]]


def looks(total_steps: int = 10, budget: str = "macs<=60%", **options: object) -> bn.Controller:
    """Of gates that look at the input: 2 of ten steps to warm up, 4 with noise, 4 without."""
    given = bn.SearchOptions(**{"warmup": 0.2, "noiseless": 0.5, **options})
    return bn.Controller(looking(), [budget], given, total_steps=total_steps, examples=seen)


def controller(space: Callable[[], bn.SuperNetwork] = fabric, *budgets: object, **given: object) -> bn.Controller:
    """Of ten steps: 2 to warm up, 5 to search, 3 to fine-tune."""
    options = {"architectures": 4, **PHASES, **given.pop("options", {})}  # type: ignore[dict-item]
    asked = budgets or ("macs<=50%",)
    return bn.Controller(space(), asked, bn.SearchOptions(**options), **{"total_steps": 10, **given})


def batch(seed: int, count: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.randint(10, (count,), generator=generator)


def step(one: bn.Controller, optimizer: torch.optim.Optimizer, seed: int) -> Tensor:
    """A step as the docstring has it."""
    x, y = batch(seed)
    output, kept = one.steering.network(x, one.policy(len(x)))
    loss = one.loss(cross_entropy(output, y, reduction="none"), kept, x)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    one.step()
    return loss.detach()


def sgd(one: bn.Controller) -> torch.optim.Optimizer:
    return torch.optim.SGD(one.weights(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)


def small(plain: nn.Module) -> float:
    """A judge to whom less is more."""
    return -float(sum(value.numel() for value in plain.parameters()))


def finished(*given: object, **options: object) -> bn.Controller:
    """Up to where an architecture is due."""
    one = controller(*given, **options)  # type: ignore[arg-type]
    optimizer = sgd(one)
    while one.phase != "choose":
        step(one, optimizer, one.steps)
    return one


@pytest.mark.parametrize(
    ("space", "estimator", "budgets"),
    [
        (fabric, "score", ("macs<=50%", "steps:2<=60%")),
        (gated, "gumbel", ("macs<=50%", "steps:2<=90%")),
        (gated, "soft-gumbel", ("params~=50%",)),
    ],
)
def test_a_loop_of_ones_own_ends_in_the_engines_weights_and_gates(space, estimator, budgets):
    """Bit for bit, through warm-up and search: the same batches, draws, prices and falling limits."""
    given = {"estimator": estimator, "architectures": 4, "schedule": "constant", "learning_rate": 0.1, **PHASES}
    one = controller(space, *budgets, options=given)
    optimizer = sgd(one)
    network = space()
    bound = [bn.Budget.parse(text).bind(network) for text in budgets]
    options = bn.SearchOptions(epochs=10, precision="float32", **given)
    other = Learner(network, bound, options, ignore=None, device=torch.device("cpu"), dtype=torch.float32)
    network.gates.reset(other.options.gate_start)  # as `search` does before it says what can be reached
    sums = Sums()
    for epoch in range(7):
        phase = other.options.phase(epoch)
        assert one.phase == phase
        loss = step(one, optimizer, epoch)
        if phase == "search" and not other.starts:
            other.begin_search()
        drawn = {"generator": seeded(other.device, 0, epoch), "progress": other.options.search_progress(epoch)}
        other.step(*batch(epoch), phase, rate=0.1, sums=sums, **drawn)  # type: ignore[arg-type]
        assert torch.isfinite(loss)
        states = one.steering.network.state_dict(), network.state_dict()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        assert [price.value for price in one.steering.prices] == [price.value for price in other.prices]
    assert one.phase == "choose"
    assert max(price.value for price in one.steering.prices) > 0


def sgd_of_groups(one: bn.Controller) -> torch.optim.Optimizer:
    return torch.optim.SGD(one.groups(0.1), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)


def test_gates_that_look_at_the_input_end_in_the_engines_weights_too():
    """Bit for bit, also where their noise ends and all are moved together."""
    one = looks()
    optimizer, network = sgd_of_groups(one), looking()
    assert len(optimizer.param_groups[0]["params"]) < len(one.weights())
    bound = [bn.Budget.parse("macs<=60%").bind(network)]
    options = bn.SearchOptions(epochs=10, precision="float32", warmup=0.2, noiseless=0.5)
    other = Learner(network, bound, options, ignore=None, device=torch.device("cpu"), dtype=torch.float32)
    network.gates.reset(other.options.gate_start)
    moved = []
    for epoch in range(10):
        phase, drawn = other.options.phase(epoch), seeded(other.device, 0, epoch)
        assert one.phase == phase
        step(one, optimizer, epoch)
        if phase == "search" and not other.starts:
            other.begin_search()
        if phase == "search" and other.options.noisy(epoch - 3) and not other.options.noisy(epoch - 2):
            before = network.probabilities()
            other.end_noise(seen(), drawn)
            moved.append(not torch.equal(before, network.probabilities()))
        progress = other.options.search_progress(epoch)
        other.step(
            *batch(epoch), phase, rate=0.1, sums=Sums(), generator=drawn, progress=progress, epochs=float(epoch - 2)
        )
        states = one.steering.network.state_dict(), network.state_dict()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), epoch
    assert moved == [True]


def test_gates_are_moved_once_where_a_step_takes_several_batches(monkeypatch):
    """Their noise ends in step 6 of 10; each step adds up the gradients of two batches."""
    one, ended = looks(), []
    monkeypatch.setattr(one.steering, "end_noise", lambda *given: ended.append(one.steps))
    optimizer = sgd_of_groups(one)
    for at in range(10):
        optimizer.zero_grad()
        for x, y in (batch(2 * at), batch(2 * at + 1)):
            output, kept = one.steering.network(x, one.policy(len(x)))
            (one.loss(cross_entropy(output, y, reduction="none"), kept) / 2).backward()
        optimizer.step()
        one.step()
    assert ended == [6]


@pytest.mark.parametrize("asked", ["macs<=60%", "macs~=80%"])
def test_gates_that_look_at_the_input_are_settled_within_the_budget(asked):
    one = looks(budget=asked)
    optimizer, network = sgd_of_groups(one), one.steering.network
    while one.phase != "settle":
        step(one, optimizer, one.steps)
    for wrong in (lambda: one.policy(4), lambda: one.choose(small), one.network):
        with pytest.raises(ConfigError, match="settle"):
            wrong()
    state = one.state_dict()
    tau = one.settle([batch(60), batch(61)])
    (outcome,) = one.outcomes
    budget = one.steering.budgets[0]
    costs = torch.cat([budget.model(network.used(network.eval()(x, Threshold(tau))[1])) for x in seen()])
    assert outcome["met"]
    assert outcome["value"] == pytest.approx(float(costs.mean()))
    assert budget.met(costs.mean())
    plain, x = one.network(), batch(70)[0]
    torch.testing.assert_close(plain(x), network(x, Threshold(tau))[0].detach(), rtol=1e-4, atol=1e-5)
    again = looks(budget=asked)
    again.load_state_dict(state)
    assert (again.phase, again.tau) == ("settle", None)
    again.load_state_dict(one.state_dict())
    assert again.tau == tau


def test_what_gates_that_look_at_the_input_need_is_one_line():
    with pytest.raises(ConfigError, match="need examples to see what they cost on, got none for resnet"):
        bn.Controller(looking(), ["macs<=50%"], total_steps=10)
    with pytest.raises(ConfigError, match="settle comes after a search of gates that look at the input, got warmup"):
        looks().settle()
    with pytest.raises(ConfigError, match="settle comes after a search of gates that look at the input, got choose"):
        finished().settle()
    one = bn.Controller(looking(), ["macs<=50%"], total_steps=1, examples=list)
    one.steps = 1
    with pytest.raises(ConfigError, match="examples must give at least one batch, got none"):
        one.settle()


def test_the_gradients_are_those_of_the_engine_on_the_same_batch():
    one = controller()
    optimizer = sgd(one)
    for seed in range(3):
        step(one, optimizer, seed)
    x, y = batch(7)
    network = one.steering.network
    output, kept = network(x, one.policy(len(x)))
    losses = cross_entropy(output, y, reduction="none")
    prices = [(price.value, price.accumulated) for price in one.steering.prices]
    parameters = list(network.parameters())
    ours = torch.autograd.grad(one.loss(losses, kept), parameters, retain_graph=True, allow_unused=True)
    for price, (value, accumulated) in zip(one.steering.prices, prices, strict=True):
        price.value, price.accumulated = value, accumulated
    options = one.steering.options
    theirs = one.steering.search_objective(losses, kept, options.search_progress(3), 1, Sums())
    reference = torch.autograd.grad(theirs, parameters, allow_unused=True)
    for a, b in zip(ours, reference, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    assert ours[-1] is not None


def test_the_loop_reaches_and_keeps_a_budget_on_digits(capsys):
    """The example as it stands: plain PyTorch, with an optimiser, a schedule and batches of its own."""
    runpy.run_path(str(ROOT / "examples" / "own_loop.py"), run_name="__main__")
    out, err = capsys.readouterr()
    *lines, last = out.strip().splitlines()
    assert err == ""
    assert list(dict.fromkeys(line.split()[1] for line in lines)) == ["warmup", "search", "choose", "finetune"]
    accuracy, macs, limit = (float(word.replace(",", "")) for word in last.split() if word[0].isdigit())
    assert accuracy > 0.95
    assert macs <= limit
    assert macs > limit / 2


def test_the_lightning_callback_leaves_learned_gates_alone_where_a_trainer_validates(monkeypatch):
    class Stop(Exception):
        pass

    class Trainer:
        def __init__(self, callbacks: list[object], **_: object) -> None:
            self.callback = callbacks[0]

        def fit(self, module: nn.Module, _: object) -> None:
            raise Stop(self.callback, module)

    stub = SimpleNamespace(Callback=object, LightningModule=nn.Module, Trainer=Trainer)
    monkeypatch.setitem(sys.modules, "lightning", stub)
    with pytest.raises(Stop) as caught:
        runpy.run_path(str(ROOT / "examples" / "lightning_callback.py"))
    callback, module = caught.value.args
    callback.setup(None, module, "fit")
    controller, gates = callback.controller, module.network.gates
    with torch.no_grad():
        gates.values.add_(1)
    before = gates.values.clone()
    for stage in ("validate", "test", "predict"):
        callback.setup(None, module, stage)
    assert callback.controller is module.controller is controller
    assert torch.equal(gates.values, before)


@pytest.mark.slow
def test_lightning_runs_the_callback(tmp_path):
    """Lightning imports torchvision where it is there."""
    example = str(ROOT / "examples" / "lightning_callback.py")
    code = f"import runpy, small; small.import_torchvision(); runpy.run_path({example!r}, run_name='__main__')"
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**alone(), "PYTHONPATH": str(ROOT / "tests")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    accuracy = float(process.stdout.split("held-out accuracy ")[1].split()[0])
    assert accuracy > 0.9
    states = [torch.load(path, weights_only=True) for path in tmp_path.rglob("*.ckpt")]
    assert len(states) == 1
    (state,) = (value for value in states[0]["callbacks"].values() if "asked" in value)
    assert state["steps"] == state["asked"] == states[0]["global_step"]


@pytest.mark.parametrize("space", [fabric, gated])
def test_what_is_handed_over_is_plain_and_within_all_budgets(space):
    own = bn.Budget(bn.costs.Function(lambda network: sum(p.numel() for p in network.parameters())), at_most="70%")
    one = finished(space, "macs<=50%", own)
    network = one.steering.network
    chosen = one.choose(small, [batch(seed) for seed in range(3)])
    plain = one.network()
    assert torch.equal(one.chosen, chosen)
    used = network.used(chosen)
    assert float(bn.costs.MACs().bind(network)(used)[0]) <= one.limits[0]["limit"]
    assert sum(value.numel() for value in plain.parameters()) <= one.limits[1]["limit"]
    assert not plain.training
    assert network.training
    optimizer = sgd(one)
    while one.steps < 10:
        step(one, optimizer, one.steps)
    network.eval()
    torch.testing.assert_close(one.network()(batch(5)[0]), network.run(batch(5)[0], used))
    assert {id(value) for value in one.network().parameters()}.isdisjoint(map(id, network.parameters()))


def test_the_best_of_the_candidates_by_the_judge_is_chosen():
    one, other = finished(), finished()
    seen: list[float] = []

    def less(plain: nn.Module) -> float:
        assert not plain.training
        assert not torch.is_grad_enabled()
        seen.append(small(plain))
        return seen[-1]

    one.choose(less)
    other.choose(lambda plain: -less(plain))
    half = len(seen) // 2
    assert small(one.network()) == max(seen[:half])
    assert small(other.network()) == min(seen[half:])
    assert max(seen) > min(seen)


def test_where_the_best_breaks_a_limit_when_measured_with_more_care_the_next_best_is_chosen(monkeypatch):
    one, seen = finished(), list[float]()

    def second(budgets, candidates, best, most):
        assert budgets is one.steering.budgets
        first = candidates[best(candidates)]
        others = [one for one in candidates if one is not first]
        return {first: [1.1], others[best(others)]: [0.9]}

    def judge(plain: nn.Module) -> float:
        seen.append(small(plain))
        return seen[-1]

    monkeypatch.setattr("budgetnet.selection.confirmed", second)
    one.choose(judge)
    assert small(one.network()) == sorted(seen)[-2]


def test_batches_set_the_norms_of_candidates_and_of_what_is_chosen():
    one, judged = finished(), []

    def judge(plain: nn.Module) -> float:
        judged.append(plain)
        return small(plain)

    network, batches = one.steering.network, [batch(seed) for seed in range(3)]
    before = {key: value.clone() for key, value in network.state_dict().items() if key.endswith("running_mean")}
    one.choose(judge, batches)
    best = max(judged, key=small).state_dict()
    assert all(torch.equal(value, best[key]) for key, value in one.network().state_dict().items())
    after = network.state_dict()
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    used = network.used(one.chosen)[0].bool().tolist()
    assert moved
    assert {int(key.split(".")[1]) for key in moved} <= {edge for edge, bit in enumerate(used) if bit}
    other = finished()
    before = {key: value.clone() for key, value in other.steering.network.state_dict().items()}
    other.choose(small)
    assert all(torch.equal(value, other.steering.network.state_dict()[key]) for key, value in before.items())


def on(one: bn.Controller, optimizer: torch.optim.Optimizer, end: int) -> None:
    """Goes on with a loop up to a step."""
    while one.steps < end:
        if one.phase == "choose":
            one.choose(small, [batch(1)])
        step(one, optimizer, one.steps)


def measuring() -> bn.Controller:
    own = bn.Budget(bn.costs.Function(lambda network: sum(p.numel() for p in network.parameters())), at_most="60%")
    return controller(fabric, own)


@pytest.fixture(scope="module")
def whole() -> bn.Controller:
    """A loop that went to its end; leave it as it is."""
    one = measuring()
    on(one, sgd(one), 10)
    return one


@pytest.mark.parametrize("stop", [1, 4, 8])
def test_a_loop_that_is_taken_up_again_ends_in_the_same_weights(whole, stop, tmp_path):
    """In each phase, through a file that holds no code."""
    first, second = measuring(), measuring()
    optimizer = sgd(first)
    on(first, optimizer, stop)
    states = [part.state_dict() for part in (first.steering.network, optimizer, first)]
    torch.save(states, tmp_path / "state.pt")
    network, weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    second.steering.network.load_state_dict(network)
    second.load_state_dict(state)
    again = sgd(second)
    again.load_state_dict(weights)
    on(second, again, 10)
    states = [one.steering.network.state_dict() for one in (whole, second)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert torch.equal(whole.chosen, second.chosen)
    assert whole.steering.prices == second.steering.prices


def test_a_state_stays_as_it_was_taken():
    own = bn.Budget(bn.costs.Function(lambda network: sum(p.numel() for p in network.parameters())), at_most="60%")
    one = controller(fabric, own)
    optimizer = sgd(one)
    for seed in range(3):
        step(one, optimizer, seed)
    state = one.state_dict()
    tensors = {name: value.clone() for name, value in state["tensors"].items()}
    step(one, optimizer, 3)
    assert all(torch.equal(value, state["tensors"][name]) for name, value in tensors.items())
    assert any(not torch.equal(value, tensors[name]) for name, value in one.state_dict()["tensors"].items())


def test_costs_that_read_examples_get_those_of_the_step():
    seen: list[Tensor] = []

    def work(architecture: frozenset[str], x: Tensor) -> Tensor:
        seen.append(x)
        return len(architecture) * (1 + x.flatten(1).square().mean(dim=1))

    one = controller(fabric, bn.Budget(bn.costs.Function(work), at_most="60%"), examples=lambda: [batch(0)[0]])
    optimizer = sgd(one)
    step(one, optimizer, 0), step(one, optimizer, 1)
    seen.clear()
    step(one, optimizer, 2)
    assert torch.equal(torch.cat(seen), batch(2)[0])
    assert one.costs["work"] > 0
    x, y = batch(3)
    output, kept = one.steering.network(x, one.policy(16))
    with pytest.raises(ConfigError, match=r"work reads examples: loss\(losses, kept, x\)"):
        one.loss(cross_entropy(output, y, reduction="none"), kept)


def test_predictions_of_a_measured_cost_are_corrected_on_the_way_and_what_was_chosen_is_measured(tmp_path):
    calls: list[str] = []

    def weight(network: nn.Module) -> float:
        calls.append(one.phase if begun else "before")
        return float(sum(value.numel() for value in network.parameters()))

    begun = False
    one = controller(fabric, bn.Budget(bn.costs.Function(weight), at_most="60%"), total_steps=40)
    begun = True
    optimizer = sgd(one)
    while one.phase != "choose":
        step(one, optimizer, one.steps)
    one.choose(small)
    (outcome,) = one.outcomes
    plain = one.network()
    assert outcome["value"] == float(sum(value.numel() for value in plain.parameters()))
    assert outcome["met"]
    assert outcome["value"] <= outcome["limit"] == one.limits[0]["limit"]
    again = controller(fabric, bn.Budget(bn.costs.Function(weight), at_most="30%"), total_steps=40)
    again.load_state_dict(one.state_dict())
    assert again.outcomes == one.outcomes
    assert again.steering.budgets[0].limit == one.steering.budgets[0].limit


def test_latencies_are_measured_on_the_way(monkeypatch):
    seen: list[int] = []
    one = controller(fabric, "macs<=60%", total_steps=60)
    monkeypatch.setattr(one.steering, "correct", seen.append)
    optimizer = sgd(one)
    while one.phase != "choose":
        step(one, optimizer, one.steps)
    assert seen == list(range(3, 31, 3))  # 30 steps of search


def test_only_gates_are_the_controllers():
    one = controller(gated)
    gates = {id(value) for value in one.steering.network.gates.parameters()}
    own = {id(value) for value in one.weights()}
    assert gates | own == {id(value) for value in one.steering.network.parameters()}
    assert not gates & own


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_network_may_be_moved_once_there_is_a_controller():
    one = controller(gated, "macs<=50%", "steps:2<=90%")
    network = one.steering.network.cuda()
    optimizer = sgd(one)
    while one.steps < 10:
        x, y = (part.cuda() for part in batch(one.steps))
        if one.phase == "choose":
            one.choose(small, [(x, y)])
        output, kept = network(x, one.policy(len(x)))
        optimizer.zero_grad()
        one.loss(cross_entropy(output, y, reduction="none"), kept, x).backward()
        optimizer.step()
        one.step()
    assert next(one.network().parameters()).is_cuda


# How it is misused


def ready(steps: int = 3) -> tuple[bn.Controller, torch.optim.Optimizer]:
    one = controller()
    optimizer = sgd(one)
    for seed in range(steps):
        step(one, optimizer, seed)
    return one, optimizer


def asked() -> tuple[bn.Controller, Tensor, Tensor]:
    """In the search, behind a policy and a forward pass."""
    one, _ = ready()
    x, y = batch(0)
    output, kept = one.steering.network(x, one.policy(16))
    return one, cross_entropy(output, y, reduction="none"), kept


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda one, losses, kept: one.loss(losses.mean(), kept), r"\(16,\), got \(\)"),
        (
            lambda one, losses, kept: one.loss(losses[:4], kept),
            r"16 examples that policy was asked for, \(16,\), got \(4,",
        ),
        (lambda one, losses, kept: one.loss(losses, kept[:, 1:]), r"kept must be what the network gave, \(K, "),
        (lambda one, losses, kept: one.loss(losses, kept[0]), r"kept must be what the network gave, \(K, "),
        (lambda one, losses, kept: one.step(), "step comes after loss, got no loss since the last step"),
        (
            lambda one, losses, kept: (one.loss(losses, kept), one.step()),
            r"step comes after loss.backward\(\), got gates",
        ),
        (
            lambda one, losses, kept: (one.loss(losses, kept), one.loss(losses, kept)),
            "loss comes after policy: output,",
        ),
        (lambda one, losses, kept: one.choose(small), "choose comes after the search, at step 7, got step 3"),
        (lambda one, losses, kept: one.network(), "network comes after choose, got step 3 of the search"),
    ],
)
def test_misuse_in_the_search_is_one_line(change, line):
    with pytest.raises(ConfigError, match=line):
        change(*asked())


def test_a_loss_before_any_policy_is_one_line():
    with pytest.raises(ConfigError, match=r"loss comes after policy: output, kept = network\(x, controller.policy"):
        controller().loss(torch.zeros(16), torch.ones(4, 10))


def test_misuse_behind_the_search_is_one_line():
    one = finished()
    with pytest.raises(ConfigError, match="the search is over at step 7: choose comes before the next policy"):
        one.policy(16)
    with pytest.raises(ConfigError, match="judge must return a finite number, more for a better network, got nan"):
        one.choose(lambda plain: float("nan"))
    one.choose(small)
    with pytest.raises(ConfigError, match="an architecture is chosen once, at step 7, got step 7"):
        one.choose(small)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"total_steps": 0}, "total_steps must be a whole number >= 1, got 0"),
        ({"total_steps": 1.5}, r"total_steps must be a whole number >= 1, got 1\.5"),
        ({"options": {"distillation": 1.0}}, r"distillation is up to your own loop, got 1\.0"),
        ({"options": {"target": "moving"}}, "a moving target starts again each epoch; a loop of one's own has steps"),
    ],
)
def test_a_controller_that_cannot_be_is_one_line(given, line):
    with pytest.raises(ConfigError, match=line):
        controller(**given)


def test_a_controller_of_nothing_or_of_what_cannot_be_is_one_line():
    with pytest.raises(ConfigError, match="a controller needs at least one budget, such as macs<=25%, got none"):
        bn.Controller(fabric(), [], total_steps=10)
    with pytest.raises(UnreachableBudget, match="macs must be at most 3 MACs, but the smallest network"):
        bn.Controller(fabric(), ["macs<=3"], total_steps=10)
    with pytest.raises(ConfigError, match="a cost has one budget, got 2 of macs"):
        bn.Controller(fabric(), ["macs<=50%", "macs<=40%"], total_steps=10)
    with pytest.raises(
        ConfigError, match=r"a table of times is a file in a folder that is there, got '/no/such/times\.json'"
    ):
        bn.Controller(fabric(), ["latency[table=/no/such/times.json]<=50%"], total_steps=10)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda state: state.pop("steps"), '"steps" is missing'),
        (lambda state: state.update(steps=-1), "must hold tensors and steps >= 0, got step -1"),
        (lambda state: state["tensors"].update(other=torch.zeros(1)), "it has 'other', which no run writes"),
        (lambda state: state["prices"].clear(), "must have 1 prices, got 0"),
        (lambda state: state["limits"].clear(), "must have 1 limits, got 0"),
    ],
)
def test_a_state_of_something_else_is_one_line(change, line):
    state = ready()[0].state_dict()
    change(state)
    with pytest.raises(FileError, match=line):
        controller().load_state_dict(state)
