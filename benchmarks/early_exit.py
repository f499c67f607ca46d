"""A DenseNet that answers early on CIFAR-10, beside the same DenseNet without exits trained on as many images.

    python benchmarks/early_exit.py --data cifar10 --seeds 0 1 2 --out runs/early_exit

The exits' gates learn under a limit on the layers that an image passes on average, or any other; they see how sure an
exit's classifier is ("answer"), or look at the features beside it, as in the paper ("features"). For each exit: the
share of the test images that leave there, how many are right of all and of those, then the mean layers, MACs and time,
each as a share of those of the network without exits, the last in turns, on one thread. The default network is small,
for two cores, and its limit 65 % of the 22 layers without exits; the paper's is `--depth 100 --growth 12
--exit-channels 128 --exit-pool 1` with all images. A row that is kept in --rows is not trained again. Prints Markdown
tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import peers
import torch

import budgetnet as bn
from budgetnet.data import Batches
from budgetnet.delivery import evaluate_gates
from budgetnet.inference import Inference

ROWS = Path(__file__).parent / "results" / "early_exit"
TIMED = 64
"""Test images that are timed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cifar10", help="dataset, or folder of images")
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", nargs="+", default=["layers<=14.3"])
    parser.add_argument("--gates", nargs="+", default=["answer", "features"], choices=["answer", "features"])
    parser.add_argument("--depth", type=int, default=22)
    parser.add_argument("--growth", type=int, default=8)
    parser.add_argument("--exit-channels", type=int, default=16)
    parser.add_argument("--exit-pool", type=int, default=2)
    parser.add_argument("--options", type=json.loads, default={}, help="options of the search, as JSON")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/early_exit"))
    parser.add_argument("--rows", type=Path, default=ROWS, help="folder of the finished rows")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = bn.data.load(arguments.data).subset(arguments.train_images, seed=0)
    for budget, gates in product(arguments.budgets, arguments.gates):
        rows = []
        for seed in arguments.seeds:
            name = f"{gates}-{budget}-seed{seed}".replace("<=", "_").replace("%", "")
            kept = arguments.rows / f"{name}.json"
            if not kept.exists():
                row = train(budget, gates, seed, data, arguments, name)
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(row, indent=1) + "\n")
            rows.append(json.loads(kept.read_text()))
        show(f"`{budget}`, gates that look at the {gates}", rows)


def train(
    budget: str, gates: str, seed: int, data: bn.data.Dataset, arguments: argparse.Namespace, name: str
) -> dict[str, Any]:
    """Trains the network with exits and, once for each seed, the one without, and says what came out."""
    options = bn.SearchOptions(**{"epochs": arguments.epochs, "seed": seed, "validate_every": 10} | arguments.options)
    shape = {name: getattr(arguments, name) for name in ("depth", "growth", "exit_channels", "exit_pool")}

    def space(conditional: bool) -> bn.SuperNetwork:
        torch.manual_seed(seed)
        looks_at = {"conditional": True, "exit_gates": gates} if conditional else {"conditional": False}
        return bn.spaces.densenet_exits(**shape, classes=data.num_classes, **looks_at)

    without = arguments.out / f"without-seed{seed}"
    plain = bn.search(space(False), data, [], options, architecture="full", out=without, resume=True)
    found = bn.search(space(True), data, [budget], options, out=arguments.out / name, resume=True)
    looked = found.result["inference"]
    costs = evaluate_gates(found.supernet, data, Inference(tau=looked["tau"]), ["layers", "macs"], recalibration=0)[
        "costs"
    ]
    images = next(iter(Batches(data.test, batch_size=TIMED, shuffle=False).epoch(0)))[0]
    return {
        "budgets": found.result["budgets"],
        "accuracy": found.result["test"]["accuracy"],
        "accuracy_without": plain.result["test"]["accuracy"],
        "layers": costs["layers"],
        "layers_without": layers_of(plain),
        "macs": costs["macs"],
        "macs_without": plain.result["network"]["macs"],
        "tau": looked["tau"],
        "exits": looked["exits"],
        "latency": peers.measure(found.network(), images, plain.network())["latency"],
        "seconds": found.result["seconds"],
        "seconds_without": plain.result["seconds"],
        "network": shape,
    }


def layers_of(found: bn.Found) -> float:
    """Convolutions and linear layers of a network that a search without a budget returned."""
    return float(bn.costs.Layers().bind(found.supernet)(found.supernet.used(found.architecture))[0])


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Means over the seeds."""

    def mean(values: list[float | None]) -> str:
        there = [100 * value for value in values if value is not None]
        return f"{statistics.mean(there):.1f}" if there else ""

    print(f"\n{title}, {len(rows)} seeds, percent\n\n| exit | images | right, of all | right, of these |")
    print("|---|---|---|---|")
    for places in zip(*(row["exits"] for row in rows), strict=True):
        cells = (mean([place[key] for place in places]) for key in ("share", "accuracy_all", "accuracy_chosen"))
        print(f"| {places[0]['name']} | {' | '.join(cells)} |")
    ways = list(rows[0]["latency"])
    beside = "layers / without exits | MACs / without exits"
    print(f"\n| accuracy | without exits | {beside} | {' | '.join(ways)}, time ratios |")
    print("|---" * (len(ways) + 4) + "|")
    shares = [[row[key] / row[f"{key}_without"] for row in rows] for key in ("layers", "macs")]
    cells = [mean([row[key] for row in rows]) for key in ("accuracy", "accuracy_without")] + list(map(mean, shares))
    cells += [f"{statistics.mean(row['latency'][way]['ratio'] for row in rows):.2f}" for way in ways]
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
