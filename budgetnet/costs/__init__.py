"""What an architecture costs: a cost is bound to a network and then maps used edges to numbers in a unit."""

from budgetnet.costs.activation import Activation, Layers
from budgetnet.costs.additive import MACs, Params
from budgetnet.costs.function import Function
from budgetnet.costs.latency import Latency
from budgetnet.costs.memory import Memory
from budgetnet.costs.model import CostModel
from budgetnet.costs.schedule import Schedule
from budgetnet.costs.steps import Steps
from budgetnet.costs.transfer import Transfer

__all__ = [
    "Activation",
    "CostModel",
    "Function",
    "Latency",
    "Layers",
    "MACs",
    "Memory",
    "Params",
    "Schedule",
    "Steps",
    "Transfer",
]
