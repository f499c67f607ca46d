"""Predicted against measured latency of random architectures, beside MACs as predictor; and measured again elsewhere.

    OMP_NUM_THREADS=1 python benchmarks/latency_prediction.py

For each space the table is built as a search builds it (its whole networks are other ones), then `--networks` random
architectures are predicted and measured in turns in one process. MACs are scaled to milliseconds by the factor that
fits best. Then `--again` others are measured as at the end of a search, and in a new process each as by `measure`:
how many lie within 5 %, in milliseconds and as a multiple of a fixed network's, timed before and behind on either
side: a machine may change its speed.
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
from budgetnet.costs.latency import SECONDS, LatencyModel, widely
from budgetnet.costs.measured import LOOKS, Measured

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
    parser.add_argument("--spaces", nargs="+", default=list(SPACES), choices=list(SPACES))
    parser.add_argument("--measure", metavar="BITS", help="an architecture of the one space, for the new processes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.measure:
        (name,) = arguments.spaces
        print(*measured(stirred(SPACES[name]()), Latency(batch=arguments.batch), arguments.measure))
        return
    print("| space | runtime | rank correlation | median error | of MACs: rank correlation | median error | again, ms "
          "| again, multiple |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
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
    model = Latency(runtime=runtime, batch=arguments.batch).bind(space)
    kept = widely(space, arguments.networks + 1, torch.Generator().manual_seed(1))[1:]
    used = space.used(kept)
    found = model.measure(kept, calls=96)
    seen = np.array([one.value for one in found])
    predicted, macs = (bound(used).detach().numpy() for bound in (model, MACs().bind(space)))
    scaled = macs * np.dot(macs, seen) / np.dot(macs, macs)
    parts = [f"{rank_correlation(guess, seen):.3f} | {100 * np.median(np.abs(guess / seen - 1)):.1f} %" for guess in
             (predicted, scaled)]  # fmt: skip
    return " | ".join([*parts, again(name, model, arguments.again) if runtime == "onnxruntime" else " | "])


def again(name: str, model: LatencyModel, count: int) -> str:
    """Of so many architectures, how many take within 5 % in a process of their own what a result would say here.

    In milliseconds, and as a multiple of what the yardstick takes.
    """
    kept = widely(model.network, count + 1, torch.Generator().manual_seed(2))[1:]
    near = [0, 0]
    for row in kept:
        before = yardstick(model.network, model.cost)
        here = Measured.middle([model.measure(row[None])[0] for _ in range(LOOKS)]).value
        yard = (before + yardstick(model.network, model.cost)) / 2
        bits = "".join(str(int(bit)) for bit in row.tolist())
        command = [sys.executable, __file__, "--spaces", name, "--batch", str(model.cost.batch), "--measure", bits]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        there, other = map(float, done.stdout.split()[-2:])
        near[0] += abs(there / here - 1) <= 0.05
        near[1] += abs((there / other) / (here / yard) - 1) <= 0.05
    return " | ".join(f"{each} of {count}" for each in near)


def measured(space: bn.SuperNetwork, cost: Latency, bits: str) -> tuple[float, float]:
    """Milliseconds of an architecture as `budgetnet measure` says them, and of the yardstick before and behind."""
    kept = torch.tensor([[float(bit) for bit in bits]])
    before = yardstick(space, cost)
    found = cost.measured(space, kept).value
    return found, (before + yardstick(space, cost)) / 2


def yardstick(space: bn.SuperNetwork, cost: Latency) -> float:
    """Milliseconds of the fixed network."""
    assembler = cost.assembler(space)
    return assembler.times([assembler.yardstick()], 200, SECONDS)[0].quantile(0.5)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's."""
    ranks = [values.argsort().argsort() for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


if __name__ == "__main__":
    main()
