from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlmesh_local.addresses import Block
from mlmesh_local.instances import Folders, InstancePlan, named, plan
from mlmesh_local.resources.model import Deployment
from mlmesh_local.resources.parse import Document, load_resources, read_documents
from mlmesh_local.workloads import Workload, expand, workload_of
from mlmesh_runtime.errors import InvalidInput

GATEWAY = {"inject.istio.io/templates": "gateway"}
DEPLOYMENT = yaml.safe_load("""
apiVersion: apps/v1
kind: Deployment
metadata: {name: registry, namespace: mlmesh}
spec:
  replicas: 2
  strategy: {type: Recreate}
  selector: {matchLabels: {app: registry}}
  template:
    metadata: {labels: {app: registry, version: v1}}
    spec:
      serviceAccountName: registry
      terminationGracePeriodSeconds: 45
      securityContext: {runAsNonRoot: true}
      containers:
        - name: registry
          image: mlmesh/registry:1
          command: [python, -m, mlmesh_registry]
          args: ["--name=$(POD_NAME)"]
          ports: [{name: grpc, containerPort: 9000}, {name: http-metrics, containerPort: 9090}]
          env:
            - {name: MLMESH_LISTEN, value: "0.0.0.0:9000"}
            - {name: MLMESH_METRICS_LISTEN, value: "0.0.0.0:9090"}
            - {name: MLMESH_DATA_DIR, value: /data}
            - {name: MLMESH_DRAIN_S, value: "5"}
            - {name: GREETING, value: "$(POD_NAMESPACE)/$(POD_NAME)"}
            - {name: ACCOUNT, valueFrom: {fieldRef: {fieldPath: spec.serviceAccountName}}}
            - {name: VERSION, valueFrom: {fieldRef: {fieldPath: "metadata.labels['version']"}}}
            - {name: BOTH, value: "$(ACCOUNT)-$$(VERSION)-$(MISSING)"}
          startupProbe: {grpc: {port: 9000}, periodSeconds: 2, failureThreshold: 30}
          readinessProbe: {grpc: {port: 9000, service: ready}, periodSeconds: 5, timeoutSeconds: 2}
          livenessProbe: {grpc: {port: 9000}, initialDelaySeconds: 3}
          resources: {requests: {cpu: "1"}}
          volumeMounts: [{name: data, mountPath: /data}]
      volumes: [{name: data, persistentVolumeClaim: {claimName: data}}]
""")


def read(document: dict[str, Any]) -> Workload:
    (deployment,) = load_resources([Document(source="a.yaml", text=yaml.safe_dump(document))]).specs(Deployment)
    return workload_of(deployment)


def planned(document: dict[str, Any], inherited: dict[str, str] | None = None) -> InstancePlan:
    return plan(
        read(document),
        7,
        name="registry-1",
        block=Block(second=80),
        folders=Folders(state=Path("/state"), working=Path("/work")),
        inherited=inherited or {},
    )


