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
    return {
        f"n{number:03d}": {
            "apiVersion": _version(kind),
            "kind": kind.removeprefix("Kubernetes"),
            "metadata": {"name": f"n{number:03d}", **metadata},
            "spec": spec,
        }
        for number, spec in enumerate(specs)
    }


def _refused_by_istio(kind: str, documents: dict[str, dict[str, Any]], folder: Path) -> dict[str, str]:
    """Why Istio refuses a document, by its name."""
    if not (SCHEMAS / "istio").is_dir():
        pytest.skip("the schemas are not here: `make tools` gets them")
    file, answer = folder / "all.yaml", folder / "refused.json"
    file.write_text("\n---\n".join(yaml.safe_dump(document) for document in documents.values()))
    schemas = f"{SCHEMAS / 'istio'},{SCHEMAS / 'gateway-api'}"
    checked = run("istiod-memory", "-check", "-crds", schemas, "-o", answer, file)
    assert checked.returncode == 0, checked.stderr
    refused = {name.split("/")[-1]: why for name, why in json.loads(answer.read_text())["refused"].items()}
    if kind not in _GATEWAY_API:
        said = run("istioctl", "validate", "-f", file)
        # Warnings come before the errors.
        for line in (said.stdout + said.stderr).partition("Error:")[2].splitlines():
            found = re.search(r"\b(n\d{3})\b", line)
            if found:
                refused.setdefault(found.group(1), line)
    return refused


def _refused_by_us(document: dict[str, Any]) -> str:
    try:
        load_resources([Document(source="it.yaml", text=yaml.safe_dump(document))])
    except InvalidResource as error:
        return error.message
    return ""


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_documents_are_refused(kind: str, tmp_path: Path) -> None:
    documents = _documents(kind)
    theirs = _refused_by_istio(kind, documents, tmp_path)
    mismatches: list[str] = []
    for name, document in documents.items():
        ours = _refused_by_us(document)
        spec = yaml.safe_dump(document["spec"], default_flow_style=True, width=10_000).strip()
        if name in theirs and not ours:
            mismatches.append(f"only Istio refuses {spec}: {theirs[name][:200]}")
        elif ours and name not in theirs and "not supported" not in ours:
            mismatches.append(f"only we refuse {spec}: {ours[:200]}")
    assert not mismatches, "\n".join(mismatches)
