"""What the mesh itself answers: direct responses, redirects, and statuses of HTTP and gRPC, each told as the other."""

from __future__ import annotations

from mlmesh_local.envoy_types import Json
from mlmesh_local.explain.requests import Request
from mlmesh_local.explain.strings import regex_replaced, without_query
from mlmesh_local.explain.values import Outcome

_AS_GRPC = {400: "INTERNAL", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "UNIMPLEMENTED"}
_UNAVAILABLE = (429, 502, 503, 504)
_AS_HTTP = {
    "OK": 200, "CANCELLED": 499, "INVALID_ARGUMENT": 400, "DEADLINE_EXCEEDED": 504, "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409, "PERMISSION_DENIED": 403, "RESOURCE_EXHAUSTED": 429, "FAILED_PRECONDITION": 400,
    "ABORTED": 409, "OUT_OF_RANGE": 400, "UNIMPLEMENTED": 501, "UNAVAILABLE": 503, "UNAUTHENTICATED": 401,
}  # fmt: skip
_REDIRECTS = {
    "MOVED_PERMANENTLY": 301, "FOUND": 302, "SEE_OTHER": 303, "TEMPORARY_REDIRECT": 307, "PERMANENT_REDIRECT": 308,
}  # fmt: skip
_USUAL_PORTS = {"http": "80", "https": "443"}


def http_as_grpc(status: int) -> str:
    """The gRPC status that Envoy makes of an HTTP status of its own (source/common/grpc/status.cc)."""
    return _AS_GRPC.get(status, "UNAVAILABLE" if status in _UNAVAILABLE else "UNKNOWN")


def grpc_as_http(code: str) -> int:
    """The HTTP status that Envoy makes of a gRPC status for a client that does not speak gRPC."""
    return _AS_HTTP.get(code, 500)


def answered(route: Json, request: Request) -> Outcome:
    """What a direct response or a redirect is to its client."""
    if "redirect" in route:
        status = _REDIRECTS[str(route["redirect"].get("response_code", "MOVED_PERMANENTLY"))]
        place = location(route["redirect"], route.get("match", {}), request)
        why = f"the route redirects to {place}; gRPC clients do not follow that"
        return Outcome(kind="redirected", code=http_as_grpc(status), why=why, http=status, location=place)
    answer = route["direct_response"]
    status = int(answer.get("status", 0))
    text = str(answer.get("body", {}).get("inline_string", ""))
    why = f"the proxy answers HTTP {status} itself" + (f": {text}" if text else "")
    return Outcome(kind="answered", code=http_as_grpc(status), why=why, http=status)


def location(redirect: Json, match: Json, request: Request) -> str:
    """Where a redirect sends a request (Envoy's source/common/router/config_impl.cc, newUri)."""
    asked = request.headers.get(":scheme", "http")
    scheme = "https" if redirect.get("https_redirect") else str(redirect.get("scheme_redirect") or asked)
    host, colon, port = request.authority.rpartition(":")
    if not colon or not port.isdigit():
        host, port = request.authority, ""
    if redirect.get("port_redirect"):
        port = str(redirect["port_redirect"])
    elif redirect.get("host_redirect") or (scheme != asked and port == _USUAL_PORTS.get(asked)):
        port = ""
    host = str(redirect.get("host_redirect") or host)
    return f"{scheme}://{host}{f':{port}' if port else ''}{_redirected_path(redirect, match, request.path)}"


def _redirected_path(redirect: Json, match: Json, full: str) -> str:
    path, query = without_query(full), full.partition("?")[2]
    rest = f"?{query}" if query and not redirect.get("strip_query") else ""
    if redirect.get("path_redirect"):
        # A query that is written in the redirect is the whole of it.
        new = str(redirect["path_redirect"])
        return new if "?" in new else f"{new}{rest}"
    if redirect.get("prefix_rewrite"):
        matched = str(match.get("prefix") or match.get("path") or match.get("path_separated_prefix") or "")
        return f"{redirect['prefix_rewrite']}{path[len(matched) :]}{rest}"
    if "regex_rewrite" in redirect:
        rewrite = redirect["regex_rewrite"]
        pattern = str(rewrite.get("pattern", {}).get("regex", ""))
        return f"{regex_replaced(pattern, str(rewrite.get('substitution', '')), path)}{rest}"
    return f"{path}{rest}"
