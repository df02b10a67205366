"""The other end: TLS between the two sidecars, and what the server's sidecar says of the call."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mlmesh_local.envoy_types import Json
from mlmesh_local.explain.chains import TCP_PROXY, chain_of, network_filter
from mlmesh_local.explain.filters import http_filters, pass_filters
from mlmesh_local.explain.rbac import evaluate
from mlmesh_local.explain.requests import Request
from mlmesh_local.explain.routing import choose, virtual_host
from mlmesh_local.explain.scene import Scene, listening_at, manager_of
from mlmesh_local.explain.strings import string_matches
from mlmesh_local.explain.values import Check, Outcome, Place, Tls
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.catalog import selects
from mlmesh_local.resources.model import PeerAuthentication

_UPSTREAM, _DOWNSTREAM = "UpstreamTlsContext", "DownstreamTlsContext"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialed:
    """A request on its way out: who sends it, and with which TLS context; None is plaintext."""

    client: ProxyNode
    context: Json | None
    request: Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What becomes of a call at one endpoint."""

    tls: Tls | None
    checks: tuple[Check, ...]
    outcome: Outcome


def client_context(cluster: Json, endpoint: Json) -> Json | None:
    """The TLS context with which a cluster dials an endpoint; None for plaintext."""
    labels = endpoint.get("metadata", {}).get("filter_metadata", {}).get("envoy.transport_socket_match", {})
    socket = cluster.get("transport_socket")
    for match in cluster.get("transport_socket_matches", ()):
        if all(labels.get(key) == value for key, value in match.get("match", {}).items()):
            socket = match.get("transport_socket")
            break
    config: Json = (socket or {}).get("typed_config", {})
    while config and not _is(config, _UPSTREAM) and "transport_socket" in config:
        # Such as the PROXY protocol around TLS.
        config = config["transport_socket"].get("typed_config", {})
    return config if _is(config, _UPSTREAM) else None


def serve(scene: Scene, dialed: Dialed, server: ProxyNode | None, port: int) -> Served:
    """A request that arrives at a server's address; None is a server outside of the mesh."""
    context, request = dialed.context, dialed.request
    identity = scene.identity(dialed.client) if context is not None and _shows_certificate(context) else ""
    if server is None:
        used = "plaintext" if context is None else "mutual TLS" if identity else "TLS"
        tls = _tls(context, identity, used=used, server="outside of the mesh, not looked at")
        return Served(tls=tls, checks=(), outcome=Outcome(kind="routed", code="OK", why="it leaves the mesh"))
    arriving = dataclasses.replace(
        request,
        peer=identity,
        tls=context is not None,
        sni=str((context or {}).get("sni", "")) or request.authority.rpartition(":")[0],
        alpn=_alpn(context),
        destination=server.pod_address,
        port=port,
    )
    listener = listening_at(scene.listeners(server), "INBOUND", port, server.pod_address)
    if listener is None:
        why = f"no listener of {server.id} takes port {port}: the application answers without its sidecar"
        return Served(
            tls=_tls(context, identity, used="plaintext" if context is None else "TLS", server="none"),
            checks=(),
            outcome=Outcome(kind="routed", code="OK", why=why),
        )
    chain = chain_of(listener, arriving)
    tls = _meeting(scene, listener, chain, dialed, server)
    if tls.problem:
        return Served(
            tls=tls, checks=(), outcome=Outcome(kind="tls_failed", code="UNAVAILABLE", why=tls.problem, http=503)
        )
    assert chain is not None  # noqa: S101  no chain is a problem of TLS
    return _behind_tls(scene, server, chain, arriving, tls)


def _behind_tls(scene: Scene, server: ProxyNode, chain: Json, request: Request, tls: Tls) -> Served:
    checks: list[Check] = []
    for one in chain.get("filters", ()):
        config: Json = one.get("typed_config", {})
        if _is(config, "RBAC") and "rules" in config:
            verdict = evaluate(config["rules"], request)
            checks.append(
                Check(
                    filter=str(one.get("name", "")),
                    action=verdict.action,
                    verdict="allow" if verdict.allowed else "deny",
                    policy=verdict.policy,
                    place=scene.provenance.of_policy(verdict.policy),
                    why="decided for the connection",
                )
            )
            if not verdict.allowed:
                why = f"{verdict.policy}: the connection is closed"
                outcome = Outcome(kind="denied", code="UNAVAILABLE", why=why, http=503)
                return Served(tls=tls, checks=tuple(checks), outcome=outcome)
    manager = manager_of(chain)
    if manager is None:
        raw = network_filter(chain, TCP_PROXY)
        why = "bytes are passed on as they are" if raw is not None else "the chain has no proxy"
        return Served(tls=tls, checks=tuple(checks), outcome=Outcome(kind="routed", code="OK", why=why))
    configuration = scene.route_configuration(server, manager)
    host = virtual_host(configuration, request.authority)
    _, route = choose(host, request) if host else ([], None)
    if host is None or route is None:
        outcome = Outcome(
            kind="no_route", code="UNIMPLEMENTED", why="the server's sidecar has no route for it", http=404
        )
        return Served(tls=tls, checks=tuple(checks), outcome=outcome)
    passed = pass_filters(
        http_filters(manager, scene.extensions(server)),
        (route, host, configuration),
        request,
        scene.provenance,
        now_s=scene.now_s,
    )
    outcome = passed.ended or Outcome(kind="routed", code="OK", why="the application answers")
    return Served(tls=tls, checks=(*checks, *passed.checks), outcome=outcome)


