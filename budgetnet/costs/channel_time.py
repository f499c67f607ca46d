"""The time of an edge whose channels have gates, by how many are open: interpolated between what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from budgetnet.costs.additive import ChannelCost

POINTS = 64
"""Most numbers of open channels at which an edge is timed."""


@dataclass(frozen=True, eq=False)
class ChannelTime:
    """Time of an edge by its open channels: what was measured, with the gradient of its trend.

    Attributes:
        units: first unit of the edge's groups and the one behind the last.
        sizes: `(groups, S)` channels that each group opens at each of S sites.
        least: `(groups,)` 1 for the fewest groups with which the edge is not closed.
        counts, times: `(m,)` open channels at the one site, in order, and milliseconds; empty where S > 1.
        macs: multiply-adds of the edge.
        trend: `(2 + S,)` of `a + b MACs + sum_s c_s n_s`, fitted by least squares to what was measured.
    """

    units: tuple[int, int]
    sizes: Tensor
    least: Tensor
    counts: Tensor
    times: Tensor
    macs: ChannelCost
    trend: Tensor

    def __call__(self, used: Tensor) -> Tensor:
        """Maps `(B, U)` used units to `(B,)` milliseconds, where the edge is used."""
        channels = used[:, slice(*self.units)].to(torch.float64) @ self.sizes.to(used.device)
        trend = self.trend.to(used.device)
        line = trend[0] + trend[1] * self.macs(used) + channels @ trend[2:]
        if not len(self.counts):
            return line.clamp(min=0.0)
        counts, times = self.counts.to(used.device), self.times.to(used.device)
        here = channels.detach()[:, 0].contiguous()
        above = torch.searchsorted(counts, here).clamp(1, max(1, len(counts) - 1))
        share = (here - counts[above - 1]) / (counts[above] - counts[above - 1])
        value = times[above - 1] + share * (times[above] - times[above - 1])
        return value + line - line.detach()

    def scaled(self, factor: float) -> ChannelTime:
        """All times times a factor."""
        return replace(self, times=self.times * factor, trend=self.trend * factor)


def channel_time(site: ChannelCost, times: Mapping[str, float]) -> ChannelTime:
    """The time of an edge from what the table has for numbers of open channels at its sites."""
    sizes = site.sizes[:, :-1]
    counts = torch.tensor([[float(n) for n in key.split(",")] for key in times], dtype=torch.float64)
    order = counts[:, 0].argsort()
    counts, seen = counts[order], torch.tensor(list(times.values()), dtype=torch.float64)[order]
    ones = torch.ones(len(counts), 1, dtype=torch.float64)
    padded = torch.cat([counts, ones], dim=1)
    macs = (padded[:, site.before] * padded[:, site.behind]) @ site.weights
    features = torch.cat([ones, macs[:, None], counts], dim=1)
    scale = features.abs().amax(dim=0).clamp(min=1e-12)
    trend = torch.linalg.lstsq(features / scale, seen[:, None], driver="gelsd").solution[:, 0] / scale
    single = sizes.shape[1] == 1
    if single and len(counts) == 1:  # one group: the same for all
        counts, seen = torch.cat([torch.zeros(1, 1, dtype=torch.float64), counts]), seen.repeat(2)
    return ChannelTime(
        site.units,
        sizes,
        site.least,
        counts[:, 0].contiguous() if single else counts[:0, 0],
        seen if single else seen[:0],
        site,
        trend,
    )


def openings(site: ChannelCost) -> list[Tensor]:
    """`(groups,)` bits at which an edge is timed: each number of open groups, or of several sites some."""
    places = [site.sizes[:, column].nonzero().flatten() for column in range(site.sizes.shape[1] - 1)]
    numbers = [np.unique(np.linspace(1, len(place), min(len(place), POINTS)).round().astype(int)) for place in places]
    if len(places) == 1:
        chosen: Sequence[Sequence[int]] = [[int(n)] for n in numbers[0]]
    else:
        random = np.random.default_rng(0)
        drawn = [[int(random.choice(own)) for own in numbers] for _ in range(POINTS - 2)]
        chosen = [[len(place) for place in places], [1] * len(places), *drawn]
    found = []
    for counts in chosen:
        bits = torch.zeros(len(site.sizes))
        for place, n in zip(places, counts, strict=True):
            bits[place[:n]] = 1
        found.append(bits)
    return found


def counts_key(bits: Tensor, site: ChannelCost) -> str:
    """Open channels at each site, as the table names them."""
    return ",".join(str(int(n)) for n in (bits.to(torch.float64) @ site.sizes[:, :-1]).tolist())
