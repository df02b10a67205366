"""The laptop mesh reads these very files, and what the overlays make of them, without refusing or missing anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mlmesh_local.resources import Applied, Deployment, ResourceSet, VirtualService, load_resources, read_documents
from tests.support import manifests

ISTIO_KINDS = {
    "AuthorizationPolicy",
    "DestinationRule",
    "Gateway",
    "PeerAuthentication",
    "Telemetry",
    "VirtualService",
}


def _read(*paths: Path) -> Applied:
    return ResourceSet().apply(load_resources(read_documents(list(paths))))


def test_the_files_as_they_are() -> None:
    applied = _read(manifests.BASE, manifests.ISTIO)
    written = manifests.documents(manifests.BASE) + manifests.documents(manifests.ISTIO)
    kinds = ISTIO_KINDS | {"Deployment", "Service", "ServiceAccount"}
    expected = {(d["kind"], f"mlmesh/{d['metadata']['name']}") for d in written if d["kind"] in kinds}
    expected |= {("Namespace", f"/{d['metadata']['name']}") for d in written if d["kind"] == "Namespace"}
    assert {(change.kind, change.name) for change in applied.changes} == expected
    replicas = {d.meta.name: d.replicas for d in applied.resources.specs(Deployment)}
    assert replicas["inference-v1"] == 2


@pytest.mark.parametrize("overlay", ["cpu", "gpu", "json"])
def test_what_production_applies(overlay: str, tmp_path: Path) -> None:
    rendered = tmp_path / "all.yaml"
    rendered.write_text(yaml.safe_dump_all(manifests.render(manifests.OVERLAYS / overlay)))
    applied = _read(rendered)
    assert {d.meta.name for d in applied.resources.specs(Deployment)} >= {"registry", "inference-v1", "inference-v2"}
    assert {v.meta.name for v in applied.resources.specs(VirtualService)} == {"inference", "registry", "training"}
