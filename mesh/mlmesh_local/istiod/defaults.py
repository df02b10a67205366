"""Defaults of the Gateway API's schemas, which a Kubernetes API server fills in before any controller reads an object.

https://gateway-api.sigs.k8s.io/reference/spec/
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Final

from mlmesh_local.istiod.store import Object

_GROUP: Final = "gateway.networking.k8s.io"
_SERVICE: Final = {"group": "", "kind": "Service"}
_GATEWAY: Final = {"group": _GROUP, "kind": "Gateway"}
_HEADER: Final = {"type": "Exact"}

# Where in the spec (a part ending in "[]" is every item of a list), and what is filled in there.
_Table = tuple[tuple[str, Mapping[str, Any]], ...]


def _filters(where: str) -> _Table:
    return (
        (f"{where}filters[].requestRedirect", {"statusCode": 302}),
        (f"{where}filters[].requestMirror.backendRef", _SERVICE),
        (f"{where}filters[].cors", {"maxAge": 5}),
    )


_ROUTE: Final[_Table] = (
    ("parentRefs[]", _GATEWAY),
    ("rules[].backendRefs[]", {**_SERVICE, "weight": 1}),
    *_filters("rules[]."),
    *_filters("rules[].backendRefs[]."),
)
_LISTENER: Final[_Table] = (
    ("listeners[]", {"allowedRoutes": {"namespaces": {"from": "Same"}}}),
    ("listeners[].allowedRoutes", {"namespaces": {"from": "Same"}}),
    ("listeners[].allowedRoutes.namespaces", {"from": "Same"}),
    ("listeners[].allowedRoutes.kinds[]", {"group": _GROUP}),
    ("listeners[].tls", {"mode": "Terminate"}),
    ("listeners[].tls.certificateRefs[]", {"group": "", "kind": "Secret"}),
)
_TABLES: Final[Mapping[str, _Table]] = {
    "HTTPRoute": (
        ("rules[]", {"matches": [{"path": {"type": "PathPrefix", "value": "/"}}]}),
        ("rules[].matches[]", {"path": {"type": "PathPrefix", "value": "/"}}),
        ("rules[].matches[].path", {"type": "PathPrefix", "value": "/"}),
        ("rules[].matches[].headers[]", _HEADER),
        ("rules[].matches[].queryParams[]", _HEADER),
        *_ROUTE,
    ),
    "GRPCRoute": (
        ("rules[].matches[].method", {"type": "Exact"}),
        ("rules[].matches[].headers[]", _HEADER),
        *_ROUTE,
    ),
    "TCPRoute": _ROUTE,
    "TLSRoute": _ROUTE,
    "Gateway": _LISTENER,
    "ListenerSet": (("parentRef", _GATEWAY), *_LISTENER),
}


def defaulted(group: str, document: Object) -> Object:
    """A document as an API server keeps it."""
    table = _TABLES.get(str(document.get("kind"))) if group == _GROUP else None
    if table is None or not isinstance(document.get("spec"), dict):
        return document
    result = {**document, "spec": copy.deepcopy(document["spec"])}
    for where, values in table:
        for place in _places(result["spec"], where.split(".")):
            for key, value in values.items():
                place.setdefault(key, copy.deepcopy(value))
    return result


def _places(value: Any, parts: list[str]) -> Iterator[Object]:
    if not isinstance(value, dict):
        return
    if not parts:
        yield value
        return
    name = parts[0].removesuffix("[]")
    inner = value.get(name)
    if parts[0].endswith("[]"):
        for item in inner if isinstance(inner, list) else ():
            yield from _places(item, parts[1:])
    else:
        yield from _places(inner, parts[1:])
