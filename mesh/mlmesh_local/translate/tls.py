"""TLS contexts: mutual TLS between sidecars, gateways' servers, TLS to the outside."""

from __future__ import annotations

from mlmesh_local.envoy_types import Json, typed
from mlmesh_local.model import TRUST_SECRET, WORKLOAD_SECRET
from mlmesh_local.resources.mesh_tls import TlsSettings
from mlmesh_local.translate.names import ADS, CREDENTIALS_ADS

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
_INVALID = "invalid://"
IN_CONFIG_MAP = "configmap://"
"""Beginning of the name of roots in a ConfigMap: "configmap://namespace/name"."""

_KINDS_OF_SECRETS = ("kubernetes://", "kubernetes-gateway://", IN_CONFIG_MAP)
# Istio lists istio-peer-exchange first; Envoy without that extension would then choose HTTP/1.
SERVER_ALPN = ["h2", "http/1.1"]


def secret_config(name: str) -> Json:
    """Where Envoy gets a secret from."""
    return {"name": name, "sds_config": ADS if name in (WORKLOAD_SECRET, TRUST_SECRET) else CREDENTIALS_ADS}


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
                "tls_certificate_sds_secret_configs": [secret_config(WORKLOAD_SECRET)],
                "combined_validation_context": {
                    "default_validation_context": {"match_typed_subject_alt_names": sans},
                    "validation_context_sds_secret_config": secret_config(TRUST_SECRET),
                },
            },
        }
    )


def mesh_server(trust_domains: tuple[str, ...], settings: TlsSettings) -> Json:
    """Transport socket of a sidecar's inbound connection: a certificate of these trust domains is demanded.

    ``trust_domains`` are the mesh's own and its aliases: one authority may sign for several, and without the check of
    the name every one of them would be let in. ``settings`` is what MeshConfig says of mutual TLS.
    """
    sans = [_uri("prefix", f"spiffe://{domain}/") for domain in trust_domains]
    parameters = dict(_MESH_PARAMETERS)
    if settings.min_version:
        parameters["tls_minimum_protocol_version"] = settings.min_version
    if settings.cipher_suites:
        parameters["cipher_suites"] = list(settings.cipher_suites)
    return _downstream(
        {
            "require_client_certificate": True,
            "common_tls_context": {
                "tls_params": parameters,
                "alpn_protocols": SERVER_ALPN,
                "tls_certificate_sds_secret_configs": [secret_config(WORKLOAD_SECRET)],
                "combined_validation_context": {
                    "default_validation_context": {"match_typed_subject_alt_names": sans},
                    "validation_context_sds_secret_config": secret_config(TRUST_SECRET),
                },
            },
        }
    )


def credential_secret(credential_name: str) -> str:
    """SDS name of a Gateway's credential; its roots are under the name with "-cacert" added.

    Istio's "builtin://" stands for the certificate of the workload, "invalid://" for one that never comes.
    """
    if credential_name.startswith("builtin://"):
        return WORKLOAD_SECRET
    if credential_name.startswith(_INVALID):
        return _INVALID
    return credential_name if credential_name.startswith(_KINDS_OF_SECRETS) else f"kubernetes://{credential_name}"


def root_secret(credential_name: str) -> str:
    """SDS name of the roots that a credential comes with."""
    if credential_name.startswith("builtin://"):
        return TRUST_SECRET
    return credential_secret(f"{credential_name}-cacert")


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
