"""Random PeerAuthentications, AuthorizationPolicies and RequestAuthentications."""

from __future__ import annotations

from tests.differential.fuzzing.chance import NAMESPACES, ROOT, Chance, Doc

SECURITY = "security.istio.io/v1"
_ADDRESSES = ("10.0.0.0/8", "127.0.0.1", "192.0.2.0/24", "2001:db8::/32", "::1", "0.0.0.0/0")
_PORTS = ("80", "8000", "9000", "10080", "18000", "7001", "17001", "8080")
_CONDITIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("request.headers[x-a]", ("1", "p*", "*s", "*")),
    ("request.headers[:authority]", ("web", "*.example.com")),
    ("request.headers[User-Agent]", ("curl/*",)),
    ("source.ip", _ADDRESSES),
    ("remote.ip", _ADDRESSES),
    ("destination.ip", _ADDRESSES),
    ("source.namespace", ("mlmesh", "oth*", "*er", "*")),
    ("source.principal", ("cluster.local/ns/mlmesh/sa/default", "*", "*/sa/x", "cluster.local/*")),
    ("source.serviceAccount", ("client", "mlmesh/client", "other/default")),
    ("source.trustDomain", ("cluster.local", "other.*", "*")),
    ("destination.port", _PORTS),
    ("connection.sni", ("*.example.com", "a.example.com", "a*", "*")),
    ("request.auth.claims[role]", ("admin", "a*", "*n", "*")),
    ("request.auth.claims[a][b]", ("x", "y*")),
    ("request.auth.claims[https://x.example.com/c]", ("x",)),
    ("request.auth.principal", ("issuer/*", "issuer/sub", "*", "*/sub")),
    ("request.auth.audiences", ("aud", "a*")),
    ("request.auth.presenter", ("me", "*")),
    ("experimental.envoy.filters.a.b[c]", ("d", "d*", "[e]")),
)

_OF_CUSTOM = ("request.headers", "destination.", "remote.ip", "source.ip", "connection.sni")


def peer_authentication(chance: Chance) -> None:
    """Of the mesh, of a namespace or of workloads, with ports; of several the oldest counts."""
    namespace = chance.one([*NAMESPACES[:2], ROOT])
    modes = ["STRICT", "PERMISSIVE", "DISABLE", "UNSET"]
    spec: Doc = {**chance.maybe(0.8, mtls={"mode": chance.one(modes)}), **chance.maybe(0.05, mtls={})}
    if namespace != ROOT and chance.yes(0.6):
        host = chance.one([host for host in chance.hosts if host.labels])
        spec["selector"] = {"matchLabels": {**host.labels, **chance.maybe(0.2, version="v1")}}
        namespace = host.namespace if chance.yes(0.9) else namespace
        if chance.yes(0.6):
            ports = chance.some([number + chance.one([0, 10000]) for number in host.ports], 1, 2)
            spec["portLevelMtls"] = {number: {"mode": chance.one(modes)} for number in ports}
    chance.add(SECURITY, "PeerAuthentication", spec, namespace=namespace)


def _either(chance: Chance, share: float, name: str, values: list[str]) -> Doc:
    """A list of values that must, and one of values that must not be."""
    negated = f"not{name[0].upper()}{name[1:]}"
    return {
        **chance.maybe(share, **{name: chance.some(values, 1, 3)}),
        **chance.maybe(share / 2, **{negated: chance.some(values, 1, 2)}),
    }


def _source(chance: Chance, *, custom: bool = False) -> Doc:
    # Authorizers are asked before tokens are read.
    if custom:
        return {"ipBlocks": chance.some(_ADDRESSES, 1, 2), **chance.maybe(0.3, notRemoteIpBlocks=["192.0.2.1"])}
    principals = [
        "cluster.local/ns/mlmesh/sa/client",
        "*",
        "*/sa/x",
        "cluster.local/*",
        "other.domain/ns/a/sa/b",
        "spiffe://a",
    ]
    parts: Doc = {
        **_either(chance, 0.1, "serviceAccounts", ["client", "mlmesh/client", "web-account", "other/default"]),
        **_either(chance, 0.2, "ipBlocks", list(_ADDRESSES)),
        **_either(chance, 0.15, "remoteIpBlocks", list(_ADDRESSES)),
        **_either(chance, 0.25, "requestPrincipals", ["*", "issuer/sub", "issuer/*", "*/sub"]),
    }
    if "serviceAccounts" not in parts and "notServiceAccounts" not in parts:
        parts.update(_either(chance, 0.35, "principals", principals))
        parts.update(_either(chance, 0.08, "trustDomains", ["cluster.local", "other.domain", "oth*"]))
        parts.update(_either(chance, 0.3, "namespaces", ["mlmesh", "oth*", "other", "*d", "*"]))
    return parts or {"namespaces": ["mlmesh"]}


