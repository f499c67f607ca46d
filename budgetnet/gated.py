"""Layers in a row with gates on their channels: masked while they are learned, cut while they are run.

A `ChannelGate` stands in a `GatedSequential` where channels can be closed. A closed channel is zero behind
the gate, which is the same as not being there: the layers before it need not compute it and the layers behind
it need not read it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from budgetnet.errors import GraphError

Network = TypeVar("Network", bound=nn.Module)

KEEPS_ZERO = (
    *(nn.ReLU, nn.ReLU6, nn.Identity, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d, nn.Dropout),
    nn.Flatten,  # of one pixel: of more, the linear layer behind it finds other channels than the gate before it
)
"""Layers that treat each channel alone and map a zero channel to a zero channel."""


class ChannelGate(nn.Module):
    """A place where groups of channels can be closed.

    Args:
        channels: that arrive here.
        granularity: channels a gate controls; the last group may be smaller (Herrmann et al., 4.2).
        always_open: number of groups, the first ones, that no gate closes: for places without a shortcut.
        lock: sites of one name share their gates, group by group (S1.3, "locked"). Where these look at the input, the
            first of the edges decides for all, and all must have the same gates.
        name: of the site, unique in its sequence.

    Raises:
        GraphError: there are no channels, or more groups are held open than there are.
    """

    def __init__(
        self,
        channels: int,
        granularity: int = 1,
        *,
        always_open: int = 0,
        lock: str | None = None,
        name: str = "hidden",
    ) -> None:
        super().__init__()
        if channels < 1 or granularity < 1:
            raise GraphError(f"a gate needs channels and granularity >= 1, got {channels} and {granularity}")
        self.channels, self.granularity, self.lock, self.name = channels, granularity, lock, name
        self.groups = ceil(channels / granularity)
        if not 0 <= always_open <= self.groups:
            raise GraphError(f"always_open must lie in 0 to {self.groups} groups, got {always_open}")
        self.always_open = always_open

    @property
    def sizes(self) -> list[int]:
        """Channels of each group."""
        return [min(self.granularity, self.channels - first) for first in range(0, self.channels, self.granularity)]

    def spread(self, groups: Tensor) -> Tensor:
        """`(..., groups)` values to `(..., channels)`: each group's value for each of its channels."""
        if self.granularity == 1:
            return groups
        return groups.repeat_interleave(self.granularity, dim=-1)[..., : self.channels]

    def forward(self, x: Tensor) -> Tensor:
        """As if open; `GatedSequential` closes groups."""
        return x

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.name}: {self.groups} groups of {self.granularity}, {self.always_open} always open"


@dataclass(frozen=True)
class Layer:
    """A layer and the sites that decide on the channels it reads and writes.

    Attributes:
        index: place in the sequence.
        mixes: whether it reads all channels to write each (a convolution, a linear layer).
        before, behind: index of the site of its input and output channels, None where there is none.
    """

    index: int
    mixes: bool
    before: int | None
    behind: int | None


