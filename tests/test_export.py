"""Exported files agree with the network at every batch size, and run where this package is not."""

from __future__ import annotations

import re
from functools import partial
from importlib import import_module

import numpy as np
import onnx
import pytest
import torch
from conftest import python
from torch import nn

from budgetnet import Edge, SuperNetwork, spaces
from budgetnet.apart import onnx_session as session
from budgetnet.errors import ConfigError
from budgetnet.export import FORMATS, difference, export, file_latency, latency, load
from budgetnet.extraction import extract, fold_batch_norm
from budgetnet.onnx_pieces import Pieces, check_writable, ordinary

ALONE = """
import sys, warnings
warnings.simplefilter("ignore")
sys.modules["budgetnet"] = None  # an import of it fails
import numpy as np, onnxruntime, torch
x, y = np.load("x.npy"), np.load("y.npy")
session = onnxruntime.InferenceSession("network.onnx", providers=["CPUExecutionProvider"])
print(np.abs(session.run(None, {session.get_inputs()[0].name: x})[0] - y).max())
module = torch.export.load("network.pt2").module()
print(np.abs(module(torch.from_numpy(x)).detach().numpy() - y).max())
print(any(name.partition(".")[0] == "budgetnet" for name in sys.modules if sys.modules[name]))
"""
BUILD = {
    "classes": lambda: spaces.resnet_fabric(width=2, channels=4, classes=10, image_size=8),
    "masks": lambda: spaces.conv_fabric(
        width=3, depth=2, channels=4, classes=3, image_size=(4, 6), task="segmentation"
    ),
}


@pytest.fixture(scope="module", params=BUILD)
def exported(request, tmp_path_factory):
    """A sub-network with batch norms that have seen something, and its files."""
    torch.manual_seed(0)
    space = BUILD[request.param]()
    kept = space.architecture("full")
    kept[0, ::3] = 0
    plain = extract(space, kept)
    plain.train()(torch.randn(32, *space.input_shape) * 3 + 1)
    folder = tmp_path_factory.mktemp(request.param)
    folded = fold_batch_norm(plain.eval())
    files = {kind: export(folded, folder / f"network.{kind}", torch.randn(1, *space.input_shape)) for kind in FORMATS}
    return plain, files, space.input_shape


@pytest.mark.parametrize("batch", [1, 3, 7])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_gives_the_networks_outputs(exported, kind, batch):
    plain, files, shape = exported
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
    assert plain(x).abs().max() > 0.01
    assert difference(plain, load(files[kind]), x) < 1e-4


@pytest.mark.parametrize("exported", ["classes"], indirect=True)
def test_the_files_run_without_this_package(exported):
    plain, files, shape = exported
    folder = files["onnx"].parent
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(5))
    np.save(folder / "x.npy", x.numpy())
    np.save(folder / "y.npy", plain(x).detach().numpy())
    process = python("-I", "-c", ALONE, cwd=folder)
    assert process.returncode == 0, process.stderr
    onnx, pt2, imported = process.stdout.split()
    assert float(onnx) < 1e-4
    assert float(pt2) < 1e-4
    assert imported == "False"


def test_the_files_name_no_path_of_this_machine(exported):
    for file in exported[1].values():
        assert not re.search(rb"/[\w.-]+/[\w./-]+\.py", file.read_bytes())


def test_the_network_that_is_exported_is_left_as_it_was(tmp_path):
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    export(network, tmp_path / "network.pt2", torch.zeros(1, 1, 4, 4))
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_an_export_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "network.pt2"
    export(nn.Conv2d(1, 2, 3), file, torch.zeros(1, 1, 4, 4))
    before = file.read_bytes()

    def full(program, to):
        to.write(b"half of")
        raise OSError("no space left")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(OSError, match="no space"):
        export(nn.Conv2d(1, 3, 3), file, torch.zeros(1, 1, 4, 4))
    assert file.read_bytes() == before


class Fickle(nn.Module):
    """A layer with a branch that no exporter can follow."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


class Rigid(nn.Module):
    """A layer for two examples."""

    def forward(self, x):
        return x.reshape(2, *x.shape[1:])


class Odd(Fickle):
    """A gate of one's own."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()

    def forward(self, x):
        return super().forward(x.mean(dim=(2, 3))[:, :1])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_network_that_cannot_be_exported_is_one_line_and_leaves_the_old_file(kind, tmp_path, capsys):
    file = tmp_path / f"network.{kind}"
    file.write_text("old")
    with pytest.raises(ConfigError, match=rf"^the network cannot be written to network\.{kind}: Could not guard .*$"):
        export(Fickle(), file, torch.zeros(1, 1, 4, 4))
    assert file.read_text() == "old"
    assert capsys.readouterr().err == ""


def test_what_an_exporter_misses_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"^the network .* No ONNX function found for .*adaptive_max_pool2d.*$"):
        export(nn.AdaptiveMaxPool2d(3), tmp_path / "network.onnx", torch.zeros(1, 1, 8, 8))


