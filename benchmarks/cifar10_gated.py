"""Gated ResNet-20 beside a narrowed one, two maintained pruners and shapes trained from scratch, on CIFAR-10.

    pip install -r benchmarks/requirements.txt
    python benchmarks/cifar10_gated.py --data cifar10 --seeds 0 1 2 --out runs/cifar10_gated

Every row sees the same images in the same number of epochs on one learning-rate curve. A row that is kept in --rows
already is not trained again. Rows may be trained on one machine (`--no-times`) and timed on another, which takes the
networks from --out. Accuracies compare within one precision, seconds within one device; latencies are ratios, each
taken beside the dense network. Prints one Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peers
import torch
from torch import Tensor, nn

import budgetnet as bn
from budgetnet.data import Batches
from budgetnet.delivery import fold_gates
from budgetnet.evaluation import evaluate
from budgetnet.options import resolve_device, resolve_precision
from budgetnet.projection import trimmed
from budgetnet.report import gate_figures
from budgetnet.report.architecture import Architecture
from budgetnet.report.records import read_json

EXAMPLE = torch.zeros(1, 3, 32, 32)
COMMON = {"validate_every": 10, "candidates": 4, "recalibration": 20}
ROWS = Path(__file__).parent / "results" / "cifar10_gated"
TIMED = 64
"""Test images that latency is measured on."""
NETWORK = "network.pt"
"""A row's network in --out, pickled whole."""
RANDOM = tuple(f"random {number}" for number in range(1, 6))


@dataclass(frozen=True)
class Gated:
    """What is searched.

    Attributes:
        space, search: options of both.
        in_time: a cost in milliseconds that is to save at least `IN_TIME` of the share of MACs that is saved.
        fold: gates that no more than this share of the images is an exception to are made constants in the network that
            was found; the same search without that is another row.
    """

    space: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    in_time: str | None = None
    fold: float | None = None


