"""A plain PyTorch loop that learns a network for digits with at most 30 % of the fabric's multiply-adds."""

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import budgetnet as bn

EPOCHS = 10
torch.manual_seed(0)
images, classes = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
data = TensorDataset(images.float().reshape(-1, 1, 8, 8) / 8 - 1, classes)
train, validation, test = torch.utils.data.random_split(data, [1200, 237, 360])
batches = DataLoader(train, batch_size=100, shuffle=True, drop_last=True)

network = bn.spaces.resnet_fabric(width=2, channels=8, classes=10, image_size=8, in_channels=1)
controller = bn.Controller(network, ["macs<=30%"], total_steps=EPOCHS * len(batches))
optimizer = torch.optim.AdamW(controller.weights(), lr=3e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=EPOCHS * len(batches))


def accuracy(plain: torch.nn.Module, split: torch.utils.data.Dataset = validation) -> float:
    """Share of right predictions."""
    x, y = next(iter(DataLoader(split, batch_size=len(split))))
    return float((plain(x).argmax(dim=1) == y).float().mean())


for epoch in range(EPOCHS):
    for x, y in batches:
        if controller.phase == "choose":
            controller.choose(accuracy, list(batches))
        output, kept = network(x, controller.policy(len(x)))
        losses = cross_entropy(output, y, reduction="none")
        optimizer.zero_grad()
        controller.loss(losses, kept).backward()
        optimizer.step()
        schedule.step()
        controller.step()
    print(f"{epoch + 1:2d} {controller.phase:8s} loss {losses.mean().item():.3f}", controller.costs)

plain = controller.network()  # plain torch.nn, within the budget
used = network.used(controller.chosen)
macs = float(bn.costs.MACs().bind(network)(used)[0])
print(f"test accuracy {accuracy(plain, test):.3f} at {macs:,.0f} MACs of at most {controller.limits[0]['limit']:,.0f}")
