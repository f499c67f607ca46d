"""Ways to decide gates once they are learned, and what they cost: against loops by hand and made-up costs."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from small import unsettled

import budgetnet as bn
from budgetnet.conditional import beside, conditional
from budgetnet.conditional.branches import WHOLE
from budgetnet.conditional.variants import VARIANTS
from budgetnet.data import Batches
from budgetnet.delivery import evaluate_gates, fold_gates, restored
from budgetnet.errors import ConfigError, FileError, UnreachableBudget
from budgetnet.evaluation import recalibrate
from budgetnet.inference import (
    Inference,
    Observed,
    exit_table,
    fitting_threshold,
    matching_threshold,
    observe,
    settled_threshold,
)
from budgetnet.runs import RunFolder
from budgetnet.sites import AlwaysOn, Fixed, Sample, Threshold
from budgetnet.timing import Timing

resnet = partial(bn.spaces.resnet, depth=8, channels=4, image_size=8, in_channels=1, conditional=True)
exits = partial(bn.spaces.densenet_exits, depth=10, growth=4, image_size=8, in_channels=1, exit_channels=8)


def stirred(space, seed: int = 0) -> bn.SuperNetwork:
    """A network whose gates differ from example to example."""
    torch.manual_seed(seed)
    network = space()
    for head in network.heads.values():
        torch.nn.init.normal_(head.decide.weight, std=1.0)
        head.reset(0.0)
    network.train()
    for part in network.modules():
        if isinstance(part, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            part.momentum = None  # the mean of what it saw
    for _ in range(3):
        network.masked(torch.randn(32, 1, 8, 8), Threshold())
    return network.eval()


def examples(count: int = 3, size: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 1, 8, 8, generator=generator), torch.randint(10, (size,), generator=generator))
        for _ in range(count)
    ]


def run(network, x, policy):
    with torch.no_grad():
        return network(x, policy)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policy": "majority"}, "policy must be threshold or stochastic or always-on or ensemble, got 'majority'"),
        ({"tau": 1.5}, r"tau must lie in \[0, 1\], got 1.5"),
        ({"runs": 0}, "runs must be a whole number >= 1, got 0"),
        ({"runs": True}, "runs must be a whole number >= 1, got True"),
    ],
)
def test_ways_to_decide_are_checked_when_they_are_made(given, message):
    with pytest.raises(ConfigError, match=message):
        Inference(**given)


def test_costs_and_rates_are_means_over_all_examples():
    """Batches of unlike size, against one pass over all of them."""
    network = stirred(resnet)
    model = bn.costs.MACs().bind(network)
    data = [*examples(2), *examples(1, 5)]
    seen = observe(network, Inference(tau=0.4), data, classes=10, models={"macs": model})
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    output, kept = run(network, x, Threshold(0.4))
    assert seen.quality["accuracy"] == pytest.approx(float((output.argmax(dim=1) == y).float().mean()))
    assert seen.costs["macs"] == pytest.approx(float(model(network.used(kept)).mean()))
    assert seen.rates == pytest.approx(kept.mean(dim=0).tolist())
    assert any(0 < rate < 1 for rate in seen.rates)


def test_always_on_opens_everything_and_a_higher_threshold_less():
    network = stirred(resnet)
    model = {"macs": bn.costs.MACs().bind(network)}
    look = partial(observe, network, examples=examples(), classes=10, models=model)
    full = float(model["macs"](network.used(network.architecture("full")))[0])
    assert look(Inference("always-on")).costs["macs"] == full
    costs = [look(Inference(tau=tau)).costs["macs"] for tau in (0.0, 0.3, 0.5, 0.7, 1.0)]
    assert costs[0] == full
    assert sorted(costs, reverse=True) == costs
    assert costs[-1] < costs[2] < full


def test_an_ensemble_is_the_mean_of_its_stochastic_runs():
    network, data = stirred(resnet), examples(1)
    model = {"macs": bn.costs.MACs().bind(network)}
    seen = observe(network, Inference("ensemble", runs=3, seed=5), data, classes=10, models=model)
    generator = torch.Generator().manual_seed(5)
    runs = [run(network, data[0][0], Sample(16, generator)) for _ in range(3)]
    mean = torch.stack([output.softmax(dim=1) for output, _ in runs]).mean(dim=0)
    expected = torch.nn.functional.nll_loss(mean.log(), data[0][1])
    assert seen.quality["loss"] == pytest.approx(float(expected), rel=1e-5)
    each = [float(model["macs"](network.used(kept)).mean()) for _, kept in runs]
    assert seen.costs["macs"] == pytest.approx(sum(each))
    single = observe(network, Inference("stochastic", seed=5), data, classes=10)
    assert single.quality["loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(runs[0][0], data[0][1])), rel=1e-5
    )


def budgets(limit: float | str) -> list:
    """At most so many MACs, or what the text asks for."""
    network = bn.spaces.resnet(depth=8, channels=4, image_size=8)
    return [bn.Budget.parse(text if "=" in text else f"macs<={text}").bind(network) for text in str(limit).split()]


@pytest.mark.parametrize(
    ("cost", "limit", "expected"),
    [
        (lambda tau: 100 * (1 - tau), 60, 0.5),  # kept as it is
        (lambda tau: 100 * (1 - tau), 30, 0.7),  # gates: close more
        (lambda tau: 100 * tau, 30, 0.3),  # exits: take more
        (lambda tau: 100 - 180 * abs(tau - 0.5), 70, 1 / 3),  # both ways: one as near as the other
    ],
)
def test_the_threshold_nearest_to_one_half_is_found(cost, limit, expected):
    def look(tau: float) -> Observed:
        return Observed({}, {"macs": cost(tau)}, [])

    tau, seen = fitting_threshold(budgets(limit), look)
    assert abs(tau - 0.5) == pytest.approx(abs(expected - 0.5), abs=0.01)
    assert seen.costs["macs"] == cost(tau) <= limit


@pytest.mark.parametrize(
    ("cost", "asked", "expected"),
    [
        (lambda tau: 100 * (1 - tau), "macs~=52", 0.5),  # near enough as it is
        (lambda tau: 100 * (1 - tau), "macs~=70", 1 - 0.95 * 0.7),  # too little at 1/2: open more
        (lambda tau: 100 * (1 - tau), "macs~=30", 1 - 1.05 * 0.3),  # too much: close more
        (lambda tau: 100 * tau, "macs~=70", 0.95 * 0.7),  # exits: take less
        (lambda tau: 100 * tau, "macs~=30", 1.05 * 0.3),
        (lambda tau: 100 * (1 - tau), "macs~=30 params<=30", 0.7),  # both cost the same here
        (lambda tau: 100 * (1 - tau), "macs~=70 params~=72", 1 - 0.95 * 0.72),
    ],
)
def test_a_threshold_comes_to_a_target_from_either_side(cost, asked, expected):
    def look(tau: float) -> Observed:
        return Observed({}, dict.fromkeys(("macs", "params"), cost(tau)), [])

    asked = budgets(asked)
    tau, seen = fitting_threshold(asked, look)
    assert tau == pytest.approx(expected, abs=0.01)
    for budget in asked:
        assert budget.met(torch.tensor(seen.costs[budget.name]))


@pytest.mark.parametrize(
    ("cost", "asked", "line"),
    [
        (lambda tau: 60 if tau < 0.7 else 20, "macs~=40", "macs must be near 40 MACs, but .* comes nearest .* takes "),
        (lambda tau: 60 - 10 * tau, "macs~=70", "macs must be near 70 MACs, but at the threshold .* takes 60$"),
        (lambda tau: 100 * (1 - tau), "macs~=70 params<=30", "must be .* but at the threshold of the gates"),
    ],
)
def test_a_target_that_no_threshold_comes_to_is_said_in_one_line(cost, asked, line):
    def look(tau: float) -> Observed:
        return Observed({}, dict.fromkeys(("macs", "params"), cost(tau)), [])

    with pytest.raises(UnreachableBudget, match=line):
        fitting_threshold(budgets(asked), look)


def test_a_target_is_come_to_with_the_batch_norms_of_its_threshold():
    """The cost is 12 % less where batch norms are those of a threshold below 1/2."""
    settled = []

    def look(tau: float) -> Observed:
        return Observed({}, {"macs": 100 * (1 - tau) * (0.88 if settled[-1] < 0.5 else 1)}, [])

    tau, seen = settled_threshold(budgets("macs~=70"), look, settled.append)
    assert settled[-1] == tau
    assert tau == pytest.approx(1 - 0.95 * 0.7 / 0.88, abs=0.01)
    assert seen.costs["macs"] == pytest.approx(0.95 * 70, rel=0.01)


def test_a_budget_that_no_threshold_keeps_is_said_in_one_line():
    def look(tau: float) -> Observed:
        return Observed({}, {"macs": 80 - 10 * tau}, [])

    with pytest.raises(UnreachableBudget, match=r"macs must be at most 50 MACs, but at the threshold .* takes 70"):
        fitting_threshold(budgets(50), look)


def test_batch_norms_are_set_again_at_the_threshold_that_is_found():
    """A network whose cost falls by 12 % where its batch norms are those of a threshold above 1/2, or rises."""
    settled, looks = [], []

    def look(tau: float) -> Observed:
        looks.append((tau, settled[-1]))
        return Observed({}, {"macs": 100 * (1 - tau) * (change if settled[-1] > 0.5 else 1)}, [])

    for change, limit, times in ((0.88, 60, [0.5]), (0.88, 30, 2), (1.12, 30, 3)):
        settled.clear()
        tau, seen = settled_threshold(budgets(limit), look, settled.append)
        assert looks[-1][1] == settled[-1]
        assert seen.costs["macs"] <= limit
        assert settled == times if isinstance(times, list) else len(settled) == times
        assert tau == pytest.approx(settled[-1], abs=1e-9)
        if change > 1:  # closed further than at first, for what the batch norms cost
            assert tau == pytest.approx(1 - 0.3 / 1.12, abs=0.01)


def test_where_no_threshold_stands_still_the_budget_is_kept_all_the_same():
    """The cost rises each time that the batch norms are set."""
    settled = []

    def look(tau: float) -> Observed:
        return Observed({}, {"macs": 100 * (1 - tau) * 1.1 ** len(settled)}, [])

    _, seen = settled_threshold(budgets(30), look, settled.append)
    assert len(settled) == 4
    assert 29 < seen.costs["macs"] <= 30


def test_the_exit_table_is_that_of_a_loop_over_examples():
    network, data = stirred(exits), examples()
    table = exit_table(network, 0.5, data)
    ways = network.ways()
    order = [edge for edge in network.visits if edge in network.exits]
    taken, right = [], [[], [], []]
    for x, y in data:
        used = network.used(run(network, x, Threshold())[1])
        for row in range(len(x)):
            open_exits = [bool(used[row, edge]) for edge in order]
            taken.append(open_exits.index(True) if any(open_exits) else 2)
            for way in range(3):
                output = network.run(x[row : row + 1], network.used(ways[way : way + 1]))
                right[way].append(bool(output.argmax() == y[row]))
    assert len(set(taken)) > 1
    for way, line in enumerate(table):
        mine = [hit for hit, place in zip(right[way], taken, strict=True) if place == way]
        assert line["share"] == pytest.approx(len(mine) / len(taken))
        assert line["accuracy_all"] == pytest.approx(sum(right[way]) / len(taken))
        assert line["accuracy_chosen"] == (pytest.approx(sum(mine) / len(mine)) if mine else None)
    assert [line["name"] for line in table] == ["d0.exit", "d1.exit", "end"]


def conditional_run(out, budgets=("macs<=60%",), space=resnet, **options) -> bn.Found:
    """Trained for a moment: its gates are where they began, so that a threshold has to be found."""
    torch.manual_seed(0)
    digits = bn.data.load("digits").subset(256, seed=0)
    searching = bn.SearchOptions(**{"epochs": 2, "validate_every": 2, "recalibration": 2} | options)
    return bn.search(stirred(space), digits, list(budgets), searching, out=out)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> bn.Found:
    """A run in bfloat16; leave it as it is."""
    return conditional_run(tmp_path_factory.mktemp("trained") / "run", precision="bfloat16")


def test_a_run_is_evaluated_from_its_checkpoint(trained, tmp_path):
    digits, run = bn.data.load("digits").subset(256, seed=0), RunFolder(trained.run)
    network = restored(run, resnet())
    for name, value in trained.supernet.named_parameters():
        assert torch.equal(value, network.get_parameter(name))
    seen = evaluate_gates(network, digits, Inference("always-on"), ["macs", "activation"], recalibration=2)
    batches = Batches(digits.train, batch_size=128, augmentation=digits.augmentation).several(2)  # as in training
    assert unsettled(network, lambda network, x: network(x, AlwaysOn()), [x for x, _ in batches]) < 1e-4
    assert seen["costs"]["activation"] == network.gate_count
    assert seen["activation"] == 1
    assert seen["units"] == {"macs": "MAC", "activation": "gate"}
    with pytest.raises(FileError, match="must hold a checkpoint, found none"):
        restored(RunFolder(tmp_path), resnet())
    with pytest.raises(FileError, match="the checkpoint is of another network"):
        restored(run, resnet(memory=True))


@torch.no_grad()
def delivered(found: bn.Found, split) -> tuple[float, float]:
    """Mean MACs and accuracy of the network that is handed over, by its own decisions."""
    model, network = bn.costs.MACs().bind(found.supernet), found.network()
    batches = Batches(split, batch_size=64, shuffle=False)
    macs, right = [], []
    for x, y in batches.epoch(0):
        output, kept = network.decide(x)
        macs.append(model(found.supernet.used(kept)))
        right.append(output.argmax(dim=1) == y)
    return float(torch.cat(macs).mean()), float(torch.cat(right).float().mean())


def test_what_is_reported_of_gates_that_look_at_the_input_is_what_is_handed_over(trained, tmp_path):
    """In bfloat16, as runs are on this machine by default, decisions differ; the network is handed over in float32."""
    found, run = trained, shutil.copytree(trained.run, tmp_path / "run")
    result, digits = found.result, bn.data.load("digits")
    (budget,) = result["budgets"]
    assert result["inference"]["tau"] != 0.5
    macs, accuracy = delivered(found, digits.validation)
    assert macs == pytest.approx(budget["value"], rel=1e-5) == pytest.approx(result["network"]["macs"], rel=1e-5)
    assert macs <= budget["limit"] * (1 + 1e-6)
    assert accuracy == pytest.approx(result["validation"]["accuracy"], abs=2e-3)
    macs, accuracy = delivered(found, digits.test)
    assert macs == pytest.approx(result["inference"]["test_costs"]["macs"], rel=1e-5)
    assert accuracy == pytest.approx(result["test"]["accuracy"], abs=2e-3)
    assert result["network"]["params"] == sum(value.numel() for value in found.plain.parameters())
    again = restored(RunFolder(run), resnet()).eval()  # as it is handed over, its batch norms too
    for name, value in found.supernet.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    loaded, x = bn.load(run, resnet()), torch.from_numpy(digits.test.images[:16]) / 127.5 - 1
    assert torch.equal(loaded(x), found.network()(x))
    assert loaded.table == found.network().table
    for broken in ({"a": {}}, {next(iter(loaded.table)): {"16": {"rows": 0.5}}}, {next(iter(loaded.table)): [1]}):
        RunFolder(run).write("break-even.json", broken)
        with pytest.raises(FileError, match=r"break-even.json: "):
            bn.load(run, resnet())


def test_a_fixed_architecture_of_gates_that_look_at_the_input_is_handed_over(tmp_path):
    space = exits(conditional=True)
    kept = space.ways()[:1]
    digits = bn.data.load("digits").subset(256, seed=0)
    options = bn.SearchOptions(epochs=1)
    found = bn.search(space, digits, ["macs<=100%"], options, architecture=kept, out=tmp_path / "run")
    assert torch.equal(found.architecture, kept)
    assert "inference" not in found.result
    assert found.result["network"]["macs"] == found.result["budgets"][0]["value"]
    assert found.result["network"]["macs"] < found.result["full"]["macs"]
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        expected = found.supernet.run(x, found.supernet.used(kept))
        torch.testing.assert_close(found.network()(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("faster", ["branches", "masks", "branches, filled", "masks, filled"])
def test_the_network_and_its_file_run_as_is_faster_on_this_machine(tmp_path, monkeypatch, faster):
    """By made-up times: of an edge and of the network the last way is the fastest, so that nothing is skipped."""
    calls = []

    def timed(ways, *, calls=0) -> list[Timing]:
        return [Timing(np.full(calls, 1.0 if name == faster else 2.0), 0.0) for name in list(VARIANTS)[: len(ways)]]

    def descending(ways, repeats, device) -> list[float]:
        calls.append(len(ways))
        return [float(len(ways) - place) for place in range(len(ways))]

    monkeypatch.setattr("budgetnet.conditional.variants.interleaved", timed)
    monkeypatch.setattr("budgetnet.conditional.tuning.interleaved", descending)
    gated = partial(resnet, granularity=(2, 4, 8))
    found = conditional_run(tmp_path / "run", ["macs<=110%"], gated, epochs=1)  # a threshold of 1/2 will do
    table = json.loads((tmp_path / "run" / "break-even.json").read_text())
    assert found.network().table == table
    assert table
    assert all(rows == dict.fromkeys(("1", "16", "64"), WHOLE._asdict()) for rows in table.values())
    assert calls.count(2) >= 2
    assert found.result["inference"]["onnx"] == faster
    ratio = {"branches": 0.5, "masks": 2.0}.get(faster, 1.0)
    assert found.result["inference"]["beside_full"] == dict.fromkeys(
        ("torch 1", "torch 16", "torch 64", "onnxruntime 1"), ratio
    )
    assert list(found.result["network"]["onnx_ms"]) == list(VARIANTS)
    file = (tmp_path / "run" / "network.onnx").read_bytes()
    assert (b"ReduceMax" in file) == ("masks" in faster)  # whether any group is open, of a table of bits
    assert (b"Resize" in file) == (faster == "masks, filled")
    assert not list((tmp_path / "run").glob("network.*.onnx"))


def test_a_network_that_skips_is_timed_beside_the_full_one(tmp_path):
    """A layer that no image takes; the times of both are those of the real networks."""
    layer = torch.nn.Sequential(*[torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(4)])
    edges = [
        bn.Edge(start="x", end="y", module=layer, name="layer", gate=bn.ConditionalGates),
        bn.Edge(start="x", end="y", module=torch.nn.Identity(), fixed=True),
    ]
    network = bn.SuperNetwork(edges, input_shape=(16, 32, 32)).eval()
    network.heads["0"].reset(-20.0)
    plain, x = conditional(network), torch.randn(8, 16, 32, 32)
    file = bn.export(plain, tmp_path / "network.onnx", x[:1])
    ratios = beside(plain, file, bn.extract(network, network.architecture("full")).eval(), x, (1, 4))
    assert list(ratios) == ["torch 1", "torch 4", "onnxruntime 1"]
    assert all(0 < ratio < 0.9 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("options", [{}, {"depth": 14, "lock": True}])
def test_gates_that_are_constants_are_not_paid_for(options):
    """By hand: the later blocks' gates are constants, so what they keep is paid for and their decisions are not."""
    network, digits = stirred(partial(resnet, **options)), bn.data.load("digits")
    images = Batches(digits.train, batch_size=64).epoch(0)
    recalibrate(network, lambda x: network.masked(x, Threshold())[0], images)
    with torch.no_grad():
        for head in list(network.heads.values())[1:]:  # far from any threshold, every other gate closed
            head.decide.weight.zero_()
            head.decide.bias.copy_(10.0 * (1 - 2 * (torch.arange(len(head.decide.bias)) % 2)))
    macs = bn.costs.MACs().bind(network)
    first, *others = map(int, network.heads)
    folded, told = fold_gates(network, digits, 0.5, 0.0)
    gates = [len(network.own_columns(edge)) for edge in (first, *others)]
    assert told["gates"] == sum(gates)
    branch, *led = folded.conditional_branches
    assert [edge.columns for edge in led] == [branch.columns] * bool(options)  # for which the first decides
    assert told["constants"] == sum(gates) - len(branch.columns)
    original, after = told["validation"]["original"], told["validation"]["folded"]
    assert after["accuracy"] == pytest.approx(original["accuracy"], abs=1e-3)
    pool = 4 * 8 * 8  # channels and pixels before the first block
    left = pool + (macs.per_head[first] - pool) * len(branch.columns) / gates[0]
    spared = sum(macs.per_head.values()) - left
    assert original["macs"] - after["macs"] == pytest.approx(spared, rel=1e-5)


