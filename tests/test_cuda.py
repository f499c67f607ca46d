"""What runs on a GPU beside the same on the CPU, and searches from data to file on one. Skipped where there is none."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import budgetnet as bn
from budgetnet import cli
from budgetnet.conditional import conditional
from budgetnet.costs import Latency
from budgetnet.costs.latency import widely
from budgetnet.data import Batches
from budgetnet.data.dataset import Augmentation
from budgetnet.delivery import Found
from budgetnet.sites import AlwaysOn, Fixed, Threshold

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SPACES = {
    "fabric": partial(bn.spaces.resnet_fabric, width=2, channels=8, image_size=8, in_channels=1),
    "channels": partial(bn.spaces.resnet, depth=8, channels=8, image_size=8, in_channels=1),
    "blocks": partial(bn.spaces.resnet, depth=8, channels=8, image_size=8, in_channels=1, gates="both", granularity=4),
    "streams": partial(bn.spaces.resnet, depth=8, channels=8, image_size=8, in_channels=1, where="stream"),
    "mobilenet": partial(bn.spaces.mobilenet_v2, width=0.35, image_size=32, in_channels=1),
    "by input": partial(bn.spaces.resnet, depth=8, channels=8, image_size=8, in_channels=1, conditional=True),
    "exits": partial(bn.spaces.densenet_exits, depth=10, growth=4, image_size=8, in_channels=1, exit_channels=8),
}
PLAIN = ["fabric", "channels", "blocks", "streams", "mobilenet"]
BY_INPUT = ["by input", "exits"]
COSTS = ["macs", "params", "memory:file", "memory:activations", "memory", "steps:2", "layers", "activation"]


@pytest.fixture(autouse=True)
def whole_digits():
    """A GPU would round float32 to fewer digits in convolutions."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def space(name: str) -> bn.SuperNetwork:
    torch.manual_seed(0)
    network = SPACES[name]()
    for part in network.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(part.bias, std=0.1)
    return network


def pair(name: str) -> tuple[bn.SuperNetwork, bn.SuperNetwork]:
    """The same network on the CPU and on the GPU."""
    network = space(name)
    return network, copy.deepcopy(network).cuda()


def examples(network: bn.SuperNetwork, count: int = 16) -> torch.Tensor:
    return torch.randn(count, *network.input_shape, generator=torch.Generator().manual_seed(0))


def options(**own) -> bn.SearchOptions:
    given = {"epochs": 4, "warmup": 0.25, "batch_size": 64, "candidates": 2, "recalibration": 2, "validate_every": 4}
    return bn.SearchOptions(**given | {"device": "cuda"} | own)


def search(network: bn.SuperNetwork, budgets: list[str], out: Path, **own) -> Found:
    side = network.input_shape[1]
    data = bn.data.load("digits", image_size=side).subset(256, seed=0)
    return bn.search(network, data, budgets, options(**own), out=out)


def test_batches_are_those_of_the_cpu():
    split = bn.data.load("digits").train
    kinds = {"batch_size": 32, "augmentation": Augmentation(pad=2, flip=True), "seed": 3}
    there, here = (Batches(split, device=device, **kinds).epoch(1) for device in ("cuda", "cpu"))
    for (x, y), (own_x, own_y) in zip(there, here, strict=True):
        assert x.is_cuda
        assert y.is_cuda
        torch.testing.assert_close(x.cpu(), own_x)
        assert torch.equal(y.cpu(), own_y)


@pytest.mark.parametrize("name", SPACES)
def test_a_pass_its_decisions_and_its_gradients_are_those_of_the_cpu(name):
    here, there = pair(name)
    x, y = examples(here), torch.arange(16) % 10
    policy = Threshold(0.5) if here.heads else AlwaysOn()
    for network, each, target in ((here, x, y), (there, x.cuda(), y.cuda())):
        output, kept = network.train().masked(each, policy) if network.heads else network.train()(each, policy)
        assert kept.device == output.device == each.device
        cross_entropy(output, target).backward()
        network.seen = (output.detach().cpu(), kept.detach().cpu())
    assert torch.equal(here.seen[1], there.seen[1])
    torch.testing.assert_close(there.seen[0], here.seen[0], rtol=1e-3, atol=1e-4)
    own, other = (
        {name: value.grad.cpu() for name, value in network.named_parameters() if value.grad is not None}
        for network in (here, there)
    )
    largest = max(float(grad.abs().max()) for grad in own.values())  # that of a bias before a batch norm is 0
    assert own.keys() == other.keys()
    for name, grad in own.items():
        torch.testing.assert_close(other[name], grad, rtol=1e-3, atol=1e-3 * largest, msg=name)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("cost", COSTS)
def test_costs_are_those_of_the_cpu(name, cost):
    here, there = pair(name)
    kept = widely(here, 12, torch.Generator().manual_seed(0))
    own, other = (bn.Budget.parse(f"{cost}<=50%").bind(network) for network in (here, there))
    used = here.used(kept)
    on_gpu = there.used(kept.cuda())
    assert torch.equal(on_gpu.cpu(), used)
    found = other.model(on_gpu)
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), own.model(used), rtol=1e-9, atol=0)
    assert other.limit == own.limit


