"""Times of functions: in turns, without the calls that were interrupted, quantiles with their confidence."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from budgetnet import timing
from budgetnet.errors import ConfigError
from budgetnet.timing import AGREE, BURST, COLD, ENOUGH, STEADY, Timing, interleaved, quantile_share, rested


def test_a_quick_function_is_timed_as_long_as_asked():
    began = time.perf_counter()
    found = interleaved([lambda: None, lambda: None], calls=8, seconds=0.2)
    assert time.perf_counter() - began >= 0.2
    assert all(len(timing.calls) > 100 for timing in found)


def bursts(*milliseconds: float) -> Timing:
    """A timing whose bursts took these."""
    return Timing(np.repeat(milliseconds, BURST - COLD), 0.0)


@pytest.fixture
def seconds(monkeypatch) -> list[float]:
    """The clock that `rested` sees: a number that tests set."""
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0], perf_counter_ns=time.perf_counter_ns)
    monkeypatch.setattr(timing, "time", clock)
    return now


@pytest.mark.parametrize(
    ("looks", "taken", "fastest"),
    [
        ([[1.0] * 5], 1, [1.0] * 5),
        ([[1.3] * 4 + [1.0], [1.0] * 3 + [1.4] * 2, [1.02, 1.5], [0.9]], 3, [1.0] * 4 + [1.02]),  # slow at first
        ([[1.0] * 4, [1.031], [1.0]], 3, [1.0] * 5),
        ([[1.2, 1.1, 1.4, 1.3, 1.5], [1.9], [1.8], [1.7], [1.6], [1.0]], 5, [1.1, 1.2, 1.3, 1.4, 1.5]),  # never
    ],
)
def test_a_machine_is_looked_at_until_the_fastest_bursts_agree(seconds, looks, taken, fastest):
    """What is returned are the calls of these, of each of the functions."""
    left = list(looks)

    def look() -> list[Timing]:
        seconds[0] += 1
        return [bursts(*[2 * each for each in left[0]]), bursts(*left.pop(0))]

    twice, once = rested(look, calls=8, seconds=0, patience=5)
    assert len(looks) - len(left) == taken
    assert sorted(once.calls) == sorted(np.repeat(fastest, BURST - COLD))
    assert sorted(twice.calls) == sorted(2 * once.calls)


def test_of_a_high_quantile_slow_calls_count_unless_the_machine_was_slow(seconds):
    """Three bursts in ten of a function are slow by themselves; in half of the turns the machine slows down all."""
    machine = np.repeat([1.0, 3.0], 10)
    own = np.tile(np.repeat([1.0, 2.0], [7, 3]), 2)

    def look() -> list[Timing]:
        seconds[0] += 1
        return [bursts(*(machine * own)), bursts(*machine)]

    tail, beside = rested(look, calls=8, seconds=0, patience=0, tail=True)
    assert sorted(tail.calls) == sorted(np.repeat([1.0, 2.0], [7 * (BURST - COLD), 3 * (BURST - COLD)]))
    assert set(beside.calls) == {1.0}
    assert tail.quantile(0.95) == 2.0
    assert set(rested(look, calls=8, seconds=0, patience=0)[0].calls) == {1.0}  # its five fastest


def test_turns_stay_together_where_a_function_lost_its_last_burst(seconds):
    """The first look has six turns, of which the last function has five; in the second look it is slow."""
    looks = [[bursts(*[1.0] * 6), bursts(*[1.0] * 5)], [bursts(*[7.0] * 6), bursts(*[2.0] * 6)]]

    def look() -> list[Timing]:
        seconds[0] += 1
        return looks.pop(0)

    first, last = rested(look, calls=8, seconds=2, patience=2, tail=True)
    assert set(last.bursts) == {0, 1, 2, 3, 4, 6}
    assert sorted(first.calls) == sorted(np.repeat([1.0, 7.0], [5 * (BURST - COLD), BURST - COLD]))
    assert last.within(np.array([70])) is last


def test_a_machine_is_looked_at_as_long_as_asked_and_until_it_is_at_rest(seconds):
    looks: list[int] = []

    def look() -> list[Timing]:
        seconds[0] += 1
        looks.append(len(looks))
        return [bursts(*[1.0] * STEADY)]

    for options, taken in [
        ({"seconds": 0, "patience": 0}, 1),
        ({"seconds": 3, "patience": 9}, 3),
        ({"seconds": 3, "patience": 2}, 2),
        ({"seconds": 0, "patience": 9, "at_rest": lambda seen: len(seen[0].calls) > 6 * STEADY * (BURST - COLD)}, 7),
        ({"seconds": 0, "patience": 9, "at_rest": lambda seen: False}, 9),
    ]:
        looks.clear()
        rested(look, calls=8, **options)
        assert len(looks) == taken


def test_the_fastest_bursts_are_as_many_as_have_the_calls_that_are_needed():
    found = bursts(*range(1, 21))
    assert (found.fastest(8).calls.max(), found.fastest(41).calls.max(), found.fastest(10**6).calls.max()) == (5, 6, 20)
    assert found.fastest(8).unrest == found.unrest == 4
    assert bursts(1.0, 1.0 + AGREE).unrest == pytest.approx(AGREE)
    assert bursts(7.0).unrest == 0
    joined = bursts(1.0, 9.0).joined(bursts(2.0), 2)
    assert joined.calls.tolist() == [1.0] * 8 + [9.0] * 8 + [2.0] * 8
    assert joined.bursts.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert Timing(np.ones(30), 0.3).joined(Timing(np.ones(10), 0.1), 4).disturbed == pytest.approx(0.25)
    spared = np.ones(24, bool)
    spared[:12] = False
    assert timing._timing(np.arange(24.0), ~spared).bursts.tolist() == [1] * 4 + [2] * 8


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
