"""What production applies: the overlays, by our own renderer and by the real kustomize."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import yaml

from tests.support import manifests, tools

CPU = manifests.OVERLAYS / "cpu"
GPU = manifests.OVERLAYS / "gpu"
FOLDERS = [manifests.BASE, manifests.ISTIO, CPU, GPU]
SCALED = ("inference-v1", "inference-v2", "ingressgateway")


def _by_name(docs: list[manifests.Document]) -> dict[tuple[str, str], manifests.Document]:
    return {(d["kind"], d["metadata"]["name"]): d for d in docs}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: cast(Path, path).name)
def test_our_renderer_and_kustomize_agree(folder: Path) -> None:
    done = tools.run("kustomize", "build", folder)
    assert done.returncode == 0, done.stderr
    real = [d for d in yaml.safe_load_all(done.stdout) if d]
    assert _by_name(manifests.render(folder)) == _by_name(real)


@pytest.mark.parametrize("folder", [CPU, GPU], ids=lambda path: cast(Path, path).name)
def test_overlays_hold_workloads_and_traffic(folder: Path) -> None:
    rendered = set(_by_name(manifests.render(folder)))
    assert set(_by_name(manifests.documents(manifests.BASE))) <= rendered
    assert set(_by_name(manifests.documents(manifests.ISTIO))) <= rendered


@pytest.mark.parametrize("folder", [CPU, GPU], ids=lambda path: cast(Path, path).name)
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
