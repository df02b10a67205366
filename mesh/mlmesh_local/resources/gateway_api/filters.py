"""Filters and backends of HTTPRoute and GRPCRoute."""

from __future__ import annotations

import re

from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.gateway_api.model import (
    BackendRef,
    CorsFilter,
    Filter,
    FilterValue,
    HeaderFilter,
    MirrorFilter,
    PathChange,
    RedirectFilter,
    RewriteFilter,
)
from mlmesh_local.resources.gateway_api.reading import (
    HEADER_NAME,
    PRECISE_HOSTNAME,
    at_most,
    group,
    kind,
    namespace,
    text,
)

HTTP_FILTERS = (
    "RequestHeaderModifier",
    "ResponseHeaderModifier",
    "RequestMirror",
    "RequestRedirect",
    "URLRewrite",
    "CORS",
    "ExtensionRef",
    "ExternalAuth",
)
GRPC_FILTERS = ("RequestHeaderModifier", "ResponseHeaderModifier", "RequestMirror", "ExtensionRef")
# What may occur several times in one list.
_HEADER_VALUE = re.compile(r"[!-~]+([\t ][!-~]+)*\Z")
_VALUE_IS = "a value: visible ASCII, with single blanks or tabs between words"
_REPEATED = ("RequestMirror", "ExtensionRef", "ExternalAuth")
_FIELD = {
    "RequestHeaderModifier": "requestHeaderModifier",
    "ResponseHeaderModifier": "responseHeaderModifier",
    "RequestMirror": "requestMirror",
    "RequestRedirect": "requestRedirect",
    "URLRewrite": "urlRewrite",
    "CORS": "cors",
    "ExtensionRef": "extensionRef",
    "ExternalAuth": "externalAuth",
}
# With one of these Istio converts nothing of the route, and says InvalidFilter in its status.
_UNKNOWN_TO_ISTIO = {
    "ExtensionRef": "Istio knows no extension of routes",
    "ExternalAuth": "Istio does not serve a route with it; use an AuthorizationPolicy with action CUSTOM",
}
FILTERS_MAX = 16
BACKENDS_MAX = 16
WEIGHT_MAX = 1_000_000
_ORIGIN = re.compile(r"^\*\Z|^https?://((\*\.)?([a-zA-Z0-9-]+\.)*[a-zA-Z0-9-]+|\*)(:[0-9]{1,5})?\Z")
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "*")


def read_filters(fields: Fields, types: tuple[str, ...]) -> tuple[Filter, ...]:
    """The `filters` of a rule or of a backend."""
    found = tuple(_filter(item, types) for item in fields.messages("filters"))
    at_most(fields, "filters", len(found), FILTERS_MAX)
    names = [item.type for item in found]
    for name in dict.fromkeys(names):
        if name and name not in _REPEATED and names.count(name) > 1:
            fields.refuse("filters", f"has {names.count(name)} filters of type {name}; one is allowed")
    if "RequestRedirect" in names and "URLRewrite" in names:
        fields.refuse("filters", "has RequestRedirect and URLRewrite; only one of them is allowed")
    return found


def _filter(fields: Fields, types: tuple[str, ...]) -> Filter:
    with fields:
        name = fields.choice("type", types) if fields.required("type") else ""
        for other in types:
            field = _FIELD[other]
            if other != name and fields.has(field):
                fields.refuse(field, f'goes with type {other}, not "{name}"')
            fields.ignored(field)
        value: FilterValue | None = None
        if name and fields.required(_FIELD[name]):
            if name in _UNKNOWN_TO_ISTIO:
                fields.refuse("type", f"{name} is not supported: {_UNKNOWN_TO_ISTIO[name]}")
            else:
                with fields.message(_FIELD[name]) as inner:
                    value = _READ[name](inner)
        return Filter(type=name, value=value, at=fields.at)


def _header_filter(fields: Fields) -> FilterValue:
    removed = fields.texts("remove")
    at_most(fields, "remove", len(removed), 16)
    repeated(fields, "remove", list(removed))
    return HeaderFilter(overwrite=_headers(fields, "set"), add=_headers(fields, "add"), remove=removed)


def _headers(fields: Fields, name: str) -> tuple[tuple[str, str], ...]:
    found: list[tuple[str, str]] = []
    for item in fields.messages(name):
        with item:
            key = text(item, "name", HEADER_NAME, "a header name", required=True, longest=256)
            value = text(item, "value", _HEADER_VALUE, _VALUE_IS, required=True, longest=4096)
            found.append((key, value))
    at_most(fields, name, len(found), 16)
    repeated(fields, name, [key for key, _ in found])
    return tuple(found)


def repeated(fields: Fields, name: str, keys: list[str]) -> None:
    """Note a problem for keys that occur twice in a list that is a mapping by name."""
    for key in dict.fromkeys(keys):
        if keys.count(key) > 1:
            fields.refuse(name, f'has "{key}" twice')


