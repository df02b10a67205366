"""Optimisations of versions as jobs: what a person chose, and what the version itself says of its making."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlmesh.registry.v1 import registry_pb2
from mlmesh.training.v1 import training_pb2 as pb
from mlmesh_cli.errors import CliError, usage_error

_CHOICES = "--int8, --fp16, --prune, --two-four or --distill"


@dataclass(frozen=True, slots=True, kw_only=True)
class Technique:
    """One technique. `recipe` and `settings` are a student's, empty for the others."""

    message: pb.Optimization
    recipe: str = ""
    settings: Mapping[str, float]

    @classmethod
    def from_options(
        cls,
        *,
        int8: bool,
        fp16: bool,
        prune: float | None,
        two_four: bool,
        distill: str | None,
        calibration: int | None,
        epochs: int | None,
        settings: Mapping[str, float],
    ) -> Technique:
        """What was chosen. Raises CliError (exit code 2) for none, for two, and for options of another one."""
        chosen = [int8, fp16, prune is not None, two_four, distill is not None]
        if sum(chosen) != 1:
            raise usage_error(f"choose one of {_CHOICES}", "such as `mlmesh optimize mnist@stable --int8`")
        if calibration is not None and not int8:
            raise usage_error("--calibration is for --int8", "leave it out")
        if epochs is not None and prune is None and not two_four:
            raise usage_error("--epochs is for --prune and --two-four", "a student has --set epochs=NUMBER")
        if settings and distill is None:
            raise usage_error("--set is for --distill", "the others keep the network that the source has")
        message = pb.Optimization()
        if int8:
            message.quantization.CopyFrom(pb.Quantization(calibration_examples=calibration or 0))
        elif fp16:
            message.mixed_precision.CopyFrom(pb.MixedPrecision(precision=pb.PRECISION_FP16))
        elif distill is not None:
            message.distillation.SetInParent()
        else:
            message.pruning.CopyFrom(pb.Pruning(sparsity=prune or 0, two_four=two_four, epochs=epochs or 0))
        return cls(message=message, recipe=distill or "", settings=settings)


def spec_of(
    version: registry_pb2.ModelVersion,
    technique: Technique,
    *,
    max_drop: float,
    model: str | None,
    aliases: Sequence[str],
) -> pb.JobSpec:
    """The job that optimises a version, on the data set that the version was trained on.

    Raises CliError when the version does not say what it was trained by and on.
    """
    recipe, dataset = version.labels.get("recipe", ""), version.lineage.dataset or version.labels.get("dataset", "")
    if not recipe or not dataset:
        raise CliError(
            f"{version.name} does not say which recipe and data set it was trained with",
            "only versions that were trained here can be optimised here",
            reason="UNKNOWN_ORIGIN",
        )
    optimization = pb.Optimization()
    optimization.CopyFrom(technique.message)
    optimization.source = version.name
    # 0 would mean the service's default.
    optimization.quality_drop_max = max_drop or 1e-9
    name = model.removeprefix("models/") if model else version.name.split("/")[1]
    return pb.JobSpec(
        recipe=technique.recipe or recipe,
        dataset=dataset,
        hyperparameters=dict(technique.settings),
        optimization=optimization,
        publication=pb.Publication(model=f"models/{name}", aliases=list(aliases)),
    )
