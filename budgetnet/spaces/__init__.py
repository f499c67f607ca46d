"""Search spaces: one builder function for each named space."""

from collections.abc import Callable

from budgetnet.spaces.conv_fabric import conv_fabric
from budgetnet.spaces.densenet_exits import densenet_exits
from budgetnet.spaces.mobilenet_v2 import mobilenet_v2
from budgetnet.spaces.resnet import resnet
from budgetnet.spaces.resnet_fabric import resnet_fabric
from budgetnet.supernet import SuperNetwork

__all__ = ["BY_NAME", "conv_fabric", "densenet_exits", "mobilenet_v2", "resnet", "resnet_fabric"]

BY_NAME: dict[str, Callable[..., SuperNetwork]] = {
    "resnet_fabric": resnet_fabric,
    "conv_fabric": conv_fabric,
    "resnet": resnet,
    "mobilenet_v2": mobilenet_v2,
    "densenet_exits": densenet_exits,
}
