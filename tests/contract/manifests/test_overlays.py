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
FOLDERS = [manifests.BASE, manifests.ISTIO, CPU, GPU, PROD, KUBEFLOW, JSON]
SCALED = ("inference-v1", "inference-v2", "ingressgateway")


def _by_name(docs: list[manifests.Document]) -> dict[tuple[str, str], manifests.Document]:
    return {(d["kind"], d["metadata"]["name"]): d for d in docs}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: cast(Path, path).name)
def test_our_renderer_and_kustomize_agree(folder: Path) -> None:
    done = tools.run("kustomize", "build", folder)
    assert done.returncode == 0, done.stderr
    real = [d for d in yaml.safe_load_all(done.stdout) if d]
    assert _by_name(manifests.render(folder)) == _by_name(real)


@pytest.mark.parametrize("folder", [CPU, GPU, PROD, KUBEFLOW, JSON], ids=lambda path: cast(Path, path).name)
def test_overlays_hold_workloads_and_traffic(folder: Path) -> None:
    rendered = set(_by_name(manifests.render(folder)))
    gone = {("PersistentVolumeClaim", "registry-data")} if folder is PROD else set()
    assert set(_by_name(manifests.documents(manifests.BASE))) - rendered == gone
    assert set(_by_name(manifests.documents(manifests.ISTIO))) <= rendered


@pytest.mark.parametrize("folder", [CPU, GPU, PROD, KUBEFLOW, JSON], ids=lambda path: cast(Path, path).name)
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
