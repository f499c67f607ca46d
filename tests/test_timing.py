"""Times of functions: in turns, without the calls that were interrupted, quantiles with their confidence."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from budgetnet import timing
from budgetnet.errors import ConfigError
from budgetnet.timing import BURST, COLD, ENOUGH, Timing, interleaved, quantile_share, steadied


def test_a_quick_function_is_timed_as_long_as_asked():
    began = time.perf_counter()
    found = interleaved([lambda: None, lambda: None], calls=8, seconds=0.2)
    assert time.perf_counter() - began >= 0.2
    assert all(len(timing.calls) > 100 for timing in found)


@pytest.mark.parametrize(
    ("seen", "fastest", "looks"),
    [
        ([2.0] * 9, [2.0] * 5, 5),
        (
            [1.3, 1.3, 1.4, 1.0, 1.3, 1.3, 1.0, 1.01, 1.0, 1.0, 0.5],
            [1.0, 1.0, 1.0, 1.0, 1.01],
            10,
        ),  # a slow phase first
        ([1.0, 1.0, 1.0, 1.0, 1.011, 1.3, 1.0, 0.5], [1.0] * 5, 7),
        ([1.0, 1.0, 1.0, 1.0, 1.3, 0.9, 0.9, 0.9, 0.9, 1.0, 0.9], [0.9] * 5, 11),  # faster than it seemed
        ([1.1**n for n in range(30, 0, -1)], [1.1**n for n in range(11, 16)], 20),  # it never agrees
    ],
)
def test_a_machine_is_looked_at_until_its_fastest_looks_agree(monkeypatch, seen, fastest, looks):
    monkeypatch.setattr(timing, "STEADY", 5)
    taken: list[float] = []

    def look() -> float:
        taken.append(seen[len(taken)])
        return taken[-1]

    assert steadied(look, float) == pytest.approx(fastest)
    assert len(taken) == looks


def test_functions_are_called_in_turns_and_cold_calls_do_not_count():
    calls: list[str] = []
    found = interleaved([lambda: calls.append("a"), lambda: calls.append("b")], calls=16)
    turns = len(calls) // (2 * BURST)
    assert calls == (["a"] * BURST + ["b"] * BURST) * turns
    assert turns == 1 + 16 // (BURST - COLD)  # the first turn warms up
    assert all(len(one.calls) <= 16 for one in found)
    assert all(len(one.calls) + round(one.disturbed * 16) in (16, 32) or one.disturbed for one in found)


def test_a_longer_call_takes_longer():
    short, long = interleaved([lambda: time.sleep(0.0005), lambda: time.sleep(0.005)], calls=24)
    assert short.quantile(0.5) < long.quantile(0.5)
    assert long.quantile(0.1) > 4.9


def test_interrupted_calls_are_left_out_and_counted(monkeypatch):
    switches = iter(np.cumsum([0, 0] * 1000))
    monkeypatch.setattr(timing, "_switches", lambda: next(switches))
    assert interleaved([lambda: None], calls=40)[0].disturbed == 0
    pattern = [0, 1] + [0, 0] * 3  # every fourth call is interrupted
    marks = iter(np.cumsum(pattern * 1000))
    monkeypatch.setattr(timing, "_switches", lambda: next(marks))
    found = interleaved([lambda: None], calls=40)[0]
    assert 0.2 < found.disturbed < 0.3
    assert len(found.calls) == 40 - round(found.disturbed * 40)


def test_all_calls_count_where_hardly_one_was_spared():
    calls = np.arange(100.0)
    spared = np.ones(100, bool)
    spared[: ENOUGH - 1] = False
    assert len(timing._timing(calls, spared).calls) == 100
    spared[ENOUGH - 1] = False
    assert timing._timing(calls, spared).calls.tolist() == list(range(ENOUGH))


def test_the_interval_of_a_quantile_holds_it_as_often_as_it_says():
    random = np.random.default_rng(0)
    for share in (0.5, 0.9):
        true = -np.log(1 - share)  # of the exponential distribution
        inside = 0
        for _ in range(2000):
            low, high = Timing(random.exponential(size=200), 0.0).interval(share)
            inside += low <= true <= high
        assert 0.93 < inside / 2000 < 0.985


@pytest.mark.parametrize(("name", "share"), [("median", 0.5), ("p95", 0.95), ("p10", 0.1), ("p99.9", 0.999)])
def test_quantiles_have_names(name: str, share: float):
    assert quantile_share(name) == pytest.approx(share)


@pytest.mark.parametrize("name", ["mean", "p0", "p100", "95", "p", ""])
def test_other_names_of_quantiles_are_refused(name: str):
    with pytest.raises(ConfigError, match="a quantile is median or p1 to p99"):
        quantile_share(name)


def test_times_hold_on_one_thread(monkeypatch):
    assert timing._switches() >= 0
    monkeypatch.setattr(timing, "resource", None)
    assert timing._switches() == 0
    assert len(interleaved([lambda: torch.ones(2)], calls=8)[0].calls) == 8
