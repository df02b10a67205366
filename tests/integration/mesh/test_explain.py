"""What `mlmesh explain` says of a call is what real Envoys do with it: the rule, the destination, the status."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

import grpc
import pytest
import pytest_asyncio

from mlmesh_local.differing import compare as compare_worlds
from mlmesh_local.envoy_types import Json, plain_bytes
from mlmesh_local.explain import Call, Explanation, Scene, document, explain
from mlmesh_local.inspection import TYPES
from mlmesh_local.live.running import Sent, compare
from mlmesh_local.live.running import running as in_envoy
from mlmesh_local.translate import Configuration
from mlmesh_local.xds import SentResource
from tests.support.envoy_mesh import CHAT, UNARY, EnvoyMesh
from tests.support.mesh_documents import GATEWAY_POD, STRICT, SUBSETS, deployment, service, split
from tests.support.tokens import Issuer

pytestmark = pytest.mark.asyncio(loop_scope="module")

ISSUER = Issuer(prefix="explain-")
STRANGER = Issuer(prefix="explain-")
WORKLOADS = (
    deployment("client", "client", "client")
    + service("client")
    + deployment("other", "other", "other")
    + service("other")
    + deployment("server-v1", "server", "server", version="v1", replicas=2)
    + deployment("server-v2", "server", "server", version="v2")
    + service("server")
    + GATEWAY_POD
)

# Every rule says in its answer which it is; answers of the proxy itself differ by their status.
RULES = """
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: server}
spec:
  host: server
  subsets:
    - {name: v1, labels: {version: v1}}
    - {name: v2, labels: {version: v2}}
    - {name: nobody, labels: {version: v3}}
    - {name: plain, labels: {version: v2}, trafficPolicy: {tls: {mode: DISABLE}}}
    - name: wrong-name
      labels: {version: v2}
      trafficPolicy: {tls: {mode: ISTIO_MUTUAL, subjectAltNames: ["spiffe://cluster.local/ns/mlmesh/sa/nobody"]}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: server}
spec:
  hosts: [server]
  http:
    - name: exact-header
      match: [{headers: {x-user: {exact: ada}}}, {headers: {x-user: {exact: bob}, x-group: {prefix: beta}}}]
      headers: {response: {set: {x-rule: exact-header}}}
      route: [{destination: {host: server, subset: v2}}]
    - name: regex-header
      match: [{headers: {x-user: {regex: "user-[0-9]+|root"}}}]
      headers: {response: {set: {x-rule: regex-header}}}
      route: [{destination: {host: server, subset: v1}}]
    - name: without
      match: [{headers: {x-flag: {}}, withoutHeaders: {x-off: {exact: "yes"}}}]
      headers: {response: {set: {x-rule: without}}}
      route: [{destination: {host: server, subset: v2}}]
    - name: only-other
      match: [{sourceLabels: {app: other}, headers: {x-source: {exact: labels}}}]
      headers: {response: {set: {x-rule: only-other}}}
      route: [{destination: {host: server, subset: v2}}]
    - name: only-gateway
      match: [{gateways: [way-in], headers: {x-source: {exact: gateway}}}]
      headers: {response: {set: {x-rule: only-gateway}}}
      route: [{destination: {host: server, subset: v1}}]
    - name: exact-path
      match: [{uri: {exact: /test.Echo/Exact}}]
      headers: {response: {set: {x-rule: exact-path}}}
      route: [{destination: {host: server, subset: v1}}]
    - name: folded-path
      match: [{uri: {prefix: /TEST.folded/}, ignoreUriCase: true}]
      headers: {response: {set: {x-rule: folded-path}}}
      route: [{destination: {host: server, subset: v1}}]
    - name: regex-path
      match: [{uri: {regex: "/test\\\\.[A-Z][a-z]+/Regex"}}]
      headers: {response: {set: {x-rule: regex-path}}}
      route: [{destination: {host: server, subset: v1}}]
    - name: rewritten
      match: [{uri: {prefix: /old.Echo/}}]
      rewrite: {uri: /test.Echo/}
      headers: {request: {set: {x-seen: rewritten}}, response: {set: {x-rule: rewritten}}}
      route: [{destination: {host: server, subset: v2}}]
    - name: query
      match: [{uri: {prefix: /query/}, queryParams: {v: {exact: "2"}}}]
      directResponse: {status: 403}
    - name: answered
      match: [{uri: {prefix: /query/}}]
      directResponse: {status: 401}
    - name: redirected
      match: [{headers: {x-go: {exact: redirect}}}]
      redirect: {uri: /elsewhere}
    - name: aborted
      match: [{headers: {x-go: {exact: abort}}}]
      fault: {abort: {grpcStatus: RESOURCE_EXHAUSTED, percentage: {value: 100}}}
      route: [{destination: {host: server}}]
    - name: nobody
      match: [{headers: {x-go: {exact: nobody}}}]
      retries: {attempts: 0}
      route: [{destination: {host: server, subset: nobody}}]
    - name: plain
      match: [{headers: {x-go: {exact: plain}}}]
      retries: {attempts: 0}
      route: [{destination: {host: server, subset: plain}}]
    - name: wrong-name
      match: [{headers: {x-go: {exact: wrong-name}}}]
      retries: {attempts: 0}
      route: [{destination: {host: server, subset: wrong-name}}]
    - name: denying-header
      match: [{headers: {x-go: {exact: denied-by-mesh}}}]
      headers: {request: {set: {x-secret: "1"}}}
      route: [{destination: {host: server}}]
    - name: split
      headers: {response: {set: {x-rule: split}}}
      route:
        - {destination: {host: server, subset: v1}, weight: 3}
        - {destination: {host: server, subset: v2}, weight: 1}
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: way-in}
spec:
  selector: {istio: gateway}
  servers: [{port: {number: 8080, name: http2, protocol: HTTP2}, hosts: ["server.example"]}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: outside}
