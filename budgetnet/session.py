"""One run from its first batch to its files, able to stop anywhere and go on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from math import sqrt
from typing import Any, Protocol

import torch
from torch import Tensor

from budgetnet.architectures import describe
from budgetnet.budgets import BoundBudget
from budgetnet.costs.measured import LearningModel, MeasuredModel
from budgetnet.data import Batches, Dataset
from budgetnet.errors import FileError
from budgetnet.evaluation import Predict, evaluate, recalibrate
from budgetnet.extraction import extract
from budgetnet.inference import Inference, Observed, observe
from budgetnet.options import SearchOptions
from budgetnet.projection import keeps, room
from budgetnet.report.records import Record
from budgetnet.report.run import Run
from budgetnet.runs import RunFolder
from budgetnet.selection import Candidate, choose
from budgetnet.sites import entropy
from budgetnet.steering import Sums, seeded
from budgetnet.training import Learner

CHECKPOINT_SECONDS = 60  # within an epoch; where a checkpoint falls changes no result


class Progress(Protocol):
    """Who is told how it goes."""

    def say(self, text: str) -> None:
        """What is done before, where it takes its time."""

    def begin(self, limits: list[dict[str, Any]], options: SearchOptions) -> None:
        """Before training: the smallest, expected and full cost beside each limit."""

    def step(self, epoch: int, done: int, batches: int, sums: Sums) -> None:
        """After each batch."""

    def epoch(self, line: dict[str, Any]) -> None:
        """After each epoch: its line of metrics.jsonl."""


class Session:
    """One run: where it stands, and how it goes on from there.

    Args:
        run: where its files lie.
        data: its images and classes.
        learner: of its network; one that has chosen already trains that architecture, without a search.

    Attributes:
        epoch, batch: that come next.
        sums: over the batches of this epoch.
        images: seen so far.
        seconds: of learning so far, also of those before it was taken up.
        candidates: what was compared when an architecture was chosen, as in result.json.
    """

    def __init__(self, run: RunFolder, data: Dataset, learner: Learner) -> None:
        self.run, self.data, self.learner = run, data, learner
        self.options = options = learner.options
        self.network = learner.network
        common: dict[str, Any] = {"batch_size": options.batch_size, "device": learner.device}
        self.train = Batches(data.train, augmentation=data.augmentation, seed=options.seed, **common)
        self.validation = Batches(data.validation, shuffle=False, **common)
        self.epoch = self.batch = 0
        self.sums = Sums()
        self.images, self.seconds = 0, 0.0
        self.candidates: list[dict[str, Any]] = []
        self.fixed = learner.chosen is not None  # no search: this architecture is trained from the start

    @property
    def budgets(self) -> tuple[BoundBudget, ...]:
        """Of this network, their limits as they were when the run began."""
        return self.learner.budgets

    @property
    def taught(self) -> int:
        """Images that the full network saw beside the samples and the chosen network, to teach them; of those seen."""
        before = self.options.warmup_epochs * len(self.train) * self.train.batch_size
        return max(0, self.images - before) if self.options.distillation else 0

    def phase(self) -> str:
        """What this epoch is for."""
        return "finetune" if self.fixed else self.options.phase(self.epoch)

    def take_up(self) -> None:
        """Goes to where the last checkpoint was written.

        Raises:
            FileError: a file of the run is damaged, or the checkpoint says what cannot be.
        """
        Run.read(self.run.path)  # what cannot be reported at the end is said now
        known = [line["epoch"] for line in self.run.metrics()]
        saved = self.run.load_checkpoint()
        if saved is None:
            return
        tensors, values = saved
        state = Record(values, f"the checkpoint of {self.run.path}")
        self.epoch, self.batch, self.images = (state.whole(key) for key in ("epoch", "batch", "images"))
        last, batches = self.options.epochs, len(self.train)
        if not (0 <= self.batch <= batches and 0 <= self.epoch <= last - bool(self.batch)):
            raise FileError(
                f"{state.file} must stand within {last} epochs of {batches} batches, "
                f"got epoch {self.epoch} and batch {self.batch}"
            )
        if self.images != (self.epoch * batches + self.batch) * self.train.batch_size:
            raise FileError(f"{state.file} does not agree with itself: {self.images} images by epoch {self.epoch}")
        if known[: self.epoch] != list(range(self.epoch)):
            raise FileError(f"{self.run.path / 'metrics.jsonl'} must hold the {self.epoch} epochs that are over")
        self.seconds, self.sums = state.number("seconds"), self._sums(state.record("sums"))
        for candidate in state.records("candidates"):
            candidate.costs("costs"), candidate.record("validation"), candidate.flag("chosen")
        self.candidates = list(values["candidates"])
        fixed = self.learner.chosen
        self.learner.load_state(tensors, values)
        self._check_choice(fixed)

    def _sums(self, record: Record) -> Sums:
        counts = {key: record.whole(key) for key in ("images", "samples")}
        totals = {key: record.number(key) for key in ("loss", "right", "connected")}
        lists = {key: list(record.numbers(key)) for key in ("costs", "prices", "opened")}
        sums = Sums(**counts, **totals, **lists)  # type: ignore[arg-type]
        samples = self.options.sampled(self.train.batch_size) * self.batch if self.phase() == "search" else 0
        images = self.train.batch_size * self.batch
        gates, budgets = (count if samples else 0 for count in (self.network.gate_count, len(self.budgets)))
        found = (sums.images, sums.samples, len(sums.opened), len(sums.costs), len(sums.prices))
        if found != (images, samples, gates, budgets, budgets):
            raise FileError(f"{record.file} must have sums over {self.batch} batches, got others")
        return sums

    def _check_choice(self, fixed: Tensor | None) -> None:
        """Raises FileError unless there is a choice once there has to be one, and it keeps the budgets."""
        here, chosen = (self.epoch, self.batch), self.learner.chosen
        name = f"the checkpoint of {self.run.path}"
        searched = not self.fixed and here > (self.options.warmup_epochs, 0)
        if bool(self.learner.starts) != searched:
            raise FileError(f"{name} must {'' if searched else 'not '}know where the costs of a search began")
        if (chosen is not None) != (self.fixed or here > (self.options.epochs - self.options.finetune_epochs, 0)):
            raise FileError(f"{name} must hold an architecture once one is chosen, and none before")
        if fixed is not None and chosen is not None and not torch.equal(fixed.to(chosen), chosen):
            raise FileError(f"{name} must hold the architecture that was asked for, got another")
        counted = [budget for budget in self.budgets if not isinstance(budget.model, MeasuredModel)]
        if not self.fixed and chosen is not None and not bool(keeps(self.network, counted, chosen)[0]):
            raise FileError(f"the architecture in {name} does not keep the budgets")

    def save(self) -> None:
        """Writes a checkpoint."""
        tensors, state = self.learner.state()
        state |= {"epoch": self.epoch, "batch": self.batch, "images": self.images, "seconds": self.seconds}
        self.run.save_checkpoint(tensors, {**state, "sums": asdict(self.sums), "candidates": self.candidates})

    def run_epoch(self, progress: Progress | None) -> None:
        """One pass over the training images in its phase, a look at the validation data, a checkpoint."""
        phase, batches, last = self.phase(), len(self.train), time.monotonic()
        if phase == "search" and not self.learner.starts:
            self.learner.begin_search()
        if phase == "finetune" and self.learner.chosen is None:
            self.choose()
        self.network.train()
        if self.batch == 0:
            self.learner.begin_epoch()
        for x, y in self.train.epoch(self.epoch, start=self.batch):
            step = self.epoch * batches + self.batch
            position, generator = self.position(step), seeded(self.learner.device, self.options.seed, step)
            before, now = (place - self.options.warmup_epochs for place in (self.position(step - 1), position))
            if phase == "search" and self.learner.noise_ends(before, now):
                looked = self.train.several(self.options.recalibration, self.epoch)
                self.learner.end_noise((one for one, _ in looked), generator, self.learner.forward)
            self.learner.step(
                x,
                y,
                phase,
                generator=generator,
                rate=self.options.rate(position / self.options.epochs),
                progress=self.options.search_progress(position),
                sums=self.sums,
                epochs=now,
            )
            self.batch += 1
            self.images += len(x)
            if progress:
                progress.step(self.epoch, self.batch, batches, self.sums)
            if time.monotonic() - last > CHECKPOINT_SECONDS:
                last = self._counted(last)
                self.save()
        if phase == "search":
            self.learner.correct(self.epoch)
        self._counted(last)
        line = self.line(phase)
        self.run.append_metrics(line)
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, Sums()
        self.save()
        if progress:
            progress.epoch(line)

    def _counted(self, since: float) -> float:
        """Adds the seconds since a moment to those of the run; the moment that it is now."""
        now = time.monotonic()
        self.seconds += now - since
        return now

    def position(self, step: int) -> float:
        """Epochs from the start of training to a step."""
        epoch, batch = divmod(step, len(self.train))
        return epoch + batch / len(self.train)

    def line(self, phase: str) -> dict[str, Any]:
        """What metrics.jsonl keeps of this epoch."""
        searching, sums = phase == "search", self.sums
        position = self.epoch + 1.0
        kept = self.current(phase)
        used = self.network.used(kept)
        looked = (self.epoch + 1) % self.options.validate_every == 0 or self.epoch + 1 == self.options.epochs
        validation = None
        if looked and self.network.heads and not self.fixed:
            self.network.eval()
            validation = self.observe(Inference(), self.validation).quality
        elif looked and bool(self.network.connects(used)[0]):
            validation = self.judge(kept, afresh=searching)
        limits = (
            self.learner.limits(self.options.search_progress(position), position - self.options.warmup_epochs)
            if searching
            else [None] * len(self.budgets)
        )
        costs, prices = (
            [total / sums.samples for total in totals] if searching else [None] * len(self.budgets)
            for totals in (sums.costs, sums.prices)
        )
        self.write_architecture(kept)
        return {
            "epoch": self.epoch,
            "phase": phase,
            "step": (self.epoch + 1) * len(self.train),
            "images_seen": self.images,
            "seconds": self.seconds,
            "learning_rate": self.options.rate(position / self.options.epochs),
            "train": {"loss": sums.loss / sums.images, "accuracy": sums.right / sums.images},
            "validation": validation,
            "entropy": float(self.undecided()) if searching else None,
            "connected": sums.connected / sums.samples if searching else None,
            "activation": self.activation() if searching else None,
            "budgets": [
                {
                    "cost": budget.name,
                    "unit": budget.unit,
                    "limit": budget.limit,
                    "at_most": budget.upper,
                    "target": limit,
                    "sampled": cost,
                    "mode": float(budget.model(used)[0]),
                    "price": price,
                    "error": budget.model.error if isinstance(budget.model, LearningModel) else None,
                    "notes": list(budget.model.notes.values()) if isinstance(budget.model, LearningModel) else [],
                }
                for budget, limit, cost, price in zip(self.budgets, limits, costs, prices, strict=True)
            ],
        }

    def activation(self) -> dict[str, float]:
        """How often each gated edge, and the mean channel of each gated site, was open in this epoch's samples."""
        network, rates = self.network, [opened / self.sums.samples for opened in self.sums.opened]
        whole = [1.0 if column is None else rates[column] for column in network.gate_of]
        found = {network.edge_names[edge]: whole[edge] for edge in network.choices}
        for site in network.sites:
            weighed = zip(whole[slice(*site.units)], site.sizes, strict=True)
            found[f"{network.edge_names[site.edge]}.{site.name}"] = sum(a * b for a, b in weighed) / sum(site.sizes)
        return found

    def undecided(self) -> Tensor:
        """Entropy of the sampled architecture in nats, over the decisions that are taken and could matter.

        `E_H[sum_g relevant_g(H) h(p_g)]`, on 1,024 samples: 0 once one architecture is left.
        """
        logits = self.network.logits()
        kept = self.network.sampled(1024, seeded(logits.device, 0, self.epoch))
        return (self.network.relevant(kept) @ entropy(logits)).mean()

    def current(self, phase: str) -> Tensor:
        """The architecture that stands for this phase: the full, the most probable or the chosen one, `(1, G)`."""
        if phase == "warmup":
            return self.network.architecture("full")
        if phase == "search":
            return (self.network.probabilities() > 0.5).float()[None]
        chosen = self.learner.chosen
        assert chosen is not None
        return chosen

    def judge(self, kept: Tensor, *, afresh: bool) -> dict[str, float]:
        """Quality of an architecture on the validation data; `afresh` sets its own batch norms first."""
        plain = extract(self.network, kept)
        predict = self.predict(plain)
        if afresh:
            recalibrate(plain, predict, self.train.several(self.options.recalibration, self.epoch))
        plain.eval()
        return self.quality(predict, self.validation)

    def choose(self) -> None:
        """Projects onto the budgets: of the probable architectures that keep them all, the best on validation data.

        Among those that the validation images cannot tell from the best, the one that leaves the least of its
        tightest budget: there is fine-tuning to come. What is measured is measured again with more care.
        """
        measure = "mean_iou" if self.data.task == "segmentation" else "accuracy"

        def best(some: Sequence[Candidate]) -> int:
            rooms = [room(self.budgets, one.costs) for one in some]
            return best_of([one.quality[measure] for one in some], rooms, images=len(self.data.validation))

        found, chosen = choose(
            self.network,
            self.budgets,
            lambda kept: self.judge(kept, afresh=True),
            best,
            count=self.options.candidates,
            generator=torch.Generator().manual_seed(self.options.seed),
            pressed=self.learner.pressed,
        )
        self.candidates = [
            {
                "costs": {budget.name: cost for budget, cost in zip(self.budgets, one.costs, strict=True)},
                "validation": one.quality,
                "chosen": one is chosen,
            }
            for one in found
        ]
        self.learner.choose(chosen.kept)
        self.settle(self.network.used(chosen.kept))

    def settle(self, used: Tensor) -> None:
        """Sets the batch norms of an architecture, `(1, U)` used units, to what its own activations are."""
        batches = self.train.several(self.options.recalibration, self.epoch)
        recalibrate(self.network, self.predict(lambda x: self.network.run(x, used)), batches)

    @cached_property
    def test(self) -> Batches:
        """The test images, to be looked at once, when all is learned."""
        return Batches(self.data.test, batch_size=self.options.batch_size, device=self.learner.device, shuffle=False)

    def observe(self, inference: Inference, batches: Batches) -> Observed:
        """What the network with its gates does on all of some batches."""
        return observe(
            self.network,
            inference,
            batches.epoch(0),
            classes=self.data.num_classes,
            ignore=self.data.ignore,
            models={budget.name: budget.model for budget in self.budgets},
            forward=self.learner.forward,
        )

    def predict(self, network: Predict) -> Predict:
        """The forward pass in the run's precision."""

        def run(x: Tensor) -> Tensor:
            with self.learner.precision():
                return network(x.contiguous(memory_format=self.learner.layout))

        return run

    def quality(self, predict: Predict, batches: Batches) -> dict[str, float]:
        """Quality over all of some batches."""
        return evaluate(predict, batches.epoch(0), classes=self.data.num_classes, ignore=self.data.ignore)

    def write_architecture(self, kept: Tensor, rates: Sequence[float] | None = None) -> None:
        """Writes architecture.json: the graph, what is kept and used, how probable, or often seen, and how costly."""
        self.run.write("architecture.json", describe(self.network, kept, self.budgets, rates))


def best_of(scores: Sequence[float], rooms: Sequence[float], *, images: int) -> int:
    """Of candidates within one standard error of the best score, a share of `images`, the one with the least room."""
    top = max(scores)
    error = sqrt(top * (1 - top) / images)
    return min((room, place) for place, (score, room) in enumerate(zip(scores, rooms, strict=True))
               if score >= top - error)[1]  # fmt: skip