class GatedSequential(nn.Sequential):
    """Layers in a row with `ChannelGate`s between them.

    Called like `nn.Sequential` it runs with all gates open. A sequence one of whose sites is closed
    altogether is dead: it gives zeros, as if the edge it stands on were dropped.

    Raises:
        GraphError: a gate stands where closing a channel is not the same as removing it, two gates
            decide on the same channels, or a gated layer is of a kind that cannot be cut.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        layers = tuple(self)  # also where they come with names, as from a slice
        self.sites = tuple(layer for layer in layers if isinstance(layer, ChannelGate))
        names = [site.name for site in self.sites]
        if len(set(names)) < len(names):
            raise GraphError(f"sites of one sequence need different names, got {', '.join(names)}")
        self.layout, self.end_sites, self.out_channels = self._layout(layers)

    @property
    def groups(self) -> int:
        """Groups of all sites together."""
        return sum(site.groups for site in self.sites)

    def split(self, bits: Tensor) -> list[Tensor]:
        """`(..., groups)` bits to those of each site."""
        return list(torch.split(bits, [site.groups for site in self.sites], dim=-1))

    def masked(self, x: Tensor, bits: Tensor) -> Tensor:
        """Computes every channel and multiplies by the bits, with a gradient to them.

        Args:
            x: `(B, C, H, W)`.
            bits: `(B, groups)`, or `(1, groups)` for all.
        """
        gates = iter(zip(self.sites, self.split(bits), strict=True))
        for layer in self:
            if isinstance(layer, ChannelGate):
                site, open_groups = next(gates)
                mask = site.spread(open_groups)
                x = x * mask.reshape(*mask.shape, *[1] * (x.ndim - 2)).to(x.dtype)
            else:
                x = layer(x)
        return x

    def cut(self, x: Tensor, bits: Tensor) -> Tensor:
        """Computes only what is open: the weights are narrowed for this call.

        Args:
            x: `(B, C, H, W)`.
            bits: `(groups,)` in {0, 1}, at least one open at each site.

        Returns:
            What `masked` gives.
        """
        kept = self.indices(bits)
        into, out = self.ends(kept)
        x = x if into is None else x.index_select(1, into)
        for layer in self.layout:
            x = narrowed_call(self[layer.index], x, *channels_of(layer, kept))
        if out is None:
            return x
        return x.new_zeros(len(x), self.out_channels, *x.shape[2:]).index_copy(1, out, x)

    def narrowed(self, bits: Tensor) -> tuple[nn.Sequential, Tensor | None, Tensor | None]:
        """The plain sequence that is left, copied.

        Args:
            bits: `(groups,)` in {0, 1}.

        Returns:
            The layers; the channels of the input that it reads, and those of the output that it
            writes (the others are zero): index tensors, None for all.
        """
        kept = self.indices(bits)
        layers = [narrowed_module(self[layer.index], *channels_of(layer, kept)) for layer in self.layout]
        plain = nn.Sequential(*[layer for layer in layers if not isinstance(layer, nn.Identity)])
        return plain.train(self.training), *self.ends(kept)

    def indices(self, bits: Tensor) -> list[Tensor | None]:
        """Open channels of each site, None where all are open."""
        found: list[Tensor | None] = []
        for site, groups in zip(self.sites, self.split(bits), strict=True):
            open_channels = site.spread(groups.detach()) > 0.5
            found.append(None if bool(open_channels.all()) else open_channels.nonzero().flatten())
        return found

    def ends(self, kept: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
        """Channels of the input that are read, and of the output that are written; None for all."""
        first, last = self.end_sites
        return (None if first is None else kept[first]), (None if last is None else kept[last])

    def _layout(self, layers: Sequence[nn.Module]) -> tuple[tuple[Layer, ...], tuple[int | None, int | None], int]:
        segments: list[int | None] = [None]  # the site that decides on the channels between two mixing layers
        width: list[int | None] = [None]
        places: list[tuple[int, bool, int]] = []  # layer, whether it mixes, the segment it writes
        closed = False  # whether a gate stands before in this segment
        count = 0
        for index, layer in enumerate(layers):
            if isinstance(layer, ChannelGate):
                if segments[-1] is not None:
                    raise GraphError(f"one gate decides on a layer's channels, got a second one, {layer.name!r}")
                if width[-1] not in (None, layer.channels):
                    raise GraphError(f"{layer.name!r} must gate the {width[-1]} channels there, got {layer.channels}")
                segments[-1], width[-1], closed, count = count, layer.channels, True, count + 1
                continue
            mixes, reads = not channelwise(layer), size(layer, "in_channels", "in_features", "num_features")
            if reads is not None and width[-1] not in (None, reads):
                raise GraphError(f"{type(layer).__name__} must read the {width[-1]} channels there, got {reads}")
            width[-1] = width[-1] if reads is None else reads
            if mixes:
                segments.append(None)
                width.append(size(layer, "out_channels", "out_features"))
                closed = False
            elif closed and not isinstance(layer, KEEPS_ZERO):
                raise GraphError(f"{type(layer).__name__} behind a gate gives a closed channel a value: gate behind it")
            places.append((index, mixes, len(segments) - 1))
        layout = []
        for index, mixes, segment in places:
            before, behind = segments[segment - mixes], segments[segment]
            gated = (before, behind) != (None, None)
            alone = isinstance(layers[index], nn.Flatten) and segment == len(segments) - 1  # nobody checks its channels
            if gated and (alone or (mixes and not cuttable(layers[index]))):
                raise GraphError(f"a gated layer must be a convolution without groups or linear, got {layers[index]}")
            layout.append(Layer(index, mixes, before, behind))
        return tuple(layout), (segments[0], segments[-1]), width[-1] or 0


def size(layer: nn.Module, *names: str) -> int | None:
    """The channels that a layer says it has under one of these names, None where it says nothing."""
    found = [value for name in names if isinstance(value := getattr(layer, name, None), int)]
    return found[0] if found else None


def channelwise(layer: nn.Module) -> bool:
    """Whether a layer treats each channel alone."""
    depthwise = isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels > 1
    return depthwise or isinstance(layer, (nn.BatchNorm2d, nn.Upsample, *KEEPS_ZERO))


def cuttable(layer: nn.Module) -> bool:
    """Whether a layer that mixes channels can be narrowed."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def channels_of(layer: Layer, kept: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """Which channels a layer reads and writes, None for all."""
    before = None if layer.before is None else kept[layer.before]
    behind = None if layer.behind is None else kept[layer.behind]
    return before, behind


def narrowed_weight(weight: Tensor, before: Tensor | None, behind: Tensor | None) -> Tensor:
    """`(out, in, ...)` weights of the channels that are read and written."""
    weight = weight if behind is None else weight.index_select(0, behind)
    return weight if before is None else weight.index_select(1, before)


def selected(values: Tensor | None, behind: Tensor | None) -> Tensor | None:
    """`(out,)` values of the channels that are written."""
    return values if values is None or behind is None else values.index_select(0, behind)


def narrowed_call(layer: nn.Module, x: Tensor, before: Tensor | None, behind: Tensor | None) -> Tensor:
    """A layer on part of its channels; the batch statistics of that part are kept in the whole one's buffers."""
    if before is None and behind is None:
        output: Tensor = layer(x)
    elif isinstance(layer, nn.Conv2d):
        depthwise = layer.groups > 1
        weight = narrowed_weight(layer.weight, None if depthwise else before, behind)
        bias = selected(layer.bias, behind)
        groups = len(weight) if depthwise else 1
        output = narrowed_conv(layer, x, weight, bias, groups)
    elif isinstance(layer, nn.Linear):
        output = F.linear(x, narrowed_weight(layer.weight, before, behind), selected(layer.bias, behind))
    elif isinstance(layer, nn.BatchNorm2d):
        output = narrowed_norm(layer, x, behind)
    else:
        output = layer(x)
    return output


