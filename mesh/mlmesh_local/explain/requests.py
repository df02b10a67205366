"""A request as a filter or a route sees it, and how routes change it on its way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlmesh_local.envoy_types import Json
from mlmesh_local.explain.strings import regex_replaced, without_query

USUAL = frozenset({":method", ":scheme", ":path", ":authority", "content-type", "te"})
"""Headers that every call has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request on one connection.

    Attributes:
        headers: lower-case names, ":path", ":method", ":authority" and ":scheme" among them.
        peer: SPIFFE identity that the client's certificate shows; empty without TLS or without a certificate.
        tls: whether the connection is encrypted; ``sni`` and ``alpn`` are what the client's hello names.
        source, destination: IPs; ``port`` is where it arrived.
        metadata: what filters found out, by filter name; claims of tokens are there.
    """

    headers: Mapping[str, str]
    peer: str = ""
    tls: bool = False
    sni: str = ""
    alpn: tuple[str, ...] = ()
    source: str = "127.0.0.1"
    destination: str = ""
    port: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The :path, query included."""
        return self.headers.get(":path", "/")

    @property
    def authority(self) -> str:
        """The :authority."""
        return self.headers.get(":authority", "")

    def with_headers(self, headers: Mapping[str, str]) -> Request:
        """The same request with other headers."""
        return dataclasses.replace(self, headers=headers)


def edited(request: Request, levels: Iterable[Json]) -> Request:
    """The request after the header edits of levels (weighted cluster, route, virtual host, route configuration)."""
    headers = dict(request.headers)
    for level in levels:
        # Envoy removes first, then adds.
        for name in level.get("request_headers_to_remove", ()):
            headers.pop(str(name).lower(), None)
        for option in level.get("request_headers_to_add", ()):
            header = option.get("header", {})
            # A percent sign is written twice; what stands between single ones is only known by the proxy.
            name, value = str(header.get("key", "")).lower(), str(header.get("value", "")).replace("%%", "%")
            action = option.get("append_action", "APPEND_IF_EXISTS_OR_ADD")
            if action == "ADD_IF_ABSENT" and name in headers:
                continue
            if action == "OVERWRITE_IF_EXISTS" and name not in headers:
                continue
            appended = action == "APPEND_IF_EXISTS_OR_ADD" and name in headers
            headers[name] = f"{headers[name]},{value}" if appended else value
    return request.with_headers(headers)


def rewritten(request: Request, match: Json, action: Json, entry: Json) -> Request:
    """The request after the rewrites of a route action; `entry` is the weighted cluster that was chosen, if any."""
    headers = dict(request.headers)
    authority = entry.get("host_rewrite_literal") or action.get("host_rewrite_literal")
    if authority:
        headers[":authority"] = str(authority)
    path = request.path
    if "prefix_rewrite" in action:
        matched = str(match.get("prefix") or match.get("path") or match.get("path_separated_prefix") or "")
        headers[":path"] = str(action["prefix_rewrite"]) + path[len(matched) :]
    elif "regex_rewrite" in action:
        headers[":path"] = _regex_rewrite(action["regex_rewrite"], path)
    return request.with_headers(headers)


def _regex_rewrite(rewrite: Json, path: str) -> str:
    pattern, substitution = str(rewrite.get("pattern", {}).get("regex", "")), str(rewrite.get("substitution", ""))
    plain = without_query(path)
    return regex_replaced(pattern, substitution, plain) + path[len(plain) :]
