"""The report: one self-contained page on how a network was found and that it keeps its budget, from run folders alone."""

from budgetnet.report.page import write

__all__ = ["write"]
