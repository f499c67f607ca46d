"""Quality pixel by pixel, and batch-norm statistics by their closed form."""

from __future__ import annotations

import math

import pytest
import torch
from small import network_on, random_graph
from torch import Tensor, nn
from torch.nn import functional as F

from budgetnet import Edge, SuperNetwork
from budgetnet.evaluation import evaluate, recalibrate
from budgetnet.sites import Fixed


def batches(*sizes: int, shape: tuple[int, ...] = (), classes: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Random logits as inputs, so that the identity predicts them, and random labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, classes, *shape, generator=generator),
            torch.randint(0, classes, (size, *shape), generator=generator),
        )
        for size in sizes
    ]


def test_accuracy_and_loss_of_images_one_by_one():
    examples = batches(5, 5, 3)
    quality = evaluate(lambda x: x, examples, classes=4)
    rows = [(logits, int(label)) for x, y in examples for logits, label in zip(x, y, strict=True)]
    assert quality["accuracy"] == pytest.approx(sum(int(x.argmax()) == y for x, y in rows) / 13)
    assert quality["loss"] == pytest.approx(sum(-float(x.log_softmax(0)[y]) for x, y in rows) / 13)
    assert set(quality) == {"accuracy", "loss"}


@pytest.mark.parametrize("ignore", [None, 2, 255])
def test_accuracy_and_mean_iou_of_masks_pixel_by_pixel(ignore: int | None):
    examples = batches(2, 1, shape=(3, 5), classes=4)
    if ignore == 255:
        examples[0][1][:, 0] = 255
    quality = evaluate(lambda x: x, examples, classes=4, ignore=ignore)
    right = seen = 0
    both, either, losses = [0] * 4, [0] * 4, []
    for x, y in examples:
        for image in range(len(x)):
            own = []
            for i in range(3):
                for j in range(5):
                    truth, guess = int(y[image, i, j]), int(x[image, :, i, j].argmax())
                    if truth == ignore:
                        continue
                    own.append(float(F.cross_entropy(x[image, :, i, j], torch.tensor(truth))))
                    seen += 1
                    right += truth == guess
                    for label in range(4):
                        both[label] += truth == guess == label
                        either[label] += label in (truth, guess)
            losses.append(sum(own) / len(own))
    ious = [b / e for b, e in zip(both, either, strict=True) if e]
    assert quality["accuracy"] == pytest.approx(right / seen)
    assert quality["mean_iou"] == pytest.approx(sum(ious) / len(ious))
    assert quality["loss"] == pytest.approx(sum(losses) / len(losses))


def test_classes_that_do_not_occur_leave_the_mean_iou_alone():
    """Truth 0 0 1, prediction 0 1 1 of five classes: each of the two that occur has 1 of 2."""
    logits = F.one_hot(torch.tensor([[[0, 1, 1]]]), 5).permute(0, 3, 1, 2).float()
    quality = evaluate(lambda x: x, [(logits, torch.tensor([[[0, 0, 1]]]))], classes=5)
    assert quality["mean_iou"] == pytest.approx(0.5)
    assert quality["accuracy"] == pytest.approx(2 / 3)


def test_a_disconnected_architecture_is_undecided():
    """Its zeros are equally likely classes: a loss of ln 4."""
    network = network_on(random_graph(0, nodes=4, extra=1))
    examples = [(torch.randn(4, *network.input_shape), torch.tensor([0, 1, 2, 3]))]
    nothing = Fixed(torch.zeros(1, network.gate_count))
    quality = evaluate(lambda x: network(x, nothing)[0], examples, classes=4)
    assert quality == {"loss": pytest.approx(math.log(4)), "accuracy": 0.25}


def normed() -> SuperNetwork:
    """Two ways from x to y, each with a batch norm that sees the input itself."""
    edges = [
        Edge(start="x", end="y", module=nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)), name=name)
        for name in ("used", "unused")
    ]
    network = SuperNetwork(edges, input_shape=(3, 4, 4))
    with torch.no_grad():
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.fill_(7)
                norm.running_var.fill_(9)
                norm.num_batches_tracked.fill_(5)
    return network


def test_recalibration_sets_statistics_to_the_mean_over_batches_and_nothing_else():
    """Mean and unbiased variance of each batch, averaged; each batch weighs the same, whatever its size."""
    network = normed()
    generator = torch.Generator().manual_seed(0)
    inputs = [k + k * torch.randn(size, 3, 4, 4, generator=generator) for k, size in enumerate((6, 2, 5), 1)]
    examples = [(x, torch.zeros(len(x))) for x in inputs]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    policy = Fixed(torch.tensor([[1.0, 0.0]]))
    recalibrate(network, lambda x: network(x, policy)[0], examples)
    norm = network.modules_on_edges[0][0]
    means = torch.stack([x.mean(dim=(0, 2, 3)) for x, _ in examples])
    variances = torch.stack([x.transpose(0, 1).flatten(1).var(dim=1) for x, _ in examples])
    torch.testing.assert_close(norm.running_mean, means.mean(dim=0))
    torch.testing.assert_close(norm.running_var, variances.mean(dim=0))
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"modules_on_edges.0.0.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert {norm.momentum for norm in network.modules() if isinstance(norm, nn.BatchNorm2d)} == {0.1}
    assert not any(part.training for part in network.modules())


def test_recalibration_forgets_what_was_before():
    network, policy = normed(), Fixed(torch.tensor([[1.0, 1.0]]))
    examples = [(torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1)), torch.zeros(8))]
    found = []
    for _ in range(2):
        recalibrate(network, lambda x: network(x, policy)[0], examples)
        found.append(network.modules_on_edges[1][0].running_mean.clone())
    assert torch.equal(*found)


def test_recalibration_that_fails_leaves_batch_norms_as_they_were():
    network = normed()
    before = {name: value.clone() for name, value in network.state_dict().items()}

    def failing(x: Tensor) -> Tensor:
        network(x, Fixed(torch.ones(1, 2)))
        raise MemoryError

    with pytest.raises(MemoryError):
        recalibrate(network, failing, [(torch.randn(4, 3, 4, 4), torch.zeros(4))])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert {norm.momentum for norm in network.modules() if isinstance(norm, nn.BatchNorm2d)} == {0.1}
    assert not network.training


def test_recalibration_leaves_no_graph_and_no_gradient():
    network = normed()
    recalibrate(network, lambda x: network(x, Fixed(torch.ones(1, 2)))[0], [(torch.randn(4, 3, 4, 4), torch.zeros(4))])
    assert all(value.grad is None for value in network.parameters())
    assert not any(value.requires_grad for value in network.buffers())