TAUGHT = {"distillation": 1.0, "warmup": 13 / 30, "finetune": 12 / 30}
"""The full network, a better teacher the longer it learned alone, needs more of the epochs before the search."""
GATED = {
    "pruned": Gated(),
    "pruned wide": Gated({"expansion": 2}),
    "pruned taught": Gated({}, TAUGHT),
    "conditional": Gated({"conditional": True}, {"noiseless": 0.7}),
    "conditional layers": Gated({"conditional": True, "gates": "layers"}, {"noiseless": 0.7}),
    "pruned streams": Gated({"where": "stream"}),
    "layers": Gated({"gates": "layers"}),
    "blocks and eights": Gated({"gates": "both", "granularity": 8}),
    "blocks and eights timed": Gated({"gates": "both", "granularity": 8}, in_time="latency[batch=64]"),
    "blocks and eights taught": Gated({"gates": "both", "granularity": 8}, TAUGHT),
    "batch activation": Gated({}, {"penalty": "batch-activation"}),
    "per-gate loss": Gated({}, {"penalty": "per-gate"}),
    "conditional per-gate": Gated({"conditional": True}, {"noiseless": 0.7, "penalty": "per-gate"}),
}
"""The wide one may take up to twice the hidden channels, that of streams also cuts those between the blocks; of the
taught ones the full network learns beside them to the end, which their seconds show; gates that look at the input have
noise until the limit is in full force; "batch activation" is Eq. 1 of Herrmann et al., where "pruned" has a price on
what exceeds the limit."""
GATED |= {f"{kind} folded": replace(GATED[kind], fold=0.05) for kind in ("conditional", "conditional layers")}
IN_TIME = 0.8
KINDS = (*GATED, "narrowed", "torch-pruning", "fastnas", "found shape", *RANDOM)
DENSE_EPOCHS = 2 / 3
"""Share of the epochs that the pruners train the dense network for; the rest follows the pruning."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cifar10", help="dataset, or folder of images")
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--pad", type=int, help="of the random crop; give such rows a folder (--rows)")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--targets", type=int, nargs="+", default=[50, 25], help="percent of the dense MACs")
    parser.add_argument("--kinds", nargs="+", default=["dense", *KINDS], choices=["dense", *KINDS])
    parser.add_argument("--options", type=json.loads, default={}, help="options of the gated search, as JSON")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10_gated"))
    parser.add_argument("--rows", type=Path, default=ROWS, help="folder of the finished rows")
    parser.add_argument("--times", action=argparse.BooleanOptionalAction, default=True, help="time the networks, too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = bn.data.load(arguments.data).subset(arguments.train_images, seed=0).augmented(pad=arguments.pad)
    table: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for seed in arguments.seeds:
        for kind, target in [("dense", 100), *((kind, target) for target in arguments.targets for kind in KINDS)]:
            if kind not in arguments.kinds:
                continue
            name = f"{kind.replace(' ', '-')}-{target}-seed{seed}"
            kept = arguments.rows / f"{name}.json"
            if not kept.exists():
                (arguments.out / name).mkdir(parents=True, exist_ok=True)
                kept.parent.mkdir(parents=True, exist_ok=True)
                row = Row(kind, target, seed, data, arguments, arguments.out / name).train()
                kept.write_text(json.dumps(row, indent=1) + "\n")
            row = json.loads(kept.read_text())
            if arguments.times and "latency" not in row:
                network = torch.load(arguments.out / name / NETWORK, weights_only=False)
                row = peers.measure(network, timed_images(data), peers.resnet20()) | row
                kept.write_text(json.dumps(row, indent=1) + "\n")
            table.setdefault((target, kind), []).append(row)
            print(f"{kind} at {target} % seed {seed}: {row['accuracy']:.4f}, {row['macs'] / 1e6:.2f} M", flush=True)
    print_table(table)


class Row:
    """One network of the table.

    Args:
        kind: of `KINDS`, or "dense".
        target: percent of the dense network's MACs.
        seed: of initialisation, order, augmentation and samples.
        data, arguments, folder: where its run lies.
    """

    def __init__(
        self, kind: str, target: int, seed: int, data: bn.data.Dataset, arguments: argparse.Namespace, folder: Path
    ) -> None:
        self.kind, self.target, self.seed, self.data, self.folder = kind, target, seed, data, folder
        self.rows, self.test = arguments.rows, Batches(data.test, batch_size=128, shuffle=False)
        self.before = 0.0
        self.options = bn.SearchOptions(epochs=arguments.epochs, seed=seed, **COMMON)
        own = GATED.get(kind, Gated()).search | arguments.options
        self.searched = bn.SearchOptions(**{"epochs": arguments.epochs, "seed": seed} | COMMON | own)
        with torch.device("meta"):
            dense = peers.macs(peers.ResNet20(), EXAMPLE)
        self.limit = dense * target / 100

    def train(self) -> dict[str, Any]:
        """Trains it, and says what came out."""
        torch.manual_seed(self.seed)
        started = time.monotonic()
        if self.kind in (*GATED, "found shape", *RANDOM):
            network, extra = self.gated()
        else:
            network, extra = getattr(self, self.kind.replace("-", "_"))(), {}
        seconds = time.monotonic() - started + self.before
        accuracy = extra.pop("accuracy") if "accuracy" in extra else self.accuracy(network)
        network = network.cpu().eval()
        torch.save(network, self.folder / NETWORK)
        device = resolve_device(self.options.device)
        return {
            "kind": self.kind,
            "target": self.target,
            "seed": self.seed,
            "accuracy": accuracy,
            "seconds": seconds,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
            "precision": str(resolve_precision(self.options.precision, device)),
            "macs": peers.macs(network, timed_images(self.data)[:1]),
            **extra,
        }

    def gated(self) -> tuple[nn.Module, dict[str, Any]]:
        """The rows that budgetnet trains: searched, found, or drawn at random."""
        kind = GATED.get(self.kind, Gated())
        space = bn.spaces.resnet(depth=20, **kind.space)
        budgets: list[bn.Budget | str] = [bn.Budget(bn.costs.MACs(), at_most=self.limit)]
        if kind.in_time:
            budgets.append(f"{kind.in_time}<={100 - IN_TIME * (100 - self.target):g}%")
        run = self.folder.with_name(self.folder.name.replace("-folded", "")) / "run"
        if self.kind in GATED:
            found = bn.search(space, self.data, budgets, self.searched, out=run, resume=True)
        else:
            if self.kind == "found shape":
                shape: str | Tensor = str(self.rows / f"pruned-{self.target}-seed{self.seed}.architecture.json")
            else:
                shape = random_shape(space, self.target / 100, 10 * self.seed + int(self.kind.split()[1]))
            found = bn.search(space, self.data, [], self.options, architecture=shape, out=run, resume=True)
        extra: dict[str, Any] = {"accuracy": found.result["test"]["accuracy"], "macs": found.result["network"]["macs"]}
        if self.kind in GATED:
            extra |= {"polarised": polarised(run), "budget": found.result["budgets"]}
        if self.kind == "pruned":
            architecture = self.rows / f"pruned-{self.target}-seed{self.seed}.architecture.json"
            architecture.write_bytes((run / "architecture.json").read_bytes())
        if kind.fold is None:
            return found.network(), extra
        network, told = fold_gates(found.supernet, self.data, found.result["inference"]["tau"], kind.fold)
        macs = told["validation"]["folded"]["macs"]
        return network, extra | {"accuracy": self.accuracy(network), "macs": macs, "constants": told["constants"]}

    def accuracy(self, network: nn.Module) -> float:
        """On the test images, looked at once."""
        device = next(network.parameters()).device
        network.eval()
        examples = ((x.to(device), y.to(device)) for x, y in self.test.epoch(0))
        return evaluate(network, examples, classes=self.data.num_classes)["accuracy"]

    def dense(self) -> nn.Module:
        """The whole network."""
        return self._trained(peers.resnet20(), 0, self.options.epochs)

    def narrowed(self) -> nn.Module:
        """Narrower by one factor everywhere."""
        return self._trained(peers.narrowed(self.limit), 0, self.options.epochs)

    def torch_pruning(self) -> nn.Module:
        """Dense, pruned by global group magnitude, fine-tuned."""
        return self._pruned(lambda network: peers.torch_pruning(network, EXAMPLE, self.limit))

    def fastnas(self) -> nn.Module:
        """Dense, pruned by FastNAS, fine-tuned."""
        scores = self.folder.parent / f"fastnas-scores-seed{self.seed}"
        return self._pruned(lambda network: peers.fastnas(network, self.data, self.limit, self.options, scores=scores))

    def _pruned(self, prune: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """Both pruners start from one dense network for each seed; its seconds are counted in every row."""
        first = round(self.options.epochs * DENSE_EPOCHS)
        network, saved = peers.resnet20(), self.folder.parent / f"unpruned-seed{self.seed}.pt"
        if saved.exists():
            state, self.before = torch.load(saved, weights_only=True)
            network.load_state_dict(state)
        else:
            self.before = peers.train(network, self.data, self.options, 0, first)
            torch.save((network.state_dict(), self.before), saved)
            self.before = 0.0  # counted by the row's own clock
        return self._trained(prune(network), first, self.options.epochs)

    def _trained(self, network: nn.Module, first: int, last: int) -> nn.Module:
        peers.train(network, self.data, self.options, first, last)
        return network


def timed_images(data: bn.data.Dataset) -> Tensor:
    """The images that latency is measured on."""
    return next(iter(Batches(data.test, batch_size=TIMED, shuffle=False).epoch(0)))[0]


def random_shape(space: bn.SuperNetwork, share: float, seed: int) -> Tensor:
    """A shape whose sites keep random numbers of channels, scaled to within 1 % below that share of the MACs."""
    generator = torch.Generator().manual_seed(seed)
    macs = bn.costs.MACs().bind(space)
    full = float(macs(space.used(space.architecture("full")))[0])
    while True:
        wanted = torch.rand(len(space.sites), generator=generator)
        low, high = 0.0, 8.0
        for _ in range(30):
            scale = (low + high) / 2
            kept = torch.zeros(1, space.gate_count)
            for site, part in zip(space.sites, (wanted * scale).clamp(max=1).tolist(), strict=True):
                columns = [space.gate_of[unit] for unit in range(*site.units)]
                kept[0, columns[: max(1, round(part * site.groups))]] = 1  # type: ignore[index, misc]
            cost = float(macs(space.used(kept))[0]) / full
            if 0.99 * share < cost <= share:
                return trimmed(space, kept)
            low, high = (scale, high) if cost <= share else (low, scale)


def polarised(run: Path) -> float:
    """Share of the gates that ended open with a probability, or for a share of images, below 0.05 or above 0.95."""
    some, count = gate_figures.polarised(Architecture.read(read_json(run / "architecture.json")))
    return some / max(1, count)


def print_table(table: dict[tuple[int, str], list[dict[str, Any]]]) -> None:
    """Test accuracy in percent: mean over the seeds, smallest to largest; latencies over the dense network's."""
    ways = [f"{runtime} {batch}" for runtime in ("torch", "onnxruntime") for batch in (1, 64)]
    print(f"\nthreads {torch.get_num_threads()}, cores {os.cpu_count()}, latency / dense latency on one thread (batch)")
    print(
        f"\n| target | network | test accuracy (min to max) | seeds | MACs | {' | '.join(ways)} | seconds | polarised |"
    )
    print("|---" * (len(ways) + 7) + "|")
    for (target, kind), rows in sorted(table.items(), key=lambda item: -item[0][0]):
        accuracy = [100 * row["accuracy"] for row in rows]
        spread = f"{statistics.mean(accuracy):.2f} ({min(accuracy):.2f} to {max(accuracy):.2f})"
        macs, seconds = (statistics.mean(row[key] for row in rows) for key in ("macs", "seconds"))
        found = [[row["latency"][way]["ratio"] for row in rows if way in row.get("latency", {})] for way in ways]
        cells = " | ".join(f"{statistics.mean(ratios):.2f}" if ratios else "" for ratios in found)
        share = statistics.mean(row["polarised"] for row in rows) if "polarised" in rows[0] else None
        shown = "" if share is None else f"{100 * share:.0f} %"
        print(
            f"| {target} % | {kind} | {spread} | {len(rows)} | {macs / 1e6:.2f} M | {cells} | {seconds:.0f} | {shown} |"
        )


if __name__ == "__main__":
    main()
