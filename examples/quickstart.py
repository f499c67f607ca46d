"""Learn a network for handwritten digits with at most a quarter of the fabric's multiply-adds, and export it."""

import torch

import budgetnet as bn

torch.manual_seed(0)
digits = bn.data.load("digits")
space = bn.spaces.resnet_fabric(width=3, classes=10, image_size=8, in_channels=1)
found = bn.search(
    space,
    digits,
    budgets=[bn.Budget(bn.costs.MACs(), at_most="25%"), "params<=200K"],
    options=bn.SearchOptions(epochs=40),
)
print(found.result["test"], found.result["budgets"])

network = found.network()  # plain torch.nn: trains, traces and ships without budgetnet
example = torch.zeros(1, 1, 8, 8)
print(network(example).shape)
bn.export(network, found.run / "mine.onnx", example)
print("report:", found.run / "report.html")