def narrowed_conv(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """A convolution with some of its weights."""
    stride: tuple[int, ...] = layer.stride
    padding: str | int | tuple[int, ...] = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
    if layer.kernel_size == (1, 1) and padding == (0, 0):
        # the pixels that it reads: oneDNN writes out of bounds in the backward pass of strided 1x1
        # convolutions of few channels (`memory_format`)
        x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
    return F.conv2d(x, weight, bias, stride, padding, layer.dilation, groups)


def narrowed_norm(norm: nn.BatchNorm2d, x: Tensor, behind: Tensor | None) -> Tensor:
    """Batch norm of some channels, which moves the running statistics of those alone."""
    assert behind is not None
    mean, var = selected(norm.running_mean, behind), selected(norm.running_var, behind)
    momentum = norm.momentum
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    training = norm.training or mean is None
    weight, bias = selected(norm.weight, behind), selected(norm.bias, behind)
    output = F.batch_norm(x, mean, var, weight, bias, training, momentum or 0.0, norm.eps)
    if norm.training and mean is not None and var is not None:
        with torch.no_grad():
            norm.running_mean.index_copy_(0, behind, mean)  # type: ignore[union-attr]
            norm.running_var.index_copy_(0, behind, var)  # type: ignore[union-attr]
    return output


def narrowed_module(layer: nn.Module, before: Tensor | None, behind: Tensor | None) -> nn.Module:
    """A copy of a layer with just the channels that are read and written."""
    new = copy.deepcopy(layer)
    if before is None and behind is None:
        return new
    if isinstance(new, nn.Conv2d):
        depthwise = new.groups > 1
        weight = narrowed_weight(new.weight.detach(), None if depthwise else before, behind)
        new.weight, new.out_channels = nn.Parameter(weight.clone()), len(weight)
        new.in_channels = len(weight) if depthwise else weight.shape[1]
        new.groups = len(weight) if depthwise else 1
    elif isinstance(new, nn.Linear):
        new.weight = nn.Parameter(narrowed_weight(new.weight.detach(), before, behind).clone())
        new.out_features, new.in_features = new.weight.shape
    elif isinstance(new, nn.BatchNorm2d) and behind is not None:
        new.num_features = len(behind)
        for name in ("running_mean", "running_var"):
            setattr(new, name, selected(getattr(new, name), behind))
        if new.affine:
            new.weight = nn.Parameter(new.weight.detach().index_select(0, behind))
    bias = getattr(new, "bias", None)
    if isinstance(bias, Tensor) and behind is not None:
        new.bias = nn.Parameter(bias.detach().index_select(0, behind))
    return new


def memory_format(network: nn.Module) -> torch.memory_format:
    """Channels last, which is faster, unless a strided 1x1 convolution reads fewer than 16 channels, or may when cut.

    The weight gradient of such a one in channels last is written beyond its memory by oneDNN 3.12, which torch 2.13
    brings (its issue 6035: fewer than 8 channels on AVX2, 16 on AVX-512), and the process crashes, then or later.
    """
    cut = {id(part) for gated in network.modules() if isinstance(gated, GatedSequential) for part in gated}
    for part in network.modules():
        if not isinstance(part, nn.Conv2d) or part.kernel_size != (1, 1) or max(part.stride) == 1:
            continue
        if part.in_channels < 16 or id(part) in cut:
            return torch.contiguous_format
    return torch.channels_last


def contiguous(network: Network) -> Network:
    """The network itself, its weights laid out as they are handed over, whatever layout it learned in."""
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # no overload takes it alone
    return network
