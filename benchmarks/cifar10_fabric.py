"""A searched ResNet fabric against fixed networks of the same MACs on CIFAR-10, every one on the same images seen.

    python benchmarks/cifar10_fabric.py --seeds 0 1 2 --out runs/cifar10_fabric

Trains, for each seed: the fabric of width 3 searched under the MACs of ResNet-20; ResNet-20 itself; the
full fabric narrowed to at most those MACs; three random sub-networks of the fabric with those MACs.
A row that is kept in --rows already is not trained again, so that the table can be filled in several sittings;
accuracies and MACs compare across machines, seconds only within one. Prints one Markdown table.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

import budgetnet as bn
from budgetnet.budgets import Budget
from budgetnet.projection import trimmed

KINDS = ("searched", "resnet-20", "narrowed fabric", "random 1", "random 2", "random 3")
SEARCH = {"warmup": 0.5, "finetune": 0.37, "gate_rate": 0.2, "recalibration": 20}  # docs/experiments.md
ROWS = Path(__file__).parent / "results" / "cifar10_fabric"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cifar10", help="dataset, or folder of images")
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--options", type=json.loads, default=SEARCH, help="options of the search, as JSON")
    parser.add_argument("--baseline-options", type=json.loads, default={}, help="options of all else, as JSON")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10_fabric"))
    parser.add_argument("--rows", type=Path, default=ROWS, help="folder of the finished rows")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = bn.data.load(arguments.data).subset(arguments.train_images, seed=0)
    rows: dict[str, list[dict[str, object]]] = {}
    for seed in arguments.seeds:
        for kind in arguments.kinds:
            name = f"{kind.replace(' ', '-')}-seed{seed}"
            row = arguments.rows / f"{name}.json"
            if not row.exists():
                train(kind, seed, data, arguments, arguments.out / name)
                keep(arguments.out / name, row)
            rows.setdefault(kind, []).append(json.loads(row.read_text()))
            print(f"{kind} seed {seed}: test accuracy {rows[kind][-1]['test']['accuracy']:.4f}", flush=True)
    print("\n| network | test accuracy, mean (min to max) | MACs | images seen | seconds |\n|---|---|---|---|---|")
    for kind, results in rows.items():
        accuracy = [100 * result["test"]["accuracy"] for result in results]
        macs = statistics.mean(result["network"]["macs"] for result in results) / 1e6
        seconds = statistics.mean(result["seconds"] for result in results)
        spread = f"{statistics.mean(accuracy):.2f} ({min(accuracy):.2f} to {max(accuracy):.2f})"
        print(f"| {kind} | {spread} | {macs:.2f} M | {results[0]['images_seen']} | {seconds:.0f} |")


def keep(run: Path, row: Path) -> None:
    """Keeps what the table needs of a run, and where it was made."""
    result, options = (json.loads((run / name).read_text()) for name in ("result.json", "options.json"))
    kept = {key: result[key] for key in ("seed", "images_seen", "seconds", "network", "validation", "test")}
    kept |= {key: options[key] for key in ("budgetnet", "torch", "machine", "threads", "precision", "search")}
    row.parent.mkdir(parents=True, exist_ok=True)
    row.write_text(json.dumps(kept, indent=1) + "\n")


def train(kind: str, seed: int, data: bn.data.Dataset, arguments: argparse.Namespace, run: Path) -> None:
    """Trains one network of the table into its run folder."""
    torch.manual_seed(seed)
    fabric = bn.spaces.resnet_fabric(width=3)
    macs = bn.costs.MACs().bind(fabric)
    limit = float(macs(fabric.used(fabric.architecture("resnet"))))
    if kind == "searched":
        options = bn.SearchOptions(**{"validate_every": 5, "seed": seed} | arguments.options)
        bn.search(fabric, data, [Budget(bn.costs.MACs(), at_most=limit)], options, out=run, resume=True)
        return
    options = bn.SearchOptions(**{"validate_every": 5, "seed": seed} | arguments.baseline_options)
    if kind == "resnet-20":
        bn.search(fabric, data, [], options, architecture="resnet", out=run, resume=True)
    elif kind == "narrowed fabric":
        channels = max(c for c in range(1, 16) if full_macs(c) <= limit)
        torch.manual_seed(seed)
        bn.search(bn.spaces.resnet_fabric(width=3, channels=channels), data, [], options, architecture="full", out=run,
                  resume=True)  # fmt: skip
    else:
        number = int(kind.split()[1])
        bn.search(fabric, data, [], options, architecture=random_like(fabric, limit, 10 * seed + number), out=run,
                  resume=True)  # fmt: skip


def full_macs(channels: int) -> float:
    """MACs of the full fabric of width 3 with so many channels."""
    fabric = bn.spaces.resnet_fabric(width=3, channels=channels)
    return float(bn.costs.MACs().bind(fabric)(fabric.used(fabric.architecture("full"))))


def random_like(fabric: bn.SuperNetwork, limit: float, seed: int) -> torch.Tensor:
    """A sub-network drawn uniformly from those whose MACs lie within 2 % below the limit."""
    generator = torch.Generator().manual_seed(seed)
    macs = bn.costs.MACs().bind(fabric)
    while True:
        kept = torch.bernoulli(torch.full((4096, fabric.gate_count), 0.5), generator=generator)
        cost = macs(fabric.used(kept))
        fitting = ((cost <= limit) & (cost > 0.98 * limit)).nonzero().flatten()
        if len(fitting):
            return trimmed(fabric, kept[fitting[:1]])


if __name__ == "__main__":
    main()
