"""Dual ascent beside the papers' grid of fixed prices: quality, slack, and what the learned gates themselves expect.

    OMP_NUM_THREADS=1 python benchmarks/price_grid.py

A MACs limit on the fabric for digits. One search finds its price; the grid is one search for each price, which the
papers' cross-validation would have to pay for: once with as many epochs each, once with as many images in all. A price
is the papers' lambda in loss per unit of C / limit. (BSN, appendix, takes lambda between 10^(m-1) and 10^(m+1) for a
limit of order 10^m. Read as the inverse, so that a penalty is of the order of a loss, that is 0.1 to 100 here.)

Of a grid the network counts that is best on validation data, of equal ones that of the smaller loss; once more of those
alone that would have kept the limit without this package's projection, as the papers have none (fewer seeds where a
seed has no such price). Every network that is handed over keeps its limit, whatever the price was, as the search ends
with a projection onto it. A wrong price shows before that, in the last two columns: what an architecture sampled from
the learned gates costs on average, and whether the most probable one keeps the limit by itself. Where they lie above
the limit the projection has to cut away what was learned to be of use; where they lie below it the price kept away
modules that the limit allows.

A row that is kept in --rows is not searched again. Prints one Markdown table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import budgetnet as bn

ROWS = Path(__file__).parent / "results" / "price_grid"
SAMPLES = 4096
"""Architectures that the expected cost of the learned gates is the mean over."""

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", default="macs<=25%")
    parser.add_argument("--prices", type=float, nargs="+", default=[1e-3, 1e-2, 1e-1, 1.0, 10.0], help="the grid")
    parser.add_argument("--epochs", type=int, default=30, help="of one search; divisible by the number of prices")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/price_grid"))
    parser.add_argument("--rows", type=Path, default=ROWS, help="folder of the finished rows")
    arguments = parser.parse_args()
    share, rest = divmod(arguments.epochs, len(arguments.prices))
    if rest:
        parser.error(f"--epochs must be divisible by {len(arguments.prices)} prices, got {arguments.epochs}")
    print(
        f"| price | epochs | images in all | validation accuracy | test accuracy | slack of {arguments.budget} "
        "| gates expect, of the limit | most probable keeps it |\n|---|---|---|---|---|---|---|---|"
    )

    def searched(price: float | str, epochs: int) -> list[Row]:
        return [finished(price, epochs, seed, arguments) for seed in arguments.seeds]

    dual = searched("dual", arguments.epochs)
    line("dual ascent", f"{arguments.epochs}", dual, dual[0]["images_seen"])
    for epochs in (arguments.epochs, share):
        grid = [searched(price, epochs) for price in arguments.prices]
        for price, rows in zip(arguments.prices, grid, strict=True):
            line(f"{price:g}", f"{epochs}", rows, rows[0]["images_seen"])
        images = sum(rows[0]["images_seen"] for rows in grid)
        for name, counts in (("best of the grid", kept), ("of those that need no projection", alone)):
            best = [max(rows, key=good) for each in zip(*grid, strict=True) if (rows := list(filter(counts, each)))]
            if best:
                chosen = ", ".join(f"{row['price']:g}" for row in best)
                line(f"**{name}** ({chosen})", f"{len(grid)} x {epochs}", best, images)


def line(price: str, epochs: str, rows: Sequence[Row], images: int) -> None:
    """One line of the table: mean, and smallest to largest, over the seeds."""
    validation, test = ([100 * row[split]["accuracy"] for row in rows] for split in ("validation", "test"))
    slack = [100 * (1 - row["value"] / row["limit"]) for row in rows]
    expected = [row["expected"] / row["limit"] for row in rows]
    unprojected = sum(map(alone, rows))
    print(f"| {price} | {epochs} | {images:,} | {spread(validation, 1)} | {spread(test, 1)} | {spread(slack, 1)} % "
          f"| {spread(expected, 2)} | {unprojected} of {len(rows)} |", flush=True)  # fmt: skip


def spread(values: Sequence[float], digits: int) -> str:
    """Such as "97.4 (96.9 to 98.1)"."""
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def alone(row: Row) -> bool:
    """Whether the most probable architecture connects input and output and keeps the limit by itself."""
    return bool(0 < row["mode"] <= row["limit"])


def kept(row: Row) -> bool:
    """Whether the network that was handed over keeps the limit."""
    return bool(row["value"] <= row["limit"])


def good(row: Row) -> tuple[float, float]:
    """By what one network of a grid is taken: its validation accuracy, then its validation loss."""
    return row["validation"]["accuracy"], -row["validation"]["loss"]


def finished(price: float | str, epochs: int, seed: int, arguments: argparse.Namespace) -> Row:
    """One row, from its file or from a search."""
    budget = arguments.budget.replace("<=", "_").replace("%", "").replace(":", "")
    name = f"{budget}-{price if price == 'dual' else f'price{price:g}'}-epochs{epochs}-seed{seed}"
    file = arguments.rows / f"{name}.json"
    if not file.exists():
        row = searched_row(price, epochs, seed, arguments.budget, arguments.out / name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(row, indent=1) + "\n")
    found: Row = json.loads(file.read_text())
    return found


def searched_row(price: float | str, epochs: int, seed: int, budget: str, run: Path) -> Row:
    """Searches, and asks the gates as they were at the end of it."""
    torch.manual_seed(seed)
    space = bn.spaces.resnet_fabric(width=3, image_size=8, in_channels=1)
    options = bn.SearchOptions(price=price, epochs=epochs, seed=seed)  # type: ignore[arg-type]
    found = bn.search(space, bn.data.load("digits"), [budget], options, out=run, resume=True)
    network, model = found.supernet, bn.Budget.parse(budget).bind(found.supernet).model
    used = network.used(network.sampled(SAMPLES, torch.Generator().manual_seed(0)))
    mode = network.used((network.probabilities() > 0.5).float()[None])
    [outcome] = found.result["budgets"]
    asked = json.loads((run / "options.json").read_text())
    row = {"price": price, "epochs": epochs, "limit": outcome["limit"], "value": outcome["value"]}
    row |= {"expected": float(model(used).mean()), "mode": float(model(mode)[0])}
    row |= {key: found.result[key] for key in ("seed", "images_seen", "seconds", "validation", "test")}
    return row | {key: asked[key] for key in ("budgetnet", "torch", "machine", "threads", "precision")}


if __name__ == "__main__":
    main()
