"""What production applies: the overlays, by our own renderer and by the real kustomize."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import yaml

from tests.support import manifests, tools

CPU = manifests.OVERLAYS / "cpu"
GPU = manifests.OVERLAYS / "gpu"
PROD = manifests.OVERLAYS / "prod"
KUBEFLOW = manifests.OVERLAYS / "kubeflow"
JSON = manifests.OVERLAYS / "json"
AMBIENT = manifests.OVERLAYS / "ambient"
WHOLE = [CPU, GPU, PROD, KUBEFLOW, JSON, AMBIENT]
FOLDERS = [manifests.BASE, manifests.ISTIO, *WHOLE]
SCALED = ("inference-v1", "inference-v2", "ingressgateway")


def _by_name(docs: list[manifests.Document]) -> dict[tuple[str, str], manifests.Document]:
    return {(d["kind"], d["metadata"]["name"]): d for d in docs}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: cast(Path, path).name)
def test_our_renderer_and_kustomize_agree(folder: Path) -> None:
    done = tools.run("kustomize", "build", folder)
    assert done.returncode == 0, done.stderr
    real = [d for d in yaml.safe_load_all(done.stdout) if d]
    assert _by_name(manifests.render(folder)) == _by_name(real)


@pytest.mark.parametrize("folder", WHOLE, ids=lambda path: cast(Path, path).name)
def test_overlays_hold_workloads_and_traffic(folder: Path) -> None:
    rendered = set(_by_name(manifests.render(folder)))
    gone = {("PersistentVolumeClaim", "registry-data")} if folder is PROD else set()
    assert set(_by_name(manifests.documents(manifests.BASE))) - rendered == gone
    assert set(_by_name(manifests.documents(manifests.ISTIO))) <= rendered


@pytest.mark.parametrize("folder", WHOLE, ids=lambda path: cast(Path, path).name)
def test_applying_again_does_not_undo_the_autoscalers(folder: Path) -> None:
    deployments = manifests.of_kind(manifests.render(folder), "Deployment")
    assert {name for name, d in deployments.items() if "replicas" not in d["spec"]} == set(SCALED)


@pytest.mark.parametrize("name", ["inference-v1", "inference-v2"])
def test_gpu_inference(name: str) -> None:
    deployment = manifests.of_kind(manifests.render(GPU), "Deployment")[name]
    (container,) = manifests.containers(deployment)
    assert container["image"] == "mlmesh/inference:0.1.0-tensorrt"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["resources"]["requests"]["nvidia.com/gpu"] == 1
    pod = deployment["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"
    # Nothing else of the workload is lost in the merge.
    assert container["command"] == ["python", "-m", "mlmesh_inference"]
    assert container["startupProbe"]["grpc"] == {"port": 9000}


def test_only_inference_asks_for_gpus() -> None:
    for name, deployment in manifests.of_kind(manifests.render(GPU), "Deployment").items():
        limits = [c["resources"]["limits"] for c in manifests.containers(deployment)]
        assert any("nvidia.com/gpu" in limit for limit in limits) == name.startswith("inference")


def test_two_registries_keep_nothing_of_their_own() -> None:
    deployment = manifests.of_kind(manifests.render(PROD), "Deployment")["registry"]
    assert deployment["spec"]["replicas"] == 2
    assert deployment["spec"]["strategy"]["type"] == "RollingUpdate"
    volumes = {volume["name"]: volume for volume in deployment["spec"]["template"]["spec"]["volumes"]}
    assert set(volumes["data"]) == {"name", "emptyDir"}
    (container,) = manifests.containers(deployment)
    env = {entry["name"]: entry for entry in container["env"]}
    # Where they keep it instead comes from a Secret, never from these files.
    for name in ("MLMESH_REGISTRY_DATABASE_URL", "MLMESH_REGISTRY_BLOBS_URL", "AWS_SECRET_ACCESS_KEY"):
        assert env[name]["valueFrom"]["secretKeyRef"]["name"] == "registry-storage"
    assert env["MLMESH_LISTEN"]["value"] == "0.0.0.0:9000"


def test_training_may_handle_trainjobs_and_nothing_else_of_the_cluster() -> None:
    rendered = manifests.render(KUBEFLOW)
    role = manifests.of_kind(rendered, "Role")["training"]
    assert {resource for rule in role["rules"] for resource in rule["resources"]} == {"trainjobs"}
    assert not manifests.of_kind(rendered, "ClusterRole")
    accounts = manifests.of_kind(rendered, "ServiceAccount")
    mounted = {name for name, account in accounts.items() if account.get("automountServiceAccountToken", True)}
    assert mounted == {"training"}
    (container,) = manifests.containers(manifests.of_kind(rendered, "Deployment")["training"])
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert env["MLMESH_TRAINING_BACKEND"] == "kubernetes"


def test_ambient_pods_have_no_sidecars_and_a_waypoint_that_tells_who_calls() -> None:
    rendered = manifests.render(AMBIENT)
    labels = manifests.of_kind(rendered, "Namespace")["mlmesh"]["metadata"]["labels"]
    assert "istio-injection" not in labels
    assert labels["istio.io/dataplane-mode"] == "ambient"
    (waypoint,) = [d for d in rendered if d["apiVersion"].startswith("gateway.networking.k8s.io/")]
    assert waypoint["metadata"]["name"] == labels["istio.io/use-waypoint"]
    assert waypoint["metadata"]["annotations"]["ambient.istio.io/xfcc-include-client-identity"] == "true"
    # Without this the services would believe whoever writes the header.
    for deployment in manifests.of_kind(rendered, "Deployment").values():
        for container in manifests.containers(deployment):
            env = {entry["name"]: entry.get("value") for entry in container.get("env", ())}
            assert env.get("MLMESH_IDENTITY_SOURCE", "xfcc") == "xfcc"


def test_ambient_policies_by_method_are_the_waypoints_and_nothing_goes_past_it() -> None:
    rendered = manifests.render(AMBIENT)
    policies = manifests.of_kind(rendered, "AuthorizationPolicy")
    for name, policy in policies.items():
        rules = policy["spec"].get("rules", [])
        speaks_http = any("paths" in to["operation"] for rule in rules for to in rule.get("to", ()))
        if name != "ingressgateway":
            # ztunnel denies what it cannot check, and a waypoint takes no policy by selector.
            assert speaks_http == ("targetRefs" in policy["spec"]), name
        assert not ("targetRefs" in policy["spec"] and "selector" in policy["spec"])
    services = set(manifests.of_kind(rendered, "Service"))
    for app in ("registry", "training", "inference"):
        assert policies[app]["spec"]["targetRefs"] == [{"group": "", "kind": "Service", "name": app}]
        assert app in services
        pods = policies[f"{app}-pods"]["spec"]
        assert pods["selector"] == {"matchLabels": {"app": app}}
        sources = {
            p for rule in pods["rules"] for source in rule.get("from", ()) for p in source["source"]["principals"]
        }
        assert sources == {"cluster.local/ns/mlmesh/sa/waypoint"}
        open_ports = [to["operation"]["ports"] for rule in pods["rules"] if "from" not in rule for to in rule["to"]]
        assert open_ports == [["9090"]]
    assert policies["deny-by-default"]["spec"] == {}


def test_ambient_asks_for_no_tls_inside_that_of_ztunnel() -> None:
    rendered = manifests.render(AMBIENT)
    for rule in manifests.of_kind(rendered, "DestinationRule").values():
        assert "tls" not in rule["spec"]["trafficPolicy"]
    for authentication in manifests.of_kind(rendered, "PeerAuthentication").values():
        assert authentication["spec"]["mtls"] == {"mode": "STRICT"}


@pytest.mark.parametrize("folder", WHOLE, ids=lambda path: cast(Path, path).name)
def test_istio_has_nothing_to_say_of_what_is_applied(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    file.write_text(yaml.safe_dump_all(manifests.render(folder)))
    valid = tools.run("istioctl", "validate", "-f", file)
    assert valid.returncode == 0, valid.stderr
    analyzed = tools.run("istioctl", "analyze", "--use-kube=false", "--output", "json", file)
    assert analyzed.returncode == 0, analyzed.stderr
    assert yaml.safe_load(analyzed.stdout) == []
