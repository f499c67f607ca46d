"""Predicted against measured latency of random architectures, beside MACs as predictor; and measured again elsewhere.

    OMP_NUM_THREADS=1 python benchmarks/latency_prediction.py

For each space the table is built as a search builds it (its whole networks are other ones), then `--networks` random
architectures are predicted and measured in turns in one process. MACs are scaled to milliseconds by the factor that
fits best. Then `--again` of them are measured in a new process each: how many medians lie within 5 %, in milliseconds
and as a multiple of a fixed network's, timed in turns with them on either side: a machine may change its speed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

import budgetnet as bn
from budgetnet.assembly import YARD, YARDSTICK
from budgetnet.costs import Latency, MACs
from budgetnet.costs.latency import SECONDS, LatencyModel, builds_of, widely
from budgetnet.export import export, onnx_session
from budgetnet.extraction import extract, fold_batch_norm
from budgetnet.timing import Timing, interleaved

BUILDS = builds_of("onnxruntime")
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
    parser.add_argument("--measure", help="a file to measure, for the new processes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.measure:
        print(*medians(Path(arguments.measure)))
        return
    print("| space | runtime | rank correlation | median error | of MACs: rank correlation | median error | again, ms "
          "| again, multiple |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.spaces:
        for runtime in arguments.runtimes:
            print(f"| {name} | {runtime} | {row(SPACES[name](), runtime, arguments)} |", flush=True)


def row(space: bn.SuperNetwork, runtime: str, arguments: argparse.Namespace) -> str:
    """One line of the table, for a space with random weights."""
    torch.manual_seed(0)
    for part in space.modules():
        if isinstance(part, torch.nn.BatchNorm2d):  # as after training: an exporter leaves out a bias of zeros
            torch.nn.init.normal_(part.bias, std=0.1)
    model = Latency(runtime=runtime, batch=arguments.batch).bind(space.eval())
    kept = widely(space, arguments.networks + 1, torch.Generator().manual_seed(1))[1:]
    used = space.used(kept)
    found = model.measure(kept, calls=96)
    seen = np.array([one.value for one in found])
    predicted, macs = (bound(used).detach().numpy() for bound in (model, MACs().bind(space)))
    scaled = macs * np.dot(macs, seen) / np.dot(macs, macs)
    parts = [f"{rank_correlation(guess, seen):.3f} | {100 * np.median(np.abs(guess / seen - 1)):.1f} %" for guess in
             (predicted, scaled)]  # fmt: skip
    return " | ".join([*parts, again(space, model, arguments.again) if runtime == "onnxruntime" else " | "])


def again(space: bn.SuperNetwork, model: LatencyModel, count: int) -> str:
    """Of so many architectures, how many take within 5 % in a process of their own what was measured here.

    In milliseconds, and as a multiple of what the yardstick takes.
    """
    kept = widely(space, count + 1, torch.Generator().manual_seed(2))[1:]
    near = [0, 0]
    with tempfile.TemporaryDirectory() as folder:
        export(YARDSTICK, Path(folder) / "yardstick.onnx", torch.zeros(1, *YARD))
        for place, row in enumerate(kept):
            file = Path(folder) / f"{place}.onnx"
            example = torch.zeros(model.cost.batch, *space.input_shape)
            export(fold_batch_norm(extract(space, row[None])), file, example)
            file.with_suffix(".json").write_text(json.dumps([list(example.shape), [1, *YARD]]))
            ways = [model.assembler.whole(row[None]) for _ in range(BUILDS)] + [model.assembler.yardstick()]
            here, yard = middle_and_yard(model.assembler.times(ways, 200, SECONDS))
            done = subprocess.run(
                [sys.executable, __file__, "--measure", str(file)], capture_output=True, text=True, check=True
            )
            there, other = map(float, done.stdout.split()[-2:])
            near[0] += abs(there / here - 1) <= 0.05
            near[1] += abs((there / other) / (here / yard) - 1) <= 0.05
    return " | ".join(f"{each} of {count}" for each in near)


def medians(file: Path) -> tuple[float, float]:
    """Milliseconds of an exported file, loaded several times, and of the yardstick beside it, in turns."""
    ways = []
    paths = [file] * BUILDS + [file.parent / "yardstick.onnx"]
    shape, yard = json.loads(file.with_suffix(".json").read_text())
    for path, size in zip(paths, [shape] * BUILDS + [yard], strict=True):
        session, example = onnx_session(str(path), 1), np.random.default_rng(0).normal(size=size).astype(np.float32)
        ways.append(partial(session.run, None, {session.get_inputs()[0].name: example}))
    return middle_and_yard(interleaved(ways, calls=200, seconds=SECONDS))


def middle_and_yard(timings: Sequence[Timing]) -> tuple[float, float]:
    """The middle median of a network that was built several times, and the yardstick's."""
    *builds, yard = (timing.quantile(0.5) for timing in timings)
    return sorted(builds)[len(builds) // 2], yard


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's."""
    ranks = [values.argsort().argsort() for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


if __name__ == "__main__":
    main()
