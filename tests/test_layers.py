"""Each file imports only from the layers above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import budgetnet

LAYERS = (
    *("errors", "checks", "version", "files", "graph", "sites", "blocks", "gated", "streams", "choices", "rows"),
    *(
        "shapes",
        "supernet",
        "spaces",
        "weights",
        "extraction",
        "filling",
        "timing",
        "apart",
        "export",
        "onnx_pieces",
        "assembly",
    ),
    "costs",
    *("objectives", "budgets", "data", "options", "conditional", "evaluation", "inference", "by_input"),
    *("projection", "selection", "runs", "building", "architectures", "measure"),
    *("report", "optimizers", "steering", "training", "session", "delivery", "search", "controller", "console", "cli"),
    *("__init__", "__main__"),
)
"""The one statement of the order; a folder is a layer, whose files may import one another."""

FOLDER = Path(budgetnet.__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))


def layer(path: Path) -> str:
    return path.relative_to(FOLDER).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    """Layers of this package that a file names in its imports, wherever they stand in it."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the package"
            # `from budgetnet import costs` names a layer by what it imports
            names += (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "budgetnet" else [node.module]
            )
    return {[*name.split("."), "__init__"][1] for name in names if name.split(".")[0] == "budgetnet"}


def test_every_file_has_its_place_in_the_order():
    assert {layer(path) for path in FILES} == set(LAYERS)
    assert len(set(LAYERS)) == len(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_file_imports_only_from_the_layers_above_it(path: Path):
    above = LAYERS[: LAYERS.index(layer(path))]
    below = imported(ast.parse(path.read_text())) - set(above) - {layer(path)}
    assert not below, f"{path.name} imports {', '.join(sorted(below))}, which the order puts below {layer(path)}"


@pytest.mark.parametrize(
    ("line", "layers"),
    [
        ("from budgetnet.costs.steps import Steps", {"costs"}),
        ("from budgetnet import costs, data as datasets", {"costs", "data"}),
        ("import budgetnet.graph", {"graph"}),
        ("import budgetnet", {"__init__"}),
        ("def f():\n    from budgetnet.cli import main", {"cli"}),
        ("import torch, json", set()),
    ],
)
def test_imports_are_found_in_every_form(line: str, layers: set[str]):
    assert imported(ast.parse(line)) == layers
