"""budgetnet learns neural networks that fit a budget: architecture and weights together, to a plain smaller network."""

from budgetnet import costs, data, spaces
from budgetnet.budgets import Budget
from budgetnet.conditional import export
from budgetnet.controller import Controller
from budgetnet.delivery import Found, evaluate_gates, fold_gates, load
from budgetnet.extraction import extract
from budgetnet.filling import filled
from budgetnet.gated import ChannelGate, GatedSequential
from budgetnet.inference import Inference
from budgetnet.options import SearchOptions
from budgetnet.search import search
from budgetnet.sites import AnswerGate, ConditionalGates, FeatureGate
from budgetnet.supernet import Edge, Node, SuperNetwork
from budgetnet.version import __version__
from budgetnet.weights import load_torchvision

__all__ = [
    "AnswerGate",
    "Budget",
    "ChannelGate",
    "ConditionalGates",
    "Controller",
    "Edge",
    "FeatureGate",
    "Found",
    "GatedSequential",
    "Inference",
    "Node",
    "SearchOptions",
    "SuperNetwork",
    "__version__",
    "costs",
    "data",
    "evaluate_gates",
    "export",
    "extract",
    "filled",
    "fold_gates",
    "load",
    "load_torchvision",
    "search",
    "spaces",
]