def _mirror(fields: Fields) -> FilterValue:
    fields.one_of("percent", "fraction")
    whole = fields.integer("percent", low=0, high=100)
    percent = None if whole is None else float(whole)
    if fields.has("fraction"):
        with fields.message("fraction") as inner:
            inner.required("numerator")
            numerator = inner.integer("numerator") or 0
            given = inner.integer("denominator", low=1)
            denominator = 100 if given is None else given
            if numerator > denominator:
                inner.refuse("numerator", f"must be at most the denominator, {denominator}")
            percent = 100.0 * numerator / denominator
    else:
        fields.ignored("fraction")
    fields.required("backendRef")
    return MirrorFilter(backend=_object(fields.message("backendRef")), percent=percent)


def _object(fields: Fields) -> BackendRef:
    with fields:
        return _reference(fields, weight=1, filters=())


def _reference(fields: Fields, *, weight: int, filters: tuple[Filter, ...]) -> BackendRef:
    found = BackendRef(
        group=group(fields, ""),
        kind=kind(fields, "Service"),
        namespace=namespace(fields),
        name=text(fields, "name", None, "a name", required=True),
        port=fields.port("port"),
        weight=weight,
        filters=filters,
        at=fields.at,
    )
    if found.group == "" and found.kind == "Service" and not fields.has("port"):
        fields.problems.add(fields.at, '"port" is required for a Service')
    return found


def read_backends(fields: Fields, types: tuple[str, ...]) -> tuple[BackendRef, ...] | None:
    """The `backendRefs` of a rule; None when absent. Without `types` they have no filters."""
    if not fields.has("backendRefs"):
        fields.ignored("backendRefs")
        return None
    found: list[BackendRef] = []
    for item in fields.messages("backendRefs"):
        with item:
            weight = item.integer("weight", low=0, high=WEIGHT_MAX)
            filters = read_filters(item, types) if types else ()
            for one in filters:
                # Istio takes header edits here and nothing else (conversion.go).
                if one.value is not None and not isinstance(one.value, HeaderFilter):
                    fields.problems.add(
                        one.at, f"not supported: Istio takes no {one.type} on a backend and would not serve the route"
                    )
            found.append(_reference(item, weight=1 if weight is None else weight, filters=filters))
    at_most(fields, "backendRefs", len(found), BACKENDS_MAX)
    return tuple(found)


def _path_change(fields: Fields) -> PathChange | None:
    if not fields.has("path"):
        fields.ignored("path")
        return None
    with fields.message("path") as inner:
        how = inner.choice("type", ("ReplaceFullPath", "ReplacePrefixMatch")) if inner.required("type") else ""
        names = {"ReplaceFullPath": "replaceFullPath", "ReplacePrefixMatch": "replacePrefixMatch"}
        value = ""
        for other, field in names.items():
            if other == how:
                inner.required(field)
                value = text(inner, field, None, "a path", longest=1024, shortest=0)
            else:
                if inner.has(field):
                    inner.refuse(field, f'goes with type {other}, not "{how}"')
                inner.ignored(field)
        return PathChange(how=how, value=value)


def _redirect(fields: Fields) -> FilterValue:
    status = fields.integer("statusCode")
    if status is not None and status not in (301, 302, 303, 307, 308):
        fields.refuse("statusCode", f"must be 301, 302, 303, 307 or 308, not {status}")
    return RedirectFilter(
        scheme=fields.choice("scheme", ("http", "https")),
        host=text(fields, "hostname", PRECISE_HOSTNAME, "a host name in lower case"),
        path=_path_change(fields),
        port=fields.port("port"),
        status=302 if status is None else status,
    )


def _rewrite(fields: Fields) -> FilterValue:
    return RewriteFilter(
        host=text(fields, "hostname", PRECISE_HOSTNAME, "a host name in lower case"), path=_path_change(fields)
    )


def _is_header(word: str) -> bool:
    return len(word) <= 256 and HEADER_NAME.match(word) is not None


def _cors(fields: Fields) -> FilterValue:
    age = fields.integer("maxAge", low=1)
    found = CorsFilter(
        origins=fields.texts("allowOrigins", lambda word: _ORIGIN.match(word) is not None, "an origin"),
        credentials=fields.boolean("allowCredentials"),
        methods=fields.texts("allowMethods", lambda word: word in _METHODS, "an HTTP method in capitals"),
        headers=fields.texts("allowHeaders", _is_header, "a header name"),
        expose=fields.texts("exposeHeaders", _is_header, "a header name"),
        max_age_s=5 if age is None else age,
    )
    for name, words in (
        ("allowOrigins", found.origins),
        ("allowMethods", found.methods),
        ("allowHeaders", found.headers),
    ):
        if "*" in words and len(words) > 1:
            fields.refuse(name, '"*" stands alone')
        repeated(fields, name, list(words))
        at_most(fields, name, len(words), 9 if name == "allowMethods" else 64)
    return found


_READ = {
    "RequestHeaderModifier": _header_filter,
    "ResponseHeaderModifier": _header_filter,
    "RequestMirror": _mirror,
    "RequestRedirect": _redirect,
    "URLRewrite": _rewrite,
    "CORS": _cors,
}
