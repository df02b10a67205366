"""Figures of the training service for Prometheus."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from mlmesh_runtime.telemetry import REGISTRY

JOBS_FINISHED = Counter(
    "mlmesh_training_jobs_finished", "Jobs that ended, by final state.", ["state"], registry=REGISTRY
)
ATTEMPTS = Counter("mlmesh_training_attempts", "Training processes started.", registry=REGISTRY)
JOBS_ACTIVE = Gauge("mlmesh_training_jobs_active", "Jobs being trained or published now.", registry=REGISTRY)
STUDIES_ACTIVE = Gauge("mlmesh_training_studies_active", "Studies that have not ended.", registry=REGISTRY)
TRIALS_FINISHED = Counter(
    "mlmesh_training_trials_finished", "Trials of studies that ended, by final state.", ["state"], registry=REGISTRY
)
