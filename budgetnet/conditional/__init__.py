"""Execution that really skips: by example, by channel group, by exit; and its export with real branches."""

from budgetnet.conditional.building import conditional, polarised
from budgetnet.conditional.folding import still_deciding
from budgetnet.conditional.network import ConditionalNetwork
from budgetnet.conditional.onnx import export_conditional
from budgetnet.conditional.variants import beside, export, export_fastest, one_by_one, times_full, tune_fastest

__all__ = [
    "ConditionalNetwork",
    "beside",
    "conditional",
    "export",
    "export_conditional",
    "export_fastest",
    "one_by_one",
    "polarised",
    "still_deciding",
    "times_full",
    "tune_fastest",
]