spec:
  hosts: [server.example]
  gateways: [way-in]
  http:
    - name: by-header
      match: [{headers: {x-user: {exact: ada}}}]
      headers: {response: {set: {x-rule: by-header}}}
      route: [{destination: {host: server, subset: v2}}]
    - name: rest
      headers: {response: {set: {x-rule: rest}}}
      route: [{destination: {host: server, subset: v1}}]
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default}
spec: {mtls: {mode: STRICT}}
---
"""

_SHORT = {url: name for name, url in TYPES.items()}

POLICIES = f"""
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{name: tokens}}
spec:
  selector: {{matchLabels: {{app: server}}}}
  jwtRules: [{{issuer: '{ISSUER.name}', jwks: '{ISSUER.jwks}', audiences: [mlmesh], forwardOriginalToken: true}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: no-secrets}}
spec:
  selector: {{matchLabels: {{app: server}}}}
  action: DENY
  rules:
    - when: [{{key: "request.headers[x-secret]", values: ["*"]}}]
    - to: [{{operation: {{paths: ["/test.Echo/Forbidden*"], notMethods: [GET]}}}}]
    - to: [{{operation: {{paths: ["/{{*}}/Templated", "/deep/{{**}}/end"]}}}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: server}}
spec:
  selector: {{matchLabels: {{app: server}}}}
  rules:
    - from: [{{source: {{principals: ["cluster.local/ns/mlmesh/sa/client"], notRequestPrincipals: ["*"]}}}}]
    - from: [{{source: {{namespaces: ["mlmesh"]}}}}]
      to: [{{operation: {{paths: ["/test.Echo/Unary"]}}}}]
      when: [{{key: "request.headers[x-open]", values: ["yes"]}}]
    - from: [{{source: {{requestPrincipals: ["{ISSUER.name}/somebody"]}}}}]
      when: [{{key: "request.auth.claims[role]", values: ["admin"]}}]
    - from: [{{source: {{principals: ["*/ns/mlmesh/sa/gateway", "*/ns/mlmesh/sa/default"]}}}}]
      to: [{{operation: {{notPaths: ["/test.Echo/Hidden"]}}}}]