def containers(deployment: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = deployment["spec"]["template"]["spec"]["containers"]
    return found


def container(deployment: dict[str, Any]) -> dict[str, Any]:
    return containers(deployment)[0]


def changed(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    document = copy.deepcopy(DEPLOYMENT)
    change(document)
    return document


def test_a_deployment_is_read() -> None:
    workload = read(DEPLOYMENT)
    assert (workload.name, workload.namespace, workload.service_account) == ("registry", "mlmesh", "registry")
    assert (workload.replicas, workload.grace_s, workload.is_gateway) == (2, 45, False)
    assert workload.labels == {"app": "registry", "version": "v1"}
    assert workload.ports == {"grpc": 9000, "http-metrics": 9090}
    assert workload.startup is not None
    assert (workload.startup.period_s, workload.startup.failures_max) == (2, 30)
    assert workload.readiness is not None
    assert (workload.readiness.service, workload.readiness.timeout_s) == ("ready", 2)
    assert workload.liveness is not None
    # Kubernetes' defaults.
    assert (workload.liveness.initial_delay_s, workload.liveness.period_s) == (3, 10)
    assert (workload.liveness.timeout_s, workload.liveness.failures_max, workload.liveness.successes_min) == (1, 3, 1)


def test_an_instance_gets_its_addresses_identity_and_folders() -> None:
    instance = planned(DEPLOYMENT)
    assert instance.name == "registry-1"
    assert instance.identity == "spiffe://cluster.local/ns/mlmesh/sa/registry"
    assert instance.argv == (sys.executable, "-m", "mlmesh_registry", "--name=registry-1")
    expected = {
        "MLMESH_LISTEN": "127.80.2.7:9000",
        "MLMESH_METRICS_LISTEN": "127.80.2.7:9090",
        "MLMESH_DATA_DIR": "/state/data/registry-1",
        "MLMESH_OUTBOUND_HOST": "127.80.3.7",
        "MLMESH_DRAIN_S": "0",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.80.0.1:4317",
        "OTEL_SERVICE_NAME": "registry",
        "POD_NAME": "registry-1",
        "POD_NAMESPACE": "mlmesh",
        "ACCOUNT": "registry",
        "VERSION": "v1",
        "BOTH": "registry-$(VERSION)-$(MISSING)",
    }
    assert {key: instance.environ.get(key) for key in expected} == expected


def test_the_shell_of_the_person_does_not_leak_into_workloads() -> None:
    inherited = {
        "PATH": "/bin",
        "HTTPS_PROXY": "http://proxy",
        "MLMESH_LISTEN": "x",
        "OTEL_TRACES_SAMPLER": "always_on",
    }
    environ = planned(DEPLOYMENT, inherited).environ
    assert environ["PATH"] == "/bin"
    assert "HTTPS_PROXY" not in environ
    assert "OTEL_TRACES_SAMPLER" not in environ
    assert environ["MLMESH_LISTEN"] == "127.80.2.7:9000"


def test_a_gateway_has_no_process_of_its_own() -> None:
    def to_gateway(document: dict[str, Any]) -> None:
        document["spec"]["template"]["metadata"]["annotations"] = GATEWAY
        document["spec"]["template"]["spec"]["containers"] = [
            {"name": "istio-proxy", "image": "auto", "ports": [{"containerPort": 8443}]}
        ]

    instance = planned(changed(to_gateway))
    assert instance.workload.is_gateway
    assert instance.workload.ports == {"8443": 8443}
    assert instance.argv == ()


def test_other_commands_stay_as_they_are() -> None:
    document = changed(lambda d: container(d).update(command=["sleep", "infinity"], args=[]))
    assert planned(document).argv == ("sleep", "infinity")


CONTAINER = "spec.template.spec.containers[0]"


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("spec.template.spec.containers", lambda d: containers(d).append({"name": "second", "command": ["true"]})),
        (f"{CONTAINER}.command", lambda d: container(d).pop("command")),
        (
            f"{CONTAINER}.readinessProbe.httpGet.port",
            lambda d: container(d).update(readinessProbe={"httpGet": {"port": "none"}}),
        ),
        (f"{CONTAINER}.livenessProbe.exec.command", lambda d: container(d).update(livenessProbe={"exec": {}})),
        (f"{CONTAINER}.command", lambda d: d["spec"]["template"]["metadata"].update(annotations=GATEWAY)),
    ],
)
def test_what_one_machine_cannot_do_is_refused_with_its_path(
    path: str, change: Callable[[dict[str, Any]], None]
) -> None:
    with pytest.raises(InvalidInput) as refused:
        read(changed(change))
    assert refused.value.violations[0].field == path
    assert refused.value.reason == "INVALID_RESOURCE"
    assert str(refused.value).startswith(f"a.yaml:1: Deployment mlmesh/registry: {path}: ")


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("$(A)", "1"),
        ("x$(A)y$(A)", "x1y1"),
        ("$$(A)", "$(A)"),
        ("$(B)", "$(B)"),
        ("$A", "$A"),
        ("a$", "a$"),
        ("$(A", "$(A"),
    ],
)
def test_references_are_replaced_as_kubernetes_does(text: str, expanded: str) -> None:
    assert expand(text, {"A": "1"}) == expanded


def test_the_manifests_of_the_project_are_understood() -> None:
    folder = Path(__file__).parents[3] / "manifests" / "base"
    deployments = load_resources(read_documents([folder])).specs(Deployment)
    found = {deployment.meta.name: workload_of(deployment) for deployment in deployments}
    assert {"registry", "training", "inference-v1", "inference-v2", "toolbox", "ingressgateway"} <= set(found)
    assert found["ingressgateway"].is_gateway
    assert found["toolbox"].argv == ("sleep", "infinity")
    assert found["inference-v1"].readiness is not None


def test_workloads_of_one_name_in_two_namespaces_keep_their_names() -> None:
    first, second = (
        read(changed(lambda document, space=space: document["metadata"].update(namespace=space)))  # type: ignore[misc]
        for space in ("mlmesh", "other")
    )
    both = named([first, second], {})
    assert {name: workload.namespace for name, workload in both.items()} == {
        "registry-0": "mlmesh",
        "registry-1": "mlmesh",
        "registry-0.other": "other",
        "registry-1.other": "other",
    }
    running = {name: workload.namespace for name, workload in both.items()}
    assert list(named([second], running)) == ["registry-0.other", "registry-1.other"]
    assert named([second, first], running) == both
