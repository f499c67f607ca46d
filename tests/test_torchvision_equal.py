"""Torchvision's own networks beside ours: their weights load, and outputs, parameters and MACs are theirs."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from small import import_torchvision, stir
from torch.utils.flop_counter import FlopCounterMode

import budgetnet as bn
from budgetnet.costs import MACs
from budgetnet.optimizers import layer_weights
from budgetnet.sites import Fixed
from budgetnet.weights import learned, read_weights

SIDE = 64
FORMS = {
    "resnet50": lambda **size: bn.spaces.resnet(depth=50, gates="both", granularity="paper", where="ends", **size),
    "mobilenet_v2": lambda **size: bn.spaces.mobilenet_v2(gates="both", granularity="paper", **size),
}


@pytest.fixture(scope="module")
def models() -> ModuleType:
    """Torchvision's models."""
    return import_torchvision().models


@pytest.mark.parametrize("form", FORMS)
def test_weights_outputs_parameters_and_macs_are_torchvisions(form, models, tmp_path):
    """From a file as torchvision's weights come in, in float64, with all gates open."""
    theirs = stir(getattr(models, form)(weights=None), 3).eval()
    file = tmp_path / f"{form}.pth"
    torch.save(theirs.state_dict(), file)
    network = FORMS[form](image_size=SIDE).double().eval()
    logits = network.gates.logits.clone()
    bn.load_torchvision(network, read_weights(file))
    file.unlink()  # of a hundred megabytes
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    full = network.architecture("full")
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        expected = theirs.double()(x[:1])
    macs = counted.get_total_flops() // 2
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        output, _ = network(x, Fixed(full))
    assert counted.get_total_flops() // 4 == macs
    assert expected.std() > 0.1
    torch.testing.assert_close(output[:1], expected)
    with torch.no_grad():
        torch.testing.assert_close(output[1:], theirs(x[1:]))
    assert torch.equal(network.gates.logits, logits)
    assert MACs(additions=False).bind(network)(network.used(full)).tolist() == [macs]
    assert sum(value.numel() for value in layer_weights(network)) == sum(value.numel() for value in theirs.parameters())


@pytest.mark.parametrize("depth", [18, 34, 101])
def test_names_and_shapes_of_other_depths_are_torchvisions(depth, models):
    with torch.device("meta"):
        theirs, network = getattr(models, f"resnet{depth}")(weights=None), bn.spaces.resnet(depth=depth, gates="none")
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in learned(network).items()} == shapes
