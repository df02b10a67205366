"""Secrets that DestinationRules name: what is read of them, who gets them, and what is warned of."""

from __future__ import annotations

import base64

import pytest

from mlmesh_local.backend_credentials import backend_credentials
from mlmesh_local.certificates import KeyPair, RootBundle
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources import Document, InvalidResource, ResourceSet, load_resources
from mlmesh_local.resources.credentials import Credential
from tests.support.pki import Authority

AUTHORITY = Authority()
LEAF = AUTHORITY.leaf()
CERT, KEY, ROOTS = (text.decode() for text in (LEAF.cert, LEAF.key, AUTHORITY.pem))


def secret(name: str, **texts: str) -> str:
    data = {key.replace("_", "."): base64.b64encode(text.encode()).decode() for key, text in texts.items()}
    return f"{{apiVersion: v1, kind: Secret, metadata: {{name: {name}}}, data: {data}}}\n---\n"


def rule(tls: str, more: str = "") -> str:
    spec = f"{{host: api.example.com, trafficPolicy: {{tls: {tls}}}{more}}}"
    return (
        f"{{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {{name: out}}, spec: {spec}}}\n---\n"
    )


POD = """
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec: {containers: [{name: it, image: it}]}
---
"""
GATEWAY = POD.replace("{app: web}", "{app: edge}, annotations: {inject.istio.io/templates: gateway}").replace(
    "web", "edge"
)
SELECTED = ", workloadSelector: {matchLabels: {app: web}}"


def load(*texts: str) -> ResourceSet:
    return load_resources([Document(source="it.yaml", text="".join(texts))])


def node(kind: str, namespace: str = "mlmesh") -> ProxyNode:
    return ProxyNode(
        id="it", kind=kind, namespace=namespace, service_account="it", labels={"app": "web"}, pod_address="127.0.0.2"
    )


def test_pairs_and_roots_are_given_under_the_names_that_clusters_ask_for() -> None:
    found = load(rule("{mode: MUTUAL, credentialName: c}"), secret("c", tls_crt=CERT, tls_key=KEY, ca_crt=ROOTS))
    roots = RootBundle(name="kubernetes://c-cacert", roots=ROOTS)
    pair = KeyPair(name="kubernetes://c", certificate=CERT, key=KEY)
    assert backend_credentials(found, node("gateway")) == (roots, pair)
    assert backend_credentials(found, node("gateway", "elsewhere")) == ()
    assert backend_credentials(found, node("sidecar")) == ()
    assert KEY not in repr(found)


def test_a_sidecar_gets_them_by_a_selector() -> None:
    for selector, given in ((SELECTED, 1), (SELECTED.replace("web", "other"), 0)):
        found = load(rule("{mode: SIMPLE, credentialName: c}", selector), secret("c", cacert=ROOTS))
        assert len(backend_credentials(found, node("sidecar"))) == given
        assert not backend_credentials(found, node("sidecar", "elsewhere"))


def test_roots_may_be_in_a_secret_of_their_own() -> None:
    others = Authority().pem.decode()
    found = load(
        rule("{mode: SIMPLE, credentialName: 'kubernetes://mlmesh/c'}"),
        secret("c", ca_crt=others),
        secret("c-cacert", ca_crt=ROOTS),
    )
    assert backend_credentials(found, node("gateway")) == (
        RootBundle(name="kubernetes://mlmesh/c-cacert", roots=ROOTS),
    )


def test_other_secrets_are_not_kept_and_what_is_no_base64_is_refused() -> None:
    assert not load(secret("token", token="it"))
    (only,) = load("{apiVersion: v1, kind: Secret, metadata: {name: c}, stringData: {ca.crt: none}}").specs(Credential)
    assert only.roots == ""
    with pytest.raises(InvalidResource, match=r'"ca\.crt" is not base64'):
        load("{apiVersion: v1, kind: Secret, metadata: {name: c}, data: {ca.crt: '-'}}")


@pytest.mark.parametrize(
    ("tls", "more", "held", "warned"),
    [
        ("{mode: SIMPLE, credentialName: c}", "", "", 'there is no Secret "mlmesh/c"'),
        ("{mode: SIMPLE, credentialName: c}", SELECTED, "", 'there is no Secret "mlmesh/c"'),
        ("{mode: SIMPLE, credentialName: c}", SELECTED.replace("web", "other"), "", ""),
        ("{mode: SIMPLE, credentialName: c}", "", secret("c", tls_crt=CERT, tls_key=KEY), "has no ca.crt"),
        ("{mode: MUTUAL, credentialName: c}", "", secret("c", ca_crt=ROOTS), "has no tls.crt with tls.key"),
        ("{mode: MUTUAL, credentialName: c}", "", secret("c", tls_crt=CERT, tls_key="it", ca_crt=ROOTS), "tls.crt"),
        ("{mode: SIMPLE, credentialName: 'configmap://mlmesh/c'}", "", "", ""),
        ("{mode: SIMPLE, credentialName: c}", "", secret("c", ca_crt=ROOTS), ""),
    ],
)
def test_what_is_missing_is_warned_of(tls: str, more: str, held: str, warned: str) -> None:
    warnings = [
        one
        for one in ResourceSet().apply(load(POD, GATEWAY, rule(tls, more), held)).warnings
        if "credentialName" in one
    ]
    assert (warned in "".join(warnings)) if warned else not warnings
