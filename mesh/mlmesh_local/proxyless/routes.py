"""Virtual hosts of a sidecar as gRPC clients understand them.

What gRPC's clients understand: gRFC A28 (matches, weights), A31 (timeouts), A33 (faults), A42 (hash), A44 (retries). An
unknown field of a route is ignored by them, so everything that is not known here is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from mlmesh_local.envoy_types import Json
from mlmesh_local.proxyless.refusals import Refusal, provenance, refused_cluster

FAULT_FILTER: Final = "envoy.filters.http.fault"
NO_SIDECAR: Final = "gRPC clients cannot do this themselves"
ATTEMPTS_MAX: Final = 5

_HARMLESS_ROUTE = {
    "name",
    "match",
    "route",
    "metadata",
    "decorator",
    "tracing",
    "stat_prefix",
    "typed_per_filter_config",
}
_HARMLESS_ACTION = {
    "cluster",
    "weighted_clusters",
    "retry_policy",
    "hash_policy",
    "timeout",
    "max_grpc_timeout",
    "max_stream_duration",
    "cluster_not_found_response_code",
    "upgrade_configs",
}
_MATCHES = {"prefix", "path", "safe_regex", "headers", "case_sensitive", "runtime_fraction"}
_HEADER_MATCHES = {
    "name",
    "exact_match",
    "safe_regex_match",
    "range_match",
    "present_match",
    "prefix_match",
    "suffix_match",
    "contains_match",
    "string_match",
    "invert_match",
}
_FIELDS = {
    "request_mirror_policies": "mirror",
    "prefix_rewrite": "rewrite",
    "regex_rewrite": "rewrite",
    "path_rewrite_policy": "rewrite",
    "host_rewrite_literal": "rewrite",
    "auto_host_rewrite": "rewrite",
    "append_x_forwarded_host": "rewrite",
    "host_rewrite_header": "rewrite",
    "redirect": "redirect",
    "direct_response": "directResponse",
    "cors": "corsPolicy",
    "envoy.filters.http.cors": "corsPolicy",
    "request_headers_to_add": "headers",
    "request_headers_to_remove": "headers",
    "response_headers_to_add": "headers",
    "response_headers_to_remove": "headers",
    "query_parameters": "match.queryParams",
}
_RETRIED = {"cancelled", "deadline-exceeded", "internal", "resource-exhausted", "unavailable"}
# gRPC retries what no server has seen by itself; the others mean HTTP statuses, which gRPC calls do not fail with.
_BY_ITSELF = {"connect-failure", "refused-stream", "reset-before-request", "retriable-status-codes"}


def client_routes(host: Json, tolerated: frozenset[str], clusters: Mapping[str, object]) -> tuple[Json, list[Refusal]]:
    """A virtual host for every authority, and what of it had to be refused."""
    found: list[Refusal] = []
    routes = [_route(route, host, tolerated, clusters, found) for route in host.get("routes", ())]
    return {"name": host["name"], "domains": ["*"], "routes": routes}, found


def _route(
    route: Json, host: Json, tolerated: frozenset[str], clusters: Mapping[str, object], found: list[Refusal]
) -> Json:
    where = provenance(route, f"the route of {host['name']}")
    here: list[Refusal] = []
    match = _match(route.get("match", {}), where, here)
    action = route.get("route", {})
    unknown = (host.keys() & _FIELDS.keys()) | (route.keys() - _HARMLESS_ROUTE)
    here.extend(_refusal(where, field) for field in sorted(unknown))
    here.extend(_refusal(where, field) for field in sorted(action.keys() - _HARMLESS_ACTION))
    result: Json = {"match": match}
    faults = dict(route.get("typed_per_filter_config", {}))
    fault = faults.pop(FAULT_FILTER, None)
    here.extend(_refusal(where, field) for field in sorted(faults))
    if fault is not None:
        result["typed_per_filter_config"] = {FAULT_FILTER: fault}
    sends = _action(action, where, here, clusters)
    kept = [refusal for refusal in here if refusal.root not in tolerated]
    found.extend(here)
    result["route"] = {"cluster": refused_cluster(kept)} if kept else sends
    return result


def _refusal(where: str, field: str) -> Refusal:
    return Refusal(where=where, field=_FIELDS.get(field, field), why=NO_SIDECAR)


def _match(match: Json, where: str, found: list[Refusal]) -> Json:
    """The match; what cannot be asked is left out, so that the refusal meets every call that might be meant."""
    kept = {key: value for key, value in match.items() if key in _MATCHES and key != "headers"}
    if not kept.keys() & {"prefix", "path", "safe_regex"}:
        kept["prefix"] = ""
    unknown = sorted(match.keys() - _MATCHES - {"path_separated_prefix"})
    if "path_separated_prefix" in match:
        # gRPC's paths are /package.Service/Method: a prefix that ends between the two means the same.
        kept["prefix"] = f"{match['path_separated_prefix']}/"
    found.extend(Refusal(where=where, field=_FIELDS.get(key, f"match.{key}"), why=NO_SIDECAR) for key in unknown)
    headers = []
    for header in match.get("headers", ()):
        if header.get("name") == ":method" and _always_post(header):
            continue
        if header.get("name", "").startswith(":") or header.keys() - _HEADER_MATCHES:
            why = f"gRPC clients do not match {header.get('name')}"
            found.append(Refusal(where=where, field="match", why=why))
            continue
        headers.append(header)
    if headers:
        kept["headers"] = headers
    return kept


def _always_post(header: Json) -> bool:
    text = header.get("string_match", {})
    return not header.get("invert_match") and text.get("exact", header.get("exact_match")) == "POST"


def _action(action: Json, where: str, found: list[Refusal], clusters: Mapping[str, object]) -> Json:
    result: Json = {}
    if action.get("timeout", "0s") != "0s":
        why = "gRPC's Python clients end such calls at the wrong time; set deadlines in the client"
        found.append(Refusal(where=where, field="timeout", why=why))
    if "weighted_clusters" in action:
        entries = action["weighted_clusters"]["clusters"]
        weighted = []
        for entry in entries:
            found.extend(_refusal(where, field) for field in sorted(entry.keys() - {"name", "weight"}))
            weighted.append({"name": entry["name"], "weight": entry["weight"]})
        result["weighted_clusters"] = {"clusters": weighted}
    elif "cluster" in action:
        result["cluster"] = action["cluster"]
    missing = [name for name in action_clusters(result) if name not in clusters]
    found.extend(Refusal(where=where, field="route", why=f"there is no destination {name}") for name in missing)
    hashes = [policy for policy in action.get("hash_policy", ()) if "header" in policy]
    if len(hashes) != len(action.get("hash_policy", ())):
        why = "gRPC clients hash by headers only"
        found.append(Refusal(where=where, field="loadBalancer.consistentHash", why=why))
    if hashes:
        result["hash_policy"] = hashes
    policy = _retries(action.get("retry_policy"), where, found)
    if policy:
        result["retry_policy"] = policy
    return result


def action_clusters(action: Json) -> Iterator[str]:
    """Clusters that an action sends to."""
    if "cluster" in action:
        yield action["cluster"]
    yield from (entry["name"] for entry in action.get("weighted_clusters", {}).get("clusters", ()))


def _retries(policy: Json | None, where: str, found: list[Refusal]) -> Json | None:
    if not policy:
        return None
    words = [word.strip() for word in policy.get("retry_on", "").split(",") if word.strip()]
    unknown = [word for word in words if word not in _RETRIED | _BY_ITSELF]
    if unknown or policy.get("retriable_status_codes"):
        why = f"gRPC clients retry on {', '.join(sorted(_RETRIED))}, not on HTTP statuses"
        found.append(Refusal(where=where, field="retries.retryOn", why=why))
    if "per_try_timeout" in policy:
        found.append(Refusal(where=where, field="retries.perTryTimeout", why=NO_SIDECAR))
    conditions = [word for word in words if word in _RETRIED]
    if not conditions:
        return None
    result: Json = {
        "retry_on": ",".join(conditions),
        "num_retries": min(policy.get("num_retries", 1), ATTEMPTS_MAX - 1),
    }
    if "retry_back_off" in policy:
        result["retry_back_off"] = policy["retry_back_off"]
    return result
