"""What connections of a cluster run over: plain TCP, TLS, Istio's mutual TLS, each behind the PROXY protocol if asked.

The rules are those of pilot/pkg/networking/core/cluster_tls.go in Istio's source.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlmesh_local.envoy_types import Json, typed
from mlmesh_local.resources.mesh_tls import TlsSettings
from mlmesh_local.resources.model import ClientTls, TrafficPolicy
from mlmesh_local.translate import tls
from mlmesh_local.translate.pools import speaks_http2

TLS_MATCH = "envoy.transport_socket_match"
"""Metadata of endpoints that chooses among the transport sockets of a cluster."""

_PROXY = "envoy.transport_sockets.upstream_proxy_protocol"
_PROXY_CONFIG = "envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport"
# Envoy's own bound of clients is TLS 1.2.
_PARAMETERS: Json = {"tls_minimum_protocol_version": "TLSv1_2", "tls_maximum_protocol_version": "TLSv1_3"}
_TLS_CONFIG = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"


def mutual_matches(mutual: Json) -> list[Json]:
    """Mutual TLS to endpoints that say they take it, plain TCP to others."""
    return [
        {"name": "tlsMode-istio", "match": {"tlsMode": "istio"}, "transport_socket": mutual},
        {"name": "tlsMode-disabled", "match": {}, "transport_socket": tls.RAW_BUFFER},
    ]


def outside_client(rule: ClientTls, options: Json, subject_alt_names: Sequence[str], defaults: TlsSettings) -> Json:
    """TLS to a server that is no part of the mesh. Changes the HTTP options as that needs it.

    ``subject_alt_names`` are those expected where the rule names none: those of the ServiceEntry; ``defaults`` are
    MeshConfig's.
    """
    automatic = not rule.sni
    checked = automatic and not rule.subject_alt_names and not rule.insecure_skip_verify
    if automatic:
        # The host that is called is the server name, and is what the certificate must be for.
        options["upstream_http_protocol_options"] = {
            "auto_sni": True,
            **({"auto_san_validation": True} if checked else {}),
        }
    parameters = dict(_PARAMETERS)
    if defaults.curves:
        parameters["ecdh_curves"] = list(defaults.curves)
    if defaults.cipher_suites:
        parameters["cipher_suites"] = list(defaults.cipher_suites)
    common: Json = {"tls_params": parameters}
    expected = {"match_typed_subject_alt_names": _sans(rule.subject_alt_names or subject_alt_names)}
    if rule.credential_name:
        _from_credential(common, rule, expected)
    else:
        _from_files(common, rule, expected)
    if speaks_http2(options):
        common["alpn_protocols"] = ["h2"]
    return _context(rule.sni, common)


def _from_credential(common: Json, rule: ClientTls, expected: Json) -> None:
    name = tls.credential_secret(rule.credential_name)
    if rule.mode == "MUTUAL":
        common["tls_certificate_sds_secret_configs"] = [tls.secret_config(name)]
    if rule.insecure_skip_verify:
        common["validation_context"] = {}
        return
    common["combined_validation_context"] = {
        "default_validation_context": expected,
        "validation_context_sds_secret_config": tls.secret_config(tls.root_secret(rule.credential_name)),
    }


def _from_files(common: Json, rule: ClientTls, expected: Json) -> None:
    if rule.mode == "MUTUAL":
        common["tls_certificates"] = [
            {
                "certificate_chain": {"filename": rule.client_certificate},
                "private_key": {"filename": rule.private_key},
            }
        ]
    if rule.insecure_skip_verify:
        common["validation_context"] = {}
        return
    roots = rule.ca_certificates if rule.ca_certificates not in ("", "system") else tls.SYSTEM_ROOTS
    common["validation_context"] = {"trusted_ca": {"filename": roots}, **expected}
    if rule.ca_crl:
        common["validation_context"]["crl"] = {"filename": rule.ca_crl}


def _sans(subject_alt_names: Sequence[str]) -> list[Json]:
    return [{"san_type": kind, "matcher": {"exact": name}} for name in subject_alt_names for kind in ("DNS", "URI")]


def _context(server_name: str, common: Json) -> Json:
    context: Json = {"common_tls_context": common}
    if server_name:
        context["sni"] = server_name
    return {"name": "envoy.transport_sockets.tls", "typed_config": typed(_TLS_CONFIG, context)}


def apply_proxy_protocol(cluster: Json, policy: TrafficPolicy | None) -> None:
    """Begin each connection with who called, if the policy asks for it; around TLS, which follows."""
    if policy is None or policy.proxy_protocol is None:
        return
    version = policy.proxy_protocol
    if "transport_socket_matches" in cluster:
        for match in cluster["transport_socket_matches"]:
            match["transport_socket"] = _announced(match["transport_socket"], version)
    else:
        cluster["transport_socket"] = _announced(cluster.get("transport_socket", tls.RAW_BUFFER), version)


def _announced(inner: Json, version: str) -> Json:
    config: Json = {"config": {"version": version}, "transport_socket": inner}
    return {"name": _PROXY, "typed_config": typed(_PROXY_CONFIG, config)}
