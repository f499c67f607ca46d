"""Of the ways to run a conditional network, and to write it to a file, those that are fastest on this machine."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn

from budgetnet.conditional import tuning
from budgetnet.conditional.branches import WHOLE, Limits
from budgetnet.conditional.network import ConditionalNetwork
from budgetnet.conditional.onnx import BLOCK, export_conditional, is_filled, kind_of, onnx_path
from budgetnet.costs.measured import Measured
from budgetnet.export import export as export_plain
from budgetnet.export import load
from budgetnet.files import put
from budgetnet.timing import interleaved, rested

MASKS = {"branches": 1, "wide": sys.maxsize}
VARIANTS: dict[str, dict[str, int]] = {
    "branches": {},
    "masks": MASKS,
    "branches, filled": {"block": BLOCK},
    "masks, filled": {**MASKS, "block": BLOCK},
}
"""How an edge's channel groups are written, as options of `export_conditional`; the first unless another is faster."""

CALLS = 8
"""Times that all examples are run in each file, and batches that are timed."""


class Written(TypedDict):
    """How a file was written.

    Attributes:
        groups: the variant.
        ms: milliseconds of one example in each that was written, the median over runs of all examples.
    """

    groups: str
    ms: dict[str, float]


def tune_fastest(network: ConditionalNetwork, examples: Tensor, repeats: int) -> None:
    """Measures where skipping pays as `ConditionalNetwork.tune` does, for this batch size, unless it never pays.

    The whole network is then run as its edges were measured, and with every batch computed whole and masked; what is
    faster stays.

    Args:
        network: learns how it is run.
        examples: `(B, C, H, W)` real examples: which gates they open decides what is faster.
        repeats: times that each way is measured.
    """
    network.tune(examples, repeats=repeats)
    edges, batch = network.skipped_branches, len(examples)
    ways = [[edge.limits[batch] for edge in edges], [WHOLE] * len(edges)]

    def run(limits: Sequence[Limits]) -> None:
        for edge, own in zip(edges, limits, strict=True):
            edge.learn({batch: own})
        network(examples)

    times = tuning.interleaved([partial(run, limits) for limits in ways], repeats, examples.device)
    run(ways[times.index(min(times))])


def export(network: nn.Module, path: str | Path, example: Tensor) -> Path:
    """Writes a network that a search handed over to a file; the ending, .onnx or .pt2, says which kind.

    Args:
        network: maps `(B, C, H, W)` to its output; exported as it stands in evaluation mode, itself unchanged. One
            whose gates look at the input is written as `export_fastest` does: it takes one image at a time.
        path: where to; ends in .onnx where gates look at the input.
        example: `(B, C, H, W)`; of gates that look at the input real ones, eight or so, on which the file is timed and
            compared with the network.

    Raises:
        ConfigError: the ending is another, or, of gates that look at the input, as `export_conditional`.
    """
    if not isinstance(network, ConditionalNetwork):
        return export_plain(network, path, example)
    export_fastest(network, path, example)
    return Path(path)


def export_fastest(network: ConditionalNetwork, path: str | Path, examples: Tensor) -> Written:
    """Writes a network to an ONNX file as `export_conditional` does, in the way that is fastest on this machine.

    Channel groups are branches or masked, numbers of channels as they are or filled up. Edges that may be closed are
    branches in any case: an example saves what it does not run.

    Args:
        network: stays as it is.
        path: where to, ends in .onnx.
        examples: `(B, C, H, W)` real examples: which gates they open decides what is faster.

    Raises:
        ConfigError: as `export_conditional`.
    """
    path = onnx_path(path)
    names = differing(network)
    files = {name: path.with_name(f"{path.stem}.{place}{path.suffix}") for place, name in enumerate(names)}
    try:
        for name, file in files.items():
            export_conditional(network, file, examples, **VARIANTS[name])
        runs = [partial(one_by_one, load(file), examples) for file in files.values()]
        times = [timing.quantile(0.5) / len(examples) for timing in interleaved(runs, calls=CALLS)]
        ms = dict(zip(files, times, strict=True))
        chosen = min(ms, key=lambda name: ms[name])
        put(files[chosen], path)
    finally:
        for file in files.values():
            file.unlink(missing_ok=True)
    return {"groups": chosen, "ms": ms}


def differing(network: ConditionalNetwork) -> list[str]:
    """The variants that are no other one of this network, "branches" first."""
    found: dict[tuple[object, ...], str] = {}
    for name, options in VARIANTS.items():
        groups = {key: value for key, value in options.items() if key != "block"}
        kinds = [kind_of(edge.body, **groups) for edge in network.conditional_branches]
        fill = "block" in options and not all(is_filled(edge.body, **options) for edge in network.edges)
        found.setdefault((*kinds, fill), name)
    return list(found.values())


@torch.no_grad()
def beside(
    network: ConditionalNetwork, file: str | Path, full: nn.Module, examples: Tensor, batches: Sequence[int]
) -> dict[str, float]:
    """Median times of a network and its file, relative to those of the full network without gates, run in turn.

    Args:
        network: as it was tuned.
        file: it was exported to.
        full: plain, in evaluation mode; exported, too.
        examples: `(B, C, H, W)` real ones: which gates they open decides what is faster.
        batches: sizes; of each up to `CALLS` batches of the examples are run.

    Returns:
        `{"torch 1": 0.93, "torch 16": ..., "onnxruntime 1": ...}`, more than 1 where the network is slower.
    """
    found = {}
    for batch in batches:
        parts = torch.split(examples[: CALLS * batch], batch)
        found[f"torch {batch}"] = _ratio(partial(_all, network, parts), partial(_all, full, parts))
    with tempfile.TemporaryDirectory() as folder:
        plain = export_plain(full, Path(folder) / "full.onnx", examples[:1])
        parts = torch.split(examples[:CALLS], 1)
        found["onnxruntime 1"] = _ratio(*(partial(_all, load(path), parts) for path in (file, plain)))
    return found


@torch.no_grad()
def times_full(
    file: str | Path, full: str | Path, examples: Tensor, *, threads: int, seconds: float, patience: float
) -> Measured:
    """How many times as long as that of the full network a file takes for examples, one by one.

    Args:
        file: of a network whose gates look at the input.
        full: of the full network without gates.
        examples: `(B, C, H, W)` real ones: which gates they open decides what it takes.
        threads: of onnxruntime.
        seconds: that both are run in turns, at least.
        patience: at most, while the machine is not at rest.
    """
    parts = torch.split(examples, 1)
    ways = [partial(_all, load(path, threads=threads), parts) for path in (file, full)]
    look = partial(interleaved, ways, calls=CALLS, seconds=min(1.0, seconds))
    mine, others = rested(look, calls=CALLS, seconds=seconds, patience=patience)
    (low, high), (least, most) = mine.interval(0.5), others.interval(0.5)
    return Measured(mine.quantile(0.5) / others.quantile(0.5), low / most, high / least)


def _ratio(run: Callable[[], object], other: Callable[[], object]) -> float:
    mine, others = (timing.quantile(0.5) for timing in interleaved([run, other], calls=CALLS))
    return mine / others


def _all(run: Callable[[Tensor], object], parts: Sequence[Tensor]) -> None:
    for x in parts:
        run(x)


def one_by_one(run: Callable[[Tensor], Tensor], examples: Tensor) -> Tensor:
    """What a file that takes one example gives for several."""
    return torch.cat([run(row[None]) for row in examples])
