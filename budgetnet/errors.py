"""What can go wrong, each also a built-in, each one clear line: what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class BudgetnetError(Exception):
    """The root of every error budgetnet raises on purpose."""


class ConfigError(BudgetnetError, ValueError):
    """An option, a budget or a request is outside its range."""


class GraphError(BudgetnetError, ValueError):
    """A graph is not a DAG from one source to one sink, or its shapes do not add."""


class DataError(BudgetnetError, ValueError):
    """A dataset is missing, incomplete, or not of its stated layout."""


class FileError(BudgetnetError, ValueError):
    """A file of a run (checkpoint, options, network) is missing, truncated or of the wrong shape."""


class UnreachableBudget(BudgetnetError, ValueError):
    """No architecture of the space keeps the budget, or none was found that does.

    Args:
        message: what binds.
        limits: what `budgets.check_reachable` found of each budget, where that is why.
    """

    def __init__(self, message: str, limits: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(message)
        self.limits = list(limits)


class DivergenceError(BudgetnetError, ArithmeticError):
    """The loss stopped being a finite number; the last good checkpoint is kept."""
