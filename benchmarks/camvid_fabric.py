"""Road scenes labelled pixel by pixel: a convolutional fabric searched under half of its MACs, beside the full fabric.

    python benchmarks/camvid_fabric.py --data data/camvid --seeds 0

The folder holds {train,val,test}/images/*.jpg and masks/*.png, classes 0 to 10 and 11 for unlabelled pixels.
Both see the same images on the same schedule. A row whose result.json is there already is not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

import budgetnet as bn

KINDS = ("full fabric", "searched")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="data/camvid")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--width", type=int, default=3)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--options", type=json.loads, default={}, help="more options of both trainings, as JSON")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/camvid_fabric"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = bn.data.load(arguments.data, ignore=11)
    rows: dict[str, list[dict[str, object]]] = {}
    for seed in arguments.seeds:
        for kind in KINDS:
            run = arguments.out / f"{kind.replace(' ', '-')}-seed{seed}"
            if not (run / "result.json").exists():
                train(kind, seed, data, arguments, run)
            rows.setdefault(kind, []).append(json.loads((run / "result.json").read_text()))
    print("\n| network | mean IoU | pixels right | MACs | images seen | seconds |\n|---|---|---|---|---|---|")
    for kind, results in rows.items():
        iou, right = ([100 * result["test"][name] for result in results] for name in ("mean_iou", "accuracy"))
        macs = statistics.mean(result["network"]["macs"] for result in results) / 1e6
        seconds = statistics.mean(result["seconds"] for result in results)
        spread = f"{statistics.mean(iou):.1f} ({min(iou):.1f} to {max(iou):.1f})"
        row = [
            kind,
            spread,
            f"{statistics.mean(right):.1f}",
            f"{macs:.0f} M",
            results[0]["images_seen"],
            f"{seconds:.0f}",
        ]
        print("| " + " | ".join(map(str, row)) + " |")


def train(kind: str, seed: int, data: bn.data.Dataset, arguments: argparse.Namespace, run: Path) -> None:
    """Trains one row of the table into its run folder."""
    torch.manual_seed(seed)
    fabric = bn.spaces.conv_fabric(
        width=arguments.width,
        depth=arguments.depth,
        channels=arguments.channels,
        classes=data.num_classes,
        image_size=data.image_shape[1:],
        task="segmentation",
    )
    common = {"epochs": arguments.epochs, "batch_size": 8, "learning_rate": 0.1, "architectures": 8, "seed": seed}
    options = bn.SearchOptions(**common | {"validate_every": 5, "candidates": 8} | arguments.options)
    if kind == "searched":
        bn.search(fabric, data, ["macs<=50%"], options, out=run, resume=True)
    else:
        bn.search(fabric, data, [], options, architecture="full", out=run, resume=True)


if __name__ == "__main__":
    main()
