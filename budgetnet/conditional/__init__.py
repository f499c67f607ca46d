"""Execution that really skips: by example, by channel group, by exit; and its export with real branches."""

from budgetnet.conditional.building import conditional, polarised
from budgetnet.conditional.network import ConditionalNetwork
from budgetnet.conditional.onnx import export_conditional

__all__ = ["ConditionalNetwork", "conditional", "export_conditional", "polarised"]
