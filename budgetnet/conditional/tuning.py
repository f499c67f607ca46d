"""Where skipping starts to pay: the ways to run an edge are timed against each other on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from budgetnet.conditional.bodies import Body, Pattern
from budgetnet.conditional.branches import Limits, add_rows, clear_rows, take_rows

SHARES = (0.0625, 0.25, 0.5, 0.75)
"""Of open rows, and of open channel groups, at which both ways are measured."""

KINDS = ("rows", "channels")


def measured(body: Body, start: Sequence[int], end: Sequence[int], example: Tensor, repeats: int) -> Limits:
    """Break-even shares of an edge at the example's batch size.

    The time of skipping, relative to computing everything and masking, is taken to be linear in the share of the work
    that is left; the break-even is where that line reaches 1.

    Args:
        body: on the edge.
        start: shape of one example before it.
        end: shape of one example behind it.
        example: `(B, C, H, W)`: its batch size, type, device and memory format are used.
        repeats: times that each way is measured, in turn.
    """
    batch = len(example)
    x, total = like(example, start), like(example, end)
    table = None if not body.groups else torch.ones(batch, body.groups, dtype=x.dtype, device=x.device)
    ways: dict[tuple[str, float], Callable[[], object]] = {("dense", 1.0): partial(dense, body, x, total, table)}
    if batch > 1:
        for count in sorted({max(1, round(share * batch)) for share in SHARES} - {batch}):
            rows = torch.randperm(batch, generator=torch.Generator().manual_seed(0))[:count].sort().values.to(x.device)
            ways["rows", count / batch] = partial(gathered, body, x, total, rows)
    for count in sorted({max(1, round(share * body.groups)) for share in SHARES if body.groups} - {body.groups}):
        pattern = spread(count, body.groups)
        if body.alive(pattern):
            ways["channels", body.share(pattern)] = partial(cut, body, x, total, pattern)
    with torch.no_grad():
        times = interleaved(list(ways.values()), repeats, x.device)
    relative = {way: value / times[0] for way, value in zip(ways, times, strict=True)}
    points = {kind: [(share, value) for (own, share), value in relative.items() if own == kind] for kind in KINDS}
    return Limits(*line(points["rows"]), *line(points["channels"]))


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Where the line through `(share, relative time)` reaches 1, and where it starts; a guess without points."""
    if not points:
        return Limits().rows, Limits().row_cost
    if len(points) == 1:  # what one point lies above its share is taken to be the same at every share
        ((share, value),) = points
        slope, intercept = 1.0, value - share
    else:
        slope, intercept = statistics.linear_regression(*zip(*points, strict=True))
    # a line that does not rise is noise, or a time that does not depend on the share
    reaches = (1 - intercept) / slope if slope > 0 else float(intercept + slope / 2 < 1)
    return min(1.0, max(0.0, reaches)), min(1.0, max(0.0, intercept))


def dense(body: Body, x: Tensor, total: Tensor, table: Tensor | None) -> None:
    """Everything computed, half of the rows cleared, and added."""
    value, owned = body.run(x, body.full, table)
    value = value if owned else value.clone()
    if len(x) > 1:
        clear_rows(value, torch.arange(0, len(x), 2, device=x.device))
    total.add_(value)


def gathered(body: Body, x: Tensor, total: Tensor, rows: Tensor) -> None:
    """Some rows gathered, computed and added back."""
    add_rows(total, rows, body.run(take_rows(x, rows), body.full)[0])


def cut(body: Body, x: Tensor, total: Tensor, pattern: Pattern) -> None:
    """All rows on some of the channels."""
    total.add_(body.run(x, pattern)[0])


def spread(count: int, groups: int) -> Pattern:
    """A pattern of `count` of so many groups, evenly spread: each site of a body gets its share."""
    return tuple([(place + 1) * count // groups > place * count // groups for place in range(groups)])


def like(example: Tensor, shape: Sequence[int]) -> Tensor:
    """Random values of one example's shape, in the batch size, type, device and memory format of `example`."""
    x = torch.randn(len(example), *shape, dtype=example.dtype, device=example.device)
    last = example.ndim == 4 and not example.is_contiguous() and x.ndim == 4
    return x.contiguous(memory_format=torch.channels_last) if last else x


def interleaved(ways: Sequence[Callable[[], object]], repeats: int, device: torch.device) -> list[float]:
    """Median time of each way, run in turn, in the same unit.

    Where one thread computes it is the processor's time, which does not count what other jobs take of a shared machine:
    by the clock, in bursts as in `timing.interleaved`, break-even shares spread several times as far there.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time_ns if alone else time.perf_counter_ns
    times: list[list[int]] = [[] for _ in ways]
    for turn in range(repeats + 2):
        for way, taken in zip(ways, times, strict=True):
            start = clock()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= 2:  # the first two warm up
                taken.append(clock() - start)
    return [statistics.median(taken) for taken in times]
