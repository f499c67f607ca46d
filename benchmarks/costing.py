"""Architectures costed in a second: MACs of a ResNet fabric, steps on 2 workers of a convolutional fabric.

    python benchmarks/costing.py

From sampled bits to costs, and beside it the same with one architecture at a time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import budgetnet as bn
from budgetnet.costs.model import CostModel


def main() -> None:
    fabric, grid = bn.spaces.resnet_fabric(width=3), bn.spaces.conv_fabric(width=8)
    cases = (
        ("MACs, resnet_fabric width 3", fabric, bn.costs.MACs(), 400_000),
        ("steps on 2 workers, conv_fabric width 8", grid, bn.costs.Steps(2), 20_000),
    )
    print(
        f"{torch.get_num_threads()} threads\n\n| cost | architectures/s | one at a time/s | ratio |\n|---|---|---|---|"
    )
    for name, network, cost, count in cases:
        model = cost.bind(network)
        kept = torch.rand(count, network.gate_count, generator=torch.Generator().manual_seed(0)) < 0.8
        whole = rate(partial(together, network, model, kept), count)
        single = rate(partial(one_by_one, network, model, kept[:20]), 20)
        print(f"| {name} | {whole:,.0f} | {single:,.0f} | {whole / single:,.0f} |")


def together(network: bn.SuperNetwork, model: CostModel, kept: Tensor) -> Tensor:
    """Costs of `(B, G)` architectures at once."""
    return model(network.used(kept))


def one_by_one(network: bn.SuperNetwork, model: CostModel, kept: Tensor) -> Tensor:
    """The same, an architecture a call."""
    return torch.cat([model(network.used(row[None])) for row in kept])


def rate(run: Callable[[], Tensor], count: int) -> float:
    """Architectures a second, median of five runs after one."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return count / statistics.median(times[1:])


if __name__ == "__main__":
    main()
