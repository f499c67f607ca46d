"""Pretrained weights to start from: torchvision's ResNets and MobileNetV2, by their names there."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from budgetnet.errors import ConfigError, FileError
from budgetnet.spaces.mobilenet_v2 import STAGES
from budgetnet.spaces.resnet import IMAGENET
from budgetnet.supernet import SuperNetwork

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the pixels, in [0, 1], of the images that torchvision's weights were learned on: red, green, blue."""

LAST = {"resnet": "fc", "mobilenet_v2": "classifier.1"}
"""Torchvision's name of the last layer."""

COUNTER = "num_batches_tracked"
"""What files older than this buffer lack, and what only a batch norm without a momentum reads."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` or safetensors wrote, by their names.

    Nothing but tensors is taken from a pickle.

    Raises:
        FileError: there is no such file, or it holds something else.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileError(f"expected a file of weights at {path}, found none") from None
    except pickle.UnpicklingError as error:  # whose own words are advice to load it nevertheless
        raise FileError(f"{path} must hold tensors by their names and nothing else, got what cannot be read") from error
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError) as error:
        raise FileError(f"{path} must hold weights: {str(error).splitlines()[0]}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FileError(f"{path} must hold tensors by their names, got {type(state).__name__}")
    return {str(name): value for name, value in state.items()}


def load_torchvision(network: SuperNetwork, state: Mapping[str, Tensor], *, classifier: bool = True) -> None:
    """Copies the weights and running statistics of torchvision's network of the same form into this one.

    Gates, and what decides them, stay as they are. Nothing is copied unless everything fits. The weights were learned
    on images less torchvision's mean, over its standard deviation: `data.normalised(MEAN, STD)` has them so.

    Args:
        network: of the space resnet with depth 18, 34, 50 or 101, or of the space mobilenet_v2.
        state: as `torch.load(file, weights_only=True)` gives it: "layer1.0.conv1.weight" or "features.0.0.weight".
        classifier: copy the last layer too; without it any number of classes will do, and it stays as it is.

    Raises:
        ConfigError: torchvision has no network of this form.
        FileError: the weights lack one that the network has, have another, or one of another shape.
    """
    expected = learned(network)
    last = LAST[network.name]
    if not classifier:
        expected, state = (
            {name: value for name, value in named.items() if not name.startswith(last)} for named in (expected, state)
        )
    for name, own in expected.items():
        shape = "none" if name not in state else shape_of(state[name])
        if shape != shape_of(own) and not (name.endswith(COUNTER) and name not in state):
            raise FileError(f"{network.name} takes torchvision's {name} of shape {shape_of(own)}, got {shape}")
    unknown = next((name for name in state if name not in expected), None)
    if unknown is not None:
        raise FileError(f"{network.name} of these options has no {unknown}, got it of shape {shape_of(state[unknown])}")
    with torch.no_grad():
        for name, own in expected.items():
            if name in state:
                own.copy_(state[name])


def classifies_alike(network: SuperNetwork, state: Mapping[str, Tensor]) -> bool:
    """Whether torchvision's weights, by their names, are for as many classes as the network has."""
    bias = state.get(f"{LAST.get(network.name)}.bias")
    return bias is not None and tuple(bias.shape) == network.shapes[network.graph.sink]


def learned(network: SuperNetwork) -> dict[str, Tensor]:
    """The parameters and buffers of a network by torchvision's names, in the order of its edges.

    Raises:
        ConfigError: torchvision has no network of this form.
    """
    depth = network.options.get("depth")
    if not (network.name == "mobilenet_v2" or (network.name == "resnet" and depth in IMAGENET)):
        known = ", ".join(str(known) for known in IMAGENET)
        form = network.name if depth is None else f"{network.name} of depth {depth}"
        raise ConfigError(f"torchvision has weights for mobilenet_v2 and resnet of depth {known}, got {form}")
    names = resnet_names if network.name == "resnet" else mobilenet_names
    found: dict[str, Tensor] = {}
    for edge, module in zip(network.edge_names, network.modules_on_edges, strict=True):
        layers = [part for part in module.modules() if isinstance(part, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]
        for prefix, layer in zip(names(edge, len(layers)), layers, strict=True):
            found |= {f"{prefix}.{key}": value for key, value in layer.state_dict(keep_vars=True).items()}
    return found


def resnet_names(edge: str, layers: int) -> list[str]:
    """Torchvision's names of the layers on an edge of `resnet`."""
    if edge in ("input", "output"):
        return ["conv1", "bn1"] if edge == "input" else ["fc"]
    group, block, part = re.findall(r"\d+|block|skip", edge)
    prefix = f"layer{int(group) + 1}.{block}"
    if part == "skip":
        return [f"{prefix}.downsample.{place}" for place in range(layers)]
    return [f"{prefix}.{kind}{place + 1}" for place in range(layers // 2) for kind in ("conv", "bn")]


def mobilenet_names(edge: str, layers: int) -> list[str]:
    """Torchvision's names of the layers on an edge of `mobilenet_v2`."""
    blocks = [count for _, _, count, _ in STAGES]
    if edge == "output":
        return ["classifier.1"]
    if edge in ("input", "last"):
        place = 0 if edge == "input" else 1 + sum(blocks)
        return [f"features.{place}.{part}" for part in range(layers)]
    if edge.endswith(".skip"):
        return []
    stage, block = map(int, re.findall(r"\d+", edge))
    last = layers // 2 - 1  # the convolutions before it each stand in a Sequential with their batch norm
    parts = [f"{pair}.{part}" for pair in range(last) for part in (0, 1)] + [str(last), str(last + 1)]
    return [f"features.{1 + sum(blocks[:stage]) + block}.conv.{part}" for part in parts]


def shape_of(value: object) -> str:
    """The shape of a tensor as it is written in messages, what it is otherwise."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
