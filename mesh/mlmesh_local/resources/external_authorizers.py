"""External authorizers among the extension providers of MeshConfig: `envoyExtAuthzGrpc` and `envoyExtAuthzHttp`.

https://istio.io/latest/docs/reference/config/istio.mesh.v1alpha1/#MeshConfig-ExtensionProvider
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Literal

from mlmesh_local.resources.fields import Fields, is_host
from mlmesh_local.resources.model_security import ExternalAuthorizer, RequestBody

NAME_CHARACTERS_MAX = 63
_NAME = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?\Z")
# Envoy's enum of status codes (envoy/type/v3/http_status.proto).
_NOT_ENVOYS = {102, 103, 418, 425, 451}
_STATUS = {int(status) for status in HTTPStatus} - _NOT_ENVOYS


def parse_external_authorizer(name: str, fields: Fields, protocol: Literal["grpc", "http"]) -> ExternalAuthorizer:
    """Read one provider. Istio denies what asks a wrong one; here it is refused."""
    if not (len(name) <= NAME_CHARACTERS_MAX and _NAME.match(name)):
        fields.problems.add(
            fields.at, f'the name "{name}" is not one of lowercase letters, digits and "-", at most 63 characters'
        )
    with fields:
        service = fields.text("service", required=True)
        namespace, slash, host = service.rpartition("/")
        if service and not (is_host(host) and "*" not in host and (namespace or not slash) and "/" not in namespace):
            fields.refuse("service", f'"{service}" is not [NAMESPACE/]HOST')
        port = fields.port("port", required=True)
        # Istio 1.31 reads it and does nothing with it.
        fields.ignored("clearRouteCache")
        common = ExternalAuthorizer(
            name=name,
            protocol=protocol,
            service=service,
            port=port,
            timeout_s=fields.duration_s("timeout"),
            fail_open=fields.boolean("failOpen"),
            status_on_error=_status(fields),
            body=_body(fields),
        )
        return common if protocol == "grpc" else _http(common, fields)


def _http(common: ExternalAuthorizer, fields: Fields) -> ExternalAuthorizer:
    prefix = fields.text("pathPrefix")
    if prefix and not prefix.startswith("/"):
        fields.refuse("pathPrefix", f'must begin with "/", not "{prefix}"')
    older, newer = _headers(fields, "includeHeadersInCheck"), _headers(fields, "includeRequestHeadersInCheck")
    additional = fields.text_map("includeAdditionalHeadersInCheck")
    return ExternalAuthorizer(
        name=common.name,
        protocol=common.protocol,
        service=common.service,
        port=common.port,
        timeout_s=common.timeout_s,
        fail_open=common.fail_open,
        status_on_error=common.status_on_error,
        body=common.body,
        path_prefix=prefix,
        request_headers=newer or older,
        additional_headers=tuple(sorted(additional.items())),
        upstream_headers_on_allow=_headers(fields, "headersToUpstreamOnAllow"),
        downstream_headers_on_deny=_headers(fields, "headersToDownstreamOnDeny"),
        downstream_headers_on_allow=_headers(fields, "headersToDownstreamOnAllow"),
    )


def _headers(fields: Fields, name: str) -> tuple[str, ...]:
    return fields.texts(name, lambda text: text != "*", 'a header name, a prefix ("x-*") or a suffix ("*-id")')


def _status(fields: Fields) -> int:
    text = fields.text("statusOnError")
    if not text:
        return 0
    if not (text.isascii() and text.isdigit() and int(text) in _STATUS):
        fields.refuse("statusOnError", f'"{text}" is not an HTTP status that Envoy knows, such as "403"')
        return 0
    return int(text)


def _body(fields: Fields) -> RequestBody | None:
    present = fields.has("includeRequestBodyInCheck")
    with fields.message("includeRequestBodyInCheck") as inner:
        if not present:
            return None
        # Envoy refuses 0, and with it every listener of the proxy.
        most = inner.integer("maxRequestBytes", low=1)
        if most is None and not inner.has("maxRequestBytes"):
            inner.required("maxRequestBytes")
        return RequestBody(
            max_bytes=most or 1,
            allow_partial=inner.boolean("allowPartialMessage"),
            as_bytes=inner.boolean("packAsBytes"),
        )
