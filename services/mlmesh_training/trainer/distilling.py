"""A small student that learns from the answers of the source (Hinton, Vinyals and Dean, 2015)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from mlmesh_training import export
from mlmesh_training.options import Distillation
from mlmesh_training.trainer.definition import Definition, Loaded, Settings
from mlmesh_training.trainer.reporter import PermanentError
from mlmesh_training.trainer.wrapping import Wrapped


class Distilled(Wrapped):
    """A recipe whose loss also asks how near its answers are to the teacher's.

    The teacher answers to the very examples, augmented as they are, that the student learns from.

    Args:
        teacher: the source's ONNX file.
        threads: of the teacher; 0 lets it take all processors.
    """

    def __init__(self, inner: Definition, distillation: Distillation, teacher: Path, *, threads: int) -> None:
        super().__init__(inner)
        self._distillation = distillation
        self._path = teacher
        self._threads = threads
        self._teacher: export.Session | None = None
        self._answers: Tensor | None = None
        self._mean, self._std = 0.0, 1.0

    def build(self, settings: Settings, loaded: Loaded) -> nn.Module:
        """The student; the teacher is loaded beside it. Errors: PermanentError when it cannot be."""
        try:
            self._teacher = export.session(self._path.read_bytes(), threads=self._threads)
        except Exception as error:  # ONNX Runtime has exceptions of its own for every way to fail
            raise PermanentError(f"the source's model cannot teach: {error}") from error
        self._mean, self._std = loaded.target_mean, loaded.target_std
        return self.inner.build(settings, loaded)

    def augment(self, inputs: tuple[Tensor, ...], settings: Settings, generator: Generator) -> tuple[Tensor, ...]:
        """As the student's recipe; the teacher answers to what comes of it."""
        changed = self.inner.augment(inputs, settings, generator)
        if self._teacher is None:
            raise RuntimeError("the model is built before it is fitted")
        self._answers = torch.from_numpy(self._teacher([each.numpy() for each in changed])[0]).float()
        return changed

    def loss(self, outputs: Tensor, targets: Tensor, settings: Settings) -> Tensor:
        """The recipe's loss, and a share of the distance to the teacher's answers of this batch.

        Classifiers: cross-entropy between the distributions softened by the temperature, times its square so that
        gradients keep their size. Regressors: mean squared error to the teacher's values, normalised as the targets.
        """
        plain = self.inner.loss(outputs, targets, settings)
        if self._answers is None or len(self._answers) != len(outputs):
            return plain
        answers = self._answers.to(outputs.device)
        if targets.is_floating_point():
            taught = nn.functional.mse_loss(outputs, (answers - self._mean) / self._std)
        else:
            heat = self._distillation.temperature
            soft = torch.log_softmax(outputs / heat, dim=1)
            taught = nn.functional.kl_div(soft, torch.softmax(answers / heat, dim=1), reduction="batchmean") * heat**2
        share = self._distillation.teacher_share
        return share * taught + (1.0 - share) * plain
