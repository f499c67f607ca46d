"""`budgetnet search`: from data, a space and budgets to a run folder."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from budgetnet import data as datasets
from budgetnet.budgets import amount
from budgetnet.cli.flags import build, numbers_in, parser_of, take
from budgetnet.console import Bars, quantity
from budgetnet.delivery import Found
from budgetnet.errors import ConfigError, UnreachableBudget
from budgetnet.options import DEFAULTS, SearchOptions
from budgetnet.report.words import foretold, slowed, slower, times_beside
from budgetnet.search import search
from budgetnet.weights import MEAN, STD, classifies_alike, load_torchvision, read_weights


def search_command(arguments: list[str]) -> None:
    """Learns a network that keeps its budgets, and tells what was found."""
    space, rest = take(arguments, "--space", "resnet_fabric")
    parser = parser_of("search", "Learns a network that keeps its budget.", space, "--space NAME")
    parser.add_class_arguments(SearchOptions, None)
    for action in parser._actions:
        if action.dest in DEFAULTS["score"]:
            values = ", ".join(f"{own[action.dest]} ({kind})" for kind, own in DEFAULTS.items())
            action.help = f"{action.help} Unless given: {values}."
    parser.add_argument("--data", default="digits", help=f"{', '.join(datasets.NAMES)}, or a folder of images")
    parser.add_argument("--root", default="data", help="folder of the named datasets")
    parser.add_argument("--image_size", type=int | None, default=None, help="resize images to this side")
    parser.add_argument("--ignore", type=int | None, default=None, help="mask value without loss")
    parser.add_argument("--train_images", type=int | None, default=None, help="take so many training images only")
    parser.add_argument("--pad", type=int | None, default=None, help="pixels a side before the random crop")
    parser.add_argument("--flip", type=bool | None, default=None, help="mirror training images at random, or not")
    parser.add_argument("--mean", type=str | None, default=None, help="of pixels in [0, 1], M or R,G,B; 0.5")
    parser.add_argument("--std", type=str | None, default=None, help="likewise: a network sees (pixel - mean) / std")
    parser.add_argument("--budget", action="append", default=[], metavar="COST<=LIMIT", help="repeat for several")
    parser.add_argument("--architecture", type=str | None, default=None, help="train this one, without a search")
    parser.add_argument(
        "--weights", type=str | None, default=None, metavar="FILE", help="torchvision's, of this network, to start from"
    )
    parser.add_argument("--out", type=str | None, default=None, metavar="RUN", help="run folder")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--json", action="store_true", help="print result.json on stdout and nothing else")
    given = parser.parse_args(rest)
    options = SearchOptions(**{field.name: getattr(given, field.name) for field in fields(SearchOptions)})
    if given.resume and given.out is None:
        raise ConfigError("--resume needs the run to go on with: --out RUN")
    data = datasets.load(given.data, root=given.root, image_size=given.image_size, ignore=given.ignore)
    if given.train_images is not None:
        data = data.subset(given.train_images, seed=0)
    data = data.augmented(pad=given.pad, flip=given.flip)
    if (given.mean is None) != (given.std is None):
        raise ConfigError("images are seen by --mean and --std together, got one of them")
    if given.mean is not None:
        data = data.normalised(numbers_in("--mean", given.mean), numbers_in("--std", given.std))
    torch.manual_seed(options.seed)
    network = build(
        space,
        given,
        rest,
        {
            "classes": data.num_classes,
            "in_channels": data.image_shape[0],
            "image_size": data.image_shape[1] if data.image_shape[1] == data.image_shape[2] else data.image_shape[1:],
            "task": data.task,
        },
    )
    if given.weights is not None:
        state = read_weights(given.weights)
        load_torchvision(network, state, classifier=classifies_alike(network, state))
        data = data if given.mean is not None else data.normalised(MEAN, STD)
    bars = Bars(Console(stderr=True, quiet=given.json))
    command = shlex.join(["budgetnet", "search", *arguments])
    try:
        found = search(
            network,
            data,
            given.budget,
            options,
            architecture=given.architecture,
            out=given.out,
            resume=given.resume,
            command=command,
            progress=bars,
        )
    finally:
        bars.close()
    if given.json:
        print(json.dumps(found.result))
    else:
        _tell(found)
    missed = [row for row in found.result["budgets"] if not row["met"]]
    if missed:
        told = "; ".join(
            f"{row['cost']} must be {'at most' if row['at_most'] else 'near'} {amount(row['limit'], row['unit'])}, "
            f"but takes {row['value']:.6g}"
            for row in missed
        )
        raise UnreachableBudget(f"the network in {found.run} does not keep its budget: {told}")


def _tell(found: Found) -> None:
    result, console = found.result, Console()
    table = Table("cost", "network", "limit", "kept", title="budget")
    for row in result["budgets"]:
        numbers = [quantity(row[key], row["unit"]) for key in ("value", "limit")]
        unsure = ", within the noise" if row.get("noise") else ""
        table.add_row(escape(row["cost"]), *numbers, ("yes" if row["met"] else "NO") + unsure)
    if result["budgets"]:
        console.print(table)
    for row in result["budgets"]:
        for note in [*_measurement(row), *row.get("notes", [])]:
            console.print(f"{row['cost']}: {note}", highlight=False, markup=False, soft_wrap=True)
    quality = ", ".join(f"{name} {100 * value:.2f} %" for name, value in result["test"].items() if name != "loss")
    console.print(f"test {quality}", highlight=False)
    for name in ("network.onnx", "network.pt2", "report.html"):
        if (found.run / name).exists():  # branches are exported to ONNX alone
            console.print(f"{found.run / name}", highlight=False, soft_wrap=True)
    if "inference" in result:
        note = "gates look at the input: the .onnx takes one image at a time, and there is no .pt2"
        console.print(note, soft_wrap=True)
        ratios = result["inference"]["beside_full"]
        console.print(f"time beside the full network without gates: {times_beside(ratios)}", highlight=False)
        if words := slower(ratios):
            console.print(words, highlight=False, soft_wrap=True)


def _measurement(row: dict[str, Any]) -> list[str]:
    """What is said of a measured or predicted cost, a row of result.json's budgets: one line at most."""
    if "predicted_for" in row:
        return [foretold(row["predicted_for"])]
    if "slowness" not in row:
        return []
    low, high, predicted, seen = (
        quantity(value, row["unit"])
        for value in (row["low"], row["high"], row["predicted"], row["value"] * row["slowness"])
    )
    told = (
        f"expected again between {low} and {high}; predicted {predicted}, half of all within {100 * row['error']:.1f} %"
    )
    return ["; ".join(part for part in (told, slowed(row["slowness"], seen)) if part)]
