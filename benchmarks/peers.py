"""Two maintained pruners on a plain CIFAR ResNet-20, trained on the images, the order and the rate curve of budgetnet.

    dense = resnet20()
    train(dense, data, options, 0, 20)
    smaller = torch_pruning(dense, torch.zeros(1, 3, 32, 32), limit)
    train(smaller, data, options, 20, options.epochs)

Torch-Pruning and NVIDIA ModelOpt are needed only by the function of each: pip install -r benchmarks/requirements.txt
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import importlib
import io
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import budgetnet as bn
from budgetnet.blocks import initialise
from budgetnet.conditional import ConditionalNetwork, tune_fastest
from budgetnet.data import Batches
from budgetnet.errors import ConfigError, DivergenceError, UnreachableBudget
from budgetnet.evaluation import evaluate
from budgetnet.export import load
from budgetnet.gated import memory_format
from budgetnet.objectives import example_losses
from budgetnet.options import resolve_device, resolve_precision
from budgetnet.timing import interleaved

WIDTH = (16, 32, 64)
"""Channels of the three stages."""

CALIBRATION = 50
"""Training batches that FastNAS sets batch norms by: it keeps so many, and with fewer sets none."""


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut: identity, or 1x1 convolution and batch norm where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(B, channels_in, H, W)` to `(B, channels, H / stride, W / stride)`."""
        inner = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class ResNet20(nn.Module):
    """Three stages of three blocks behind a 3x3 convolution, then global average pooling and a linear layer.

    Args:
        width: channels of the three stages.
        classes: of the output.

    Source: He et al., arXiv:1512.03385, section 4.2. Differs: projections where it pads channels with zeros.
    """

    def __init__(self, width: Sequence[int] = WIDTH, classes: int = 10) -> None:
        super().__init__()
        first, second, third = width
        self.conv1 = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(*(Block(first, first, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(first, second, 2), Block(second, second, 1), Block(second, second, 1))
        self.layer3 = nn.Sequential(Block(second, third, 2), Block(third, third, 1), Block(third, third, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(third, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(B, 3, H, W)` images to `(B, classes)` logits."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.flatten(self.pool(x)))


def resnet20(width: Sequence[int] = WIDTH, *, classes: int = 10) -> nn.Module:
    """A ResNet-20 for CIFAR with projection shortcuts, started as budgetnet starts its convolutions."""
    return initialise(ResNet20(width, classes))


def narrowed(limit_macs: float, *, classes: int = 10) -> nn.Module:
    """The widest ResNet-20 that is narrower by the same factor everywhere and has at most `limit_macs` at 32 x 32.

    Each width is rounded to the nearest whole channel, at least 1; factors in 128ths give every such network.

    Raises:
        UnreachableBudget: one channel everywhere has more MACs.
    """

    def width(share: int) -> list[int]:
        return [max(1, (2 * share * channels + 128) // 256) for channels in WIDTH]

    def cost(share: int) -> int:
        with torch.device("meta"):
            return macs(ResNet20(width(share), classes), torch.zeros(1, 3, 32, 32))

    share = bisect.bisect_right(range(1, 129), limit_macs, key=cost)
    if share == 0:
        raise UnreachableBudget(f"a narrowed ResNet-20 has at least {cost(1)} MACs, expected at most {limit_macs:g}")
    return resnet20(width(share), classes=classes)


def train(network: nn.Module, data: bn.data.Dataset, options: bn.SearchOptions, first: int, last: int) -> float:
    """Trains epochs `first` to `last - 1` of `options.epochs` in place, and returns the seconds they took.

    Batches, rate curve, optimiser and precision are those of budgetnet's own training. The curve runs on from
    call to call; the momentum does not, it starts at 0 in each: after pruning the weights have other shapes.

    Args:
        network: plain `torch.nn`; left in training mode, on the device and in in the memory format that is safe for it.
        data: its training images are used.
        options: of which `epochs` is the length of the whole curve.
        first: where it goes on, in 0..last.
        last: where it stops, in first..options.epochs.

    Raises:
        ConfigError: these epochs are not on the curve.
        DivergenceError: the loss is not finite.
    """
    if not 0 <= first <= last <= options.epochs:
        raise ConfigError(f"expected epochs within 0 to {options.epochs}, got {first} to {last}")
    device = resolve_device(options.device)
    dtype = resolve_precision(options.precision, device)
    layout = memory_format(network)
    network.to(device=device, memory_format=layout)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=options.learning_rate,
        momentum=options.momentum,
        nesterov=options.momentum > 0,
        weight_decay=options.weight_decay,
    )
    batches = _training_batches(data, options, device)
    network.train()
    started = time.monotonic()
    for epoch in range(first, last):
        for batch, (x, y) in enumerate(batches.epoch(epoch)):
            rate = options.rate((epoch + batch / len(batches)) / options.epochs)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                output = network(x.contiguous(memory_format=layout))
            loss = example_losses(output, y, data.ignore).mean()
            if not torch.isfinite(loss):
                raise DivergenceError(f"the loss must stay finite, got {loss.item()} at learning rate {rate:.3g}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
    return time.monotonic() - started


def torch_pruning(network: nn.Module, example: Tensor, limit_macs: float, *, steps: int = 1000) -> nn.Module:
    """A copy pruned by Torch-Pruning: global group magnitude (L2), until it has at most `limit_macs`.

    Importance is taken afresh in each step; with more steps than channels a step removes one channel or none,
    so the result is the first below the limit. The outputs are never pruned.

    Args:
        network: trained; stays as it is.
        example: `(1, C, H, W)`.
        limit_macs: of the result.
        steps: in which all channels would go.

    Raises:
        SystemExit: Torch-Pruning is not installed.
        ConfigError: the network keeps the limit as it is.
        UnreachableBudget: pruning ends above the limit.
        RuntimeError: nothing was pruned.

    Source: Fang et al., arXiv:2301.12900; version 1.6.1, step by step as in its own benchmarks, which take 400.
    """
    tp = _required("torch_pruning")
    _check_limit(network, example, limit_macs)
    pruned = copy.deepcopy(network)
    pruned.zero_grad(set_to_none=True)
    device = next(pruned.parameters()).device
    outputs = [layer for layer in pruned.modules() if isinstance(layer, nn.Linear)][-1:]
    with torch.enable_grad():  # it reads the graph of autograd
        pruner = tp.pruner.BasePruner(
            pruned,
            example.to(device),
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            global_pruning=True,
            pruning_ratio=1.0,
            iterative_steps=steps,
            ignored_layers=outputs,
        )
    for _ in range(steps):
        groups = 0
        for group in pruner.step(interactive=True):
            group.prune()
            groups += 1
        if groups and macs(pruned, example) <= limit_macs:
            break
    return _checked(pruned, network, example, limit_macs)


def fastnas(
    network: nn.Module,
    data: bn.data.Dataset,
    limit_macs: float,
    options: bn.SearchOptions | None = None,
    *,
    divisor: int = 4,
    scores: Path | None = None,
) -> nn.Module:
    """A copy pruned by ModelOpt's FastNAS: the channels that cost the least validation accuracy at `limit_macs`.

    Each number of channels in each layer is scored alone, on all validation images, after `CALIBRATION` batches
    have set the batch norms for it. ResNet-20 in fours has 85 to score; the limit only matters when that is done.

    Args:
        network: trained; stays as it is.
        data: its validation images score, its training images set the batch norms.
        limit_macs: of the result.
        options: of which batch size, device, precision and seed are used; None for the defaults.
        divisor: of the channels to choose from; with ModelOpt's own 32 a ResNet-20 keeps at least 84 % of its MACs.
        scores: file that keeps the scores, to be used again for this network alone, with another limit or after
            an interruption.

    Raises:
        SystemExit: ModelOpt is not installed.
        ConfigError: the network keeps the limit as it is.
        ValueError: no choice has so few MACs, or its search, which comes close to the fewest at best, found none.
        RuntimeError: nothing was pruned.

    Source: ModelOpt 0.47.0, `modelopt.torch.prune` in mode "fastnas", as in its example on ResNet-20. Differs:
        a finer divisor, and its FLOPs, 2 a MAC, are counted by torch: its own counter asks for torchvision.
    """
    mtp = _required("modelopt.torch.prune")
    options = options or bn.SearchOptions()
    device = resolve_device(options.device)
    dtype = resolve_precision(options.precision, device)
    example = torch.zeros(1, *data.image_shape, device=device)
    _check_limit(network, example, limit_macs)
    pruned = copy.deepcopy(network).to(device=device, memory_format=torch.contiguous_format)  # it takes no other
    pruned.zero_grad(set_to_none=True)
    choices = mtp.fastnas.FastNASConfig()
    choices["nn.Conv2d"]["*"]["channel_divisor"] = divisor
    choices["nn.BatchNorm2d"]["*"]["feature_divisor"] = divisor
    validation = Batches(data.validation, batch_size=options.batch_size, device=device, shuffle=False)
    epochs = map(_training_batches(data, options, device).epoch, itertools.count())
    calibration = list(itertools.islice(itertools.chain.from_iterable(epochs), CALIBRATION))

    def accuracy(candidate: nn.Module) -> float:
        candidate.eval()
        quality = evaluate(candidate, validation.epoch(0), classes=data.num_classes, ignore=data.ignore)
        return quality["accuracy"]

    def flops(candidate: nn.Module, **_: Any) -> float:
        return 2.0 * macs(candidate, example)

    # weights are sorted in place, so no cast of them may be kept
    precision = torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)
    counted = mock.patch("modelopt.torch.nas.algorithms.inference_flops", flops)
    with precision, counted, contextlib.redirect_stdout(io.StringIO()):
        found, _ = mtp.prune(
            model=pruned.eval(),
            mode=[("fastnas", choices)],
            constraints={"flops": 2.0 * limit_macs},
            dummy_input=example,
            config={
                "score_func": accuracy,
                "data_loader": calibration,
                "max_iter_data_loader": CALIBRATION,
                "checkpoint": None if scores is None else str(scores),
                "verbose": False,
            },
        )
    for name in [name for name in vars(found) if name.startswith("_modelopt")]:
        delattr(found, name)  # its notes on how the network came about
    return _checked(found, network, example, limit_macs)


def measure(
    network: nn.Module, images: Tensor, beside: nn.Module, *, batches: Sequence[int] = (1, 64), calls: int = 32
) -> dict[str, Any]:
    """What a network costs: MACs and parameters, and its milliseconds beside another's, in turns, on one thread.

    Args:
        network: stays as it is.
        images: `(B, C, H, W)` real ones, as what gates close depends on them; the last B are timed.
        beside: what its times are ratios to.
        batches: images that are run together; each has to divide B.
        calls: timed calls at least, each of which passes over all images, or over 16 one by one.

    Returns:
        `{"macs", "params", "latency"}`, the last `{"torch 64": {"ms": a call's median, "ratio": to beside's}, ...}` in
        float32: torch as in evaluation, channels last, no layers merged, what gates close by the input skipped where it
        pays here; onnxruntime with all its own optimisations, of conditional networks one by one alone.
    """
    plain, other = (
        copy.deepcopy(each).cpu().float().to(memory_format=torch.channels_last).eval() for each in (network, beside)
    )
    images = images.detach().cpu().float()
    found: dict[str, dict[str, float]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / name for name in ("network.onnx", "beside.onnx")]
            files = [bn.export(each, path, images[:8]) for each, path in zip((plain, other), paths, strict=True)]
            for batch in batches:
                inputs = (images[:16] if batch == 1 else images).split(batch)
                last = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
                if isinstance(plain, ConditionalNetwork):
                    tune_fastest(plain, last[0], repeats=7)
                found[f"torch {batch}"] = _beside(plain, other, last, calls)
                if batch > 1 and isinstance(network, ConditionalNetwork):
                    continue
                found[f"onnxruntime {batch}"] = _beside(*(load(file, threads=1) for file in files), inputs, calls)
    finally:
        torch.set_num_threads(threads)
    return {
        "macs": macs(plain, images[:1]),
        "params": sum(value.numel() for value in plain.parameters()),
        "latency": found,
    }


@torch.no_grad()
def _beside(
    run: Callable[[Tensor], object], other: Callable[[Tensor], object], inputs: Sequence[Tensor], calls: int
) -> dict[str, float]:
    """Median milliseconds of a call, and the ratio to the other's."""
    ways = [partial(_all, each, inputs) for each in (run, other)]
    mine, theirs = (timing.quantile(0.5) for timing in interleaved(ways, calls=calls))
    return {"ms": mine / len(inputs), "ratio": mine / theirs}


def _all(run: Callable[[Tensor], object], inputs: Sequence[Tensor]) -> None:
    for x in inputs:
        run(x)


@torch.no_grad()
def macs(network: nn.Module, example: Tensor) -> int:
    """Multiply-adds of convolutions and linear layers on the `(1, C, H, W)` example, by torch's own counter."""
    training = [(part, part.training) for part in network.modules()]
    network.eval()
    with FlopCounterMode(display=False) as counter:
        network(example.to(next(network.parameters()).device))
    for part, mode in training:
        part.training = mode
    return counter.get_total_flops() // 2


def _training_batches(data: bn.data.Dataset, options: bn.SearchOptions, device: torch.device) -> Batches:
    """The batches that budgetnet trains on."""
    return Batches(
        data.train,
        batch_size=options.batch_size,
        device=device,
        augmentation=data.augmentation,
        seed=options.seed,
    )


def _check_limit(network: nn.Module, example: Tensor, limit_macs: float) -> None:
    """Raises ConfigError where there is nothing to prune."""
    full = macs(network, example)
    if full <= limit_macs:
        raise ConfigError(f"expected a limit below the network's {full} MACs, got {limit_macs:g}")


def _checked(pruned: nn.Module, network: nn.Module, example: Tensor, limit_macs: float) -> nn.Module:
    """The pruned network, if it is smaller, keeps the limit and gives the same outputs in shape."""
    before, after = macs(network, example), macs(pruned, example)
    if after >= before:
        raise RuntimeError(f"expected fewer than {before} MACs after pruning, got {after}: nothing was pruned")
    if after > limit_macs:
        raise UnreachableBudget(f"pruning ended at {after} MACs, expected at most {limit_macs:g}")
    with torch.no_grad():
        device = next(network.parameters()).device
        shapes = [tuple(copy.deepcopy(each).eval().to(device)(example.to(device)).shape) for each in (network, pruned)]
    if shapes[0] != shapes[1]:
        raise RuntimeError(f"expected outputs of shape {shapes[0]} after pruning, got {shapes[1]}")
    return pruned


def _required(module: str) -> Any:
    """The module of a package that budgetnet itself does not need."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed: pip install -r benchmarks/requirements.txt") from error
