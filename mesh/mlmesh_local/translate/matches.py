"""Conditions of VirtualServices as Envoy's route matches."""

from __future__ import annotations

from collections.abc import Iterable

from mlmesh_local.envoy_types import Json
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.catalog import full_gateway, selects
from mlmesh_local.resources.domains import claim_path
from mlmesh_local.resources.model_routes import HttpMatch, Layer4Match, StringMatch

ANYTHING: Json = {"prefix": "/"}
JWT_FILTER = "envoy.filters.http.jwt_authn"
JWT_PAYLOAD = "payload"
"""Key of the claims in the metadata of the filter that checks tokens, as Istio names it."""


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


def claim_matcher(claims: tuple[str, ...], match: StringMatch, *, invert: bool = False) -> Json:
    """type.matcher.v3.MetadataMatcher of a claim, which may be a text or a list of texts."""
    value: Json = {"present_match": True} if match.how == "present" else {"string_match": string_matcher(match)}
    result: Json = {
        "filter": JWT_FILTER,
        "path": [{"key": key} for key in (JWT_PAYLOAD, *claims)],
        "value": {"or_match": {"value_matchers": [{"list_match": {"one_of": value}}, value]}},
    }
    if invert:
        result["invert"] = True
    return result


def route_match(match: HttpMatch | None, *, by_segment: bool = False) -> Json:
    """route.v3.RouteMatch of conditions; what depends on the proxy is decided by `applies`.

    ``by_segment``: prefixes match whole segments of the path, as in the Gateway API.
    """
    if match is None:
        return dict(ANYTHING)
    result: Json = _path(match.uri, by_segment=by_segment)
    result["case_sensitive"] = not match.ignore_uri_case
    headers: list[Json] = []
    claims: list[Json] = []
    for conditions, invert in ((match.headers, False), (match.without_headers, True)):
        for name, value in conditions:
            path = claim_path(name)
            if path:
                claims.append(claim_matcher(path, value, invert=invert))
            else:
                headers.append(header_matcher(name, value, invert=invert))
    headers.sort(key=lambda header: str(header["name"]))
    for name, value_of in ((":method", match.method), (":authority", match.authority), (":scheme", match.scheme)):
        if value_of:
            headers.append(header_matcher(name, value_of))
    if headers:
        result["headers"] = headers
    if claims:
        result["dynamic_metadata"] = claims
    if match.query_params:
        result["query_parameters"] = [_query(name, value) for name, value in match.query_params]
    return result


def _path(uri: StringMatch | None, *, by_segment: bool) -> Json:
    if uri is None or uri.how == "present":
        return dict(ANYTHING)
    if uri.how == "exact":
        return {"path": uri.value}
    if uri.how == "regex":
        return {"safe_regex": {"regex": uri.value}}
    if by_segment and uri.value != "/":
        return {"path_separated_prefix": uri.value.removesuffix("/")}
    return {"prefix": uri.value}


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


def connection_applies(match: Layer4Match, proxy: ProxyNode, gateway: str, namespace: str, port: int) -> bool:
    """The same for conditions on connections of a sidecar, which must all hold."""
    if match.gateways and gateway not in {full_gateway(name, namespace) for name in match.gateways}:
        return False
    return (
        match.port in (0, port)
        and match.source_namespace in ("", proxy.namespace)
        and selects(match.source_labels, proxy.labels)
    )


def is_catch_all(match: Json) -> bool:
    """Whether a route match takes everything, so that no route after it is reached."""
    everything = (
        match.get("prefix") == "/"
        or match.get("path_separated_prefix") == "/"
        or match.get("safe_regex", {}).get("regex") == ".*"
    )
    return everything and not any(match.get(name) for name in ("headers", "query_parameters", "dynamic_metadata"))


def unique(items: Iterable[str]) -> list[str]:
    """Items in order, each once."""
    return list(dict.fromkeys(items))
