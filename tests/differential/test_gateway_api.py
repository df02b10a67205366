"""Resources of the Gateway API: what follows from them, and their statuses, are those of Istio's own controller."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlmesh_local.resources import Document, load_resources
from mlmesh_local.resources.fields import parse_duration
from mlmesh_local.resources.gateway_api.derive import conversion_of, derive
from mlmesh_local.resources.gateway_api.rules import NOWHERE
from mlmesh_local.resources.gateway_api.status import statuses
from mlmesh_local.resources.model import GatewayClass
from mlmesh_local.resources.resource_set import ResourceSet
from tests.differential.secrets import secrets
from tests.support.tools import ROOT, run

FOLDER = Path(__file__).parent / "gateway_api"
CASES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SCHEMAS = ROOT / ".tools" / "crds" / "gateway-api"


class Case:
    """A cluster as we read it, and what Istio made of it."""

    def __init__(self, name: str, folder: Path) -> None:
        documents = [document for document in yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text()) if document]
        for second, document in enumerate(documents):
            # Which of two is older decides between them.
            document["metadata"]["creationTimestamp"] = f"2026-01-01T00:00:{second:02d}Z"
            document["metadata"]["uid"] = str(second)
        text = "\n---\n".join(yaml.safe_dump(document) for document in documents)
        named = {document["metadata"]["name"] for document in documents if document["kind"] == "Namespace"}
        used = {document["metadata"].get("namespace") for document in documents} - named - {None}
        # What is in a cluster is in a namespace that is there.
        around = [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}} for name in sorted(used)]
        around += secrets(["shop/cert", "certs/cert"])
        self.ours: ResourceSet = load_resources([Document(source=f"{name}.yaml", text=text)])
        file, answer = folder / "cluster.yaml", folder / "istio.json"
        file.write_text(f"{text}\n---\n{yaml.safe_dump_all(around)}")
        if not SCHEMAS.is_dir():
            pytest.skip("the schemas of the Gateway API are not here: `make tools` gets them")
        result = run("istiod-memory", "-crds", SCHEMAS, "-o", answer, file)
        assert result.returncode == 0, result.stderr
        self.istio: dict[str, Any] = json.loads(answer.read_text())


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def test_the_schemas_accept_the_same(case: Case) -> None:
    assert case.istio["refused"] == {}


def test_the_same_gateways_and_virtual_services_follow(case: Case) -> None:
    ours = {
        (item.kind, item.meta.namespace, item.meta.name): _plain(item.spec)
        for item in conversion_of(case.ours).derived
        if item.kind in {"Gateway", "VirtualService", "DestinationRule"}
    }
    theirs = {
        (kind, item["namespace"], item["name"]): _plain(item["spec"])
        for kind, items in case.istio["derived"].items()
        for item in items
    }
    assert ours == theirs


def test_what_follows_can_be_served(case: Case) -> None:
    assert len(derive(case.ours)) >= len(case.ours)


def test_statuses_are_the_same(case: Case) -> None:
    found = statuses(conversion_of(case.ours), lambda _host, _namespace: None, case.ours.specs(GatewayClass))
    ours = {
        f"{kind.removeprefix('Kubernetes')} {namespace}/{name}": _ordered(status)
        for (kind, namespace, name), status in found.items()
    }
    # Classes that Istio adds to every cluster.
    theirs = {
        name: _ordered(status)
        for name, status in case.istio["statuses"].items()
        if name not in {"GatewayClass /istio", "GatewayClass /istio-remote"}
    }
    assert ours == theirs


def _plain(value: Any) -> Any:
    """A document in one form: durations in seconds, defaults left out."""
    if isinstance(value, dict):
        if value.get("host") == NOWHERE:
            return {}
        left_out = (("mode", "PASSTHROUGH"), ("sniHosts", []))
        return {key: _plain(inner) for key, inner in value.items() if (key, inner) not in left_out}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, str) and parse_duration(value) is not None:
        return parse_duration(value)
    return value


def _ordered(status: Any) -> Any:
    """A status without times, its conditions in one order."""
    if isinstance(status, dict):
        left_out = {"lastTransitionTime", "observedGeneration"}
        found = {key: _ordered(value) for key, value in status.items() if key not in left_out}
        if "; " in found.get("message", ""):
            # What several listeners say comes in the order of a hash table.
            found["message"] = sorted(found["message"].split("; "))
        return found
    if isinstance(status, list):
        items = [_ordered(item) for item in status]
        return sorted(items, key=lambda item: str(item["type"])) if items and "reason" in items[0] else items
    return status
