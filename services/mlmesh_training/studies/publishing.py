"""The best trial's model as a version of the registry: what is registered of the study. Pure."""

from __future__ import annotations

from dataclasses import replace

from mlmesh_training.jobs import Job
from mlmesh_training.studies.study import Study

LABELS_MAX = 64
"""Labels that a version may have."""


def publishable(study: Study, job: Job) -> Job:
    """The best trial's job as if it had been asked to publish, with the study's figures.

    The same study and job always give the same, so that a repeated registration is the same request. Errors: ValueError
    when the study has nothing to publish or the job left no model.
    """
    publication, trained, best = study.spec.job.publication, job.trained, study.best
    if publication is None or trained is None or best is None or best.value is None:
        raise ValueError(f"{study.name} has nothing to publish of {job.name}")
    counts = study.counts
    figures = {
        "study.trial": str(best.number),
        "study.trials": str(study.chosen),
        "study.trials_complete": str(counts.complete),
        "study.trials_pruned": str(counts.pruned),
        "study.trials_failed": str(counts.failed),
        "study.sampler": study.spec.sampler.lower(),
        "study.pruner": study.spec.pruner.lower(),
        "study.metric": study.metric,
        "study.value": f"{best.value:.9g}",
    }
    found = ", ".join(f"{name} {value:.6g}" for name, value in sorted(best.hyperparameters.items()))
    told = (
        f"Best of {study.chosen} trials of {study.name} (trial {best.number}): "
        f"{study.metric} {best.value:.6g}; {found}."
    )
    labels = {**figures, **trained.labels}
    if len(labels) > LABELS_MAX:
        labels = dict(trained.labels)
    return replace(
        job,
        spec=replace(
            job.spec,
            publication=replace(
                publication, description=f"{publication.description}\n\n{told}" if publication.description else told
            ),
        ),
        trained=replace(trained, labels=labels, metrics={study.metric: best.value, **trained.metrics}),
        model_version=study.model_version,
        study=study.name,
    )
