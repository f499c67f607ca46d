"""Does every returned network keep its limit, and how much of it is left: many budgets, spaces and seeds.

    OMP_NUM_THREADS=1 python benchmarks/budgets_kept.py --data data/cifar10

Default options throughout; on CIFAR-10 few images, and few channels in the fabric, as it is the limits that are looked
at, not accuracy. Slack is what is left of the tightest limit, as a share of it. A row that is kept in --rows is not
searched again, so that the table can be filled in several sittings. Prints one Markdown table.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import budgetnet as bn
from budgetnet.errors import UnreachableBudget

ROWS = Path(__file__).parent / "results" / "budgets_kept"
SPACES: dict[str, Callable[[], bn.SuperNetwork]] = {
    "digits fabric": lambda: bn.spaces.resnet_fabric(width=3, image_size=8, in_channels=1),
    "CIFAR-10 fabric": lambda: bn.spaces.resnet_fabric(width=3, channels=8),
    "gated ResNet-20": lambda: bn.spaces.resnet(depth=20),
    "ResNet-20 by input": lambda: bn.spaces.resnet(depth=20, gates="layers", conditional=True),
}
BUDGETS = (
    *("macs<=15%", "macs<=25%", "macs<=50%", "macs<=75%"),
    *("params<=25%", "memory<=50%", "latency<=50%", "steps:2<=50%", "steps:4<=50%"),
    *("macs<=50% latency<=50%", "macs<=25% params<=50%", "memory<=50% steps:2<=50%"),
    *("latency<=50% memory<=60%", "params<=50% steps:4<=60%"),
)
BY_INPUT = {"ResNet-20 by input": ("latency<=60%",)}
"""Of input-dependent gates, on layers here, which accept few other costs."""
STEPS = {"gated ResNet-20": "75%"}
"""The limit on steps where half of them is out of reach: the shortcuts of strided blocks take steps too."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="CIFAR-10; without it digits alone")
    parser.add_argument("--train-images", type=int, default=1280, help="of CIFAR-10, and to validate on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--spaces", nargs="+", default=list(SPACES), choices=list(SPACES))
    parser.add_argument("--budgets", nargs="+", help="all unless given")
    parser.add_argument("--out", type=Path, default=Path("runs/budgets_kept"))
    parser.add_argument("--rows", type=Path, default=ROWS, help="folder of the finished rows")
    arguments = parser.parse_args()
    print("| space | budget | kept | mean slack | slack of each seed | test accuracy |\n|---|---|---|---|---|---|")
    slacks = []
    for space in arguments.spaces:
        if space != "digits fabric" and not arguments.data:
            continue
        for text in arguments.budgets or BY_INPUT.get(space, BUDGETS):
            budget = re.sub(r"(steps:\d<=)\d+%", rf"\g<1>{STEPS[space]}", text) if space in STEPS else text
            rows = [finished(space, budget, seed, arguments) for seed in arguments.seeds]
            done = [row for row in rows if row["budgets"]]
            kept = sum(all(each["met"] for each in row["budgets"]) for row in done)
            left = [min(1 - each["value"] / each["limit"] for each in row["budgets"]) for row in done]
            slacks += left
            each = ", ".join(f"{100 * slack:.1f}" for slack in left)
            accuracy = statistics.mean(100 * row["accuracy"] for row in done) if done else float("nan")
            print(f"| {space} | {budget} | {kept} of {len(rows)} | {100 * statistics.mean(left or [0]):.1f} % "
                  f"| {each} | {accuracy:.1f} |", flush=True)  # fmt: skip
    print(f"\nmean slack of {len(slacks)} networks: {100 * statistics.mean(slacks):.2f} %")


def finished(space: str, budget: str, seed: int, arguments: argparse.Namespace) -> dict[str, object]:
    """One row, from its file or from a search."""
    name = f"{space}-{budget}-seed{seed}".replace(" ", "-").replace("<=", "_").replace("%", "").replace(":", "")
    file = arguments.rows / f"{name}.json"
    if not file.exists():
        torch.manual_seed(seed)
        data = bn.data.load("digits" if space == "digits fabric" else arguments.data)
        if space != "digits fabric":
            few = arguments.train_images
            data = replace(data.subset(few, seed=0), validation=data.validation.subset(few, seed=0))
        options = bn.SearchOptions(seed=seed)
        row: dict[str, object] = {"budgets": [], "accuracy": None}
        try:
            run = arguments.out / name
            result = bn.search(SPACES[space](), data, budget.split(), options, out=run, resume=True).result
            row = {"budgets": result["budgets"], "accuracy": result["test"]["accuracy"], "seconds": result["seconds"]}
        except UnreachableBudget as error:
            row["error"] = str(error)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(row, indent=1) + "\n")
    found: dict[str, object] = json.loads(file.read_text())
    return found


if __name__ == "__main__":
    main()
