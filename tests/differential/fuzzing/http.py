"""Rules of random VirtualServices: matches, actions and what goes with them."""

from __future__ import annotations

from tests.differential.fuzzing.chance import NAMESPACES, Chance, Doc, Host

_CONDITIONS = (
    "5xx", "gateway-error", "reset", "connect-failure", "refused-stream", "retriable-4xx", "cancelled",
    "deadline-exceeded", "internal", "resource-exhausted", "unavailable", "503", "409", "reset-before-request",
    "envoy-ratelimited", "retriable-headers", "http3-post-connect-failure",
)  # fmt: skip
_GRPC = ("UNAVAILABLE", "NOT_FOUND", "OK", "RESOURCE_EXHAUSTED")


def _string(chance: Chance, exact: str) -> Doc:
    return chance.one([{"exact": exact}, {"prefix": exact[:2]}, {"regex": f"{exact}.*"}])


def _match(chance: Chance, gateways: list[str], *, delegate: bool = False) -> Doc:
    path = chance.one(["/a", "/a/b", "/shop", "/", "/a/"])
    paths: list[Doc] = [{"exact": path}, {"prefix": path}, {"prefix": path}]
    if not delegate:
        paths.append({"regex": f"{path}.*"})
    names = ["x-a", "x-b", "end-user", "X-Upper", "host", "content-type"]
    match: Doc = {
        **chance.maybe(0.6, uri=chance.one(paths)),
        **chance.maybe(0.15, method=_string(chance, chance.one(["GET", "POST"]))),
        **chance.maybe(
            0.3, headers={name: chance.one([_string(chance, "value"), {}]) for name in chance.some(names, 1, 2)}
        ),
        **chance.maybe(0.1, withoutHeaders={"x-c": chance.one([_string(chance, "value"), {}])}),
        **chance.maybe(0.15, queryParams={"q": chance.one([{"exact": "1"}, {"prefix": "p"}, {"regex": "r+"}, {}])}),
        **chance.maybe(0.1, authority=_string(chance, "a.example.com")),
        **chance.maybe(0.05, scheme=chance.one([{"exact": "http"}, {"prefix": "ht"}])),
        **chance.maybe(0.1, ignoreUriCase=True),
        **chance.maybe(0.1, name="m"),
        **chance.maybe(0.03, statPrefix="stats"),
    }
    if not delegate:
        match.update(chance.maybe(0.15, port=chance.one([80, 8000, 9000, 8080])))
        match.update(
            chance.maybe(
                0.15, sourceLabels=chance.one([{"app": "client"}, {"app": "web"}, {"app": "client", "team": "red"}])
            )
        )
        match.update(chance.maybe(0.1, sourceNamespace=chance.one(NAMESPACES[:2])))
        if gateways:
            match.update(chance.maybe(0.2, gateways=chance.some(gateways, 1, 2)))
    return match or {"uri": {"prefix": path}}


def destination(chance: Chance, namespace: str, host: Host | None = None) -> Doc:
    """Where a rule may send: a host with or without a subset and a port."""
    host = host or chance.http_host()
    result: Doc = {"host": chance.host_as_written(host, namespace)}
    if chance.yes(0.04):
        result["host"] = chance.one(["nobody.example.com", "nobody", "nobody.other.svc.cluster.local"])
    if host.subsets and chance.yes(0.5):
        result["subset"] = chance.one(host.subsets)
    elif chance.yes(0.05):
        result["subset"] = "nowhere"
    ports = host.http_ports()
    if ports and (len(host.ports) > 1 or chance.yes(0.5)):
        result["port"] = {"number": chance.one([*ports, *ports, *ports, *ports, 5555])}
    return result


def _headers(chance: Chance) -> Doc:
    request: Doc = {
        **chance.maybe(
            0.6,
            set={
                chance.one(["x-set", "X-Set", "host", ":authority"]): chance.one(
                    ["1", "%DOWNSTREAM_REMOTE_ADDRESS%", "50%%"]
                )
            },
        ),
        **chance.maybe(0.5, add={"x-add": chance.one(["2", "a b"])}),
        **chance.maybe(0.3, remove=chance.some(["x-r", "X-R2"], 1, 2)),
    }
    response: Doc = {
        **chance.maybe(0.5, set={"x-in": "4"}),
        **chance.maybe(0.5, add={"x-out": "3"}),
        **chance.maybe(0.4, remove=["server"]),
    }
    return {**chance.maybe(0.7, request=request), **chance.maybe(0.5, response=response)}


def _authority_once(rule: Doc) -> None:
    """The authority is written once: by the rewrite, or by headers."""
    if "authority" in rule.get("rewrite", {}):
        for place in (rule, *rule.get("route", ())):
            written = place.get("headers", {}).get("request", {}).get("set", {})
            for name in ("host", ":authority"):
                written.pop(name, None)


def _cors(chance: Chance) -> Doc:
    return {
        **chance.maybe(0.85, allowOrigins=[_string(chance, "https://x") for _ in range(chance.number(1, 2))]),
        **chance.maybe(0.6, allowMethods=chance.some(["GET", "PUT", "DELETE"], 1, 2)),
        **chance.maybe(0.4, allowHeaders=["x-a"]),
        **chance.maybe(0.4, exposeHeaders=["x-b", "x-c"]),
        **chance.maybe(0.4, maxAge=chance.one(["1h", "90s"])),
        **chance.maybe(0.4, allowCredentials=chance.yes(0.5)),
        **chance.maybe(0.3, unmatchedPreflights=chance.one(["IGNORE", "FORWARD", "UNSPECIFIED"])),
    }


def _percentage(chance: Chance) -> Doc:
    return chance.maybe(
        0.85, percentage=chance.one([{"value": 10}, {"value": 5.5}, {"value": 0}, {"value": 100}, {"value": 0.01}])
    )


