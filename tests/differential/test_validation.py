"""Documents are refused exactly where Istio refuses them: `istioctl validate` and the schemas of the custom resources.

Each file in validation/ holds specs of one kind. Istio is asked when the test runs. What the laptop mesh refuses by
name ("not supported") although Istio takes it is no mismatch: docs/mesh/fields.md lists it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlmesh_local.resources import Document, InvalidResource, load_resources
from tests.support.tools import ROOT, run

FOLDER = Path(__file__).parent / "validation"
KINDS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SCHEMAS = ROOT / ".tools" / "crds"
_SECURITY = ("AuthorizationPolicy", "PeerAuthentication", "RequestAuthentication")
_GATEWAY_API = (
    "GRPCRoute",
    "GatewayClass",
    "HTTPRoute",
    "KubernetesGateway",
    "ReferenceGrant",
    "TCPRoute",
    "TLSRoute",
)


# What only we refuse, and why.
STRICTER = {
    "{rules: [{from: []}]}": "written empty it would match every caller, which nobody means",
    "{rules: [{to: []}]}": "written empty it would match every operation, which nobody means",
    "{host: a, trafficPolicy: {loadBalancer: {consistentHash: {httpCookie: {name: c, ttl: -1s}}}}}": "Envoy refuses it",
}


def _version(kind: str) -> str:
    if kind in _GATEWAY_API:
        return "gateway.networking.k8s.io/v1"
    if kind in _SECURITY:
        return "security.istio.io/v1"
    if kind == "Telemetry":
        return "telemetry.istio.io/v1"
    versions = {"EnvoyFilter": "v1alpha3", "ProxyConfig": "v1beta1"}
    return f"networking.istio.io/{versions.get(kind, 'v1')}"


def _documents(kind: str) -> dict[str, dict[str, Any]]:
    specs = yaml.safe_load((FOLDER / f"{kind}.yaml").read_text())
    metadata = {} if kind == "GatewayClass" else {"namespace": "shop"}
    prefix = kind.lower()
    return {
        f"{prefix}-{number:03d}": {
            "apiVersion": _version(kind),
            "kind": kind.removeprefix("Kubernetes"),
            "metadata": {"name": f"{prefix}-{number:03d}", **metadata},
            "spec": spec,
        }
        for number, spec in enumerate(specs)
    }


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Why Istio refuses a document, by the document's name."""
    if not (SCHEMAS / "istio").is_dir():
        pytest.skip("the schemas are not here: `make tools` gets them")
    folder = tmp_path_factory.mktemp("validation")
    file, answer = folder / "all.yaml", folder / "refused.json"
    everything = {kind: _documents(kind) for kind in KINDS}
    # As JSON, which has one meaning: of the words y and no, YAML has several.
    texts = [json.dumps(document) for documents in everything.values() for document in documents.values()]
    file.write_text("\n---\n".join(texts))
    schemas = f"{SCHEMAS / 'istio'},{SCHEMAS / 'gateway-api'}"
    checked = run("istiod-memory", "-check", "-crds", schemas, "-o", answer, file)
    assert checked.returncode == 0, checked.stderr
    found = {name.split("/")[-1]: why for name, why in json.loads(answer.read_text())["refused"].items()}
    said = run("istioctl", "validate", "-f", file)
    # Warnings come before the errors.
    for line in (said.stdout + said.stderr).partition("Error:")[2].splitlines():
        name = re.search(r"\b([a-z]+-\d{3})\b", line)
        if name and not name.group(1).startswith(tuple(kind.lower() for kind in _GATEWAY_API)):
            found.setdefault(name.group(1), line)
    return found


def _refused_by_us(document: dict[str, Any]) -> str:
    try:
        load_resources([Document(source="it.yaml", text=json.dumps(document))])
    except InvalidResource as error:
        return error.message
    return ""


def _by_name(message: str) -> bool:
    return "not supported" in message or "that the laptop mesh" in message


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_documents_are_refused(kind: str, refused: dict[str, str]) -> None:
    mismatches: list[str] = []
    for name, document in _documents(kind).items():
        ours = _refused_by_us(document)
        spec = yaml.safe_dump(document["spec"], default_flow_style=True, width=10_000).strip()
        if name in refused and not ours:
            mismatches.append(f"only Istio refuses {spec}: {refused[name][:200]}")
        elif ours and name not in refused and not _by_name(ours) and spec not in STRICTER:
            mismatches.append(f"only we refuse {spec}: {ours[:200]}")
    assert not mismatches, "\n".join(mismatches)
