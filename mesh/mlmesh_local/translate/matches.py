"""Conditions of VirtualServices as Envoy's route matches."""

from __future__ import annotations

from collections.abc import Iterable

from mlmesh_local.envoy_types import Json
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.catalog import full_gateway, selects
from mlmesh_local.resources.model import HttpMatch, StringMatch

ANYTHING: Json = {"prefix": "/"}


def string_matcher(match: StringMatch) -> Json:
    """type.matcher.v3.StringMatcher."""
    if match.how == "regex":
        return {"safe_regex": {"regex": match.value}}
    return {match.how: match.value}


def header_matcher(name: str, match: StringMatch, *, invert: bool = False) -> Json:
    """route.v3.HeaderMatcher. Inverted, it also holds where the header is missing, as in Istio."""
    result: Json = {"name": name}
    if match.how == "present":
        result["present_match"] = True
    else:
        result["string_match"] = string_matcher(match)
        if invert:
            result["treat_missing_header_as_empty"] = True
    if invert:
        result["invert_match"] = True
    return result


def route_match(match: HttpMatch | None) -> Json:
    """route.v3.RouteMatch of conditions; what depends on the proxy is decided by `applies`."""
    if match is None:
        return dict(ANYTHING)
    result: Json = _path(match.uri)
    if match.ignore_uri_case and "safe_regex" not in result:
        result["case_sensitive"] = False
    headers = [header_matcher(name, value) for name, value in match.headers]
    headers += [header_matcher(name, value, invert=True) for name, value in match.without_headers]
    headers.sort(key=lambda header: str(header["name"]))
    for name, value in ((":method", match.method), (":authority", match.authority), (":scheme", match.scheme)):
        if value:
            headers.append(header_matcher(name, value))
    if headers:
        result["headers"] = headers
    if match.query_params:
        result["query_parameters"] = [_query(name, value) for name, value in match.query_params]
    return result


def _path(uri: StringMatch | None) -> Json:
    if uri is None or uri.how == "present":
        return dict(ANYTHING)
    if uri.how == "exact":
        return {"path": uri.value}
    return {"prefix": uri.value} if uri.how == "prefix" else {"safe_regex": {"regex": uri.value}}


def _query(name: str, value: StringMatch) -> Json:
    if value.how == "present":
        return {"name": name, "present_match": True}
    return {"name": name, "string_match": string_matcher(value)}


def applies(match: HttpMatch | None, proxy: ProxyNode, gateway: str, namespace: str, listener_port: int) -> bool:
    """Whether conditions on the port, the gateway and the client can hold for a proxy at all.

    As in Istio, conditions on the client count only where no gateways are named.
    """
    if match is None:
        return True
    if match.port and match.port != listener_port:
        return False
    if match.gateways:
        return gateway in {full_gateway(name, namespace) for name in match.gateways}
    if not selects(match.source_labels, proxy.labels):
        return False
    return match.source_namespace in ("", proxy.namespace)


def is_catch_all(match: Json) -> bool:
    """Whether a route match takes everything, so that no route after it is reached."""
    everything = match.get("prefix") == "/" or match.get("safe_regex", {}).get("regex") == ".*"
    return everything and not match.get("headers") and not match.get("query_parameters")


def unique(items: Iterable[str]) -> list[str]:
    """Items in order, each once."""
    return list(dict.fromkeys(items))