def test_a_layer_that_cannot_be_written_is_named_before_training():
    """Unless the one architecture that is trained leaves it out."""
    kinds = {"plain": nn.Conv2d(1, 1, 1), "own": nn.Softsign(), "odd": Rigid()}
    edges = [Edge(start="x", end="y", module=module, name=name) for name, module in kinds.items()]
    space = SuperNetwork(edges, input_shape=(1, 8, 8))
    with pytest.raises(ConfigError, match=r"^'odd': a layer cannot be written to ONNX: Constraints violated .*$"):
        check_writable(space)
    check_writable(space, space.used(torch.tensor([[1.0, 1.0, 0.0]])))


def test_a_gate_that_cannot_be_written_is_named_before_training():
    """Unless it decides nothing, where one architecture is trained."""
    skip = Edge(start="x", end="y", module=nn.Identity(), fixed=True)
    space = SuperNetwork(
        [skip, Edge(start="x", end="y", module=nn.Conv2d(1, 1, 1), gate=Odd, name="asks")], input_shape=(1, 8, 8)
    )
    with pytest.raises(ConfigError, match=r"^\"asks's gate\": a layer cannot be written to ONNX: Could not guard .*$"):
        check_writable(space)
    check_writable(space, space.used(torch.ones(1, 1)))


@pytest.mark.parametrize(
    "build",
    [
        partial(spaces.resnet_fabric, width=2),
        partial(spaces.conv_fabric, width=2, depth=2, classes=3, image_size=(4, 6), task="segmentation"),
        partial(spaces.resnet, depth=8, conditional=True, memory=True, gates="both"),
        spaces.mobilenet_v2,
        partial(spaces.densenet_exits, depth=10),
        partial(spaces.densenet_exits, depth=10, exit_gates="features"),
    ],
)
def test_the_layers_of_the_named_spaces_are_known_to_be_written(build, monkeypatch):
    """Nothing has to be exported before they are searched, which takes seconds."""
    monkeypatch.setattr(Pieces, "model", lambda self: pytest.fail("exported"))
    check_writable(build())


def test_layers_that_are_not_what_they_seem_are_looked_at():
    class Mine(nn.ReLU):
        pass

    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda module, given, output: output)
    traced = torch.fx.symbolic_trace(nn.Softsign())
    seem = [Mine(), hooked, traced, nn.Upsample(scale_factor=2, mode="bicubic")]
    assert not any(ordinary(nn.Sequential(nn.Conv2d(1, 1, 1), module)) for module in seem)
    assert ordinary(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Upsample(scale_factor=2)))


def test_latency_is_a_median_between_its_percentiles():
    calls = []
    measured = latency(lambda x: calls.append(x), torch.zeros(1), calls=50)
    assert list(measured) == ["median", "p10", "p90"]
    assert 0 < measured["p10"] <= measured["median"] <= measured["p90"]
    assert len(calls) >= 50


def test_difference_is_the_largest_of_any_output():
    assert difference(lambda x: x, lambda x: x * torch.tensor([1.0, 0.5]), torch.tensor([[1.0, 2.0]])) == 1.0


@pytest.mark.parametrize("kind", FORMATS)
def test_latency_of_a_file_is_that_with_the_threads_that_were_asked_for(kind, tmp_path, monkeypatch):
    """And afterwards torch has those it had."""
    file = export(nn.Conv2d(1, 2, 3), tmp_path / f"network.{kind}", torch.zeros(1, 1, 4, 4))
    seen, before = [], torch.get_num_threads()

    def timed(run, x, **options):
        seen.append(torch.get_num_threads())
        return latency(run, x, **options)

    def opened(model, threads):
        seen.append(threads)
        return session(model, threads)

    module = import_module("budgetnet.export")  # by its name the package has the function
    monkeypatch.setattr(module, "latency", timed)
    monkeypatch.setattr(module, "onnx_session", opened)
    assert file_latency(file, torch.zeros(1, 1, 4, 4), threads=before + 1, calls=10)["median"] > 0
    assert before + 1 in seen
    assert torch.get_num_threads() == before


def test_an_onnx_file_says_no_more_than_its_graph(tmp_path):
    """Weights keep their names; what the exporter notes about its own work is not in it."""
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(8, 3))
    file = export(network, tmp_path / "network.onnx", torch.zeros(1, 1, 4, 4))
    model = onnx.load(str(file))
    onnx.checker.check_model(model, full_check=True)
    names = [weight.name for weight in model.graph.initializer if not weight.name.startswith("/")]
    assert names == list(network.state_dict())
    assert [value.type.tensor_type.shape.dim[0].dim_param for value in (*model.graph.input, *model.graph.output)] == [
        "batch",
        "batch",
    ]
    for part in (model, model.graph, *model.graph.node, *model.graph.initializer):
        assert not part.metadata_props
    assert file.stat().st_size < 4 * sum(value.numel() for value in network.parameters()) + 1000
