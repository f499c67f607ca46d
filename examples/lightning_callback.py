"""A Lightning callback that keeps a network within a budget, on digits; needs `pip install lightning`."""
# ruff: noqa: D101, D102 (Lightning's hooks are what Lightning says)

import lightning
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import budgetnet as bn


class Budgets(lightning.Callback):
    """Steers the gates of a module's `network`; the module has a `judge` and asks the `controller` it is given."""

    def __init__(self, *budgets: str, total_steps: int) -> None:
        self.budgets, self.total_steps = budgets, total_steps

    def setup(self, trainer: lightning.Trainer, module: lightning.LightningModule, stage: str) -> None:
        if stage == "fit":  # a new one sets the gates to their start, which validate and test are not to do
            budgets, steps = self.budgets, self.total_steps
            self.controller = module.controller = bn.Controller(module.network, budgets, total_steps=steps)

    def on_train_batch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule, *_: object) -> None:
        if self.controller.phase == "choose":
            self.controller.choose(module.judge, [[part.to(module.device) for part in b] for b in module.batches])

    def on_train_batch_end(self, *_: object) -> None:
        self.controller.step()

    def state_dict(self) -> dict[str, object]:  # what Lightning's checkpoints hold, and give back
        return self.controller.state_dict()

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.controller.load_state_dict(state)


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        images, classes = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
        images = images.float().reshape(-1, 1, 8, 8) / 8 - 1
        self.batches = DataLoader(TensorDataset(images[:1400], classes[:1400]), batch_size=100, shuffle=True)
        self.held_out = images[1400:], classes[1400:]
        self.network = bn.spaces.resnet_fabric(width=2, channels=8, classes=10, image_size=8, in_channels=1)

    def judge(self, plain: torch.nn.Module) -> float:
        return float((plain.cpu()(self.held_out[0]).argmax(dim=1) == self.held_out[1]).float().mean())

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        output, kept = self.network(batch[0], self.controller.policy(len(batch[0])))
        return self.controller.loss(cross_entropy(output, batch[1], reduction="none"), kept)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.controller.weights(), lr=3e-3)


torch.manual_seed(0)
module, epochs = Digits(), 10
callback = Budgets("macs<=30%", total_steps=epochs * len(module.batches))
lightning.Trainer(max_epochs=epochs, callbacks=[callback], logger=False).fit(module, module.batches)
print(f"held-out accuracy {module.judge(callback.controller.network()):.3f}", callback.controller.limits)
