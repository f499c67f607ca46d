"""What is printed before training."""

from io import StringIO

import pytest
from rich.console import Console

from budgetnet import SearchOptions
from budgetnet.console import Bars, quantity


def test_numbers_have_four_digits_and_the_prefix_that_limits_have():
    told = [quantity(value, "MAC") for value in (999.96, 12_346, 999_999, 40_930_000, 3.2e12)]
    assert told == ["1 K MAC", "12.35 K MAC", "1 M MAC", "40.93 M MAC", "3.2 T MAC"]


@pytest.mark.parametrize(
    ("alike", "limit", "estimator", "told"),
    [
        (0.97, 100.0, "score", True),
        (0.5, 100.0, "score", False),
        (0.97, 300.0, "score", False),  # they keep it as they are
        (0.97, 100.0, "gumbel", False),  # which learns from the cost's gradient
    ],
)
def test_the_user_is_told_where_samples_cost_the_same(alike: float, limit: float, estimator: str, told: bool):
    row = {"cost": "transfer:1K", "unit": "B", "smallest": 8.0, "bound": True, "expected": 250.0, "full": 256.0}
    text = StringIO()
    bars = Bars(Console(file=text, width=200))
    bars.begin([{**row, "alike": alike, "limit": limit}], SearchOptions(estimator=estimator).resolved())
    bars.close()
    said = "transfer:1K: 97 % of the sampled networks cost the same, so gates learn little: let them start lower than"
    assert (said in text.getvalue()) is told
