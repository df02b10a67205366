"""Pieces of Envoy's routes: timeouts, retries, faults, answers, rewriting, header edits."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping

from mlmesh_local.envoy_types import Json, typed
from mlmesh_local.resources.http_actions import GRPC_STATUS, is_authority
from mlmesh_local.resources.model import HashKey
from mlmesh_local.resources.model_routes import Cors, DirectResponse, Fault, HeaderEdits, Redirect, Retries, Rewrite
from mlmesh_local.translate.matches import string_matcher
from mlmesh_local.translate.names import fraction, seconds

FAULT_FILTER = "envoy.filters.http.fault"
CORS_FILTER = "envoy.filters.http.cors"
STATE_FILTER = "envoy.filters.http.set_filter_state"
# pilot/pkg/networking/core/route/retry/retry.go
DEFAULT_RETRY_ON = "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes"
_PREVIOUS_HOSTS: Json = {
    "name": "envoy.retry_host_predicates.previous_hosts",
    "typed_config": typed("envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"),
}
_PREVIOUS_PRIORITIES: Json = {
    "name": "envoy.retry_priorities.previous_priorities",
    "typed_config": typed(
        "envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig", {"update_frequency": 2}
    ),
}
_REDIRECT_CODES = {
    301: "MOVED_PERMANENTLY",
    302: "FOUND",
    303: "SEE_OTHER",
    307: "TEMPORARY_REDIRECT",
    308: "PERMANENT_REDIRECT",
}


def timeouts(timeout_s: float | None) -> Json:
    """Istio's pair: the route's timeout also bounds what a gRPC client asks for; 0 leaves the client's deadline."""
    text = seconds(timeout_s or 0.0)
    return {"timeout": text, "max_grpc_timeout": text}


def retry_policy(retries: Retries | None, *, hashed: bool) -> Json | None:
    """Istio's default policy with what the rule overrides; None where attempts are 0."""
    policy: Json = {
        "retry_on": DEFAULT_RETRY_ON,
        "num_retries": 2,
        "host_selection_retry_max_attempts": 5,
        "retry_host_predicate": [] if hashed else [_PREVIOUS_HOSTS],
    }
    if retries is None:
        return policy
    if retries.attempts <= 0:
        return None
    policy["num_retries"] = retries.attempts
    if retries.retry_on:
        words = [word for word in (item.strip() for item in retries.retry_on.split(",")) if word]
        codes = [int(word) for word in words if word.isdigit()]
        conditions = [word for word in words if not word.isdigit()]
        if codes and "retriable-status-codes" not in ",".join(conditions):
            conditions.append("retriable-status-codes")
        policy["retry_on"] = ",".join(conditions)
        policy["retriable_status_codes"] = codes
    if retries.per_try_timeout_s is not None:
        policy["per_try_timeout"] = seconds(retries.per_try_timeout_s)
    if retries.ignore_previous_hosts is not None:
        policy["retry_host_predicate"] = [_PREVIOUS_HOSTS] if retries.ignore_previous_hosts else []
    if retries.remote_localities:
        policy["retry_priority"] = _PREVIOUS_PRIORITIES
    if retries.backoff_s is not None:
        policy["retry_back_off"] = {"base_interval": seconds(retries.backoff_s)}
    return policy


def hash_policy(key: HashKey) -> Json:
    """route.v3.RouteAction.HashPolicy: what consistent hashing looks at."""
    if key.how == "header":
        return {"header": {"header_name": key.name}}
    if key.how == "query":
        return {"query_parameter": {"name": key.name}}
    if key.how == "source_ip":
        return {"connection_properties": {"source_ip": True}}
    cookie: Json = {"name": key.name}
    if key.cookie_ttl_s is not None:
        cookie["ttl"] = seconds(key.cookie_ttl_s)
    if key.cookie_path:
        cookie["path"] = key.cookie_path
    if key.cookie_attributes:
        cookie["attributes"] = [{"name": name, "value": value} for name, value in key.cookie_attributes]
    return {"cookie": cookie}


def redirect_action(redirect: Redirect, listener_port: int, *, tls: bool) -> Json:
    """route.v3.RedirectAction. The port of the request is that of the listener; a scheme's own port is left out."""
    action: Json = {"response_code": _REDIRECT_CODES[redirect.code]}
    if redirect.authority:
        action["host_redirect"] = redirect.authority
    if redirect.prefix_rewrite:
        action["prefix_rewrite"] = redirect.prefix_rewrite
    else:
        action["path_redirect"] = redirect.uri
    if redirect.scheme:
        action["scheme_redirect"] = redirect.scheme
    port = listener_port if redirect.same_port else redirect.port
    scheme = redirect.scheme or ("https" if tls else "http")
    if port and (port, scheme) not in ((80, "http"), (443, "https")):
        action["port_redirect"] = port
    return action


