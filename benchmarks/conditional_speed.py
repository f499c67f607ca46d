"""Time of a network whose gates look at the input, beside the share of the MACs that it computes.

    python benchmarks/conditional_speed.py

A ResNet (16, 32, 64 channels, 32x32 pixels) with gates on its layers, or on groups of 8 channels. Its heads are random,
their biases set so that each gate is open for a given share of the examples, "apart": for others than the next gate; or,
"alike", a share of the gates for all examples. Each is timed beside the same network without gates, dense: all are run in turn in one process,
ratios of medians are printed. The last column is the share of the saved MACs that is saved in time.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import budgetnet as bn
from budgetnet.conditional import ConditionalNetwork, conditional, export_conditional
from budgetnet.evaluation import recalibrate
from budgetnet.export import export, load
from budgetnet.extraction import extract, fold_batch_norm
from budgetnet.sites import AlwaysOn, ConditionalGates, Threshold

EXAMPLES = 64
"""Random images that everything is run on."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--gates", nargs="+", default=["layers", "channels"], choices=["layers", "channels", "both"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--runtimes", nargs="+", default=["torch", "onnxruntime"], choices=["torch", "onnxruntime"])
    parser.add_argument("--memory", default="channels_last", choices=["channels_last", "contiguous"])
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    memory = getattr(torch, "channels_last" if arguments.memory == "channels_last" else "contiguous_format")
    x = torch.randn(EXAMPLES, 3, 32, 32, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=memory)
    print(f"ResNet-{arguments.depth}, {arguments.channels} channels, {arguments.memory} in torch, ", end="")
    print(f"{torch.get_num_threads()} threads; time and MACs are ratios to the dense network\n")
    print("| runtime | batch | gates | examples | open | MACs | time | time / ungated | saved |")
    print("|---|---|---|---|---|---|---|---|---|")
    for gates in arguments.gates:
        space = network_with(gates, arguments.depth, arguments.channels, x).to(memory_format=memory)
        dense = fold_batch_norm(extract(space, space.architecture("full"))).to(memory_format=memory)
        ungated = conditional(space, None, constants=torch.ones(space.gate_count))
        for runtime in arguments.runtimes:
            for batch in arguments.batches if runtime == "torch" else [1]:
                rows(arguments, runtime, batch, gates, space, dense, ungated, x)


def rows(
    arguments: argparse.Namespace,
    runtime: str,
    batch: int,
    gates: str,
    space: bn.SuperNetwork,
    dense: nn.Module,
    ungated: ConditionalNetwork,
    x: Tensor,
) -> None:
    """Prints the rows of one network in one runtime at one batch size."""
    inputs = x.split(batch)[:16]
    macs, whole = bn.costs.MACs().bind(space), bn.costs.MACs(gates=False).bind(space)
    full = float(whole(space.used(space.architecture("full")))[0])
    ways: dict[tuple[str, float], Callable[[Tensor], Tensor]] = {}
    shares: dict[tuple[str, float], tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for like in ("alike", "apart"):
            for share in arguments.shares:
                if like == "alike" and (share == 1 or gates == "layers"):
                    continue
                network = conditional(with_open(space, share, like == "apart", x), None)
                if runtime == "torch":
                    network.tune(inputs[0], repeats=7)
                    ways[like, share] = network
                else:
                    path = Path(folder) / f"{like}{share}.onnx"
                    ways[like, share] = load(export_conditional(network, path, x[:1].contiguous()))
                kept = torch.cat([network.decide(part)[1] for part in inputs])
                own = kept[:, space.independent :].mean()
                shares[like, share] = float(own), float(macs(space.used(kept)).mean()) / full
        bases: list[Callable[[Tensor], Tensor]] = [dense, ungated]
        if runtime == "onnxruntime":
            bases = [load(export(dense, Path(folder) / "dense.onnx", x[:1]))] * 2
            inputs = tuple(part.contiguous() for part in inputs)
        medians = interleaved(
            [*bases, *ways.values()], inputs, arguments.repeats if batch > 1 else 3 * arguments.repeats
        )
    for (like, _), (opened, share), taken in zip(ways, shares.values(), medians[2:], strict=True):
        ratio, bare = taken / medians[0], taken / medians[1]
        saved = f"{(1 - ratio) / (1 - share):.2f}" if share < 0.98 else ""
        print(f"| {runtime} | {batch} | {gates} | {like} | {opened:.2f} | {share:.2f} | ", end="")
        print(f"{ratio:.2f} | {bare:.2f} | {saved} |", flush=True)


def network_with(gates: str, depth: int, channels: int, x: Tensor) -> bn.SuperNetwork:
    """A ResNet with gates that look at the input, its batch norms set on `x`."""
    torch.manual_seed(0)
    space = bn.spaces.resnet(depth=depth, channels=channels, gates=gates, granularity=8, conditional=True)
    recalibrate(space, lambda x: space(x, AlwaysOn())[0], [(x, x)])
    return space.eval()


@torch.no_grad()
def with_open(space: bn.SuperNetwork, share: float, apart: bool, x: Tensor) -> bn.SuperNetwork:
    """A copy in which each gate is open for a share of `x`, or, not `apart`, a share of its edge's gates for all."""
    network = copy.deepcopy(space)
    for head in network.heads.values():
        assert isinstance(head, ConditionalGates)
        head.reset(0.0)
        if apart:
            nn.init.normal_(head.decide.weight)
            logits = logits_of(network, head, x).sort(dim=0, descending=True).values
            taken = round(share * len(x))  # the threshold lies half-way between the last that is open and the next
            next_one = logits[taken] if taken < len(x) else logits[-1] - 1
            start = -(logits[taken - 1] + next_one) / 2
        else:
            nn.init.zeros_(head.decide.weight)
            places = torch.arange(head.count)
            start = 2.0 * (((places + 1) * share).floor() > (places * share).floor()) - 1
        head.decide.bias.copy_(start)
    return network


def logits_of(network: bn.SuperNetwork, head: nn.Module, x: Tensor) -> Tensor:
    """What a head says of the examples, `(B, n)`."""
    found: list[Tensor] = []
    hook = head.register_forward_hook(lambda module, given, logits: found.append(logits))
    network.masked(x, Threshold())
    hook.remove()
    return found[0]


def interleaved(ways: Sequence[Callable[[Tensor], Tensor]], inputs: Sequence[Tensor], repeats: int) -> list[float]:
    """Median time of each way over all inputs, run in turn."""
    # with one thread the processor's time, which other jobs on the machine leave as it is
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in ways]
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for way, taken in zip(ways, times, strict=True):
                start = clock()
                for x in inputs:
                    way(x)
                if turn:  # the first warms up
                    taken.append(clock() - start)
    return [statistics.median(taken) for taken in times]


if __name__ == "__main__":
    main()
