"""TLS of listeners, with the checks of clients, as Istio's Gateways have it.

pilot/pkg/config/kube/gateway/conversion.go of Istio (buildTLS) says how.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlmesh_local.resources.gateway_api.attach import Fault, Surroundings
from mlmesh_local.resources.gateway_api.model import Listener, ListenerTls, ObjectRef
from mlmesh_local.resources.gateway_api.model_tls import ClientValidation
from mlmesh_local.resources.meta import Meta

IN_SECRET = "kubernetes-gateway://"  # noqa: S105  The beginning of a name.
IN_CONFIG_MAP = "configmap://"
ROOTS_SUFFIX = "-cacert"
_TLS_MODE = "gateway.istio.io/tls-terminate-mode"
_OWN_CERTIFICATE = {
    "ISTIO_SIMPLE": {"mode": "SIMPLE", "credentialName": "builtin://"},
    "ISTIO_MUTUAL": {"mode": "ISTIO_MUTUAL"},
}
_CIPHERS = "gateway.istio.io/tls-cipher-suites"


def server_tls(
    meta: Meta, listener: Listener, check: ClientValidation | None, around: Surroundings
) -> tuple[dict[str, Any] | None, Fault | None]:
    """TLS settings of a listener's server (None without TLS), and what is wrong with what they refer to."""
    tls = listener.tls
    if tls is None:
        return None, None
    options = tls.options
    if tls.mode == "Passthrough":
        mode = "AUTO_PASSTHROUGH" if options.get("gateway.istio.io/listener-protocol") == "auto-passthrough" else ""
        return _ciphers({"mode": mode or "PASSTHROUGH"}, options), None
    wanted = options.get(_TLS_MODE, "")
    if wanted in _OWN_CERTIFICATE:
        return dict(_OWN_CERTIFICATE[wanted]), None
    document: dict[str, Any] = {"mode": wanted if wanted in ("MUTUAL", "OPTIONAL_MUTUAL") else "SIMPLE"}
    names, fault = _credentials(meta, tls, around)
    if not names:
        return document, fault
    if len(names) == 1:
        document["credentialName"] = names[0]
    else:
        document["credentialNames"] = names
    fault = _check_clients(document, meta, check, around, wanted) if check is not None else None
    return document if fault else _ciphers(document, options), fault


def _credentials(meta: Meta, tls: ListenerTls, around: Surroundings) -> tuple[list[str], Fault | None]:
    """Istio's names of the certificates that may be used. One of them is enough."""
    if len(tls.certificates) > 2:
        message = "TLS mode can only support up to 2 server certificates"
        return [], Fault(reason="InvalidCertificateRef", message=message)
    names: list[str] = []
    faults: list[Fault] = []
    own = meta.namespace
    for ref in tls.certificates:
        space = ref.namespace or own
        if (ref.group, ref.kind) != ("", "Secret"):
            message = f"invalid certificate reference {_described(ref)}, only secret is allowed"
            faults.append(Fault(reason="InvalidCertificateRef", message=message))
        elif space != own and not around.granted((_kind(meta), own), "Secret", space, ref.name):
            message = (
                f'certificateRef {ref.name}/{space} not accessible to a Gateway in namespace "{own}" '
                "(missing a ReferenceGrant?)"
            )
            faults.append(Fault(reason="RefNotPermitted", message=message))
        else:
            names.append(f"{IN_SECRET}{space}/{ref.name}")
    joined = "; ".join(fault.message for fault in faults)
    return names, Fault(reason=faults[0].reason, message=joined) if faults else None


def _check_clients(
    document: dict[str, Any], meta: Meta, check: ClientValidation, around: Surroundings, wanted: str
) -> Fault | None:
    if len(check.roots) > 1:
        return Fault(reason="InvalidCACertificateRef", message="only one caCertificateRef is supported")
    name, fault = _roots(meta, check.roots[0], around)
    if fault is not None:
        return fault
    optional = check.insecure if wanted not in ("MUTUAL", "OPTIONAL_MUTUAL") else wanted == "OPTIONAL_MUTUAL"
    document["mode"] = "OPTIONAL_MUTUAL" if optional else "MUTUAL"
    document["insecureSkipVerify"] = check.insecure and wanted not in ("MUTUAL", "OPTIONAL_MUTUAL")
    document["caCertCredentialName"] = name
    return None


def _roots(meta: Meta, ref: ObjectRef, around: Surroundings) -> tuple[str, Fault | None]:
    own = meta.namespace
    space = ref.namespace or own
    start = f"invalid CA certificate reference {_described(ref)}"
    if (ref.group, ref.kind) not in (("", "ConfigMap"), ("", "Secret")):
        message = f"{start}, only secret and configmap are allowed"
        return "", Fault(reason="InvalidCACertificateKind", message=message)
    if ref.kind == "ConfigMap":
        bundle = around.bundles.get((space, ref.name))
        if bundle is None:
            message = f"{start}, configmap {space}/{ref.name} not found"
            return "", Fault(reason="InvalidCACertificateRef", message=message)
        if not bundle.valid:
            return "", Fault(reason="InvalidCACertificateRef", message=f"{start}, the bundle is malformed")
    # Istio looks for a grant of this name.
    if space != own and not around.granted((_kind(meta), own), ref.kind, space, f"{ref.name}{ROOTS_SUFFIX}"):
        message = (
            f'caCertificateRef {space}/{ref.name} not accessible to a Gateway in namespace "{own}" '
            "(missing a ReferenceGrant?)"
        )
        return "", Fault(reason="RefNotPermitted", message=message)
    kind = IN_CONFIG_MAP if ref.kind == "ConfigMap" else IN_SECRET
    return f"{kind}{space}/{ref.name}{ROOTS_SUFFIX}", None


def client_certificate_fault(meta: Meta, ref: ObjectRef | None, around: Surroundings) -> Fault | None:
    """What is wrong with the certificate that a Gateway shows to backends. Istio's proxies do not use it."""
    if ref is None:
        return None
    if (ref.group, ref.kind) != ("", "Secret"):
        message = f"invalid clientCertificateRef {_described(ref)}, only secret is allowed"
        return Fault(reason="InvalidClientCertificateRef", message=message)
    space = ref.namespace or meta.namespace
    if space != meta.namespace and not around.granted(("Gateway", meta.namespace), "Secret", space, ref.name):
        message = (
            f'clientCertificateRef {ref.name}/{space} not accessible to a Gateway in namespace "{meta.namespace}" '
            "(missing a ReferenceGrant?)"
        )
        return Fault(reason="RefNotPermitted", message=message)
    return None


def _kind(meta: Meta) -> str:
    return meta.kind.removeprefix("Kubernetes")


def _described(ref: ObjectRef) -> str:
    return f"{ref.group}/{ref.kind}/{ref.name}.{ref.namespace}"


def _ciphers(document: dict[str, Any], options: Mapping[str, str]) -> dict[str, Any]:
    names = [name.strip() for name in options.get(_CIPHERS, "").split(",") if name.strip()]
    if names:
        document["cipherSuites"] = names
    return document