---
"""


@dataclass(frozen=True)
class Asked:
    """A call. ``policies``: whether the policies above are active, too."""

    name: str
    headers: Mapping[str, str] = field(default_factory=dict)
    path: str = UNARY
    client: str = "client"
    host: str = "server"
    gateway: str = ""
    policies: bool = False


def bearer(**claims: object) -> dict[str, str]:
    # Made when tests are collected, and valid still when a long suite comes to them.
    claims = {"exp": time.time() + 86400, **claims}
    return {"authorization": f"Bearer {ISSUER.token(**claims)}"}  # type: ignore[arg-type]


CALLS = (
    Asked("exact header", {"x-user": "ada"}),
    Asked("exact header in another case", {"x-user": "Ada"}),
    Asked("both headers of the second match", {"x-user": "bob", "x-group": "beta-7"}),
    Asked("one header of two", {"x-user": "bob"}),
    Asked("the other header of two", {"x-group": "beta"}),
    Asked("regex matches all", {"x-user": "user-17"}),
    Asked("regex alternative", {"x-user": "root"}),
    Asked("regex matches a part only", {"x-user": "user-17x"}),
    Asked("header is present", {"x-flag": "1"}),
    Asked("header is present and empty", {"x-flag": ""}),
    Asked("excluded header has another value", {"x-flag": "1", "x-off": "no"}),
    Asked("excluded header", {"x-flag": "1", "x-off": "yes"}),
    Asked("labels of another client", {"x-source": "labels"}),
    Asked("labels of this client", {"x-source": "labels"}, client="other"),
    Asked("rule of a gateway", {"x-source": "gateway"}),
    Asked("exact path", path="/test.Echo/Exact"),
    Asked("exact path and more", path="/test.Echo/ExactAndMore"),
    Asked("exact path with a query", path="/test.Echo/Exact?x=1"),
    Asked("path in another case", path="/test.FOLDED/x"),
    Asked("regex of the path", path="/test.Echo/Regex"),
    Asked("regex of a part of the path", path="/test.Echo/Regex/more"),
    Asked("rewritten path", path="/old.Echo/Unary"),
    Asked("query parameter", path="/query/x?a=1&v=2"),
    Asked("another query parameter", path="/query/x?v=3"),
    Asked("no query parameter", path="/query/x"),
    Asked("redirect", {"x-go": "redirect"}),
    Asked("fault", {"x-go": "abort"}),
    Asked("no endpoint", {"x-go": "nobody"}),
    Asked("plaintext to STRICT", {"x-go": "plain"}),
    Asked("another server expected", {"x-go": "wrong-name"}),
    Asked("full name", {"x-user": "ada"}, host="server.mlmesh.svc.cluster.local"),
    Asked("name with the namespace", {"x-user": "ada"}, host="server.mlmesh"),
    Asked("split"),
    Asked("split of another client", client="other"),
    Asked("service without rules", host="other"),
    Asked("gateway, by header", {"x-user": "ada"}, host="server.example", gateway="way-in"),
    Asked("gateway, the rest", host="server.example", gateway="way-in"),
    Asked("gateway, unknown host", host="nobody.example", gateway="way-in"),
    Asked("allowed identity", policies=True),
    Asked("identity that is not allowed", client="other", policies=True),
    Asked("identity allowed by a header", {"x-open": "yes"}, client="other", policies=True),
    Asked("header for another path", {"x-open": "yes"}, path="/test.Echo/Other", client="other", policies=True),
    Asked("denied by a header", {"x-secret": "1"}, policies=True),
    Asked("denied by a header that the route sets", {"x-go": "denied-by-mesh"}, policies=True),
    Asked("denied by the path", path="/test.Echo/ForbiddenThing", policies=True),
    Asked("denied by the path behind a rewrite", path="/old.Echo/Forbidden", policies=True),
    Asked("denied by a template", path="/test.Echo/Templated", policies=True),
    Asked("a template of one segment", path="/test/Echo/Templated", policies=True),
    Asked("a template of many segments", path="/deep/a/b/end", policies=True),
    Asked("a template and more", path="/deep/a/b/end/more", policies=True),
    Asked("no token of another identity", client="other", policies=True),
    Asked("token with the role", bearer(aud="mlmesh", role="admin"), client="other", policies=True),
    Asked("token with another role", bearer(aud="mlmesh", role="user"), client="other", policies=True),
    Asked("token for another", bearer(aud="somebody"), policies=True),
    Asked("token that has expired", bearer(aud="mlmesh", exp=1), policies=True),
    Asked("token of another issuer", bearer(aud="mlmesh", iss="https://evil.example"), policies=True),
    Asked(
        "token that another signed",
        {"authorization": f"Bearer {STRANGER.token(aud='mlmesh', exp=time.time() + 86400)}"},
        policies=True,
    ),
    Asked("no token at all", {"authorization": "Bearer nothing"}, policies=True),
    Asked("token where none may be", bearer(aud="mlmesh"), policies=True),
    Asked("token by another algorithm", bearer(aud="mlmesh", role="admin", alg="ES256"), client="other", policies=True),
    Asked("gateway, allowed", host="server.example", gateway="way-in", policies=True),
    Asked("gateway, hidden", path="/test.Echo/Hidden", host="server.example", gateway="way-in", policies=True),
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EnvoyMesh]:
    async with EnvoyMesh.start(tmp_path_factory.mktemp("mesh"), WORKLOADS, RULES) as mesh:
        yield mesh


async def test_explanations_are_what_envoys_do(running: EnvoyMesh) -> None:
    assert len(CALLS) >= 40
    differences: list[str] = []
    for policies in (False, True):
        await running.reset(RULES, *([POLICIES] if policies else []))
        scene = Scene(running.world, now_s=time.time())
        sent = Scene(running.world, now_s=scene.now_s, sent=_sent_to_all(running))
        for asked in (one for one in CALLS if one.policies == policies):
            said = explain(scene, _call(asked))
            done = await _done(running, asked)
            problem = _difference(said, done, asked)
            if problem:
                differences.append(f"{asked.name}: {problem}\n  said {said.outcome}\n  done {done}")
            # What was really sent, written out again by protobuf, is read to the same effect.
            if document(explain(sent, _call(asked))) != document(said):
                differences.append(f"{asked.name}: what was sent explains otherwise")
    assert not differences, "\n".join(differences)


DENIED = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nobody}
spec: {selector: {matchLabels: {app: server}}}
---
"""


