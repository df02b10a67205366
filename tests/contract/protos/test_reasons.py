"""Reasons of errors: what the code raises is what the contract lists, both ways."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import contract, reasons

SERVICES = {
    "mlmesh.registry.v1.ModelRegistryService": "services/mlmesh_registry",
    "mlmesh.training.v1.TrainingService": "services/mlmesh_training",
    "mlmesh.training.v1.TrainingWorkerService": "services/mlmesh_training",
    "mlmesh.inference.v1.InferenceControlService": "services/mlmesh_inference",
    "mlmesh.local.v1.LocalMeshService": "mesh/mlmesh_local",
}
# Modules of one package that serve another service of it.
WORKERS = re.compile(r"backends/kubernetes/.*|worker_servicer\.py|worker/.*")
# Raised and caught inside the process, or said by a process that does not start: no caller of an RPC sees them.
INSIDE = {
    "mlmesh.training.v1.TrainingService": {"JOB_STOPPED", "ILLEGAL_TRANSITION", "ETAG_MISMATCH"},
    "mlmesh.training.v1.TrainingWorkerService": {"NOT_READY", "PERMISSION_DENIED"},
    "mlmesh.inference.v1.InferenceControlService": {"REVISION_LOST", "TIMED_OUT"},
    "mlmesh.local.v1.LocalMeshService": {
        "PORT_IN_USE",
        "MESH_RUNNING",
        "ENVOY_NOT_FOUND",
        "ISTIOD_FAILED",
        "ISTIOD_MISSING",
        "ISTIOD_SILENT",
        "INSTANCE_FAILED",
        "START_TIMED_OUT",
        "NOT_READY",
        "DATA_LOSS",
        "ALREADY_EXISTS",
    },
}
# Of the runtime: what services raise through its helpers and list themselves, and what its own services say.
HELPERS = {"DISK_FULL", "CHUNK_OFFSET_MISMATCH", "CHUNK_CHECKSUM_MISMATCH", "DIGEST_MISMATCH", "WRITER_BUSY"}
OWN = {
    "INVALID_FIELD", "TOO_MANY_HEALTH_NAMES", "TOO_MANY_WATCHERS", "HEALTH_NAME_UNKNOWN", "CHANNELZ_NUMBER_UNKNOWN",
}  # fmt: skip


def _listed(service: str, introduction: str) -> set[str]:
    comment = " ".join(contract.service_comments()[service].split())
    found = re.search(introduction + r" ([A-Z0-9_, ]+)\.", comment)
    assert found, f"the comment of {service} does not say: {introduction}"
    return set(found.group(1).split(", "))


def _raised(folder: str) -> dict[str, str]:
    return reasons.raised(contract.ROOT / folder)


def _raised_by(service: str) -> dict[str, str]:
    workers = service.endswith("WorkerService")
    return reasons.raised(contract.ROOT / SERVICES[service], lambda path: bool(WORKERS.fullmatch(path)) == workers)


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_reasons_of_a_service(service: str) -> None:
    listed = _listed(service, "one of these reasons:")
    runtime = _raised("services/mlmesh_runtime")
    raised = {r: at for r, at in _raised_by(service).items() if r not in INSIDE.get(service, set())}
    undocumented = {reason: at for reason, at in raised.items() if reason not in listed and reason not in runtime}
    assert undocumented == {}, "raised, but not in the comment of the service"
    never = listed - set(raised) - set(runtime)
    assert never == set(), "in the comment of the service, but never raised"


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_reasons_of_the_runtime(service: str) -> None:
    listed = _listed(service, "The runtime that all services share adds:")
    assert listed == set(_raised("services/mlmesh_runtime")) - HELPERS - OWN


@pytest.mark.parametrize("service", sorted(INSIDE))
def test_what_is_said_to_stay_inside_exists(service: str) -> None:
    assert INSIDE[service] <= set(_raised_by(service))


def test_reasons_are_found(tmp_path: Path) -> None:
    """The reading itself: literals, choices, defaults."""
    (tmp_path / "module.py").write_text(
        "raise NotFound('x', reason='JOB_NOT_FOUND')\n"
        "raise errors.Conflict('x', reason='A_B' if y else 'C_D')\n"
        "raise errors.NotReady('x')\n"
        "raise ValueError('x')\n"
    )
    assert set(reasons.raised(tmp_path)) == {"JOB_NOT_FOUND", "A_B", "C_D", "NOT_READY"}
