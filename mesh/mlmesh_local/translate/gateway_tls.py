"""TLS contexts of a gateway's servers (pilot/pkg/networking/core/listener.go: BuildListenerTLSContext)."""

from __future__ import annotations

from mlmesh_local.envoy_types import Json, typed
from mlmesh_local.model import TRUST_SECRET, WORKLOAD_SECRET
from mlmesh_local.resources.ciphers import is_cipher_suite
from mlmesh_local.resources.mesh_tls import TlsSettings
from mlmesh_local.resources.model_gateways import ServerTls
from mlmesh_local.translate import tls as mesh_tls

_VERSIONS = {"TLSV1_0": "TLSv1_0", "TLSV1_1": "TLSv1_1", "TLSV1_2": "TLSv1_2", "TLSV1_3": "TLSv1_3"}
_SAN_TYPES = ("URI", "DNS", "EMAIL", "IP_ADDRESS")


def server_context(tls: ServerTls, defaults: TlsSettings) -> Json:
    """Transport socket of a server that ends TLS. Named certificates come over SDS, files are read by Envoy.

    ``defaults`` are MeshConfig's, for what the server does not say.
    """
    common: Json = {"alpn_protocols": mesh_tls.SERVER_ALPN}
    if tls.mode == "ISTIO_MUTUAL":
        common["tls_certificate_sds_secret_configs"] = [mesh_tls.secret_config(WORKLOAD_SECRET)]
        common |= _combined(tls, TRUST_SECRET)
        return _socket(common, required=True)
    parameters = _parameters(tls, defaults)
    if parameters:
        common["tls_params"] = parameters
    if tls.credentials:
        common["tls_certificate_sds_secret_configs"] = [
            mesh_tls.secret_config(mesh_tls.credential_secret(name)) for name in tls.credentials
        ]
    else:
        common["tls_certificates"] = [
            {"certificate_chain": {"filename": chain}, "private_key": {"filename": key}}
            for chain, key in tls.certificates
        ]
    if tls.mode != "SIMPLE":
        common |= _validation(tls)
    return _socket(common, required=tls.mode == "MUTUAL")


def _socket(common: Json, *, required: bool) -> Json:
    context = {"require_client_certificate": required, "common_tls_context": common}
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": typed("envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext", context),
    }


def cipher_suites(names: tuple[str, ...]) -> list[str]:
    """Suites that Envoy knows, each once; expressions such as "-ALL" are left to it."""
    return list(dict.fromkeys(name for name in names if is_cipher_suite(name)))


def _parameters(tls: ServerTls, defaults: TlsSettings) -> Json:
    result: Json = {}
    if defaults.min_version:
        result["tls_minimum_protocol_version"] = defaults.min_version
    if defaults.cipher_suites:
        result["cipher_suites"] = list(defaults.cipher_suites)
    if defaults.curves:
        result["ecdh_curves"] = list(defaults.curves)
    if tls.min_version in _VERSIONS:
        result["tls_minimum_protocol_version"] = _VERSIONS[tls.min_version]
    if tls.max_version in _VERSIONS:
        result["tls_maximum_protocol_version"] = _VERSIONS[tls.max_version]
    suites = cipher_suites(tls.cipher_suites)
    if suites:
        result["cipher_suites"] = suites
    return result


def _validation(tls: ServerTls) -> Json:
    """How clients' certificates are checked."""
    if not tls.credentials and not tls.ca_credential_name:
        checks = {**_checks(tls), "trusted_ca": {"filename": tls.ca_certificates}}
        if tls.ca_crl:
            checks["crl"] = {"filename": tls.ca_crl}
        return {"validation_context": checks}
    if tls.ca_credential_name:
        return _combined(tls, mesh_tls.credential_secret(tls.ca_credential_name))
    return _combined(tls, mesh_tls.root_secret(tls.credentials[0]))


def _combined(tls: ServerTls, roots: str) -> Json:
    return {
        "combined_validation_context": {
            "default_validation_context": _checks(tls),
            "validation_context_sds_secret_config": mesh_tls.secret_config(roots),
        }
    }


def _checks(tls: ServerTls) -> Json:
    checks: Json = {}
    if tls.subject_alt_names:
        checks["match_typed_subject_alt_names"] = _names(tls)
    if tls.verify_spki:
        checks["verify_certificate_spki"] = list(tls.verify_spki)
    if tls.verify_hash:
        checks["verify_certificate_hash"] = list(tls.verify_hash)
    if tls.insecure_skip_verify:
        checks["trust_chain_verification"] = "ACCEPT_UNTRUSTED"
    return checks


def _names(tls: ServerTls) -> list[Json]:
    return [{"san_type": kind, "matcher": {"exact": name}} for name in tls.subject_alt_names for kind in _SAN_TYPES]