def test_only_gates_that_look_at_the_input_are_folded():
    with pytest.raises(ConfigError, match="gates to fold are those that look at the input, and resnet has no such"):
        fold_gates(resnet(conditional=False), bn.data.load("digits"), 0.5, 0.05)


@pytest.mark.parametrize("sign", [1, -1], ids=["gates", "exits"])
@pytest.mark.parametrize("drawn", [0.2, 0.5, 0.9])
def test_the_matching_threshold_costs_what_the_drawn_gates_cost(drawn, sign):
    """Logits spread evenly from -4 to 4: a threshold at logit l opens (4 - l) / 8 of them."""
    logits = torch.linspace(-4, 4, 8001)

    def cost(policy) -> float:
        opened = float(policy(logits, slice(0, 8001)).mean()) if isinstance(policy, Threshold) else drawn
        return opened if sign > 0 or not isinstance(policy, Threshold) else 1 - opened

    expected = (4 - 8 * drawn) * sign
    assert matching_threshold(cost, Sample()) == pytest.approx(expected, abs=0.1 if drawn != 0.5 else 0)


def test_the_matching_threshold_stays_where_gates_are_polarised():
    """Between -5 and 5 every threshold costs the same, and beyond each it does again: the nearest is taken."""
    logits = torch.tensor([-5.0, -5.0, 5.0, 5.0])

    def cost(policy) -> float:
        return float(policy(logits, slice(0, 4)).mean())

    assert matching_threshold(cost, Fixed(torch.tensor([[1.0, 0, 1, 0]]))) == 0
    assert matching_threshold(cost, Fixed(torch.ones(1, 4))) == pytest.approx(-5, abs=0.02)
    assert matching_threshold(cost, Fixed(torch.zeros(1, 4))) == pytest.approx(5, abs=0.02)
    assert matching_threshold(lambda policy: 2.0 if isinstance(policy, Sample) else cost(policy), Sample()) == 0
