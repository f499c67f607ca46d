"""Time of a training step against the share of the fabric's MACs that its sample uses.

    python benchmarks/step_time.py

Beside the full fabric's step, and beside masking: all modules run, their outputs multiplied by 0 or 1.
The three alternate in one run; ratios of medians are printed, absolute times only say on what.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import budgetnet as bn
from budgetnet.options import resolve_precision
from budgetnet.sites import Fixed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--architectures", type=int, default=8)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75, 0.95])
    parser.add_argument("--rounds", type=int, default=12, help="samples drawn for each share")
    parser.add_argument("--precision", default="auto")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    dtype = resolve_precision(arguments.precision, torch.device("cpu"))
    network = bn.spaces.resnet_fabric(width=arguments.width).to(memory_format=torch.channels_last).train()
    x = torch.randn(arguments.batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (arguments.batch_size,))

    def step(forward: Callable[[Tensor], Tensor]) -> float:
        network.zero_grad(set_to_none=True)
        start = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = forward(x)
        F.cross_entropy(output.float(), y).backward()
        return time.perf_counter() - start

    full = Fixed(network.architecture("full"))
    print(
        f"fabric of width {arguments.width}, batch {arguments.batch_size}, {arguments.architectures} architectures, ",
        end="",
    )
    print(f"{str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads")
    print("\n| share of MACs used | step / full step | share + 0.12 | masking / full step | full step, s |")
    print("|---|---|---|---|---|")
    for share in arguments.shares:
        samples = draw(network, share, arguments.architectures, arguments.rounds)
        for policy in (full, Fixed(samples[0][0])):  # warm-up
            step(lambda x, policy=policy: network(x, policy)[0])
        times: dict[str, list[float]] = {"full": [], "sampled": [], "masked": []}
        for kept, _ in samples:
            used = network.used(kept)
            times["full"].append(step(lambda x: network(x, full)[0]))
            times["sampled"].append(step(lambda x, kept=kept: network(x, Fixed(kept))[0]))
            times["masked"].append(step(lambda x, used=used: masked(network, x, used)))
        mean_share = statistics.mean(actual for _, actual in samples)
        base, sampled, mask = (statistics.median(times[kind]) for kind in ("full", "sampled", "masked"))
        print(
            f"| {mean_share:.2f} | {sampled / base:.2f} | {mean_share + 0.12:.2f} | {mask / base:.2f} | {base:.3f} |",
            flush=True,
        )


def draw(network: bn.SuperNetwork, share: float, architectures: int, rounds: int) -> list[tuple[Tensor, float]]:
    """Batches of sampled architectures whose mean share of the full MACs lies within 0.03 of `share`."""
    generator = torch.Generator().manual_seed(0)
    macs = bn.costs.MACs().bind(network)
    full = macs(network.used(network.architecture("full")))
    low, high = 0.0, 1.0
    for _ in range(20):  # the keep probability that gives this share on average
        middle = (low + high) / 2
        kept = torch.bernoulli(torch.full((2048, network.gate_count), middle), generator=generator)
        low, high = (middle, high) if float((macs(network.used(kept)) / full).mean()) < share else (low, middle)
    samples = []
    while len(samples) < rounds:
        kept = torch.bernoulli(torch.full((architectures, network.gate_count), low), generator=generator)
        actual = float((macs(network.used(kept)) / full).mean())
        if abs(actual - share) < 0.03:
            samples.append((kept, actual))
    return samples


def masked(network: bn.SuperNetwork, x: Tensor, used: Tensor) -> Tensor:
    """The same outputs the usual way: every module on every example, outputs of unused ones multiplied by 0."""
    examples = used.repeat_interleave(len(x) // len(used), dim=0)
    values = {network.graph.source: x}
    for node in network.graph.order[1:]:
        total = None
        for edge in network.graph.incoming[node]:
            value = network.modules_on_edges[edge](values[network.graph.edges[edge][0]])
            value = value * examples[:, edge].reshape(-1, *[1] * (value.ndim - 1)).to(value.dtype)
            total = value if total is None else total + value
        values[node] = network.activations[node](total)
    return values[network.graph.sink]


if __name__ == "__main__":
    main()
