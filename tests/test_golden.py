"""Every analytic number of the super networks' tables, and of the networks that they contain, digit by digit."""

from __future__ import annotations

import json
import re
from decimal import ROUND_HALF_EVEN, Decimal
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from budgetnet import SuperNetwork
from budgetnet.cli import main
from budgetnet.measure import measure_network
from budgetnet.spaces import BY_NAME

GOLDEN: list[dict[str, Any]] = json.loads((Path(__file__).parent / "golden.json").read_text())
"""A row a number: `value` exactly, in `unit`; `paper` as it is printed, less padding zeros, or null."""

THROUGH_THE_COMMAND = ["resnet20.macs", "resnet32.cifar100.macs", "resnet20.params", "resnet44.steps4",
                       "cnf2.macs_paper", "cnf2.macs", "cnf1.params", "cnf2.steps2", "cnf8.part_labels.macs_paper",
                       "fabric3.macs", "fabric3.cifar100.params", "fabric3.steps2", "fabric3.s.macs"]  # fmt: skip


@cache
def network(space: str, options: str) -> SuperNetwork:
    return BY_NAME[space](**json.loads(options))


@cache
def measured(space: str, options: str, architecture: str) -> dict[str, Any]:
    """All costs that the rows ask of one architecture, measured together."""
    built = network(space, options)
    asked = {row["cost"] for row in GOLDEN if (row["space"], json.dumps(row["options"])) == (space, options)}
    return measure_network(built, built.architecture(architecture), sorted(asked))


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: row["id"])
def test_number(row: dict[str, Any]):
    found = measured(row["space"], json.dumps(row["options"]), row["architecture"])
    assert found["costs"][row["cost"]] == row["value"]
    assert isinstance(found["costs"][row["cost"]], int)
    assert found["units"][row["cost"]] == row["unit"]


@pytest.mark.parametrize("row", [row for row in GOLDEN if row["paper"]], ids=lambda row: row["id"])
def test_what_is_printed_is_the_number_rounded(row: dict[str, Any]):
    match = re.fullmatch(r"([\d.]+)([MG]?)", row["paper"])
    assert match is not None
    shown, scale = Decimal(match[1]), {"": 1, "M": 10**6, "G": 10**9}[match[2]]
    assert (Decimal(row["value"]) / scale).quantize(shown, ROUND_HALF_EVEN) == shown


@pytest.mark.parametrize("row", [row for row in GOLDEN if row["id"] in THROUGH_THE_COMMAND], ids=lambda row: row["id"])
def test_number_through_the_command_line(row: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    options = [word for name, value in row["options"].items() for word in (f"--space.{name}", str(value))]
    asked = ["--architecture", row["architecture"], "--costs", row["cost"], "--json"]
    assert main(["measure", row["space"], *options, *asked]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"costs": {row["cost"]: row["value"]}, "units": {row["cost"]: row["unit"]}}


def test_rows_are_told_apart_and_all_named_ones_exist():
    names = [row["id"] for row in GOLDEN]
    assert len(set(names)) == len(names)
    assert set(THROUGH_THE_COMMAND) <= set(names)
    keys = {"id", "source", "space", "options", "architecture", "cost", "value", "paper", "unit"}
    assert all(set(row) == keys for row in GOLDEN)