def _meeting(
    scene: Scene,
    listener: Json,
    chain: Json | None,
    dialed: Dialed,
    server: ProxyNode,
) -> Tls:
    context = dialed.context
    identity = scene.identity(dialed.client) if context is not None and _shows_certificate(context) else ""
    port = int(listener.get("address", {}).get("socket_address", {}).get("port_value", 0))
    mode = _mode(listener)
    place = _peer_authentication(scene, server, port, mode)
    shown = scene.identity(server)
    demanded: Json | None = None
    if chain is not None:
        config = chain.get("transport_socket", {}).get("typed_config", {})
        demanded = config if _is(config, _DOWNSTREAM) else None
    problem = ""
    if chain is None and context is None:
        problem = f"the client sends plaintext, {server.id} takes mutual TLS only ({mode})"
    elif chain is None:
        problem = f"the client sends TLS, {server.id} takes none of the kind ({mode})"
    elif demanded is not None and context is None:
        problem = f"the client sends plaintext, {server.id} takes mutual TLS only ({mode})"
    elif demanded is None and context is not None and manager_of(chain) is not None:
        problem = f"the client sends TLS, {server.id} takes plaintext only ({mode})"
    elif demanded is not None and context is not None:
        problem = _certificate_problem(context, demanded, identity, shown, server)
    used = "none" if problem else "plaintext" if context is None else "mutual TLS" if demanded is not None else "TLS"
    return _tls(context, identity, used=used, server=mode, shown=shown, place=place, problem=problem)


def _certificate_problem(context: Json, demanded: Json, identity: str, shown: str, server: ProxyNode) -> str:
    if demanded.get("require_client_certificate") and not identity:
        return f"{server.id} demands a certificate, the client shows none"
    wanted = _names(demanded)
    if identity and wanted and not any(string_matches(matcher, identity) for matcher in wanted):
        return f"{server.id} does not accept {identity}: it is of another trust domain"
    expected = _names(context)
    if expected and not any(string_matches(matcher, shown) for matcher in expected):
        return f"{server.id} shows {shown}, the client expects {', '.join(_texts(expected))}"
    return ""


def _tls(
    context: Json | None,
    identity: str,
    *,
    used: str,
    server: str,
    shown: str = "",
    place: Place | None = None,
    problem: str = "",
) -> Tls:
    client = "plaintext"
    if context is not None:
        client = "TLS with the workload's certificate" if identity else "TLS"
    return Tls(
        client=client,
        server=server,
        used=used,  # type: ignore[arg-type]
        sni=str((context or {}).get("sni", "")),
        client_identity=identity,
        server_identity=shown,
        expected=tuple(_texts(_names(context or {}))),
        place=place,
        problem=problem,
    )


def _mode(listener: Json) -> str:
    """What a sidecar's listener takes, in the words of PeerAuthentication."""
    chains = [chain for chain in listener.get("filter_chains", ()) if manager_of(chain) is not None]
    chains = chains or list(listener.get("filter_chains", ()))
    secure = [_is(chain.get("transport_socket", {}).get("typed_config", {}), _DOWNSTREAM) for chain in chains]
    if all(secure):
        return "STRICT"
    return "PERMISSIVE" if any(secure) else "DISABLE"


def _peer_authentication(scene: Scene, server: ProxyNode, port: int, mode: str) -> Place | None:
    """The resource that says so: workload over namespace over mesh, in one scope the oldest."""
    everything = scene.view.resources.specs(PeerAuthentication)
    scopes = (
        [a for a in everything if a.meta.namespace == server.namespace and a.selector]
        and [
            a
            for a in everything
            if a.meta.namespace == server.namespace and a.selector and selects(a.selector, server.labels)
        ],
        [a for a in everything if a.meta.namespace == server.namespace and not a.selector],
        [a for a in everything if a.meta.namespace == scene.world.root_namespace and not a.selector],
    )
    for scope in scopes:
        for authentication in scope[:1]:
            name = f"{authentication.meta.namespace}/{authentication.meta.name}"
            if dict(authentication.ports).get(port) == mode:
                return scene.provenance.place("PeerAuthentication", name, "spec", "portLevelMtls", str(port))
            if authentication.mode == mode:
                return scene.provenance.place("PeerAuthentication", name, "spec", "mtls", "mode")
    return None


def _is(config: Json, kind: str) -> bool:
    return str(config.get("@type", "")).endswith(f".{kind}")


def _common(context: Json) -> Json:
    result: Json = context.get("common_tls_context", {})
    return result


def _shows_certificate(context: Json) -> bool:
    common = _common(context)
    return bool(common.get("tls_certificate_sds_secret_configs") or common.get("tls_certificates"))


def _alpn(context: Json | None) -> tuple[str, ...]:
    return tuple(_common(context).get("alpn_protocols", ())) if context is not None else ()


def _names(context: Json) -> list[Json]:
    common = _common(context)
    validation = common.get("combined_validation_context", {}).get("default_validation_context")
    validation = validation or common.get("validation_context", {})
    return [one.get("matcher", {}) for one in validation.get("match_typed_subject_alt_names", ())]


def _texts(matchers: list[Json]) -> list[str]:
    return [str(next((f"{v}*" if k == "prefix" else v for k, v in matcher.items()), "")) for matcher in matchers]
