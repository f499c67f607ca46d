"""Predicted against measured latency of random architectures, beside MACs as predictor; and measured again elsewhere.

    OMP_NUM_THREADS=1 python benchmarks/latency_prediction.py

For each space the table is built as a search builds it (its whole networks are other ones), then `--networks` random
architectures are predicted and measured in one process, four in turns, as a search measures candidates. MACs are
scaled to milliseconds by the factor that fits best. Then `--again` others are measured as at the end of a search, and
in a new process each as by `measure RUN`, beside the full network: how many lie within 5 %, and how many as seen.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import torch

import budgetnet as bn
from budgetnet.costs import Latency, MACs
from budgetnet.costs.latency import LatencyModel, widely
from budgetnet.costs.stopwatch import Rest

SPACES: dict[str, Callable[[], bn.SuperNetwork]] = {
    "fabric of width 3": lambda: bn.spaces.resnet_fabric(width=3),
    "ResNet-20, channels": lambda: bn.spaces.resnet(depth=20),
    "ResNet-20, blocks and eights": lambda: bn.spaces.resnet(depth=20, gates="both", granularity=8),
    "fabric of width 3, digits": lambda: bn.spaces.resnet_fabric(width=3, image_size=8, in_channels=1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=200)
    parser.add_argument("--again", type=int, default=10)
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "torch"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda for torch and compiled alone")
    parser.add_argument("--spaces", nargs="+", default=list(SPACES), choices=list(SPACES))
    parser.add_argument("--measure", metavar="BITS", help="an architecture of the one space, for the new processes")
    parser.add_argument(
        "--took", metavar="MS", type=float, nargs=2, help="the full network and the yardstick, for these"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.measure:
        (name,) = arguments.spaces
        kept = torch.tensor([[float(bit) for bit in arguments.measure]])
        cost, space = Latency(batch=arguments.batch), stirred(SPACES[name]())
        found = cost.compared(space, kept, Rest(*arguments.took))
        print(found.value, found.slowness)
        return
    print("| space | runtime | rank correlation | median error | of MACs: rank correlation | median error | again |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.spaces:
        for runtime in arguments.runtimes:
            print(f"| {name} | {runtime} | {row(name, runtime, arguments)} |", flush=True)


def stirred(space: bn.SuperNetwork) -> bn.SuperNetwork:
    """A space with random weights, its biases not zero: as after training. An exporter leaves out a bias of zeros."""
    torch.manual_seed(0)
    for part in space.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(part.bias, std=0.1)
    return space.eval()


def row(name: str, runtime: str, arguments: argparse.Namespace) -> str:
    """One line of the table."""
    space = stirred(SPACES[name]())
    model = Latency(runtime=runtime, batch=arguments.batch, device=arguments.device).bind(space)
    kept = widely(space, arguments.networks + 1, torch.Generator().manual_seed(1))[1:]
    used = space.used(kept)
    found = [one for few in kept.split(4) for one in model.measure(few)]
    seen = np.array([one.value for one in found])
    predicted, macs = (bound(used).detach().numpy() for bound in (model, MACs().bind(space)))
    scaled = macs * np.dot(macs, seen) / np.dot(macs, macs)
    parts = [f"{rank_correlation(guess, seen):.3f} | {100 * np.median(np.abs(guess / seen - 1)):.1f} %" for guess in
             (predicted, scaled)]  # fmt: skip
    return " | ".join([*parts, again(name, model, arguments.again) if runtime == "onnxruntime" else ""])


def again(name: str, model: LatencyModel, count: int) -> str:
    """Of so many architectures, how many take within 5 % in a process of their own of what a result would say here."""
    near = seen = 0
    for row in widely(model.network, count + 1, torch.Generator().manual_seed(2))[1:]:
        here = model.report(row[None]).value
        bits = "".join(str(int(bit)) for bit in row.tolist())
        command = [sys.executable, __file__, "--spaces", name, "--batch", str(model.cost.batch), "--measure", bits]
        command += ["--took", *map(str, model.watch.took)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        there, slowness = (float(word) for word in done.stdout.split())
        near += abs(there / here - 1) <= 0.05
        seen += abs(there * slowness / here - 1) <= 0.05
        told = f"{there:.4f} in a new process, where the machine is {slowness:.2f} times as slow"
        print(f"{name}: {here:.4f} ms here, {told}", file=sys.stderr, flush=True)
    return f"{near} of {count}, as seen {seen}"


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's."""
    ranks = [values.argsort().argsort() for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


if __name__ == "__main__":
    main()
