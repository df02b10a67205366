"""The fitting loop of one process: seeded, deterministic, able to go on from any step as if it had never stopped."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlmesh_training.backends.base import TrainingTask
from mlmesh_training.jobs import Checkpoint, LogLine, Metrics, Progress
from mlmesh_training.options import Precision, Schedule
from mlmesh_training.trainer.definition import Definition, Loaded, Part
from mlmesh_training.trainer.fitting import sharing
from mlmesh_training.trainer.fitting.batches import LEAST, Plan, share
from mlmesh_training.trainer.fitting.figures import Figures, Meter
from mlmesh_training.trainer.fitting.pausing import ASKED, Flag, PauseRequested
from mlmesh_training.trainer.fitting.ranks import ALONE, Ranks
from mlmesh_training.trainer.fitting.schedules import schedule
from mlmesh_training.trainer.fitting.watching import Watch
from mlmesh_training.trainer.reporter import PermanentError, Reporter

REPORT_INTERVAL_S = 0.2
EVALUATION_BATCH = 256
LOOK_STEPS_GPU = 16
"""Steps between two looks at the figures of a GPU, each of which waits for it."""
FORMAT = 2
"""Of the state in a checkpoint; another one is not read."""

Save = Callable[[int, Mapping[str, Any]], str]
"""Stores the state after so many optimizer steps and returns its SHA-256."""


class Fit:
    """Model, optimizer, schedule, scaler and random state of one task, and how far they are.

    Args:
        ranks: this process among those that fit together; all of them make the same calls in the same order.
    """

    def __init__(self, task: TrainingTask, definition: Definition, loaded: Loaded, ranks: Ranks = ALONE) -> None:
        settings, options = task.hyperparameters, task.fit
        self.task, self.ranks, self.settings = task, ranks, settings
        self.epoch, self.epochs = 0, int(settings["epochs"])
        self.step, self.position, self.done = 0, 0, False
        self.best: sharing.State | None = None
        self._definition, self._loaded = definition, loaded
        self._plan = Plan(
            examples=len(loaded.train), batch=int(settings["batch_size"]), accumulation=options.accumulation_steps
        )
        self.steps = self.epochs * self._plan.steps
        torch.manual_seed(task.seed)
        self.shared = sharing.share(definition.build(settings, loaded), task.distribution.strategy, ranks)
        if not ranks.alone:
            # What layers draw at random is another for each process's examples.
            torch.manual_seed(_mixed(task.seed, ranks.rank))
        self._augmenting = torch.Generator().manual_seed(_mixed(task.seed, ranks.rank + (1 << 16)))
        self._buffers = sharing.statistics(self.shared.plain)
        self._figures = Figures(loaded, ranks.device)
        self._whole = Meter()
        self._watch = Watch.of(options.early_stopping)
        trained = [each for each in self.shared.model.parameters() if each.requires_grad]
        rate = settings["learning_rate"]
        self._optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=settings.get("weight_decay", 0.0))
        self._schedule = schedule(
            self._optimizer,
            options.schedule or Schedule(getattr(definition, "schedule", Schedule.ONE_CYCLE)),
            rate=rate,
            steps=self.steps,
            warmup_share=options.warmup_share,
        )
        self._scaler = torch.amp.GradScaler(ranks.device.type, enabled=options.precision is Precision.FP16)
        # A step that the scaler skips comes before the schedule's all the same; torch warns of that order.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
        if isinstance(self.shared, sharing.Copied):
            self._rehearse()

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return Progress(epoch=self.epoch, epochs=self.epochs, step=self.step, steps=self.steps)

    def run(self, save: Save, reporter: Reporter, *, pause: Flag = ASKED) -> None:
        """Fit what is left, with checkpoints on the way and one at the end.

        Errors: PermanentError (diverged), PauseRequested (after a checkpoint), OSError.
        """
        every = self.task.fit.checkpoint_steps
        while not self.done:
            self.shared.model.train()
            meter = Meter()
            steps = self._plan.order(seed=self.task.seed, epoch=self.epoch)
            for batches in steps[self.position :]:
                paused = self._fit(batches, meter, pause)
                if meter.age_s >= REPORT_INTERVAL_S and meter.filled:
                    reporter.send(Metrics(progress=self.progress, values=self._measured(meter)))
                    meter = Meter()
                if self.position == len(steps):
                    break
                if paused or (every and self.step % every == 0):
                    self._save(save, reporter)
                if paused:
                    raise PauseRequested
            self._end_epoch(reporter)
            paused = not self.done and not self.ranks.all(not pause.value)
            if self.done or paused or not every or self.step % every == 0:
                self._save(save, reporter)
            if paused:
                raise PauseRequested

    def outputs(self, part: Part) -> Tensor:
        """What the model as it is answers to this process's examples, FP32 on its device."""
        self.shared.plain.eval()
        answers = []
        with torch.no_grad(), self._cast():
            for start in range(0, len(part), EVALUATION_BATCH):
                rows = tuple(each[start : start + EVALUATION_BATCH] for each in part.inputs)
                answers.append(self.shared.plain(*self._moved(rows)).float())
        return torch.cat(answers)

    def finished(self) -> nn.Module:
        """The fitted module, on the CPU, ready to evaluate; for a process alone."""
        if self.best is not None:
            self.shared.restore_weights(self.best)
        return self.shared.plain.cpu().eval()

    def state(self) -> dict[str, Any]:
        """All that the rest of the fitting depends on. Each process calls it; only rank 0's answer is whole."""
        return {
            "format": FORMAT,
            "world": self.ranks.world,
            "strategy": str(self.task.distribution.strategy),
            "epoch": self.epoch,
            "position": self.position,
            "step": self.step,
            "done": self.done,
            "model": self.shared.weights(),
            "optimizer": self.shared.optimizer(self._optimizer),
            "schedule": self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
            "whole": self._whole.state(),
            "watch": self._watch.state(),
            "best": self.best,
            "random": self._random(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a stored state. Errors: RuntimeError, KeyError, ValueError, TypeError for another fitting's."""
        made = (state["format"], state["world"], state["strategy"])
        mine = (FORMAT, self.ranks.world, str(self.task.distribution.strategy))
        if made[:2] != mine[:2] or (not self.ranks.alone and made != mine):
            raise ValueError(f"made as (format, processes, strategy) {made}, expected {mine}")
        self.shared.restore_weights(state["model"])
        self.shared.restore_optimizer(self._optimizer, state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._scaler.load_state_dict(state["scaler"])
        self._whole.restore(state["whole"])
        self._watch.restore(state["watch"])
        self._keep(state["best"])
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self.step, self.done = int(state["step"]), bool(state["done"])
        torch.set_rng_state(state["random"]["torch"][self.ranks.rank])
        self._augmenting.set_state(state["random"]["augmenting"][self.ranks.rank])
        if self.ranks.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"]["cuda"][self.ranks.rank], self.ranks.device)

    def _rehearse(self) -> None:
        """One backward pass that changes nothing.

        DDP groups gradients into messages anew after the first pass that it sees. Without this, a fitting that goes on
        in the middle would send its first step's in another grouping, and three or more processes would add them up in
        another order.
        """
        buffers = [(each, each.clone()) for each in self.shared.plain.buffers()]
        cuda = [self.ranks.device] if self.ranks.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            part = self._loaded.train.rows(torch.arange(min(LEAST, len(self._loaded.train))))
            with self._cast():
                outputs = self.shared.model(*self._moved(part.inputs)).float()
            # Not the recipe's loss, which need not expect it.
            outputs.sum().backward()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)

    def _keep(self, weights: sharing.State | None) -> None:
        """Keep the best weights, once for all processes."""
        if self.ranks.first:
            self.best = weights

    def _random(self) -> dict[str, list[Tensor]]:
        found = {"torch": torch.get_rng_state(), "augmenting": self._augmenting.get_state()}
        if self.ranks.device.type == "cuda":
            found["cuda"] = torch.cuda.get_rng_state(self.ranks.device)
        return {name: self.ranks.gather(value) for name, value in found.items()}

    def _save(self, save: Save, reporter: Reporter) -> None:
        state = self.state()
        if self.ranks.first:
            reporter.send(Checkpoint(progress=self.progress, sha256=save(self.step, state)))

    def _fit(self, batches: Sequence[Tensor], meter: Meter, pause: Flag) -> bool:
        """One optimizer step; whether all should pause after it."""
        examples = sum(len(rows) for rows in batches)
        for index, rows in enumerate(batches):
            last = index + 1 == len(batches)
            mine = share(rows, rank=self.ranks.rank, world=self.ranks.world)
            with self.shared.accumulating(not last):
                part = self._loaded.train.rows(mine.rows)
                inputs = self._definition.augment(part.inputs, self.settings, self._augmenting)
                (targets,) = self._moved((part.targets,))
                with self._cast():
                    outputs = self.shared.model(*self._moved(inputs)).float()
                loss = self._definition.loss(outputs, targets, self.settings)
                self._figures.add(outputs.detach(), targets, loss, mine.counted)
                if last:
                    # On its way while the gradients are computed.
                    message = self._figures.message(asked=pause.value)
                    finish = sharing.averaging(message, self._buffers, self.ranks)
                # Gradients are averaged over processes: weighted so, that is the mean over all examples of the step.
                weight = mine.counted * self.ranks.world / examples
                self._scaler.scale(loss * weight).backward()  # type: ignore[no-untyped-call]
        self._update()
        finish()
        return self._look(message, meter)

    def _update(self) -> None:
        if clip := self.task.fit.clip_norm:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self.shared.model.parameters(), clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        self._schedule.step()
        self.step += 1
        self.position += 1

    def _look(self, message: Tensor, meter: Meter) -> bool:
        """Take in what all processes told in a step; on the CPU each time, on a GPU from time to time, look at it."""
        due = self.ranks.device.type == "cpu" or self.step % LOOK_STEPS_GPU == 0 or self._boundary()
        figures, asked = self._figures.take(message, look=due)
        if figures is None:
            return False
        meter.add(figures)
        self._whole.add(figures)
        if not math.isfinite(self._whole.loss):
            raise PermanentError(f"the loss became {self._whole.loss} in epoch {self.epoch + 1}; lower learning_rate")
        return asked

    def _boundary(self) -> bool:
        """Whether something follows this step that needs all figures."""
        every = self.task.fit.checkpoint_steps
        return self.position == self._plan.steps or bool(every and self.step % every == 0)

    def _end_epoch(self, reporter: Reporter) -> None:
        self.epoch += 1
        self.position = 0
        # The last figures of an epoch are means over all of it.
        values = {**self._measured(self._whole), **self._validated()}
        if self._watch.see(self.epoch, values) and self.task.fit.restore_best:
            self._keep(self.shared.weights())
        self._whole = Meter()
        reporter.send(Metrics(progress=self.progress, values=values))
        self.done = self.epoch >= self.epochs or self._watch.over
        if self.done and self.epoch < self.epochs:
            watched = self._watch
            reporter.send(
                LogLine(
                    severity="info",
                    message=f"stopped after epoch {self.epoch}: {watched.options.metric} has not improved for "
                    f"{watched.waited} epochs, it was {watched.best:.6g} in epoch {watched.best_epoch}",
                )
            )

    def _measured(self, meter: Meter) -> dict[str, float]:
        return {
            **{f"train_{name}": value for name, value in self._figures.named(meter).items()},
            "learning_rate": float(self._schedule.get_last_lr()[0]),
            "examples_per_second": meter.examples_per_second,
        }

    def _validated(self) -> dict[str, float]:
        """Figures on the validation part, to which each process contributes its share of each batch."""
        part, meter = self._loaded.validation, Meter()
        for rows in torch.split(torch.arange(len(part)), EVALUATION_BATCH):
            mine = share(rows, rank=self.ranks.rank, world=self.ranks.world, least=1)
            held = part.rows(mine.rows)
            outputs = self.outputs(held)
            (targets,) = self._moved((held.targets,))
            self._figures.add(outputs, targets, self._figures.validation_loss(outputs, targets), mine.counted)
        message = self._figures.message(asked=False)
        self.ranks.add(message)
        figures, _ = self._figures.take(message, look=True)
        if figures is None or not math.isfinite(figures.loss):
            raise PermanentError(f"the validation loss is not finite in epoch {self.epoch}; lower learning_rate")
        meter.add(figures)
        return {f"validation_{name}": value for name, value in self._figures.named(meter).items()}

    def _cast(self) -> contextlib.AbstractContextManager[Any]:
        kind = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}.get(self.task.fit.precision)
        return contextlib.nullcontext() if kind is None else torch.autocast(self.ranks.device.type, dtype=kind)

    def _moved(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Tensors on this process's device; the copy to a GPU goes on while the CPU does something else."""
        if self.ranks.device.type == "cpu":
            return tensors
        return tuple(each.pin_memory().to(self.ranks.device, non_blocking=True) for each in tensors)


def _mixed(seed: int, stream: int) -> int:
    """A seed of its own for each stream of random numbers."""
    return (seed * 1_000_003 + stream * 7_919 + 1) % (1 << 63)
