"""The report, from run folders alone: one page on how a network was found and that it keeps its budget."""

from budgetnet.report.page import write

__all__ = ["write"]