def _operation(chance: Chance) -> Doc:
    paths = ["/a", "/a/*", "*/b", "*", "/{*}/x", "/a/{**}", "/{*}", "/a/{*}/b/{**}", "/x y"]
    return {
        **_either(chance, 0.5, "paths", paths),
        **_either(chance, 0.35, "methods", ["GET", "POST", "P*", "*T", "*"]),
        **_either(chance, 0.2, "ports", list(_PORTS)),
        **_either(
            chance, 0.2, "hosts", ["a.example.com", "*.example.com", "web", "web*", "A.Example.com", "*", "web:8000"]
        ),
    } or {"methods": ["GET"]}


def _when(chance: Chance, *, custom: bool = False) -> Doc:
    key, values = chance.one([one for one in _CONDITIONS if not custom or one[0].startswith(_OF_CUSTOM)])
    negated = chance.maybe(0.4, notValues=chance.some(values, 1, 2))
    return {
        "key": key,
        **(chance.maybe(0.7, values=chance.some(values, 1, 2)) if negated else {"values": chance.some(values)}),
        **negated,
    }


def target(chance: Chance, namespace: str) -> Doc:
    """What a policy is for: workloads by labels, gateways by name, or all of its namespace."""
    if chance.yes(0.6):
        return {
            "selector": {
                "matchLabels": chance.one([chance.label(), chance.label(), {"istio": "gateway"}, {"app": "client"}])
            }
        }
    return {}


def authorization_policy(chance: Chance) -> None:
    """Rules of sources, operations and conditions, for one action."""
    namespace = chance.one([*NAMESPACES[:2], *NAMESPACES, ROOT])
    actions = ["ALLOW", "ALLOW", "DENY", "AUDIT"]
    if any(document["kind"] == "ConfigMap" for document in chance.documents):
        actions.append("CUSTOM")
    action = chance.one(actions)
    spec: Doc = {**target(chance, namespace), **({} if action == "ALLOW" and chance.yes(0.5) else {"action": action})}
    rules = []
    custom = action == "CUSTOM"
    for _ in range(chance.number(0 if action == "ALLOW" else 1, 3)):
        rule: Doc = {
            **chance.maybe(
                0.6, **{"from": [{"source": _source(chance, custom=custom)} for _ in range(chance.number(1, 2))]}
            ),
            **chance.maybe(0.6, to=[{"operation": _operation(chance)} for _ in range(chance.number(1, 2))]),
            **chance.maybe(0.5, when=[_when(chance, custom=custom) for _ in range(chance.number(1, 2))]),
        }
        rules.append(rule)
    if action == "CUSTOM":
        spec["provider"] = {"name": chance.one(["check", "ask", "nobody"])}
    if rules:
        spec["rules"] = rules
    metadata: Doc = {}
    if chance.yes(0.15) and action in ("ALLOW", "DENY"):
        metadata = {"annotations": {"istio.io/dry-run": chance.one(["true", "true", "false"])}}
    chance.add(SECURITY, "AuthorizationPolicy", spec, namespace=namespace, **metadata)


def _issuer(chance: Chance, issuer: str) -> Doc:
    headers = [
        {"name": "x-token", **chance.maybe(0.5, prefix="Bearer ")},
        {"name": "Authorization", "prefix": "Token "},
    ]
    claims = [{"header": "x-sub", "claim": "sub"}, {"header": "x-deep", "claim": "a.b"}]
    return {
        "issuer": issuer,
        "jwks": '{"keys":[]}',
        **chance.maybe(0.3, audiences=chance.some(["aud", "other-aud"], 1, 2)),
        **chance.maybe(0.3, fromHeaders=chance.some(headers, 1, 2)),
        **chance.maybe(0.2, fromParams=chance.some(["token", "access"], 1, 2)),
        **chance.maybe(0.2, fromCookies=chance.some(["token", "session"], 1, 2)),
        **chance.maybe(0.3, forwardOriginalToken=chance.yes(0.7)),
        **chance.maybe(0.2, outputPayloadToHeader="x-payload"),
        **chance.maybe(0.25, outputClaimToHeaders=chance.some(claims, 1, 2)),
        **chance.maybe(0.2, timeout="3s"),
        **chance.maybe(0.2, spaceDelimitedClaims=["perms"]),
    }


def request_authentication(chance: Chance) -> None:
    """Issuers with their keys inline; several policies may name one issuer."""
    namespace = chance.one([*NAMESPACES, ROOT])
    rules = [_issuer(chance, issuer) for issuer in chance.some(["issuer", "second", "third"], 1, 3)]
    chance.add(SECURITY, "RequestAuthentication", {**target(chance, namespace), "jwtRules": rules}, namespace=namespace)