@pytest.mark.parametrize("name", PLAIN)
def test_architectures_run_together_and_extracted_as_on_the_cpu(name):
    here, there = pair(name)
    kept = widely(here, 4, torch.Generator().manual_seed(1))
    x = examples(here)
    with torch.no_grad():
        together, _ = there.eval()(x.cuda(), Fixed(kept.cuda()))
        own, _ = here.eval()(x, Fixed(kept))
        torch.testing.assert_close(together.cpu(), own, rtol=1e-4, atol=1e-4)
        for row, part, bits in zip(together.split(4), x.split(4), kept, strict=True):
            plain = bn.extract(there, bits[None].cuda()).eval()
            torch.testing.assert_close(plain(part.cuda()), row, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BY_INPUT)
@pytest.mark.parametrize("batch", [1, 16])
def test_what_gates_close_by_the_input_is_skipped_on_the_gpu(name, batch):
    _, there = pair(name)
    x = examples(there, batch).cuda()
    there.eval()
    plain = conditional(there, tau=0.5).eval()
    with torch.no_grad():
        masked, _ = there.masked(x, Threshold(0.5))
        torch.testing.assert_close(plain(x), masked, rtol=1e-4, atol=1e-4)
        plain.tune(x, repeats=3)
        torch.testing.assert_close(plain(x), masked, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["auto", "float32"])
@pytest.mark.parametrize(
    ("name", "budgets"),
    [
        ("fabric", ["macs<=60%"]),
        ("fabric", ["steps:2<=90%", "memory:file<=80%"]),
        ("channels", ["macs<=50%"]),
        ("channels", ["latency<=90%"]),
        ("blocks", ["macs<=50%", "params<=70%"]),
        ("by input", ["macs<=80%"]),
        ("exits", ["layers<=80%"]),
    ],
)
def test_a_search_ends_in_a_network_that_keeps_its_budgets_on_the_cpu(name, budgets, precision, tmp_path):
    found = search(space(name), budgets, tmp_path / "run", precision=precision)
    assert all(entry["met"] for entry in found.result["budgets"])
    assert found.result["equivalence"]["extracted"] < 1e-3
    assert found.result["equivalence"]["onnx"] < 1e-3
    x = examples(found.supernet)
    assert found.network()(x).device.type == "cpu"
    with torch.no_grad():
        torch.testing.assert_close(bn.load(found.run, space(name))(x), found.network()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "own",
    [
        {"distillation": 1.0},
        {"estimator": "score", "finetune": 0.25},
        {"estimator": "soft-gumbel", "finetune": 0.25},
        {"penalty": "batch-activation", "target": "moving", "finetune": 0.25},
        {"penalty": "per-gate", "price": 1.0, "finetune": 0.25},
        {"gate_optimizer": "sgd", "gate_decay": "papers", "architectures": 4, "finetune": 0.25},
    ],
    ids=str,
)
def test_ways_to_learn(own, tmp_path):
    found = search(space("channels"), ["macs<=60%"], tmp_path / "run", **own)
    assert found.result["budgets"][0]["met"]


def test_a_search_that_was_stopped_goes_on(tmp_path):
    one, network = tmp_path / "run", space("channels")

    class Stop(Exception):
        pass

    class Progress:
        def __getattr__(self, name):
            return lambda *_: None

        def epoch(self, line):
            if line["epoch"] == 1:
                raise Stop

    data = bn.data.load("digits").subset(256, seed=0)
    with pytest.raises(Stop):
        bn.search(network, data, ["macs<=60%"], options(), out=one, progress=Progress())
    found = bn.search(network, data, ["macs<=60%"], options(), out=one, resume=True)
    assert found.result["budgets"][0]["met"]
    assert found.result["images_seen"] == 4 * 256


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")
@pytest.mark.parametrize("runtime", ["torch", "compiled"])
def test_latency_on_the_gpu_is_learned_kept_and_told(runtime, tmp_path):
    cost = f"latency[runtime={runtime},device=cuda,batch=16]"
    found = search(space("blocks"), [f"{cost}<=95%"], tmp_path / "run")
    (entry,) = found.result["budgets"]
    assert entry["value"] <= entry["limit"] or not entry["met"]
    assert (tmp_path / "run" / f"latency-{runtime}-1-16-cuda.json").is_file()


def test_what_is_timed_on_the_gpu_computes_there():
    network, cost = space("channels"), Latency(runtime="torch", device="cuda", batch=4)
    run = cost.assembler(network).whole(network.architecture("full"))
    assert torch.cuda.memory_allocated() > 0
    assert run().is_cuda
    assert cost.measured(network, network.architecture("full")).value > 0


def test_a_run_of_the_gpu_is_evaluated_measured_and_exported(tmp_path, capsys):
    run = tmp_path / "run"
    search(space("by input"), ["macs<=80%"], run)
    for arguments in (["evaluate", str(run), "--policy", "stochastic"], ["measure", str(run)], ["export", str(run)]):
        if arguments[0] == "export":
            arguments = [*arguments, "--out", str(tmp_path / "network.onnx")]
        assert cli.main(arguments) == 0, capsys.readouterr().err
