"""Studies for the tests of training."""

from __future__ import annotations

import dataclasses
from typing import Any

from mlmesh_training.jobs import JobSpec
from mlmesh_training.queue import DEFAULT_CAPACITY
from mlmesh_training.studies import acceptance
from mlmesh_training.studies.space import Dimension
from mlmesh_training.studies.study import Decision, Study, StudySpec, Trial
from tests.support.training import START, spec

RATES = Dimension(name="learning_rate", low=1e-4, high=1e-1, log=True)
WIDTHS = Dimension(name="width", values=(8.0, 16.0, 32.0))


def study_spec(**changes: Any) -> StudySpec:
    """A spec of a study that is fine, with changes; `job` is changed by a mapping."""
    job: JobSpec = spec(**changes.pop("job", {}))
    return StudySpec(**{"job": job, "dimensions": (RATES, WIDTHS), "trials_max": 6, "seed": 3, **changes})


def study(uid: str = "cnn-1", **changes: Any) -> Study:
    """An accepted study; `spec` is changed by a mapping, the rest are fields of the study."""
    asked = study_spec(**changes.pop("spec", {}))
    return dataclasses.replace(
        acceptance.accepted(asked, uid=uid, creator="", now=START, capacity=DEFAULT_CAPACITY), **changes
    )


def begun(known: Study, *, job: str = "job-0", **hyperparameters: float) -> tuple[Study, Trial]:
    """The study with its next trial, whose job runs."""
    from mlmesh_training.studies import study as steps

    point = hyperparameters or {"learning_rate": 0.01, "width": 8.0}
    decision = steps.chosen(known, START, hyperparameters=point)
    assert decision.trial is not None
    return both(steps.begun(decision.study, decision.trial, START, job=job))


def both(decision: Decision) -> tuple[Study, Trial]:
    """Study and trial of a decision."""
    assert decision.trial is not None
    return decision.study, decision.trial
