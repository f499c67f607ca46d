"""Latency of a gated ResNet, masked and extracted beside dense: channels cut anywhere, in eights, or whole blocks.

"Filled" is the extracted network with channels of zeros up to multiples of 8, as `budgetnet export --fill 8` does.

    python benchmarks/gated_speed.py

The networks alternate in one run; ratios of medians to the dense network's are printed, an absolute time says on what.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import budgetnet as bn
from budgetnet.export import export, load
from budgetnet.extraction import extract, fold_batch_norm
from budgetnet.projection import trimmed
from budgetnet.sites import Fixed
from budgetnet.timing import interleaved

KINDS = ("anywhere", "eights", "blocks", "blocks and eights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="of the dense MACs")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--blocks", type=int, nargs="+", default=[8], help="to fill channels up to multiples of")
    parser.add_argument("--calls", type=int, default=8, help="that count at least; ten times as many of batch 1")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"ResNet-{arguments.depth}, float32, one thread, torch {torch.__version__}; latency / dense latency (batch)")
    columns = [
        f"{name} ({batch})"
        for name in ("masked torch", "torch", "onnxruntime", *(filled_to(block) for block in arguments.blocks))
        for batch in arguments.batches
    ]
    print(f"\n| cut | MACs | {' | '.join(columns)} | dense torch, ms ({arguments.batches[-1]}) |")
    print("|---" * (len(columns) + 3) + "|")
    for kind in arguments.kinds:
        for share in arguments.shares:
            space = make(kind, arguments.depth)
            kept, cost = draw(space, share)
            ratios, dense = measured(space, kept, arguments.batches, arguments.blocks, arguments.calls)
            cells = " | ".join(f"{ratios[column]:.2f}" for column in columns)
            print(f"| {kind} | {cost:.2f} | {cells} | {dense:.1f} |", flush=True)


def make(kind: str, depth: int) -> bn.SuperNetwork:
    """The space in which such a cut is an architecture, with batch norms that have seen something."""
    gates = {"blocks": "layers", "blocks and eights": "both"}.get(kind, "channels")
    space = bn.spaces.resnet(depth=depth, gates=gates, granularity=1 if kind == "anywhere" else 8)
    with torch.no_grad():
        space.train()(torch.randn(32, 3, 32, 32), Fixed(space.architecture("full")))
    return space.eval()


def draw(space: bn.SuperNetwork, share: float) -> tuple[Tensor, float]:
    """An architecture with about that share of the MACs, the nearest of 4,000 drawn at random, and its share."""
    generator = torch.Generator().manual_seed(0)
    macs = bn.costs.MACs().bind(space)
    full = float(macs(space.used(space.architecture("full")))[0])
    rate = torch.linspace(0.02, 0.98, 4000)[:, None].expand(-1, space.gate_count)
    kept = torch.bernoulli(rate, generator=generator)
    costs = macs(space.used(kept)) / full
    best = int((costs - share).abs().argmin())
    return trimmed(space, kept[best : best + 1]), float(costs[best])


def filled_to(block: int) -> str:
    """The column of the network filled up to multiples of a block."""
    return f"filled to {block}s"


def measured(
    space: bn.SuperNetwork, kept: Tensor, batches: list[int], blocks: list[int], calls: int
) -> tuple[dict[str, float], float]:
    """Ratios of median latencies to the dense network's, and the dense median in torch for the last batch, in ms."""
    cut = fold_batch_norm(extract(space, kept)).to(memory_format=torch.channels_last)
    dense = fold_batch_norm(extract(space, space.architecture("full"))).to(memory_format=torch.channels_last)
    masked = copy.deepcopy(space).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ratios, last = {}, 0.0
    for batch in batches:
        x = torch.randn(batch, 3, 32, 32)
        with tempfile.TemporaryDirectory() as folder:
            networks = {"onnxruntime": cut, "dense onnxruntime": dense}
            networks |= {filled_to(block): bn.filled(cut, block) for block in blocks}
            files = {name: export(net, Path(folder) / f"{name}.onnx", x[:1]) for name, net in networks.items()}
            ort = {name: load(path, threads=1) for name, path in files.items()}
        fast = x.contiguous(memory_format=torch.channels_last)
        medians = medians_of(
            {
                "masked torch": lambda fast=fast: masked.masked(fast, Fixed(kept)),  # type: ignore[misc]
                "torch": lambda fast=fast: cut(fast),  # type: ignore[misc]
                "dense": lambda fast=fast: dense(fast),  # type: ignore[misc]
                **{name: partial(run, x) for name, run in ort.items()},
            },
            calls if batch > 1 else 10 * calls,
        )
        for name in ("masked torch", "torch"):
            ratios[f"{name} ({batch})"] = medians[name] / medians["dense"]
        for name in ort:
            ratios[f"{name} ({batch})"] = medians[name] / medians["dense onnxruntime"]
        last = medians["dense"]
    return ratios, last


@torch.no_grad()
def medians_of(runs: dict[str, Callable[[], object]], calls: int) -> dict[str, float]:
    """Median milliseconds of each, in turns of several calls, the first of which find another's data in the caches."""
    return {
        name: timing.quantile(0.5)
        for name, timing in zip(runs, interleaved(list(runs.values()), calls=calls), strict=True)
    }


if __name__ == "__main__":
    main()
