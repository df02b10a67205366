"""External authorizers (action CUSTOM) as Envoy's ext_authz. Shapes are istiod's (authz/builder/extauthz.go)."""

from __future__ import annotations

from collections.abc import Sequence

from mlmesh_local.envoy_types import Json
from mlmesh_local.resources.catalog import CatalogService
from mlmesh_local.resources.model import AuthorizationPolicy, ExternalAuthorizer
from mlmesh_local.translate import names
from mlmesh_local.translate.authorization.policies import CUSTOM_PREFIX
from mlmesh_local.translate.names import filter_of, seconds
from mlmesh_local.translate.view import View

AUTHORIZER_MESSAGE = "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz"
DENIED_SUFFIX = "-deny-due-to-bad-CUSTOM-action"
_NETWORK = "envoy.extensions.filters.network.ext_authz.v3.ExtAuthz"
_NETWORK_NAME = "envoy.filters.network.ext_authz"
_HTTP_RBAC = "envoy.filters.http.rbac"
_NETWORK_RBAC = "envoy.filters.network.rbac"
_EFFECTIVE_POLICY = "shadow_effective_policy_id"
_TIMEOUT_S = 600.0

Chosen = tuple[ExternalAuthorizer, CatalogService]


def authorizer(view: View, policies: Sequence[AuthorizationPolicy]) -> Chosen | None:
    """The authorizer that the policies of a workload name and the service behind it.

    None when there is no such provider or service, or when they name several: Istio then denies what they match.
    """
    wanted = {policy.provider for policy in policies}
    known = view.mesh_config.authorizers if view.mesh_config else ()
    found = [provider for provider in known if provider.name in wanted]
    if len(wanted) != 1 or len(found) != 1:
        return None
    namespace, _, host = found[0].service.rpartition("/")
    service = view.services.get(host)
    if service is None or namespace not in ("", service.namespace):
        return None
    return found[0], service


def http_authorizer(provider: ExternalAuthorizer, service: CatalogService, shadow_prefix: str) -> Json:
    """The HTTP filter's configuration."""
    config: Json = {
        "transport_api_version": "V3",
        "failure_mode_allow": provider.fail_open,
        # Istio's value also has the provider's name. There is one provider for a workload, and without the name nothing
        # slips through in the moment in which the policies on the routes name another one than this filter asks.
        "filter_enabled_metadata": _asked_when(_HTTP_RBAC, shadow_prefix, CUSTOM_PREFIX),
    }
    if provider.protocol == "grpc":
        config["grpc_service"] = _grpc_service(provider, service)
    else:
        config["http_service"] = _http_service(provider, service)
        if provider.request_headers:
            config["allowed_headers"] = _headers(provider.request_headers)
    if provider.status_on_error:
        config["status_on_error"] = {"code": provider.status_on_error}
    if provider.body:
        config["with_request_body"] = {
            "max_request_bytes": provider.body.max_bytes,
            "allow_partial_message": provider.body.allow_partial,
            "pack_as_bytes": provider.body.as_bytes,
        }
    return config


def network_authorizer(provider: ExternalAuthorizer, service: CatalogService, shadow_prefix: str) -> Json | None:
    """The network filter; None for an authorizer that speaks HTTP, which cannot be asked about a connection."""
    if provider.protocol == "http":
        return None
    config: Json = {
        "stat_prefix": "tcp.",
        "failure_mode_allow": provider.fail_open,
        "transport_api_version": "V3",
        "grpc_service": _grpc_service(provider, service),
        "filter_enabled_metadata": _asked_when(_NETWORK_RBAC, shadow_prefix, f"{CUSTOM_PREFIX}{provider.name}"),
    }
    return filter_of(_NETWORK_NAME, _NETWORK, config)


def _asked_when(filter_name: str, shadow_prefix: str, policy_prefix: str) -> Json:
    return {
        "filter": filter_name,
        "path": [{"key": shadow_prefix + _EFFECTIVE_POLICY}],
        "value": {"string_match": {"prefix": policy_prefix}},
    }


def _grpc_service(provider: ExternalAuthorizer, service: CatalogService) -> Json:
    cluster = names.outbound_cluster(provider.port, "", service.host)
    return {"envoy_grpc": {"cluster_name": cluster, "authority": service.host}, "timeout": _timeout(provider)}


def _http_service(provider: ExternalAuthorizer, service: CatalogService) -> Json:
    result: Json = {
        "server_uri": {
            # Required, and used for nothing.
            "uri": f"http://{service.host}",
            "cluster": names.outbound_cluster(provider.port, "", service.host),
            "timeout": _timeout(provider),
        }
    }
    if provider.path_prefix:
        result["path_prefix"] = provider.path_prefix
    if provider.additional_headers:
        added = [{"key": name, "value": value} for name, value in provider.additional_headers]
        result["authorization_request"] = {"headers_to_add": added}
    passed_on = {
        "allowed_upstream_headers": provider.upstream_headers_on_allow,
        "allowed_client_headers": provider.downstream_headers_on_deny,
        "allowed_client_headers_on_success": provider.downstream_headers_on_allow,
    }
    if any(passed_on.values()):
        result["authorization_response"] = {name: _headers(value) for name, value in passed_on.items() if value}
    return result


def _timeout(provider: ExternalAuthorizer) -> str:
    return seconds(_TIMEOUT_S if provider.timeout_s is None else provider.timeout_s)


def _headers(patterns: Sequence[str]) -> Json:
    result: list[Json] = []
    for text in patterns:
        if text.startswith("*"):
            match: Json = {"suffix": text[1:]}
        elif text.endswith("*"):
            match = {"prefix": text[:-1]}
        else:
            match = {"exact": text}
        result.append({**match, "ignore_case": True})
    return {"patterns": result}
