"""The competitors' networks and training; what needs their packages runs only where these are installed."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import budgetnet as bn
from budgetnet.conditional import conditional
from budgetnet.data import Augmentation, Batches, Dataset, Split
from budgetnet.errors import ConfigError, DivergenceError, UnreachableBudget
from budgetnet.evaluation import evaluate
from budgetnet.training import Learner, Sums

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
peers = importlib.import_module("peers")

FULL = 40_813_184
"""MACs of ResNet-20, see `test_macs_of_resnet20_are_the_sum_over_its_layers`."""

SMALL = bn.SearchOptions(epochs=6, batch_size=16, learning_rate=0.05, precision="float32", seed=3)


def squares(images: int) -> Split:
    """Noise of 8 x 8 with a bright half, by which four classes can be told."""
    random = np.random.default_rng(images)
    targets = np.arange(images) % 4
    pixels = random.integers(0, 100, (images, 3, 8, 8), dtype=np.uint8)
    for image, target in zip(pixels, targets, strict=True):
        image[:, :4] += 100 * np.uint8(target % 2)
        image[:, :, :4] += 50 * np.uint8(target // 2)
    return Split(pixels, targets)


@pytest.fixture(scope="module")
def data():
    return Dataset("squares", squares(64), squares(32), squares(32), tuple("abcd"), "classification", None,
                   Augmentation(pad=1))  # fmt: skip


def loss(network, data):
    batches = Batches(data.train, batch_size=32, shuffle=False)
    return evaluate(copy.deepcopy(network).eval(), batches.epoch(0), classes=4)["loss"]


def test_macs_of_resnet20_are_the_sum_over_its_layers():
    stem, classifier = 27 * 16 * 32**2, 64 * 10
    first = 6 * 9 * 16**2 * 32**2
    second = (9 * 16 * 32 + 5 * 9 * 32**2 + 16 * 32) * 16**2  # the last term: the projection
    third = (9 * 32 * 64 + 5 * 9 * 64**2 + 32 * 64) * 8**2
    assert stem + first + second + third + classifier == FULL
    network = peers.resnet20()
    assert peers.macs(network, torch.zeros(1, 3, 32, 32)) == FULL
    assert network.training
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(("share", "width", "macs"), [(0.5, (11, 23, 45), 20_231_554), (0.25, (8, 16, 31), 10_122_358)])
def test_narrowed_is_the_widest_below_the_limit(share, width, macs):
    network = peers.narrowed(share * FULL)
    assert tuple(layer[0].conv2.out_channels for layer in (network.layer1, network.layer2, network.layer3)) == width
    assert peers.macs(network, torch.zeros(1, 3, 32, 32)) == macs
    wider = peers.resnet20((width[0], width[1], width[2] + 1))
    assert peers.macs(wider, torch.zeros(1, 3, 32, 32)) > share * FULL


def test_narrowed_refuses_a_limit_that_one_channel_exceeds():
    with pytest.raises(UnreachableBudget, match="at least"):
        peers.narrowed(1000)


def test_training_follows_one_rate_curve_from_call_to_call(data):
    network, rates = peers.resnet20((4, 4, 4), classes=4), []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    seconds = peers.train(network, data, SMALL, 0, 2), peers.train(network, data, SMALL, 2, 6)
    handle.remove()
    assert rates == [SMALL.rate(step / 24) for step in range(24)]  # 4 batches in each of 6 epochs
    assert min(seconds) > 0


def test_training_lowers_the_loss(data):
    torch.manual_seed(0)
    network = peers.resnet20((4, 4, 4), classes=4)
    before = loss(network, data)
    peers.train(network, data, SMALL, 0, 6)
    assert loss(network, data) < 0.6 * before


def test_training_is_that_of_budgetnet(data):
    torch.manual_seed(0)
    space = bn.spaces.resnet_fabric(width=1, channels=8, classes=4, image_size=8)
    kept = space.architecture("full")
    plain = bn.extract(space, kept).train()
    peers.train(plain, data, SMALL, 0, 2)
    learner = Learner(space, [], SMALL, ignore=None, device=torch.device("cpu"), dtype=torch.float32)
    learner.chosen = kept
    batches = Batches(data.train, batch_size=16, augmentation=data.augmentation, seed=3)
    for step in range(8):
        x, y = next(batches.epoch(step // 4, start=step % 4))
        rate, unused = SMALL.rate(step / 24), torch.Generator()
        learner.step(x, y, "finetune", generator=unused, rate=rate, progress=1.0, sums=Sums())
    for name, value in bn.extract(space, kept).state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], value)


def test_training_refuses_epochs_off_the_curve(data):
    with pytest.raises(ConfigError, match="within 0 to 6"):
        peers.train(peers.resnet20((4, 4, 4), classes=4), data, SMALL, 4, 7)


def test_training_stops_where_the_loss_is_not_finite(data):
    network = peers.resnet20((4, 4, 4), classes=4)
    with torch.no_grad():
        network.fc.bias.fill_(float("nan"))
    with pytest.raises(DivergenceError, match="finite"):
        peers.train(network, data, SMALL, 0, 1)


def test_measures_a_network_beside_another_and_leaves_both_as_they_are():
    network, other, images = peers.resnet20((4, 4, 4)), peers.resnet20((32, 32, 32)), torch.randn(8, 3, 16, 16)
    measured = peers.measure(network, images, other, batches=(1, 8), calls=8)
    assert measured["macs"] == peers.macs(network, images[:1])
    assert measured["params"] == sum(value.numel() for value in network.parameters())
    assert set(measured["latency"]) == {"torch 1", "onnxruntime 1", "torch 8", "onnxruntime 8"}
    assert all(found["ratio"] > 0 and found["ms"] > 0 for found in measured["latency"].values())
    assert all(part.training for each in (network, other) for part in each.modules())


def test_measures_a_conditional_network_one_by_one_where_its_file_takes_no_more():
    space = bn.spaces.resnet(depth=8, channels=4, image_size=16, gates="layers", conditional=True).eval()
    plain, images = conditional(space), torch.randn(8, 3, 16, 16)
    measured = peers.measure(plain, images, plain, batches=(1, 8), calls=8)
    assert set(measured["latency"]) == {"torch 1", "onnxruntime 1", "torch 8"}


def test_a_missing_package_is_said_in_one_line(data, monkeypatch):
    for package in ("torch_pruning", "modelopt", "modelopt.torch", "modelopt.torch.prune"):
        monkeypatch.setitem(sys.modules, package, None)
    network, example = peers.resnet20((4, 4, 4), classes=4), torch.zeros(1, 3, 8, 8)
    with pytest.raises(SystemExit, match=r"^torch_pruning is not installed: pip install -r benchmarks/requirements"):
        peers.torch_pruning(network, example, 1000)
    with pytest.raises(SystemExit, match=r"^modelopt\S* is not installed: pip install -r benchmarks/requirements"):
        peers.fastnas(network, data, 1000)


@pytest.mark.filterwarnings("ignore")  # of the foreign package
@pytest.mark.parametrize("share", [0.5, 0.25])
def test_torch_pruning_keeps_the_limit(share, data):
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    network, example = peers.resnet20((4, 8, 16), classes=4), torch.zeros(1, 3, 8, 8)
    peers.train(network, data, SMALL, 0, 1)
    weights, full = copy.deepcopy(network.state_dict()), peers.macs(network, example)
    pruned = peers.torch_pruning(network, example, share * full, steps=150)
    assert 0.8 * share * full < peers.macs(pruned, example) <= share * full
    assert pruned(torch.zeros(2, 3, 8, 8)).shape == (2, 4)
    assert all(torch.equal(weights[name], value) for name, value in network.state_dict().items())
    before = loss(pruned, data)
    peers.train(pruned, data, SMALL, 1, 6)
    assert loss(pruned, data) < before


@pytest.mark.filterwarnings("ignore")
def test_torch_pruning_says_what_it_cannot_do():
    pytest.importorskip("torch_pruning")
    network, example = peers.resnet20((4, 4, 4)), torch.zeros(1, 3, 8, 8)
    with pytest.raises(UnreachableBudget, match="at most 10"):
        peers.torch_pruning(network, example, 10, steps=60)
    with pytest.raises(ConfigError, match="below"):
        peers.torch_pruning(network, example, peers.macs(network, example))
    for value in network.parameters():
        value.requires_grad_(False)  # autograd has no graph to read
    with pytest.raises(RuntimeError, match="nothing was pruned"):
        peers.torch_pruning(network, example, 1000, steps=60)


@pytest.mark.filterwarnings("ignore")
def test_fastnas_keeps_the_limit_and_its_scores(data, tmp_path, monkeypatch):
    pytest.importorskip("modelopt.torch.prune")
    monkeypatch.setattr("modelopt.torch.nas.autonas.MODELOPT_QUEUE_MAXLEN", 2)
    monkeypatch.setattr(peers, "CALIBRATION", 2)
    torch.manual_seed(0)
    network, example = peers.resnet20((8, 16, 16), classes=4), torch.zeros(1, 3, 8, 8)
    peers.train(network, data, SMALL, 0, 2)
    weights, full = copy.deepcopy(network.state_dict()), peers.macs(network, example)
    scores = tmp_path / "scores.pth"
    pruned = peers.fastnas(network, data, 0.85 * full, SMALL, divisor=8, scores=scores)
    assert peers.macs(pruned, example) <= 0.85 * full
    assert pruned(torch.zeros(2, 3, 8, 8)).shape == (2, 4)
    assert {type(part).__module__.partition(".")[0] for part in pruned.modules()} == {"torch", "peers"}
    assert all(torch.equal(weights[name], value) for name, value in network.state_dict().items())
    monkeypatch.setattr(peers, "evaluate", None)  # not needed again
    smaller = peers.fastnas(network, data, 0.75 * full, SMALL, divisor=8, scores=scores)
    assert peers.macs(smaller, example) <= 0.75 * full
    with pytest.raises(ValueError, match="NOT all constraints can be satisfied"):
        peers.fastnas(network, data, 0.1 * full, SMALL, divisor=8, scores=scores)
    monkeypatch.undo()
    before = loss(smaller, data)
    peers.train(smaller, data, SMALL, 2, 6)
    assert loss(smaller, data) < before
