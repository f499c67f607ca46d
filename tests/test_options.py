"""Options are checked when they are made, and say which epoch does what at which rate."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from budgetnet import SearchOptions
from budgetnet.errors import ConfigError
from budgetnet.options import resolve_device, resolve_precision


@pytest.mark.parametrize("name", ["epochs", "batch_size", "candidates", "recalibration", "validate_every"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", None])
def test_counts_are_whole_numbers_from_1(name: str, value: object):
    with pytest.raises(ConfigError, match=rf"{name} must be a whole number >= 1, got"):
        SearchOptions(**{name: value})


@pytest.mark.parametrize(
    "name", ["learning_rate", "weight_decay", "gate_rate", "gate_limit", "proportional", "integral", "exploration"]
)
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "1"])
def test_rates_and_gains_are_numbers_from_0(name: str, value: object):
    with pytest.raises(ConfigError, match=rf"{name} must be a number >= 0, got"):
        SearchOptions(**{name: value})
    assert getattr(SearchOptions(**{name: 0}), name) == 0


@pytest.mark.parametrize("name", ["warmup", "finetune", "noiseless", "momentum", "target_decay"])
@pytest.mark.parametrize("value", [-0.1, 1, math.nan])
def test_shares_lie_below_1(name: str, value: float):
    with pytest.raises(ConfigError, match=rf"{name} must be a number >= 0 and < 1, got"):
        SearchOptions(**{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed must be a whole number >= 0.*, got -1"),
        ({"gate_start": math.inf}, "gate_start must be a number, got inf"),
        ({"anneal": -1}, "anneal must be a number >= 0, got -1"),
        ({"milestones": (0.5, 1.0)}, "milestones must be a number >= 0 and < 1, got 1.0"),
        ({"schedule": "cosine"}, "schedule must be one-cycle or steps or constant, got 'cosine'"),
        ({"gate_optimizer": "lion"}, "gate_optimizer must be adam or sgd, got 'lion'"),
        ({"baseline": "none"}, "baseline must be leave-one-out or batch-mean or moving-average, got 'none'"),
        ({"estimator": "adam"}, "estimator must be auto or score or gumbel or soft-gumbel, got 'adam'"),
        ({"penalty": "hinge"}, "penalty must be price or batch-activation or const-quad or per-gate, got 'hinge'"),
        ({"target": "falling"}, "target must be linear or constant or stepped or moving or exponential, got 'falling'"),
        ({"precision": "int8"}, "precision must be auto or float32 or bfloat16, got 'int8'"),
        ({"target": "moving", "target_start": 0}, "target_start of a moving target must be > 0, got 0"),
        ({"target": "exponential", "target_start": 0.0}, "target_start of a moving target must be > 0, got 0"),
        ({"target_decay": 0.5}, "target_decay is of an exponential target, got 0.5 with linear"),
        ({"target_decay": 0.5, "target": "moving"}, "target_decay is of an exponential target, got 0.5 with moving"),
        ({"target_rates": {"a": 1.5}, "penalty": "per-gate"}, r"target_rates must lie in \[0, 1\], got 1.5 for 'a'"),
        ({"target_rates": {"a": "all"}, "penalty": "per-gate"}, r"rates must lie in \[0, 1\], got 'all' for 'a'"),
        ({"target_rates": [0.5]}, r"target_rates must map names of layers to rates, got \[0.5\]"),
        ({"target_rates": {"a": 0.5}}, "target_rates are of the penalty per-gate, got them with price"),
        ({"price": -1.0}, "price must be a number >= 0, got -1"),
        ({"price": "free"}, "price must be a number >= 0, got 'free'"),
        ({"architectures": 0}, "architectures must be a whole number >= 1, got 0"),
        ({"architectures": "all"}, "architectures must be a whole number >= 1, got 'all'"),
        ({"architectures": 9, "batch_size": 8}, "architectures must be at most batch_size 8, got 9"),
        ({"architectures": 1, "estimator": "score"}, "a leave-one-out baseline needs architectures >= 2, got 1"),
        ({"warmup": 0.6, "finetune": 0.4}, "must leave at least one of 30 epochs to search, got 18 and 12 epochs"),
    ],
)
def test_options_outside_their_range(options, message):
    with pytest.raises(ConfigError, match=message):
        SearchOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architectures": 1}, "a leave-one-out baseline needs architectures >= 2, got 1"),
        ({"finetune": 0.8}, "must leave at least one of 30 epochs to search, got 6 and 24 epochs"),
    ],
)
def test_what_one_estimator_needs_is_asked_once_it_is_known(options, message):
    assert SearchOptions(**options).resolved(gated=True).estimator == "gumbel"
    with pytest.raises(ConfigError, match=message):
        SearchOptions(**options).resolved()


def test_options_at_the_edge_of_their_range():
    SearchOptions(epochs=1, warmup=0, finetune=0, momentum=0, anneal=0, seed=0, milestones=())
    SearchOptions(architectures=1, baseline="moving-average")
    SearchOptions(architectures=8, batch_size=8, anneal=2.0)
    SearchOptions(price=0, architectures="example")


def test_options_are_frozen_and_named():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SearchOptions().epochs = 3
    with pytest.raises(TypeError):
        SearchOptions(30)


@given(st.integers(1, 60), st.floats(0, 0.99), st.floats(0, 0.99))
def test_phases_follow_each_other_and_search_is_never_left_out(epochs: int, warmup: float, finetune: float):
    try:
        options = SearchOptions(epochs=epochs, warmup=warmup, finetune=finetune)
    except ConfigError:
        assert round(warmup * epochs) + round(finetune * epochs) >= epochs
        return
    phases = [options.phase(epoch) for epoch in range(epochs)]
    first, last = round(warmup * epochs), round(finetune * epochs)
    assert phases == ["warmup"] * first + ["search"] * (epochs - first - last) + ["finetune"] * last
    assert "search" in phases


def test_the_papers_phases():
    """50 epochs of warm-up of 300, falling after 150 and 225."""
    options = SearchOptions(
        epochs=300, warmup=50 / 300, finetune=0, schedule="steps", learning_rate=0.1, milestones=(0.5, 0.75)
    )
    assert [options.phase(epoch) for epoch in (0, 49, 50, 299)] == ["warmup", "warmup", "search", "search"]
    rates = [options.rate(epoch / 300) for epoch in (0, 149, 150, 224, 225, 299)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_annealing_runs_over_its_share_of_the_search():
    """Of 30 epochs 6 warm up and 12 fine-tune: half of the 12 between."""
    options = SearchOptions(epochs=30, warmup=0.2, finetune=0.4, anneal=0.5)
    assert [options.search_progress(at) for at in (0, 6, 9, 12, 18)] == [0, 0, 0.5, 1, 1]
    assert SearchOptions(anneal=0).search_progress(0) == 1


def test_noise_ends_a_share_of_the_search_before_its_end():
    """Of 30 epochs 6 warm up and 12 fine-tune; a quarter of the 12 between is 3."""
    options = SearchOptions(epochs=30, warmup=0.2, finetune=0.4, noiseless=0.25)
    assert [options.noisy(at) for at in (0, 8.9, 9, 12)] == [True, True, False, False]
    assert SearchOptions().noisy(11.9)
    looking = SearchOptions().resolved(conditional=True)  # 4 of 30 epochs warm up; half of the 26 others is 13
    assert [looking.noisy(at) for at in (12.9, 13)] == [True, False]


def test_one_cycle_rises_to_its_peak_at_a_fifth_and_ends_at_zero():
    options = SearchOptions(learning_rate=2.0)
    assert [options.rate(at) for at in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx([0.2, 1.1, 2, 1, 0])
    falling = [options.rate(0.2 + 0.01 * step) for step in range(81)]
    assert falling == sorted(falling, reverse=True)


def test_a_constant_rate_stays():
    assert {SearchOptions(schedule="constant").rate(at) for at in (0, 0.3, 1)} == {0.2}


def test_architectures_of_a_batch():
    """As many as asked, but no more than there are examples, as in the last batch of an epoch."""
    assert [SearchOptions(architectures=16).sampled(examples) for examples in (128, 16, 5)] == [16, 16, 5]
    assert SearchOptions(architectures="example").sampled(37) == 37


def test_devices_and_precisions():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    for name in ("tpu", "cuda:99", ""):
        with pytest.raises(ConfigError, match=f"device must be one that torch has here, got '{name}'"):
            resolve_device(name)
    assert resolve_precision("float32", torch.device("cpu")) == torch.float32
    assert resolve_precision("bfloat16", torch.device("cpu")) == torch.bfloat16
    assert resolve_precision("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)
