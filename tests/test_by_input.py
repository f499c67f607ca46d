"""Milliseconds where gates look at the input: how they are predicted, and the threshold at which a file keeps them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from clock import tick
from torch import Tensor

import budgetnet as bn
from budgetnet import by_input, cli
from budgetnet.budgets import BoundBudget
from budgetnet.by_input import _full, learn_latency, settled
from budgetnet.conditional import ConditionalNetwork, export_conditional
from budgetnet.costs.latency import LatencyByInput
from budgetnet.costs.measured import Measured
from budgetnet.delivery import evaluate_gates
from budgetnet.errors import ConfigError, UnreachableBudget
from budgetnet.export import load
from budgetnet.inference import Inference, Observed, expected_costs
from budgetnet.sites import Threshold
from budgetnet.steering import Steering, prepare

FULL = 2.0


class Plain:
    """An extracted network takes `FULL` milliseconds, or the share of them that its MACs are."""

    full = FULL
    cost = SimpleNamespace(threads=1)
    watch = SimpleNamespace(took=SimpleNamespace(full=FULL))

    def __init__(self, network: bn.SuperNetwork) -> None:
        self.macs = bn.costs.MACs(gates=False).bind(network)
        self.whole = float(self.macs(network.used(network.architecture("full")))[0])

    def __call__(self, used: Tensor) -> Tensor:
        return self.macs(used) / self.whole * FULL


@pytest.fixture
def network() -> bn.SuperNetwork:
    """Whose gates differ from image to image."""
    torch.manual_seed(0)
    space = bn.spaces.resnet(depth=8, channels=4, image_size=8, in_channels=1, conditional=True, gates="layers")
    for head in space.heads.values():
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=1.0)
    return space.eval()


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """A full network's file, of which nothing but its time would be of interest."""
    return _full(bn.spaces.resnet(depth=8, channels=4, image_size=8, in_channels=1), tmp_path_factory.mktemp("full"))


@pytest.fixture
def timed(monkeypatch, full) -> list[ConditionalNetwork]:
    """The networks that were written."""
    monkeypatch.setattr(by_input, "_full", lambda *_: full)
    built: list[ConditionalNetwork] = []
    before = by_input.conditional

    def conditional(*given, **options) -> ConditionalNetwork:
        built.append(before(*given, **options))
        return built[-1]

    monkeypatch.setattr(by_input, "conditional", conditional)
    monkeypatch.setattr(
        by_input, "export_fastest", lambda *given: {"groups": "", "ms": {}, "file": export_conditional(*given)}
    )
    return built


def clock(
    network: bn.SuperNetwork, timed: list[ConditionalNetwork], law: Callable[[float], float], noise: float = 0.0
) -> Callable[..., Measured]:
    """In the place of `times_full`: a file takes what a law says of the share of MACs that the examples open.

    It has to be the file of the network that was built last.
    """
    plain = Plain(network)

    def times_full(file: Path, full: Path, examples: Tensor, **_: object) -> Measured:
        used = network.used(timed[-1].decide(examples)[1])
        assert torch.allclose(load(file)(examples[:1]), timed[-1](examples[:1]), atol=1e-4)
        assert all(node.op_type != "If" for node in onnx.load(str(full)).graph.node)
        ratio = law(float(plain(used).mean()) / FULL)
        return Measured(ratio, ratio * (1 - noise), ratio * (1 + noise))

    return times_full


def test_what_deciding_takes_is_learned_from_all_open_and_all_closed(network, timed, monkeypatch):
    """A law that is a line is found exactly."""
    monkeypatch.setattr(by_input, "times_full", clock(network, timed, lambda share: 0.2 + 0.7 * share))
    model = LatencyByInput(Plain(network))
    learn_latency(network, model)
    assert model.deciding == pytest.approx(0.2 * FULL)
    assert model.saving == pytest.approx(0.7)
    ends = [network.used(one.decide(torch.randn(2, 1, 8, 8))[1]) for one in timed]
    macs = [float(Plain(network)(used).mean()) for used in ends]
    assert macs[0] == FULL > macs[1]


