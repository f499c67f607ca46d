"""A network in part on a device, in part in the cloud: learned under what the device sends, and under MACs alone.

    OMP_NUM_THREADS=1 python benchmarks/device_cloud.py

The example of the introduction of Budgeted Super Networks, as a run. One space, a convolutional fabric, is learned
with the same options, seeds and images seen under a limit on the bytes that a device of so many MACs sends to the
cloud; under a limit on all MACs; and, as a control, under as many MACs as the first turns out to use. Each network is
then cut where its device sends least. Prints one Markdown table, and writes the network with its cut as cut.svg into
the folder of its run (report.html of the first shows it too). A row that is kept in --rows is not searched again.

The limits, for digits: the fabric has 250 K MACs and the device affords 20 K of them, the way down to the coarsest
layer and a few modules beside it, but none of the fabric's breadth. Its layers hold 2,048, 512, 128 and 32 bytes and
the image 256, which can always be sent in place of all else: so only a limit below 256 binds, and 128 asks for a
network that passes through one layer of the third resolution while it is still on the device. A quarter of all MACs is
three devices. The control has as many MACs as what is learned under the bytes, and shows what that limit does beyond
them.

A cost has to differ between samples to be learned from. Here, with gates that start open with a probability of .8, a
tenth of the sampled architectures sends less than the image, at the default of .95 one of a hundred. In a fabric of 4
columns (one seed) all samples soon sent the image, the cost of all was the same, nothing was learned from it, and only
the projection at the end found a network that keeps the limit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import budgetnet as bn
from budgetnet.architectures import describe
from budgetnet.report.architecture import Architecture
from budgetnet.report.cuts import crossing
from budgetnet.report.network import draw
from budgetnet.report.page import picture
from budgetnet.report.plans import read_cuts
from budgetnet.report.quantities import percent, si
from budgetnet.report.records import Record

ROWS = Path(__file__).parent / "results" / "device_cloud"
SAMPLES = 4096
"""Architectures that the expected cost of the learned gates is the mean over."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """What is asked: MACs of the device, bytes that it sends, a share of all MACs, and a smaller one."""

    device: str
    sent: str
    macs: str
    control: str

    @property
    def budgets(self) -> dict[str, str]:
        """The budget that each kind of network is learned under."""
        return {
            "bytes sent": f"transfer:{self.device}<={self.sent}",
            "MACs": f"macs<={self.macs}",
            "MACs, control": f"macs<={self.control}",
        }


SEARCH = {"gate_start": 1.4}
DIGITS = Limits("20K", "128", "25%", "9.6%")
IMAGES = Limits("420K", "2048", "25%", "45%")
"""For 32 x 32 pixels in colour, 12,288 bytes: one layer of the third resolution. Tried with few images only."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="digits, or images of 32 x 32 such as data/cifar10")
    parser.add_argument("--train-images", type=int, default=2560, help="of what is not digits")
    parser.add_argument("--limits", nargs=4, metavar=("DEVICE", "SENT", "MACS", "CONTROL"), help="20K 128 25%% 10%%")
    parser.add_argument("--options", type=json.loads, default=SEARCH, help="options of all searches, as JSON")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/device_cloud"))
    parser.add_argument("--rows", type=Path, default=ROWS, help="folder of the finished rows")
    arguments = parser.parse_args()
    limits = Limits(*arguments.limits) if arguments.limits else DIGITS if arguments.data == "digits" else IMAGES
    print(
        "| learned under | seed | test accuracy | MACs | of these on the device | bytes sent | edges that cross "
        "| gates expect, of the limit |\n|---|---|---|---|---|---|---|---|"
    )
    for kind, budget in limits.budgets.items():
        rows = [finished(budget, seed, limits.device, arguments) for seed in arguments.seeds]
        for row in rows:
            line(f"{kind}: {budget}", f"{row['seed']}", [row], ", ".join(row["crossing"]) or "none, only the output")
        counts = [len(row["crossing"]) for row in rows]
        line(f"**{kind}**", "mean (min to max)", rows, spread(counts, 1))


def line(kind: str, seed: str, rows: Sequence[Row], cross: str) -> None:
    """One line of the table."""
    accuracy, expected = [100 * row["test"]["accuracy"] for row in rows], [row["expected"] for row in rows]
    whole, device, sent = ([row[key] for row in rows] for key in ("macs", "device_macs", "bytes"))
    print(f"| {kind} | {seed} | {spread(accuracy, 1)} | {spread(whole, 0)} | {spread(device, 0)} | {spread(sent, 0)} "
          f"| {cross} | {spread(expected, 2)} |", flush=True)  # fmt: skip


def spread(values: Sequence[float], digits: int) -> str:
    """Such as "97.4 (96.9 to 98.1)", or the one number that there is."""
    ends = f" ({min(values):,.{digits}f} to {max(values):,.{digits}f})" if len(values) > 1 else ""
    return f"{mean(values):,.{digits}f}{ends}"


def finished(budget: str, seed: int, device: str, arguments: argparse.Namespace) -> Row:
    """One row, from its file or from a search."""
    name = f"{Path(arguments.data).name}-{budget}-device{device}-seed{seed}"
    name = name.replace("<=", "_").replace("%", "").replace(":", "")
    file = arguments.rows / f"{name}.json"
    if not file.exists():
        row = searched(budget, seed, device, arguments, arguments.out / name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(row, indent=1) + "\n")
    found: Row = json.loads(file.read_text())
    return found


def searched(budget: str, seed: int, device: str, arguments: argparse.Namespace, run: Path) -> Row:
    """Searches under a budget, cuts what comes out between device and cloud, and draws it."""
    torch.manual_seed(seed)
    data = bn.data.load(arguments.data)
    if arguments.data == "digits":
        space = bn.spaces.conv_fabric(width=3, channels=8, image_size=8, in_channels=1)
    else:
        data = data.subset(arguments.train_images, seed=0)
        space = bn.spaces.conv_fabric(width=3, channels=8)
    options = bn.SearchOptions(**{"seed": seed} | arguments.options)
    found = bn.search(space, data, [budget], options, out=run, resume=True)
    network, result = found.supernet, found.result
    asked, *both = [bn.Budget.parse(each).bind(network) for each in (budget, "macs<=1e15", f"transfer:{device}<=1e15")]
    described = json.loads(json.dumps(describe(network, found.architecture, both)))
    record = Record(described, "the architecture")
    architecture, [cut] = Architecture.read(record), read_cuts(record)
    drawing = draw(architecture, cut.device, cut.sent, cut.size)
    right, macs = percent(result["test"]["accuracy"]), result["network"]["macs"]
    title = f"{budget}: {right} right. Of {si(macs)} MACs {si(cut.macs)} on the device, which sends {cut.size:,.0f} B"
    (run / "cut.svg").write_text(picture(drawing, title), encoding="utf-8")
    edges = [edge for places in crossing(architecture, cut.device).values() for edge in places]
    used = network.used(network.sampled(SAMPLES, torch.Generator().manual_seed(0)))
    row = {"budgets": result["budgets"], "macs": macs, "device_macs": cut.macs, "bytes": cut.size}
    row |= {"sent": list(cut.sent), "crossing": [architecture.edges[edge].name for edge in sorted(edges)]}
    row |= {"expected": float(asked.model(used).mean()) / asked.limit}
    row |= {key: result[key] for key in ("seed", "images_seen", "seconds", "validation", "test")}
    made = json.loads((run / "options.json").read_text())
    return row | {key: made[key] for key in ("budgetnet", "torch", "machine", "threads", "precision", "search")}


if __name__ == "__main__":
    main()