def direct_response_action(response: DirectResponse) -> Json:
    """route.v3.DirectResponseAction."""
    action: Json = {"status": response.status}
    if isinstance(response.body, str):
        action["body"] = {"inline_string": response.body}
    elif response.body is not None:
        action["body"] = {"inline_bytes": base64.b64encode(response.body).decode()}
    return action


def apply_rewrite(action: Json, match: Json, rewrite: Rewrite, *, by_segment: bool) -> None:
    """Add what is rewritten of the path to a RouteAction."""
    if rewrite.uri_regex is not None:
        action["regex_rewrite"] = {
            "pattern": {"regex": rewrite.uri_regex.match},
            "substitution": rewrite.uri_regex.rewrite,
        }
    elif by_segment and rewrite.uri == "/":
        # The prefix is removed; the slash stays where that is the whole path.
        prefix = re.escape(match.get("path_separated_prefix", ""))
        action["regex_rewrite"] = {"pattern": {"regex": f"^{prefix}(/?)(.*)"}, "substitution": "/\\2"}
    elif rewrite.uri:
        action["prefix_rewrite"] = rewrite.uri


def fault_config(fault: Fault) -> Json:
    """Configuration of the fault filter for a route."""
    result: Json = {}
    if fault.delay:
        result["delay"] = {
            "fixed_delay": seconds(fault.delay.fixed_delay_s),
            "percentage": fraction(fault.delay.percent),
        }
    if fault.abort:
        abort: Json = {}
        if fault.abort.percent is not None:
            abort["percentage"] = fraction(fault.abort.percent)
        if fault.abort.grpc_status is not None:
            abort["grpc_status"] = GRPC_STATUS.index(fault.abort.grpc_status)
        else:
            abort["http_status"] = fault.abort.http_status
        result["abort"] = abort
    return typed("envoy.extensions.filters.http.fault.v3.HTTPFault", result)


def cors_config(cors: Cors) -> Json:
    """Configuration of the CORS filter for a route."""
    result: Json = {
        "forward_not_matching_preflights": cors.forward_unmatched,
        "filter_enabled": {"default_value": {"numerator": 100, "denominator": "HUNDRED"}},
    }
    if cors.origins:
        result["allow_origin_string_match"] = [string_matcher(origin) for origin in cors.origins]
    for name, values in (
        ("allow_methods", cors.methods),
        ("allow_headers", cors.headers),
        ("expose_headers", cors.expose),
    ):
        if values:
            result[name] = ",".join(values)
    if cors.max_age_s is not None:
        result["max_age"] = str(cors.max_age_s)
    if cors.credentials is not None:
        result["allow_credentials"] = cors.credentials
    return typed("envoy.extensions.filters.http.cors.v3.CorsPolicy", result)


def request_marker() -> Json:
    """Configuration that makes mutual TLS of a request tell the other sidecar that HTTP is inside.

    Where no protocol is declared, that is how it knows; Istio's own Envoy has a filter for it.
    """
    alpn: Json = {
        "object_key": "envoy.network.application_protocols",
        "format_string": {"text_format_source": {"inline_string": "istio-h2,istio"}},
    }
    return typed("envoy.extensions.filters.http.set_filter_state.v3.Config", {"on_request_headers": [alpn]})


def apply_headers(target: Json, edits: HeaderEdits | None) -> str:
    """Add header edits to a route or weighted cluster. Returns the authority that they set, if any."""
    if edits is None:
        return ""
    groups = (
        ("request_headers_to_add", edits.request_set, edits.request_add),
        ("response_headers_to_add", edits.response_set, edits.response_add),
    )
    for field, overwrite, append in groups:
        options = [*_options(overwrite, "OVERWRITE_IF_EXISTS_OR_ADD"), *_options(append, "APPEND_IF_EXISTS_OR_ADD")]
        if options:
            target[field] = [*target.get(field, []), *options]
    for field, removed in (
        ("request_headers_to_remove", edits.request_remove),
        ("response_headers_to_remove", edits.response_remove),
    ):
        kept = [name for name in removed if not _is_internal(name)]
        if kept:
            target[field] = [*target.get(field, []), *kept]
    return _authority(edits.request_set) or _authority(edits.request_add)


def _options(headers: Mapping[str, str], action: str) -> list[Json]:
    return [
        {"header": {"key": name, "value": headers[name]}, "append_action": action}
        for name in sorted(headers)
        if not _is_internal(name)
    ]


def _authority(headers: Mapping[str, str]) -> str:
    return next((value for name, value in headers.items() if is_authority(name)), "")


def _is_internal(name: str) -> bool:
    return name.startswith(":") or name.lower() == "host"
