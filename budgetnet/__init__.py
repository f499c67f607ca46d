"""budgetnet learns neural networks that fit a budget: architecture and weights together, to a plain smaller network."""

from budgetnet import costs, data, spaces
from budgetnet.budgets import Budget
from budgetnet.controller import Controller
from budgetnet.delivery import Found, fold_gates, load
from budgetnet.export import export
from budgetnet.extraction import extract
from budgetnet.options import SearchOptions
from budgetnet.search import search
from budgetnet.supernet import Edge, Node, SuperNetwork
from budgetnet.version import __version__
from budgetnet.weights import load_torchvision

__all__ = [
    "Budget",
    "Controller",
    "Edge",
    "Found",
    "Node",
    "SearchOptions",
    "SuperNetwork",
    "__version__",
    "costs",
    "data",
    "export",
    "extract",
    "fold_gates",
    "load",
    "load_torchvision",
    "search",
    "spaces",
]
