"""BackendTLSPolicy, ConfigMaps with roots, and `spec.tls` of a Gateway."""

from __future__ import annotations

import re
from collections import Counter

from cryptography import x509

from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.gateway_api.model import ObjectRef
from mlmesh_local.resources.gateway_api.model_tls import (
    BackendTlsPolicy,
    CaBundle,
    ClientValidation,
    GatewayTls,
    PolicyTarget,
)
from mlmesh_local.resources.gateway_api.reading import (
    HOSTNAME,
    PRECISE_HOSTNAME,
    SECTION_NAME,
    at_most,
    group,
    kind,
    object_ref,
    text,
)
from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.tree import Node

ROOT_KEYS = ("cacert", "ca.crt")
"""Keys of a ConfigMap under which Istio looks for roots, in its order."""

_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_WELL_KNOWN = re.compile(rf"^(System|({_LABEL}(\.{_LABEL})*/([A-Za-z0-9][-A-Za-z0-9_.]{{0,61}})?[A-Za-z0-9]))\Z")
_URI = re.compile(r"^(([^:/?#]+):)(//([^/?#]*))([^?#]*)(\?([^#]*))?(#(.*))?")


def parse_backend_tls_policy(meta: Meta, spec: Fields) -> BackendTlsPolicy:
    """Read a BackendTLSPolicy's spec."""
    options = spec.text_map("options")
    at_most(spec, "options", len(options), 16)
    for key, value in options.items():
        if len(value) > 4096:
            spec.refuse("options", f'the value of "{key}" is longer than 4096 characters')
    targets = _targets(spec)
    spec.required("validation")
    with spec.message("validation") as inner:
        roots = _references(inner, limit=8)
        well_known = text(inner, "wellKnownCACertificates", _WELL_KNOWN, '"System" or domain/name')
        if bool(roots) == bool(well_known):
            inner.problems.add(inner.at, 'needs one of "caCertificateRefs", "wellKnownCACertificates"')
        return BackendTlsPolicy(
            meta=meta,
            targets=targets,
            hostname=text(inner, "hostname", PRECISE_HOSTNAME, "a host name in lower case", required=True),
            roots=roots,
            well_known=well_known,
            alt_names=_alt_names(inner),
        )


def _targets(spec: Fields) -> tuple[PolicyTarget, ...]:
    found: list[PolicyTarget] = []
    for item in spec.messages("targetRefs"):
        with item:
            found.append(
                PolicyTarget(
                    group=group(item, "", required=True),
                    kind=kind(item, required=True),
                    name=text(item, "name", None, "a name", required=True),
                    section=text(item, "sectionName", SECTION_NAME, "the name of a section"),
                    at=item.at,
                )
            )
    if not found:
        spec.problems.add(spec.at, '"targetRefs" needs at least one item')
    at_most(spec, "targetRefs", len(found), 16)
    several = Counter((one.group, one.kind, one.name) for one in found)
    sections = Counter((one.group, one.kind, one.name, one.section) for one in found)
    for one in found:
        twice = several[one.group, one.kind, one.name] > 1
        if twice and (not one.section or sections[one.group, one.kind, one.name, one.section] > 1):
            spec.problems.add(
                one.at, f'needs a "sectionName" of its own: {one.kind} "{one.name}" is named more than once'
            )
    return tuple(found)


def _references(fields: Fields, *, limit: int) -> tuple[ObjectRef, ...]:
    found: list[ObjectRef] = []
    for item in fields.messages("caCertificateRefs"):
        with item:
            found.append(
                ObjectRef(
                    group=group(item, "", required=True),
                    kind=kind(item, required=True),
                    name=text(item, "name", None, "a name", required=True),
                )
            )
    at_most(fields, "caCertificateRefs", len(found), limit)
    return tuple(found)


def _alt_names(fields: Fields) -> tuple[str, ...]:
    found: list[str] = []
    members = {"Hostname": "hostname", "URI": "uri"}
    for item in fields.messages("subjectAltNames"):
        with item:
            how = item.choice("type", tuple(members)) if item.required("type") else ""
            for other, name in members.items():
                pattern, what = (HOSTNAME, "a host name in lower case") if name == "hostname" else (_URI, "a URI")
                if other == how:
                    item.required(name)
                    found.append(text(item, name, pattern, what))
                else:
                    if item.has(name):
                        item.refuse(name, f'goes with type {other}, not "{how}"')
                    item.ignored(name)
    at_most(fields, "subjectAltNames", len(found), 5)
    return tuple(found)


def read_gateway_tls(spec: Fields) -> GatewayTls | None:
    """`spec.tls` of a Gateway; None when absent."""
    if not spec.has("tls"):
        spec.ignored("tls")
        return None
    default: ClientValidation | None = None
    ports: dict[int, ClientValidation | None] = {}
    certificate: ObjectRef | None = None
    with spec.message("tls") as tls:
        if tls.has("frontend"):
            with tls.message("frontend") as frontend:
                frontend.required("default")
                with frontend.message("default") as inner:
                    default = _validation(inner)
                ports = _ports(frontend)
        tls.ignored("frontend")
        if tls.has("backend"):
            with tls.message("backend") as backend:
                if backend.has("clientCertificateRef"):
                    with backend.message("clientCertificateRef") as inner:
                        certificate = object_ref(inner, group_default="", kind_default="Secret")
                backend.ignored("clientCertificateRef")
        tls.ignored("backend")
    return GatewayTls(default=default, ports=ports, client_certificate=certificate)


def _ports(frontend: Fields) -> dict[int, ClientValidation | None]:
    found: dict[int, ClientValidation | None] = {}
    items = list(frontend.messages("perPort"))
    for item in items:
        with item:
            port = item.port("port", required=True)
            item.required("tls")
            if port in found:
                item.refuse("port", f"{port} occurs twice")
            with item.message("tls") as inner:
                found[port] = _validation(inner)
    at_most(frontend, "perPort", len(items), 64)
    return found


def _validation(fields: Fields) -> ClientValidation | None:
    if not fields.has("validation"):
        fields.ignored("validation")
        return None
    with fields.message("validation") as inner:
        roots: list[ObjectRef] = []
        for item in inner.messages("caCertificateRefs"):
            with item:
                roots.append(object_ref(item))
        if not roots:
            inner.problems.add(inner.at, '"caCertificateRefs" needs at least one item')
        at_most(inner, "caCertificateRefs", len(roots), 16)
        mode = inner.choice("mode", ("AllowValidOnly", "AllowInsecureFallback"), "AllowValidOnly")
        return ClientValidation(roots=tuple(roots), insecure=mode == "AllowInsecureFallback")


def roots_of(body: Fields) -> str:
    """The roots in a ConfigMap; empty when it has none."""
    data = body.raw("data")
    values = data.value if data is not None and isinstance(data.value, dict) else {}
    found = [values[key] for key in ROOT_KEYS if key in values]
    return next((node.value for node in found if isinstance(node, Node) and isinstance(node.value, str)), "")


def parse_ca_bundle(meta: Meta, body: Fields) -> CaBundle:
    """Read a ConfigMap with roots."""
    body.ignored("data", "immutable", "binaryData")
    roots = roots_of(body)
    return CaBundle(meta=meta, roots=roots, valid=_holds_certificates(roots))


def _holds_certificates(text: str) -> bool:
    try:
        return bool(x509.load_pem_x509_certificates(text.encode()))
    except ValueError:
        return False