def test_a_file_that_saves_nothing_has_no_gradient_to_save_by():
    """Nor one that takes longer when all is closed."""
    model = LatencyByInput(SimpleNamespace(full=FULL))
    model.learn((2.0, 1.0), (3.0, 3.5))
    assert (model.saving, model.deciding) == (0.0, 3.25)
    model.learn((2.0, 1.0), (2.0, 0.8))  # deciding takes no less than nothing
    assert (model.saving, model.deciding) == (pytest.approx(0.96), 0.0)
    model.learn((1.0, 1.0), (2.0, 2.0))  # nothing lies between the two
    assert (model.saving, model.deciding) == (0.0, 2.0)


def test_its_gradient_is_the_extracted_networks_as_far_as_the_file_saves(network):
    plain = Plain(network)
    model = LatencyByInput(plain)
    model.learn((2.0, 1.0), (2.4, 1.9))
    used = network.used(network.architecture("full")).requires_grad_()
    (own,) = torch.autograd.grad(model(used).sum(), used)
    (extracted,) = torch.autograd.grad(plain(used).sum(), used)
    assert torch.allclose(own, 0.5 * extracted)
    assert extracted.abs().sum() > 0


def images(count: int) -> Tensor:
    """As different as real ones."""
    torch.manual_seed(1)
    return torch.randn(count, 1, 8, 8) * torch.randn(count, 1, 1, 1).exp() + 2 * torch.randn(count, 1, 1, 1)


def asked(network: bn.SuperNetwork, limit: float, *, upper: bool = True) -> tuple[BoundBudget, LatencyByInput]:
    model = LatencyByInput(Plain(network))
    return BoundBudget("latency", model, limit, FULL, upper), model


@torch.no_grad()
def found(
    network: bn.SuperNetwork,
    budget: BoundBudget,
    x: Tensor,
    settle: Callable[[float], None] = lambda _: None,
    **options,
) -> by_input.Settled:
    """Settled on examples; the first of them are timed."""

    def look(tau: float) -> Observed:
        return Observed({}, expected_costs(network, Threshold(tau), [x], {budget.name: budget.model}), [])

    return settled(network, [budget], look, settle, x, **options)


@pytest.mark.parametrize(("wrong", "limit", "upper"), [(1.3, 1.2, True), (0.7, 0.6, True), (1.3, 1.2, False)])
def test_the_threshold_is_that_at_which_the_file_keeps_its_limit(
    network, timed, wrong, limit, upper, monkeypatch, tmp_path
):
    """Though predictions are too low, or too high, by nearly a third, and the timed examples are not the mean ones."""
    monkeypatch.setattr(by_input, "times_full", clock(network, timed, lambda share: wrong * share, noise=0.01))
    x = images(512)
    budget, _ = asked(network, limit, upper=upper)
    one = found(network, budget, x, path=tmp_path / "network.onnx")
    true = wrong * expected_costs(network, Threshold(one.tau), [x], {"share": Plain(network)})["share"]
    measured = one.measured["latency"]
    assert measured.value == pytest.approx(true, rel=1e-6)
    if upper:
        assert 0 <= 1 - measured.high / limit <= by_input.CLOSE
    else:
        assert abs(measured.value / limit - 1) <= 0.05
    assert torch.allclose(load(tmp_path / "network.onnx")(x[:1]), one.plain(x[:1]), atol=1e-4)
    assert one.seen.costs["latency"] == pytest.approx(measured.high if upper else measured.value, rel=1e-6)


def test_a_file_that_keeps_its_limit_at_one_half_is_left_there(network, timed, monkeypatch):
    monkeypatch.setattr(by_input, "times_full", clock(network, timed, lambda share: share))
    budget, _ = asked(network, 10 * FULL)
    one = found(network, budget, images(8))
    assert one.tau == 0.5
    assert len(timed) == 1


def test_what_comes_nearest_is_handed_over_where_no_file_keeps_the_limit(network, timed, monkeypatch):
    """A file that takes as long whatever is closed: the first look is as good as any."""
    monkeypatch.setattr(by_input, "times_full", clock(network, timed, lambda share: 0.9 + 0.01 * share))
    budget, _ = asked(network, 0.8 * FULL)
    one = found(network, budget, images(32))
    assert one.measured["latency"].value == pytest.approx(0.9 * FULL, rel=0.02)
    assert one.worst([budget]) > 0
    smallest, _ = asked(network, 0.01 * FULL)
    with pytest.raises(UnreachableBudget, match=r"latency must be at most 0\.02 ms"):
        found(network, smallest, images(32))


