"""`budgetnet export`: the network of a finished run in a file of one's own, near-constant gates folded where asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from budgetnet import data as datasets
from budgetnet.building import space_of_run
from budgetnet.by_input import TIMED
from budgetnet.cli.finished import data_of_run, decided_by_input, shown
from budgetnet.cli.flags import parser_of, positional, show_space, take
from budgetnet.conditional import export_fastest
from budgetnet.delivery import fold_gates, restored
from budgetnet.delivery import load as load_network
from budgetnet.errors import ConfigError
from budgetnet.export import FORMATS, export, file_latency, load
from budgetnet.files import replace
from budgetnet.filling import filled
from budgetnet.runs import RunFolder


def export_command(arguments: list[str]) -> None:
    """Copies the network of a finished run to a file, near-constant gates folded where that is asked."""
    target, rest = positional(arguments, "export RUN")
    own, rest = take(rest, "--space", "")
    parser = parser_of("export", "Copies the network of a finished run to a file.", "", "RUN")
    parser.add_argument("--format", default="onnx", help=" or ".join(FORMATS))
    parser.add_argument("--out", type=str | None, default=None, metavar="FILE", help="network.FORMAT unless given")
    parser.add_argument(
        "--fold",
        type=float | None,
        default=None,
        metavar="MARGIN",
        help="gates that look at the input become constants where, on the validation images, they are open more seldom "
        "than this share, such as 0.05, or closed",
    )
    parser.add_argument(
        "--fill",
        type=int | None,
        default=None,
        metavar="BLOCK",
        help="channels of zeros make up multiples of it, such as 8, between convolutions: the same outputs, in "
        "onnxruntime mostly sooner",
    )
    parser.add_argument("--data", type=str | None, default=None, help="to fold on: the run's own unless given")
    parser.add_argument("--root", default="data", help="folder of the named datasets")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    show_space(parser)
    given = parser.parse_args(rest)
    if given.format not in FORMATS:
        raise ConfigError(f"format must be {' or '.join(FORMATS)}, got {given.format!r}")
    run = RunFolder(target)
    decided = decided_by_input(run.read("result.json"), run)
    if decided is not None and given.format != "onnx":
        raise ConfigError(f"a network whose gates look at the input is exported to onnx, got {given.format!r}")
    source, out = run.path / f"network.{given.format}", Path(given.out or f"network.{given.format}")
    if out.suffix != source.suffix:
        raise ConfigError(f"a file of format {given.format} ends in {source.suffix}, got {out}")
    if not out.parent.is_dir() or out.is_dir():
        raise ConfigError(f"expected a file in a folder that exists, got {out}")
    if given.fold is not None:
        if decided is None:
            raise ConfigError(f"--fold takes a run whose gates look at the input, got {target}")
        _fold(run, decided.share("tau"), out, own, given)
        return
    if given.fill is not None:
        if decided is not None or given.format != "onnx":
            what = (
                "whose gates look at the input has such a file where it is faster"
                if decided
                else "in pt2 gains nothing"
            )
            raise ConfigError(f"--fill is for an onnx file of a plain network: one {what}")
        _fill(run, out, source, own, given)
        return
    load(source)  # a broken file is not passed on
    replace(out, source.read_bytes())
    print(json.dumps({"file": str(out), "bytes": out.stat().st_size}) if given.json else f"wrote {out}")


def _fill(run: RunFolder, out: Path, source: Path, own: str, given: Any) -> None:
    """Writes the network of a run with channels filled up to blocks, and prints what both files take here."""
    space = space_of_run(run, own)
    x = torch.zeros(1, *space.input_shape)
    export(filled(load_network(run.path, space), given.fill), out, x)
    ms = {name: file_latency(file, x, seconds=1.0, patience=10.0)["median"] for name, file in
          (("original", source), ("filled", out))}  # fmt: skip
    if given.json:
        print(json.dumps({"file": str(out), "bytes": out.stat().st_size, "ms": ms}))
        return
    told = f"{ms['filled']:.4g} ms, where {source} takes {ms['original']:.4g} ms"
    print(f"wrote {out}: {told} (onnxruntime, 1 thread, batch 1)")


def _fold(run: RunFolder, tau: float, out: Path, own: str, given: Any) -> None:
    """Writes the network of a run with near-constant gates folded, and prints what it gives beside the original."""
    network = restored(run, space_of_run(run, own))
    data = data_of_run(run, network, given)
    folded, told = fold_gates(network, data, tau, given.fold)
    examples = next(iter(datasets.Batches(data.validation, batch_size=TIMED, shuffle=False).epoch(0)))[0]
    told |= {"onnx": export_fastest(folded, out, examples)}
    if given.json:
        print(json.dumps({"file": str(out), "bytes": out.stat().st_size, **told}))
        return
    table = Table("", "original", "folded", title=f"{told['constants']} of {told['gates']} gates are constants now")
    for name, value in told["validation"]["original"].items():
        table.add_row(name, *[shown(name, one) for one in (value, told["validation"]["folded"][name])])
    Console().print(table)
    print(f"wrote {out}")