def _fault(chance: Chance) -> Doc:
    delay = {"fixedDelay": chance.one(["1s", "0.25s"]), **_percentage(chance)}
    abort = {
        **chance.one([{"httpStatus": 503}, {"httpStatus": 404}, {"grpcStatus": chance.one(_GRPC)}]),
        **_percentage(chance),
    }
    return chance.one([{"abort": abort}, {"delay": delay}, {"abort": abort, "delay": delay}])


def _rewrite(chance: Chance) -> Doc:
    return chance.one(
        [
            {"uri": "/new"},
            {"uri": "/"},
            {"authority": "else.example.com"},
            {"uri": "/", "authority": "x"},
            {"uriRegexRewrite": {"match": "/a", "rewrite": "/z"}},
            {"uriRegexRewrite": {"match": "^/([^/]+)/(.*)$", "rewrite": r"/\2/\1"}, "authority": "z"},
        ]
    )


def _mirrors(chance: Chance, namespace: str) -> Doc:
    if chance.yes(0.4):
        several = [
            {"destination": destination(chance, namespace), **_percentage(chance)} for _ in range(chance.number(1, 2))
        ]
        return {"mirrors": several}
    share = chance.one(
        [{"mirrorPercentage": {"value": 20}}, {"mirrorPercentage": {"value": 0}}, {"mirrorPercent": 33}, {}]
    )
    return {"mirror": destination(chance, namespace), **share}


def _retries(chance: Chance) -> Doc:
    if chance.yes(0.2):
        return {"attempts": 0}
    return {
        "attempts": chance.number(1, 5),
        **chance.maybe(0.5, perTryTimeout=chance.one(["0.2s", "2s"])),
        **chance.maybe(0.7, retryOn=",".join(chance.some(_CONDITIONS, 1, 4))),
        **chance.maybe(0.2, retryRemoteLocalities=chance.yes(0.5)),
        **chance.maybe(0.2, retryIgnorePreviousHosts=chance.yes(0.5)),
        **chance.maybe(0.2, backoff=chance.one(["0.1s", "2s"])),
    }


def _extras(chance: Chance, namespace: str, action: str) -> Doc:
    result: Doc = {
        **chance.maybe(0.2, headers=_headers(chance)),
        **chance.maybe(0.15, corsPolicy=_cors(chance)),
    }
    if action == "direct":
        return result
    if action == "redirect":
        return result
    result.update(chance.maybe(0.15, fault=_fault(chance)))
    return {
        **result,
        **chance.maybe(0.25, timeout=chance.one(["1s", "0.5s", "2h"])),
        **chance.maybe(0.3, retries=_retries(chance)),
        **chance.maybe(0.2, rewrite=_rewrite(chance)),
        **(_mirrors(chance, namespace) if chance.yes(0.15) else {}),
    }


def _redirect(chance: Chance) -> Doc:
    port: Doc = chance.one(
        [{}, {}, {"port": 8443}, {"derivePort": "FROM_PROTOCOL_DEFAULT"}, {"derivePort": "FROM_REQUEST_PORT"}]
    )
    result: Doc = {
        **chance.maybe(0.6, uri=chance.one(["/elsewhere", "/", "%PREFIX()%/x"][:2])),
        **chance.maybe(0.4, authority="c.example.com"),
        **chance.maybe(0.4, redirectCode=chance.one([301, 302, 303, 307, 308])),
        **chance.maybe(0.3, scheme=chance.one(["https", "http"])),
        **port,
    }
    return result if result.keys() & {"uri", "authority", "scheme", "port"} else {**result, "uri": "/elsewhere"}


def _direct(chance: Chance) -> Doc:
    body: Doc = chance.one([{}, {"body": {"string": "text"}}, {"body": {"bytes": "dGV4dA=="}}])
    return {"status": chance.one([200, 204, 404, 503]), **body}


def rule(chance: Chance, namespace: str, gateways: list[str], delegates: list[Doc], *, delegate: bool = False) -> Doc:
    """One rule of `spec.http`."""
    result: Doc = {}
    if chance.yes(0.7):
        result["match"] = [_match(chance, gateways, delegate=delegate) for _ in range(chance.number(1, 3))]
    result.update(chance.maybe(0.3, name=chance.one(["first", "second"])))
    action = chance.one(["route"] * 6 + ["redirect", "direct"] + (["delegate"] * 4 if delegates else []))
    if action == "route":
        targets: list[Doc] = [{"destination": destination(chance, namespace)} for _ in range(chance.number(1, 3))]
        for target in targets:
            target.update(chance.maybe(0.15, headers=_headers(chance)))
            if len(targets) > 1:
                target["weight"] = chance.one([0, 1, 20, 50, 100])
        if len(targets) > 1 and not any(target["weight"] for target in targets):
            targets[0]["weight"] = 1
        result["route"] = targets
    elif action == "redirect":
        result["redirect"] = _redirect(chance)
    elif action == "direct":
        result["directResponse"] = _direct(chance)
    else:
        result["delegate"] = chance.one(delegates)
        for match in result.get("match", []):
            match.pop("uri", None) if "regex" in match.get("uri", {}) else None
            if not match:
                match["uri"] = {"prefix": "/"}
    result.update(
        _extras(chance, namespace, "route" if action == "delegate" and chance.yes(0.3) else action)
        if action != "delegate"
        else _of_root(chance, namespace)
    )
    _authority_once(result)
    return result


def _of_root(chance: Chance, namespace: str) -> Doc:
    """What a rule says for the delegate that stands in its place."""
    found = _extras(chance, namespace, "route") if chance.yes(0.5) else {}
    return {name: value for name, value in found.items() if name in ("timeout", "retries", "headers", "corsPolicy")}
