"""Every Kubernetes document against the schemas of Kubernetes itself."""

from __future__ import annotations

from pathlib import Path

import kubernetes_validate
import pytest

from tests.support import manifests

# The oldest release that still gets fixes and the newest that the schemas know.
RELEASES = ("1.34", kubernetes_validate.latest_version())
CUSTOM = ("monitoring.coreos.com/", "networking.istio.io/", "security.istio.io/", "telemetry.istio.io/")

RENDERED = {
    "base": manifests.render(manifests.BASE),
    "cpu": manifests.render(manifests.OVERLAYS / "cpu"),
    "gpu": manifests.render(manifests.OVERLAYS / "gpu"),
}


def _builtin(docs: list[manifests.Document]) -> list[manifests.Document]:
    return [d for d in docs if not d["apiVersion"].startswith(CUSTOM)]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", sorted(RENDERED))
def test_every_document_is_valid(name: str, release: str) -> None:
    docs = _builtin(RENDERED[name])
    assert len(docs) > 20
    for doc in docs:
        kubernetes_validate.validate(doc, release, strict=True)


def test_a_wrong_field_is_refused() -> None:
    doc = manifests.load(manifests.BASE / "inference.yaml")[0]
    doc["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(doc, RELEASES[0], strict=True)


@pytest.mark.parametrize("folder", [manifests.BASE, manifests.ISTIO], ids=["base", "istio"])
def test_every_file_is_listed_in_its_kustomization(folder: Path) -> None:
    listed = set(manifests.load(folder / "kustomization.yaml")[0]["resources"])
    assert listed == {p.name for p in folder.glob("*.yaml")} - {"kustomization.yaml"}


@pytest.mark.parametrize("name", sorted(RENDERED))
def test_every_document_names_the_namespace_itself(name: str) -> None:
    # The laptop mesh reads the files as they are, without kustomize.
    for doc in RENDERED[name]:
        if doc["kind"] != "Namespace":
            assert doc["metadata"]["namespace"] == "mlmesh", doc["metadata"]["name"]


def test_no_name_is_taken_twice() -> None:
    for docs in RENDERED.values():
        names = [(d["kind"], d["metadata"]["name"]) for d in docs]
        assert len(names) == len(set(names))


def test_the_service_monitor_finds_the_metrics_ports() -> None:
    docs = RENDERED["base"]
    monitor = manifests.of_kind(docs, "ServiceMonitor")["mlmesh"]
    (expression,) = monitor["spec"]["selector"]["matchExpressions"]
    assert expression["operator"] == "In"
    (endpoint,) = monitor["spec"]["endpoints"]
    assert monitor["spec"]["namespaceSelector"]["matchNames"] == ["mlmesh"]
    with_port = {
        name
        for name, service in manifests.of_kind(docs, "Service").items()
        if endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    }
    selected = {
        name
        for name, service in manifests.of_kind(docs, "Service").items()
        if service["metadata"]["labels"][expression["key"]] in expression["values"]
    }
    assert with_port == selected == {"registry", "training", "inference"}
    assert endpoint["path"] == "/metrics"
