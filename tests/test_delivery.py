"""What is handed over: batch norms set on training images, exits that take each image once, files that agree."""

from __future__ import annotations

import runpy
from pathlib import Path

import onnx
import pytest
import torch
from small import unsettled

import budgetnet as bn
from budgetnet.conditional import one_by_one
from budgetnet.data import Batches
from budgetnet.errors import ConfigError
from budgetnet.evaluation import evaluate
from budgetnet.export import load
from budgetnet.sites import Threshold

EPOCHS = 6


def images(split: bn.data.Split) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of a split and their classes, in its order."""
    return next(iter(Batches(split, batch_size=len(split), shuffle=False).epoch(0)))


def search(space, budget: str, folder, **options):
    digits = bn.data.load("digits").subset(512, seed=0)
    given = {"precision": "float32", "validate_every": EPOCHS, "candidates": 2, "recalibration": 2}
    return digits, bn.search(space, digits, [budget], bn.SearchOptions(**given | options), out=folder / "run")


def recalibrating(digits, epochs: int) -> list[torch.Tensor]:
    """The batches that batch norms are set on."""
    batches = Batches(digits.train, batch_size=128, augmentation=digits.augmentation).epoch(epochs)
    return [x for x, _ in batches][:2]


@pytest.fixture(scope="module")
def exits(tmp_path_factory):
    """Digits, and what a search for a DenseNet with exits found in them."""
    torch.manual_seed(0)
    small = {"depth": 10, "growth": 4, "image_size": 8, "in_channels": 1, "exit_channels": 8, "exit_pool": 2}
    space = bn.spaces.densenet_exits(**small)
    return search(space, "layers<=80%", tmp_path_factory.mktemp("exits"), epochs=EPOCHS)


def test_exits_are_told_apart_in_the_result(exits):
    """Each image is taken once; shares are those of the network that skips, accuracies of the three ways."""
    digits, found = exits
    table = found.result["inference"]["exits"]
    assert [row["name"] for row in table] == ["d0.exit", "d1.exit", "end"]
    assert sum(row["share"] for row in table) == pytest.approx(1)
    used = [row for row in table if row["share"] > 0]
    assert len(used) > 1
    mean = sum(row["share"] * row["accuracy_chosen"] for row in used)
    assert mean == pytest.approx(found.result["test"]["accuracy"])
    x, y = images(digits.test)
    kept, ways = found.plain.decide(x)[1], found.supernet.ways()
    taken = torch.where(kept.any(dim=1), kept.argmax(dim=1), 2)
    with torch.no_grad():
        for place, row in enumerate(table):
            output = found.supernet.run(x, found.supernet.used(ways[place : place + 1]))
            right = (output.argmax(dim=1) == y).double()
            assert row["share"] == pytest.approx(float((taken == place).double().mean()))
            assert row["accuracy_all"] == pytest.approx(float(right.mean()))
            own = right[taken == place]
            assert row["accuracy_chosen"] == (pytest.approx(float(own.mean())) if len(own) else None)


def test_a_network_with_exits_its_file_and_its_result_agree(exits):
    digits, found = exits
    tau, (budget,) = found.result["inference"]["tau"], found.result["budgets"]
    assert max(found.result["equivalence"].values()) < 1e-4
    for split in ("validation", "test"):
        quality = evaluate(found.plain, [images(getattr(digits, split))], classes=10)
        assert found.result[split] == pytest.approx(quality, rel=1e-4)
    model = bn.Budget.parse("layers<=80%").bind(found.supernet).model
    with torch.no_grad():
        _, kept = found.supernet.masked(images(digits.validation)[0], Threshold(tau))
        x = images(digits.test)[0][:40]
        masked = found.supernet.masked(x, Threshold(tau))[0]
    assert budget["value"] == pytest.approx(float(model(found.supernet.used(kept)).mean()))
    assert budget["met"] == (budget["value"] <= budget["limit"])
    assert budget["met"]
    file = load(found.run / "network.onnx", threads=1)
    for output in (found.network()(x), torch.cat([file(row[None]) for row in x])):
        torch.testing.assert_close(output, masked, rtol=1e-4, atol=1e-4)


def test_a_network_that_skips_is_exported_with_its_branches(exits, tmp_path):
    digits, found = exits
    x = images(digits.test)[0][:8]
    file = bn.export(found.network(), tmp_path / "mine.onnx", x)
    assert "If" in {node.op_type for node in onnx.load(str(file)).graph.node}
    torch.testing.assert_close(one_by_one(load(file), x), found.plain(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match=r"gates look at the input is exported to a \.onnx file, got 'mine\.pt2'$"):
        bn.export(found.network(), tmp_path / "mine.pt2", x)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.onnx"]


def test_a_network_with_exits_has_batch_norms_of_training_images(exits):
    """Which exit is taken changes nothing before a batch norm."""
    digits, found = exits

    def run(network, x):
        return network.masked(x, Threshold())

    assert unsettled(found.supernet, run, recalibrating(digits, EPOCHS)) < 1e-4


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_plain_network_has_batch_norms_of_training_images(tmp_path):
    torch.manual_seed(0)
    space = bn.spaces.resnet_fabric(width=1, channels=4, image_size=8, in_channels=1)
    digits, found = search(space, "macs<=60%", tmp_path, epochs=3, warmup=0.34, finetune=0.33)
    batches = recalibrating(digits, 3)
    assert unsettled(found.network(), lambda network, x: network(x), batches) < 1e-4
    used = found.supernet.used(found.architecture)
    assert unsettled(found.supernet, lambda network, x: network.run(x, used), batches) < 1e-4
    for split in ("validation", "test"):
        quality = evaluate(found.plain, [images(getattr(digits, split))], classes=10)
        assert found.result[split] == pytest.approx(quality, rel=1e-4)


def test_the_example_of_gates_of_ones_own_keeps_its_budget(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(Path(bn.__file__).parents[1] / "examples" / "own_gated_space.py"), run_name="__main__")
    found = example["found"]
    (budget,) = found.result["budgets"]
    assert budget["limit"] / 2 < budget["value"] <= budget["limit"]
    assert found.result["test"]["accuracy"] > 0.9
    file = Path(capsys.readouterr().out.split()[-1])
    x = images(bn.data.load("digits").test)[0][:16]
    torch.testing.assert_close(load(file)(x), found.plain(x), rtol=1e-4, atol=1e-4)


def test_gates_of_ones_own_may_look_at_the_input(tmp_path):
    path = Path(bn.__file__).parents[1] / "examples" / "own_gated_space.py"
    space = runpy.run_path(str(path))["gated_cnn"](channels=8, by_input=True)
    digits, found = search(space, "macs<=70%", tmp_path, epochs=2)
    tau = found.result["inference"]["tau"]
    seen = bn.evaluate_gates(found.supernet, digits, bn.Inference(tau=tau), ["macs"], recalibration=0)
    assert seen["quality"] == pytest.approx(found.result["test"], rel=1e-3)
    x = images(digits.test)[0][:8]
    # what is skipped goes by times, so sums may come in another order
    torch.testing.assert_close(bn.load(found.run, space)(x), found.plain(x), rtol=1e-4, atol=1e-5)
