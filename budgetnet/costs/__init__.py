"""What an architecture costs: a cost is bound to a network and then maps used edges to numbers in a unit."""

from budgetnet.costs.activation import Activation, Layers
from budgetnet.costs.additive import MACs, Params
from budgetnet.costs.steps import Steps

__all__ = ["Activation", "Layers", "MACs", "Params", "Steps"]
