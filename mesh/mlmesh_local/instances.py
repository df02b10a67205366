"""Replicas: which process runs with which environment at which addresses. Pure."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlmesh_local import process
from mlmesh_local.addresses import Block, InstanceAddresses
from mlmesh_local.pki import spiffe_id
from mlmesh_local.workloads import Workload, expand, resolve_environment
from mlmesh_runtime.errors import InvalidInput

# Never handed on: settings of the mesh and of telemetry belong to the manifests, and a proxy between loopback addresses
# breaks gRPC.
_OWN_PREFIXES = ("MLMESH_", "OTEL_", "GRPC_")
_PROXIES = frozenset({"http_proxy", "https_proxy", "grpc_proxy", "all_proxy"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    """Where instances keep their files, and where they are started."""

    state: Path
    working: Path

    @property
    def logs(self) -> Path:
        """Logs of every process."""
        return self.state / "logs"

    def data(self, instance: str) -> Path:
        """Data of an instance; kept when it ends."""
        return self.state / "data" / instance


@dataclass(frozen=True, slots=True, kw_only=True)
class InstancePlan:
    """One replica, ready to be started. ``argv`` is empty for a gateway."""

    name: str
    workload: Workload
    addresses: InstanceAddresses
    identity: str
    argv: tuple[str, ...]
    environ: Mapping[str, str]
    log: Path
    sidecar_log: Path
    data: Path

    def answers_to(self, target: str) -> bool:
        """Whether a person means it: an instance, or all of a workload; either completed, "NAMESPACE/NAME"."""
        namespace, _, plain = target.rpartition("/")
        return namespace in ("", self.workload.namespace) and plain in (self.name, self.workload.name)


def named(workloads: Iterable[Workload], existing: Mapping[str, str]) -> dict[str, Workload]:
    """Workloads by the names that their replicas get: "{deployment}-{ordinal}".

    A name that two namespaces have is completed by its namespace where it occurs again. ``existing`` are namespaces
    of what runs, by name: nothing is called otherwise because other workloads come and go.
    """
    result: dict[str, Workload] = {}
    for workload in workloads:
        for ordinal in range(workload.replicas):
            plain = workload.instance_name(ordinal)
            full = f"{plain}.{workload.namespace}"
            taken = plain in result or existing.get(plain, workload.namespace) != workload.namespace
            result[full if taken or full in existing else plain] = workload
    return result


def plan(
    workload: Workload,
    number: int,
    *,
    name: str,
    block: Block,
    folders: Folders,
    inherited: Mapping[str, str],
) -> InstancePlan:
    """Plan a replica of a workload as instance ``number`` of the mesh."""
    addresses = block.instance(number)
    pod_fields = {
        "metadata.name": name,
        "metadata.namespace": workload.namespace,
        "spec.serviceAccountName": workload.service_account,
        "spec.nodeName": "localhost",
        "status.podIP": addresses.pod,
        "status.hostIP": "127.0.0.1",
        **{f"metadata.labels['{key}']": value for key, value in workload.labels.items()},
        **{f"metadata.annotations['{key}']": value for key, value in workload.annotations.items()},
    }
    for entry in workload.environment:
        if entry.field_path and entry.field_path not in pod_fields:
            raise InvalidInput(
                f"Deployment {workload.name}: variable {entry.name}: fieldPath {entry.field_path!r} is not supported",
                field="spec.template.spec.containers[0].env.valueFrom.fieldRef.fieldPath",
                reason="INVALID_RESOURCE",
            )
    own = resolve_environment(workload, pod_fields)
    own |= _overrides(workload, name=name, own=own, addresses=addresses, block=block, folders=folders)
    return InstancePlan(
        name=name,
        workload=workload,
        addresses=addresses,
        identity=spiffe_id(workload.service_account, workload.namespace),
        argv=resolved(tuple(expand(word, own) for word in workload.argv)),
        environ=inheritable(inherited) | own | {process.MARK: str(folders.state)},
        log=folders.logs / f"{name}.log",
        sidecar_log=folders.logs / f"{name}.sidecar.log",
        data=folders.data(name),
    )


def inheritable(environ: Mapping[str, str]) -> dict[str, str]:
    """What of the supervisor's own environment children get."""
    return {
        key: value
        for key, value in environ.items()
        if not key.startswith(_OWN_PREFIXES) and key.lower() not in _PROXIES
    }


def _overrides(
    workload: Workload,
    *,
    name: str,
    own: Mapping[str, str],
    addresses: InstanceAddresses,
    block: Block,
    folders: Folders,
) -> dict[str, str]:
    result = {
        "MLMESH_DATA_DIR": str(folders.data(name)),
        "MLMESH_OUTBOUND_HOST": addresses.outbound,
        # Endpoints have learned of the end before SIGTERM is sent: there is nothing to wait for.
        "MLMESH_DRAIN_S": "0",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{block.otlp}",
        "OTEL_SERVICE_NAME": own.get("OTEL_SERVICE_NAME") or workload.labels.get("app", workload.name),
        "POD_NAME": name,
        "POD_NAMESPACE": workload.namespace,
        "POD_IP": addresses.pod,
        "PYTHONUNBUFFERED": "1",
    }
    listen = own.get("MLMESH_LISTEN") or (f"0.0.0.0:{workload.ports['grpc']}" if "grpc" in workload.ports else "")
    for key, value in (("MLMESH_LISTEN", listen), ("MLMESH_METRICS_LISTEN", own.get("MLMESH_METRICS_LISTEN", ""))):
        if value and not value.startswith("unix:"):
            result[key] = f"{addresses.application}:{value.rpartition(':')[2]}"
    return result


def resolved(argv: tuple[str, ...]) -> tuple[str, ...]:
    """``python`` in a manifest is the image's; here it is the interpreter that runs the mesh, with its packages."""
    if argv and argv[0] in {"python", "python3"}:
        return (sys.executable, *argv[1:])
    return argv