ANSWERED = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: server}
spec: {hosts: [server], http: [{directResponse: {status: 403}}]}
---
"""


async def test_streams_are_moved_and_cut_by_what_is_said_to(running: EnvoyMesh) -> None:
    await running.reset(STRICT, SUBSETS, split(0, 100))
    said = explain(Scene(running.world, now_s=time.time()), Call(source="client", host="server", path=CHAT))
    assert not [line for line in said.streams if line.startswith("CUT by")]
    async with running.channel() as channel:
        stream = channel.stream_stream(CHAT)(timeout=60)
        assert await _exchange(stream, b"1") == b"server-v2-0:1"
        # Neither a denial, nor other weights, nor a rule that answers itself ends or moves it.
        await running.reset(STRICT, SUBSETS, split(0, 100), DENIED)
        assert await _exchange(stream, b"denied") == b"server-v2-0:denied"
        assert (await running.call()).code is grpc.StatusCode.PERMISSION_DENIED
        await running.reset(STRICT, SUBSETS, split(100, 0))
        assert await _exchange(stream, b"weights") == b"server-v2-0:weights"
        assert (await running.call()).text.startswith("server-v1-")
        await running.reset(STRICT, SUBSETS, ANSWERED)
        assert await _exchange(stream, b"no route") == b"server-v2-0:no route"
        assert (await running.call()).code is grpc.StatusCode.PERMISSION_DENIED
        # The end of its server does; its answer has begun, so that no other can go on with it.
        await running.reset(STRICT, SUBSETS, split(50, 50))
        await running.restart_envoy("server-v2-0")
        assert await stream.code() is grpc.StatusCode.INTERNAL
        assert any("its open streams end with INTERNAL" in line for line in said.streams)


async def test_a_timeout_of_the_route_cuts_a_stream_that_flows(running: EnvoyMesh) -> None:
    await running.reset(STRICT, SUBSETS, split(0, 100, "      timeout: 1s"))
    said = explain(Scene(running.world, now_s=time.time()), Call(source="client", host="server", path=CHAT))
    assert any(line.startswith("CUT by the route: no stream lives longer than 1 s") for line in said.streams)
    async with running.channel() as channel:
        stream = channel.stream_stream(CHAT)(timeout=60)
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # A write to what has just ended is an invalid state.
            while await stream.write(b"1") is None and await stream.read() is not grpc.aio.EOF:
                pass
        # The server's sidecar knows the time, too: at a busy moment it is first.
        assert await stream.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.DEADLINE_EXCEEDED)


async def _exchange(stream: grpc.aio.StreamStreamCall, message: bytes) -> bytes:
    await stream.write(message)
    answer = await asyncio.wait_for(stream.read(), 30)
    assert isinstance(answer, bytes), f"the stream has ended: {await stream.code()}"
    return answer


async def test_what_envoys_run_is_what_they_were_sent(running: EnvoyMesh) -> None:
    await running.reset(RULES)
    for name in ("client-0", "server-v2-0", "gateway-0"):
        sent = [
            Sent(type=_SHORT[one.type_url], name=one.name, version=one.version, content=_content(one))
            for one in running.ads.sent(name)
            if one.type_url in _SHORT
        ]
        compared = compare(sent, in_envoy(await running.configuration(name, "?include_eds")))
        verdicts = {one.verdict for one in compared if one.verdict != "draining"}
        assert verdicts == {"same"}, [one for one in compared if one.verdict != "same"]
        assert {one.type for one in compared} == set(TYPES)
        # And what was not sent like this is told.
        other = dataclasses.replace(sent[0], version="another")
        again = compare([other], in_envoy(await running.configuration(name)))
        assert [one.verdict for one in again if one.name == other.name] == ["differs"]


def _servers(*servers: str) -> str:
    """A gateway with a server for each "name mode" on one port."""
    listed = "".join(
        f"{{port: {{number: 8443, name: {name}, protocol: HTTPS}}, hosts: [{name}.example], "
        f"tls: {{mode: {mode}, credentialName: ingress-cert}}}}, "
        for name, mode in (one.split() for one in servers)
    )
    return f"""
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {{name: tls}}
spec: {{selector: {{istio: gateway}}, servers: [{listed}]}}
---
"""


async def test_what_diff_says_is_cut_is_what_envoy_drains(running: EnvoyMesh) -> None:
    await running.reset(_servers("a SIMPLE", "b SIMPLE"))
    for servers, chains in ((("a SIMPLE", "b SIMPLE", "c SIMPLE"), 0), (("a SIMPLE", "b MUTUAL"), 2)):
        before = running.world
        draining = await _draining(running)
        await running.reset(_servers(*servers))
        (change,) = [one for one in compare_worlds(before, running.world).config if one.type == "listeners"]
        assert change.cuts == bool(chains)
        # Only chains that change or go are drained; a new one leaves the others alone.
        assert await _draining(running) - draining == chains


async def _draining(mesh: EnvoyMesh) -> int:
    stats = await mesh.stats("gateway-0", "listener_manager.total_(filter_chains|listeners)_draining")
    return sum(stats.values())


def _sent_to_all(mesh: EnvoyMesh) -> dict[str, Configuration]:
    found: dict[str, Configuration] = {}
    for proxy in mesh.proxies:
        for one in mesh.ads.sent(proxy.id):
            if one.type_url in _SHORT:
                found.setdefault(proxy.id, {}).setdefault(one.type_url, {})[one.name] = _content(one)
    return found


def _content(sent: SentResource) -> Json:
    return plain_bytes(sent.type_url, sent.content)


def _call(asked: Asked) -> Call:
    return Call(
        source="" if asked.gateway else asked.client,
        host=asked.host,
        port=0 if asked.gateway else 9000,
        path=asked.path,
        headers=asked.headers,
        gateway=asked.gateway,
    )


@dataclass(frozen=True)
class Done:
    """What came back: status, who answered, and which rule says that it was."""

    code: str
    text: str
    rule: str


async def _done(mesh: EnvoyMesh, asked: Asked) -> Done:
    if asked.gateway:
        target, authority = f"{mesh.proxy('gateway-0').pod_address}:8080", asked.host
    else:
        target = f"{mesh.proxy(f'{asked.client}-0').outbound_address}:9000"
        authority = f"{asked.host}:9000"
    options = (("grpc.default_authority", authority), ("grpc.enable_retries", 0))
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        call = channel.unary_unary(asked.path)(b"", timeout=5, metadata=tuple(asked.headers.items()))
        try:
            text, code = (await call).decode(), "OK"
        except grpc.aio.AioRpcError as error:
            text, code = error.details() or "", error.code().name
        metadata = {**dict(await call.initial_metadata() or ()), **dict(await call.trailing_metadata() or ())}
    return Done(code=code, text=text, rule=str(metadata.get("x-rule", "")))


def _difference(said: Explanation, done: Done, asked: Asked) -> str:
    expected = said.outcome.code
    if said.outcome.kind == "routed" and _sent(said, asked) != UNARY:
        # The application knows one method.
        expected = "UNIMPLEMENTED"
    if done.code != expected:
        return f"the status is {done.code}, not {expected}"
    rule = said.route.route if said.route else ""
    if done.rule and rule != done.rule:
        return f"the rule is {done.rule}, not {rule}"
    answered = {endpoint.instance for one in said.destinations for endpoint in one.endpoints}
    if done.code == "OK" and done.text not in answered:
        return f"{done.text} answered, not {', '.join(sorted(answered))}"
    return ""


def _sent(said: Explanation, asked: Asked) -> str:
    rewritten = any("path prefix" in line for line in said.headers)
    return asked.path.replace("/old.Echo/", "/test.Echo/") if rewritten else asked.path
