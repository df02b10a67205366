"""The workloads as the rest of the platform expects them: names, ports, identities, probes, security, environment."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from mlmesh_cli.config import VARIABLES as CLI_VARIABLES
from mlmesh_runtime.config import VARIABLES, Settings
from tests.support import manifests

DOCS = manifests.documents(manifests.BASE)
DEPLOYMENTS = manifests.of_kind(DOCS, "Deployment")
SERVICES = manifests.of_kind(DOCS, "Service")
SERVERS = ("registry", "training", "inference-v1", "inference-v2")

# deployment: (app, service account, replicas, module or None)
WORKLOADS: dict[str, tuple[str, str, int, str | None]] = {
    "registry": ("registry", "registry", 1, "mlmesh_registry"),
    "training": ("training", "training", 1, "mlmesh_training"),
    "inference-v1": ("inference", "inference", 2, "mlmesh_inference"),
    "inference-v2": ("inference", "inference", 1, "mlmesh_inference"),
    "toolbox": ("toolbox", "operator", 1, None),
    "ingressgateway": ("ingressgateway", "ingressgateway", 1, None),
}


def _pod(name: str) -> dict[str, Any]:
    return dict(DEPLOYMENTS[name]["spec"]["template"]["spec"])


def _labels(name: str) -> dict[str, str]:
    return dict(DEPLOYMENTS[name]["spec"]["template"]["metadata"]["labels"])


def _environment(name: str) -> dict[str, str | None]:
    (container,) = manifests.containers(DEPLOYMENTS[name])
    return {e["name"]: e.get("value") for e in container["env"]}


def test_these_workloads_and_no_others() -> None:
    assert set(DEPLOYMENTS) == set(WORKLOADS)
    assert set(SERVICES) == {"registry", "training", "inference", "ingressgateway"}


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_workload(name: str) -> None:
    app, account, replicas, module = WORKLOADS[name]
    assert _labels(name)["app"] == app
    assert _pod(name)["serviceAccountName"] == account
    assert account in manifests.of_kind(DOCS, "ServiceAccount")
    assert DEPLOYMENTS[name]["spec"]["replicas"] == replicas
    (container,) = manifests.containers(DEPLOYMENTS[name])
    if module:
        assert container["command"] == ["python", "-m", module]
    selector = DEPLOYMENTS[name]["spec"]["selector"]["matchLabels"]
    assert selector.items() <= _labels(name).items()


def test_no_two_deployments_select_the_same_pods() -> None:
    for name, deployment in DEPLOYMENTS.items():
        selector = deployment["spec"]["selector"]["matchLabels"].items()
        assert [other for other in DEPLOYMENTS if selector <= _labels(other).items()] == [name]


@pytest.mark.parametrize("name", ["registry", "training", "inference", "ingressgateway"])
def test_service_reaches_pods_and_says_its_protocol(name: str) -> None:
    service = SERVICES[name]
    selected = [d for d in DEPLOYMENTS if service["spec"]["selector"].items() <= _labels(d).items()]
    assert selected, "no pod has these labels"
    expected = {"tls-grpc": 8443} if name == "ingressgateway" else {"grpc": 9000, "http-metrics": 9090}
    assert {p["name"]: p["port"] for p in service["spec"]["ports"]} == expected
    for deployment in selected:
        (container,) = manifests.containers(DEPLOYMENTS[deployment])
        ports = {p["name"]: p["containerPort"] for p in container["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == expected[port["name"]]


@pytest.mark.parametrize("name", SERVERS)
def test_probes_ask_grpc_health(name: str) -> None:
    (container,) = manifests.containers(DEPLOYMENTS[name])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"] == {"port": 9000}, probe
    # A slow start must not be taken for a hang.
    startup = container["startupProbe"]
    assert startup["failureThreshold"] * startup["periodSeconds"] >= 60


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_security(name: str) -> None:
    pod = _pod(name)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in manifests.containers(DEPLOYMENTS[name]):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)


def test_no_account_gets_a_token_of_the_api_server() -> None:
    for account in manifests.of_kind(DOCS, "ServiceAccount").values():
        assert account["automountServiceAccountToken"] is False


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_resources(name: str) -> None:
    for container in manifests.containers(DEPLOYMENTS[name]):
        resources = container["resources"]
        assert {"cpu", "memory"} <= set(resources["requests"])
        # Memory is bounded; the CPU is not, since throttling only adds latency.
        assert set(resources["limits"]) == {"memory"}


@pytest.mark.parametrize("name", SERVERS)
def test_every_place_to_write_is_a_volume(name: str) -> None:
    (container,) = manifests.containers(DEPLOYMENTS[name])
    volumes = {v["name"]: v for v in _pod(name)["volumes"]}
    mounts = {m["mountPath"]: volumes[m["name"]] for m in container["volumeMounts"]}
    assert "emptyDir" in mounts["/tmp"]
    data = mounts[str(_environment(name)["MLMESH_DATA_DIR"])]
    if name in ("registry", "training"):
        claim = data["persistentVolumeClaim"]["claimName"]
        assert claim in manifests.of_kind(DOCS, "PersistentVolumeClaim")
        # One writer: two pods must never share the volume.
        assert DEPLOYMENTS[name]["spec"]["strategy"] == {"type": "Recreate"}
        assert DEPLOYMENTS[name]["spec"]["replicas"] == 1
    else:
        assert "emptyDir" in data


@pytest.mark.parametrize("name", [*SERVERS, "toolbox"])
def test_the_environment_is_one_that_processes_understand(name: str) -> None:
    known = {variable.name for variable in (*VARIABLES, *(CLI_VARIABLES if name == "toolbox" else ()))}
    assert set(_environment(name)) <= known


@pytest.mark.parametrize("name", SERVERS)
def test_the_environment_makes_settings(name: str) -> None:
    environment = {k: v for k, v in _environment(name).items() if v is not None}
    settings = Settings.from_environment(environment, service=name)
    assert str(settings.data_dir) == "/data"
    spec = _pod(name)
    # The kubelet must not kill what is still within its own time to end.
    assert settings.drain_s > 0
    assert spec["terminationGracePeriodSeconds"] >= settings.drain_s + settings.grace_s + 5


def test_each_subset_serves_its_alias() -> None:
    assert _environment("inference-v1")["MLMESH_SERVE"] == "*@stable"
    assert _environment("inference-v2")["MLMESH_SERVE"] == "*@canary"
    assert _labels("inference-v1")["version"] == "v1"
    assert _labels("inference-v2")["version"] == "v2"


@pytest.mark.parametrize("name", SERVERS)
def test_the_sidecar_is_there_first_and_lets_metrics_pass(name: str) -> None:
    annotations = DEPLOYMENTS[name]["spec"]["template"]["metadata"]["annotations"]
    proxy = yaml.safe_load(annotations["proxy.istio.io/config"])
    assert proxy["holdApplicationUntilProxyStarts"] is True
    assert annotations["traffic.sidecar.istio.io/excludeInboundPorts"] == "9090"


def test_the_gateway_is_injected() -> None:
    template = DEPLOYMENTS["ingressgateway"]["spec"]["template"]
    assert template["metadata"]["annotations"]["inject.istio.io/templates"] == "gateway"
    assert template["metadata"]["labels"]["istio"] == "ingressgateway"
    (container,) = template["spec"]["containers"]
    assert (container["name"], container["image"]) == ("istio-proxy", "auto")


def test_the_namespace_is_injected() -> None:
    assert manifests.of_kind(DOCS, "Namespace")["mlmesh"]["metadata"]["labels"]["istio-injection"] == "enabled"


def test_disruption_budgets_cover_each_server_once() -> None:
    for name in (*SERVERS, "ingressgateway"):
        matching = [
            budget
            for budget in manifests.of_kind(DOCS, "PodDisruptionBudget").values()
            if budget["spec"]["selector"]["matchLabels"].items() <= _labels(name).items()
        ]
        # Two budgets on one pod make every eviction fail.
        assert len(matching) == 1, name
        assert matching[0]["spec"]["maxUnavailable"] == 1


def test_autoscalers_scale_what_exists_and_may_be_many() -> None:
    for scaler in manifests.of_kind(DOCS, "HorizontalPodAutoscaler").values():
        target = scaler["spec"]["scaleTargetRef"]
        assert (target["apiVersion"], target["kind"]) == ("apps/v1", "Deployment")
        deployment = DEPLOYMENTS[target["name"]]
        assert deployment["spec"].get("strategy", {}).get("type") != "Recreate"
        assert scaler["spec"]["minReplicas"] == deployment["spec"]["replicas"]
        assert scaler["spec"]["maxReplicas"] > scaler["spec"]["minReplicas"]
        (metric,) = scaler["spec"]["metrics"]
        names = [c["name"] for c in manifests.containers(deployment)]
        assert metric["containerResource"]["container"] in names
        (container,) = manifests.containers(deployment)
        assert metric["containerResource"]["name"] in container["resources"]["requests"]