def test_a_threshold_that_came_nearer_than_later_ones_is_settled_on_again(network, timed, monkeypatch):
    """Its batch norms are set once more, and its file is written."""
    budget, _ = asked(network, 1.2)
    times = iter([1.02, 1.1, 1.08, 1.09, 0.99])
    monkeypatch.setattr(by_input, "times_full", lambda *_, **__: Measured(*[next(times) * 1.2 / FULL] * 3))
    taus: list[float] = []
    x = images(32)
    one = found(network, budget, x, taus.append)
    assert len(timed) == 5
    assert taus[-1] == one.tau
    assert torch.equal(timed[-1](x), timed[0](x))
    assert not torch.equal(timed[-2](x), timed[0](x))
    assert one.plain is timed[-1]


def test_a_steering_goes_on_with_what_it_knew_of_deciding(network, timed, monkeypatch):
    """And with the milliseconds of the machine as it was."""
    tick(monkeypatch)
    laws = iter([lambda share: 0.2 + 0.7 * share, lambda share: 0.5 + 0.1 * share])
    states = []
    for _ in range(2):
        monkeypatch.setattr(by_input, "times_full", clock(network, timed, next(laws)))
        ready = prepare(network, ["latency<=90%"], bn.SearchOptions(epochs=4))
        steering = Steering(network, ready.budgets, ready.options)
        states.append((steering, steering.state()))
    (first, (tensors, state)), (second, (_, other)) = states
    assert state["timed"] != other["timed"]
    second.load_state(tensors, state)
    assert second.state()[1]["timed"] == state["timed"]
    models = [each.budgets[0].model for each in (first, second)]
    used = network.used(network.architecture("full"))
    assert float(models[1](used)[0]) == float(models[0](used)[0])


def test_a_search_keeps_a_limit_on_what_a_mean_image_takes(timed, monkeypatch, tmp_path):
    """All but the times are real; what deciding takes is no line here, and was predicted to be one."""
    tick(monkeypatch)
    digits = bn.data.load("digits")
    space = bn.spaces.resnet(depth=8, channels=4, image_size=8, in_channels=1, conditional=True, gates="layers")
    monkeypatch.setattr(by_input, "times_full", clock(space, timed, lambda share: 0.3 + 0.9 * share**2, noise=0.01))
    options = bn.SearchOptions(epochs=6, seed=0, recalibration=2)
    found = bn.search(space, digits, ["latency<=85%", "macs<=95%"], options=options, out=tmp_path / "run")
    budget = found.result["budgets"][0]
    assert budget["met"]
    assert budget["low"] < budget["value"] < budget["high"] <= budget["limit"]
    told = measure_run(tmp_path / "run")
    assert told["costs"]["latency"] == budget["value"]
    assert "latency was measured" in (tmp_path / "run" / "report.html").read_text()
    edges = json.loads((tmp_path / "run" / "architecture.json").read_text())["edges"]
    shares = {edge["name"]: edge["costs"]["latency"] for edge in edges}
    assert min(shares.values()) >= 0 < shares["g0.0.block"]
    before = found.result["before"][0]
    assert before["smallest"] < before["limit"] < before["full"]
    with pytest.raises(ConfigError, match="where gates look at the input the run's file is timed: measure RUN"):
        evaluate_gates(found.supernet, digits, Inference(), ["latency"])
    with pytest.raises(UnreachableBudget, match="latency must be at most"):
        bn.search(space, digits, ["latency<=10%"], options=options, out=tmp_path / "other")
    assert not (tmp_path / "other" / "metrics.jsonl").exists()


def measure_run(run: Path) -> dict[str, Any]:
    written = io.StringIO()
    with redirect_stdout(written):
        assert cli.main(["measure", str(run), "--costs", "latency,macs", "--json"]) == 0
    return json.loads(written.getvalue())


def test_a_controller_settles_on_a_limit_in_milliseconds(network, timed, monkeypatch):
    tick(monkeypatch)
    monkeypatch.setattr(by_input, "times_full", clock(network, timed, lambda share: 0.1 + share))
    x = images(64)
    one = bn.Controller(network, ["latency<=75%"], total_steps=4, examples=lambda: [x])
    while one.phase != "settle":
        output, kept = network(x[:8], one.policy(8))
        one.loss(output.logsumexp(dim=1), kept).backward()
        one.step()
    one.settle()
    assert one.outcomes[0]["met"]
    assert one.outcomes[0]["high"] <= one.outcomes[0]["limit"]
    assert torch.equal(one.network()(x[:4]), timed[-1](x[:4]))
