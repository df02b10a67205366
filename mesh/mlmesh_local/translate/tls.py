"""TLS contexts: mutual TLS between sidecars, gateways' servers, TLS to the outside."""

from __future__ import annotations

from mlmesh_local.envoy_types import Json, typed
from mlmesh_local.model import TRUST_SECRET, WORKLOAD_SECRET
from mlmesh_local.resources.model import ServerTls
from mlmesh_local.translate.names import ADS

RAW_BUFFER: Json = {
    "name": "envoy.transport_sockets.raw_buffer",
    "typed_config": typed("envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer"),
}
SYSTEM_ROOTS = "/etc/ssl/certs/ca-certificates.crt"
# Envoy's own default for clients ends at TLS 1.2.
_CLIENT_PARAMETERS: Json = {"tls_minimum_protocol_version": "TLSv1_2", "tls_maximum_protocol_version": "TLSv1_3"}
# pilot/pkg/security/authn/utils/utils.go
_MESH_PARAMETERS: Json = {
    "tls_minimum_protocol_version": "TLSv1_2",
    "tls_maximum_protocol_version": "TLSv1_3",
    "cipher_suites": [
        "ECDHE-ECDSA-AES256-GCM-SHA384",
        "ECDHE-RSA-AES256-GCM-SHA384",
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        "ECDHE-RSA-AES128-GCM-SHA256",
        "AES256-GCM-SHA384",
        "AES128-GCM-SHA256",
    ],
}
_VERSIONS = {"TLS_AUTO": "TLS_AUTO", "TLSV1_2": "TLSv1_2", "TLSV1_3": "TLSv1_3"}
# Istio lists istio-peer-exchange first; Envoy without that extension would then choose HTTP/1.
SERVER_ALPN = ["h2", "http/1.1"]


def _secret(name: str) -> Json:
    return {"name": name, "sds_config": ADS}


def _uri(how: str, value: str) -> Json:
    return {"san_type": "URI", "matcher": {how: value}}


def mesh_client(identities: tuple[str, ...], trust_domain: str, server_name: str, *, http2: bool) -> Json:
    """Transport socket of a sidecar's outbound connection: own certificate, the server's identity checked.

    Without known identities any of the trust domain is accepted.
    """
    sans = [_uri("exact", identity) for identity in identities] or [_uri("prefix", f"spiffe://{trust_domain}/")]
    return _upstream(
        {
            "sni": server_name,
            "common_tls_context": {
                "tls_params": _CLIENT_PARAMETERS,
                "alpn_protocols": ["istio", "h2"] if http2 else ["istio"],
                "tls_certificate_sds_secret_configs": [_secret(WORKLOAD_SECRET)],
                "combined_validation_context": {
                    "default_validation_context": {"match_typed_subject_alt_names": sans},
                    "validation_context_sds_secret_config": _secret(TRUST_SECRET),
                },
            },
        }
    )


def mesh_server(trust_domains: tuple[str, ...]) -> Json:
    """Transport socket of a sidecar's inbound connection: a certificate of these trust domains is demanded.

    ``trust_domains`` are the mesh's own and its aliases. One authority may sign for several: without the check of the
    name every one of them would be let in.
    """
    sans = [_uri("prefix", f"spiffe://{domain}/") for domain in trust_domains]
    return _downstream(
        {
            "require_client_certificate": True,
            "common_tls_context": {
                "tls_params": _MESH_PARAMETERS,
                "alpn_protocols": SERVER_ALPN,
                "tls_certificate_sds_secret_configs": [_secret(WORKLOAD_SECRET)],
                "combined_validation_context": {
                    "default_validation_context": {"match_typed_subject_alt_names": sans},
                    "validation_context_sds_secret_config": _secret(TRUST_SECRET),
                },
            },
        }
    )


def gateway_server(tls: ServerTls, trust_domains: tuple[str, ...]) -> Json:
    """Transport socket of a gateway's server. The certificate is the secret "kubernetes://{credentialName}"."""
    if tls.mode == "ISTIO_MUTUAL":
        return mesh_server(trust_domains)
    params = {"tls_minimum_protocol_version": _VERSIONS[tls.min_version]}
    if tls.max_version != "TLS_AUTO":
        params["tls_maximum_protocol_version"] = _VERSIONS[tls.max_version]
    name = credential_secret(tls.credential_name)
    context: Json = {
        "tls_params": params,
        "alpn_protocols": SERVER_ALPN,
        "tls_certificate_sds_secret_configs": [_secret(name)],
    }
    if tls.mode != "SIMPLE":
        sans = [
            {"san_type": kind, "matcher": {"exact": name}} for name in tls.subject_alt_names for kind in ("URI", "DNS")
        ]
        context["combined_validation_context"] = {
            "default_validation_context": {"match_typed_subject_alt_names": sans},
            "validation_context_sds_secret_config": _secret(f"{name}-cacert"),
        }
    return _downstream({"require_client_certificate": tls.mode == "MUTUAL", "common_tls_context": context})


def credential_secret(credential_name: str) -> str:
    """SDS name of a Gateway's credential; its roots are under the name with "-cacert" added."""
    return f"kubernetes://{credential_name}"


def _upstream(context: Json) -> Json:
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": typed("envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext", context),
    }


def _downstream(context: Json) -> Json:
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": typed("envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext", context),
    }
