"""Time of a network whose gates look at the input, beside the share of the MACs that it computes.

    OMP_NUM_THREADS=1 python benchmarks/conditional_speed.py

A ResNet (16, 32, 64 channels on images of 32x32) with gates on its layers, or on groups of 8 channels. Its heads are
random, their biases set so that each gate is open for a given share of the images: "apart", each gate for others; or
"alike", a share of each layer's gates for all images. Beside it the same network without gates: "time" is relative to
the plain network that `extract` gives, "ungated" to the skipping network with all gates open for all. All are run in
turn in one process; ratios of medians are printed. "saved" is the share of the saved MACs that is saved in time.
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
from budgetnet.conditional import conditional, export_fastest, tune_fastest
from budgetnet.evaluation import recalibrate
from budgetnet.export import export, load
from budgetnet.extraction import extract, fold_batch_norm
from budgetnet.sites import AlwaysOn, ConditionalGates, Threshold

IMAGES = 64
Run = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--granularity", type=int, default=8, help="channels of a group")
    parser.add_argument("--gates", nargs="+", default=["layers", "channels"], choices=["layers", "channels", "both"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64], help="of torch; onnxruntime runs one image")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--runtimes", nargs="+", default=["torch", "onnxruntime"], choices=["torch", "onnxruntime"])
    parser.add_argument("--memory", default="channels_last", choices=["channels_last", "contiguous"])
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    memory = torch.channels_last if arguments.memory == "channels_last" else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(IMAGES, 3, 32, 32, generator=generator).contiguous(memory_format=memory)
    threads = torch.get_num_threads()
    print(f"ResNet-{arguments.depth}, {arguments.channels} channels in groups of {arguments.granularity}, ", end="")
    print(f"{arguments.memory} in torch, {threads} threads\n")
    print("| runtime | batch | gates | images | open | MACs | time | ungated | saved |")
    print("|---|---|---|---|---|---|---|---|---|")
    for gates in arguments.gates:
        space = network_with(gates, arguments, x).to(memory_format=memory)
        for batch in arguments.batches if "torch" in arguments.runtimes else []:
            print_rows(arguments, "torch", batch, gates, space, x)
        if "onnxruntime" in arguments.runtimes:
            print_rows(arguments, "onnxruntime", 1, gates, space, x.contiguous())


def print_rows(
    arguments: argparse.Namespace, runtime: str, batch: int, gates: str, space: bn.SuperNetwork, x: Tensor
) -> None:
    """The rows of one network in one runtime at one batch size."""
    inputs = x.split(batch)[:16]
    macs, whole = bn.costs.MACs().bind(space), bn.costs.MACs(gates=False).bind(space)
    full = space.architecture("full")
    dense: nn.Module = fold_batch_norm(extract(space, full))
    ungated = conditional(space, constants=torch.ones(space.gate_count))
    kinds = [("apart", share) for share in arguments.shares]
    if runtime == "torch" and gates != "layers":
        kinds = [("alike", share) for share in arguments.shares if share < 1] + kinds
    ways: list[Run] = [dense, ungated]
    counted: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        if runtime == "onnxruntime":
            ways = [load(export(dense, Path(folder) / "dense.onnx", x[:1]))] * 2
        for like, share in kinds:
            network = conditional(with_open(space, share, like == "apart", x))
            kept = torch.cat([network.decide(part)[1] for part in inputs])
            relative = float(macs(space.used(kept)).mean()) / float(whole(space.used(full))[0])
            counted.append((float(kept[:, space.independent :].mean()), relative))
            if runtime == "torch":
                tune_fastest(network, inputs[0], repeats=7)
                ways.append(network)
            else:
                file = Path(folder) / f"{like}{share}.onnx"
                export_fastest(network, file, x[:8])
                ways.append(load(file))
        medians = interleaved(ways, inputs, arguments.repeats * (1 if batch > 1 else 3))
    for (like, _), (opened, share), taken in zip(kinds, counted, medians[2:], strict=True):
        ratio, bare = taken / medians[0], taken / medians[1]
        own = f"{bare:.2f}" if runtime == "torch" else ""
        saved = f"{(1 - ratio) / (1 - share):.2f}" if share < 0.98 else ""
        print(f"| {runtime} | {batch} | {gates} | {like} | {opened:.2f} | {share:.2f} | ", end="")
        print(f"{ratio:.2f} | {own} | {saved} |", flush=True)


def network_with(gates: str, arguments: argparse.Namespace, x: Tensor) -> bn.SuperNetwork:
    """A ResNet with gates that look at the input, its batch norms set on `x`."""
    torch.manual_seed(0)
    space = bn.spaces.resnet(
        depth=arguments.depth,
        channels=arguments.channels,
        gates=gates,
        granularity=arguments.granularity,
        conditional=True,
    )
    recalibrate(space, lambda x: space(x, AlwaysOn())[0], [(x, x)])
    return space.eval()


@torch.no_grad()
def with_open(space: bn.SuperNetwork, share: float, apart: bool, x: Tensor) -> bn.SuperNetwork:
    """A copy in which each gate is open for a share of `x`; or, not `apart`, a share of each layer's gates for all."""
    network = copy.deepcopy(space)
    for head in network.heads.values():
        assert isinstance(head, ConditionalGates)
        head.reset(0.0)
        if apart:
            nn.init.normal_(head.decide.weight)
            logits = logits_of(network, head, x).sort(dim=0, descending=True).values
            taken = round(share * len(x))  # the threshold lies half-way between the last that is open and the next
            following = logits[taken] if taken < len(x) else logits[-1] - 1
            start = -(logits[taken - 1] + following) / 2
        else:
            nn.init.zeros_(head.decide.weight)
            places = torch.arange(head.count)
            start = 2.0 * (((places + 1) * share).floor() > (places * share).floor()) - 1
        head.decide.bias.copy_(start)
    return network


def logits_of(network: bn.SuperNetwork, head: nn.Module, x: Tensor) -> Tensor:
    """What a head says of the images, `(B, n)`."""
    found: list[Tensor] = []
    hook = head.register_forward_hook(lambda module, given, logits: found.append(logits))
    network.masked(x, Threshold())
    hook.remove()
    return found[0]


def interleaved(ways: Sequence[Run], inputs: Sequence[Tensor], repeats: int) -> list[float]:
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
