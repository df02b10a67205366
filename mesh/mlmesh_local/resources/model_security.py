"""What security resources say, as values: who is who, and who may do what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mlmesh_local.resources.meta import Meta

MtlsMode = Literal["UNSET", "DISABLE", "PERMISSIVE", "STRICT"]
PolicyAction = Literal["ALLOW", "DENY", "AUDIT", "CUSTOM"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerAuthentication:
    """Whether workloads take plaintext. No selector: the namespace, or the whole mesh in the root namespace."""

    meta: Meta
    selector: Mapping[str, str]
    mode: MtlsMode
    ports: tuple[tuple[int, MtlsMode], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """Any of ``values`` (none: whatever) and none of ``not_values``. ``key`` is the attribute, as conditions name it.

    "host", "method" and "path" are the attributes that only operations have.
    """

    key: str
    values: tuple[str, ...]
    not_values: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRule:
    """Any of the sources and any of the operations and all conditions. No sources, or no operations, is anything."""

    sources: tuple[tuple[Values, ...], ...]
    operations: tuple[tuple[Values, ...], ...]
    conditions: tuple[Values, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthorizationPolicy:
    """Who may call what. ALLOW without rules allows nothing.

    ``gateways`` are Gateway API Gateways that `targetRefs` name; without them ``selector`` selects workloads.
    ``provider`` is the name of the extension provider that decides for CUSTOM; a ``dry_run`` only leaves its outcome in
    metadata and statistics.
    """

    meta: Meta
    selector: Mapping[str, str]
    action: PolicyAction
    rules: tuple[PolicyRule, ...]
    gateways: tuple[str, ...] = ()
    provider: str = ""
    dry_run: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class JwtRule:
    """Tokens of one issuer: where they are, which keys sign them, what is passed on.

    ``from_headers`` are (name, prefix), ``claim_headers`` (header, claim). Without any location tokens come as Bearer
    in `authorization`, or in the query parameter `access_token`. ``jwks`` is the text of a key set; else it is fetched
    from ``jwks_uri``, or from where the issuer's OpenID discovery says.
    """

    issuer: str
    audiences: tuple[str, ...] = ()
    jwks: str = ""
    jwks_uri: str = ""
    from_headers: tuple[tuple[str, str], ...] = ()
    from_params: tuple[str, ...] = ()
    from_cookies: tuple[str, ...] = ()
    payload_header: str = ""
    claim_headers: tuple[tuple[str, str], ...] = ()
    forward: bool = False
    timeout_s: float | None = None
    space_delimited_claims: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestAuthentication:
    """Which tokens are valid. A request without a token passes; who needs one says so in an AuthorizationPolicy."""

    meta: Meta
    selector: Mapping[str, str]
    rules: tuple[JwtRule, ...]
    gateways: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestBody:
    """How much of a request's body the external authorizer sees."""

    max_bytes: int
    allow_partial: bool = False
    as_bytes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalAuthorizer:
    """An extension provider that decides for AuthorizationPolicies with action CUSTOM.

    ``protocol`` is that of `envoyExtAuthzGrpc` or `envoyExtAuthzHttp`. ``service`` is "[NAMESPACE/]HOST".
    ``status_on_error`` 0 is Envoy's 403. Header lists take one "*" at an end; they are those of HTTP only.
    """

    name: str
    protocol: Literal["grpc", "http"]
    service: str
    port: int
    timeout_s: float | None = None
    fail_open: bool = False
    status_on_error: int = 0
    body: RequestBody | None = None
    path_prefix: str = ""
    request_headers: tuple[str, ...] = ()
    additional_headers: tuple[tuple[str, str], ...] = ()
    upstream_headers_on_allow: tuple[str, ...] = ()
    downstream_headers_on_deny: tuple[str, ...] = ()
    downstream_headers_on_allow: tuple[str, ...] = ()
