"""Action CUSTOM: real Envoys ask an external authorizer, and dry runs and audits only leave a note."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio

from tests.support.authorizer import Authorizer
from tests.support.envoy_mesh import EnvoyMesh, unary
from tests.support.mesh_documents import STRICT, deployment, service
from tests.support.mesh_load import under_load

pytestmark = pytest.mark.asyncio(loop_scope="module")

WORKLOADS = (
    deployment("client", "client", "client")
    + service("client")
    + deployment("server", "server", "server")
    + service("server")
)
OK = grpc.StatusCode.OK
DENIED = grpc.StatusCode.PERMISSION_DENIED
ALLOWED = {"x-ext-authz": "allow"}
PORTS = {"grpc": 9191, "http": 8000, "nobody": 9292}


def settings(*providers: str) -> str:
    inner = "\n".join(f"    - {provider}" for provider in providers)
    return f"""
apiVersion: v1
kind: ConfigMap
metadata: {{name: istio, namespace: istio-system}}
data:
  mesh: |
    extensionProviders:
{inner}
---
"""


def entry(address: str) -> str:
    """The authorizers, beside the workload as Istio's documentation has them."""
    ports = ", ".join(
        f"{{number: {number}, name: {'http' if name == 'http' else 'grpc'}-{name}, protocol: {kind}}}"
        for (name, number), kind in zip(PORTS.items(), ("GRPC", "HTTP", "GRPC"), strict=True)
    )
    return f"""
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: authz}}
spec:
  hosts: [authz.local]
  location: MESH_EXTERNAL
  resolution: STATIC
  endpoints: [{{address: {address}}}]
  ports: [{ports}]
---
"""


def provider(name: str, kind: str, port: int, more: str = "") -> str:
    return f"{{name: {name}, {kind}: {{service: authz.local, port: {port}{more}}}}}"


GRPC = provider("by-grpc", "envoyExtAuthzGrpc", PORTS["grpc"])
HTTP = provider(
    "by-http",
    "envoyExtAuthzHttp",
    PORTS["http"],
    ", pathPrefix: /check, includeRequestHeadersInCheck: [x-ext-authz],"
    " includeAdditionalHeadersInCheck: {x-extra: '1'}, headersToUpstreamOnAllow: [x-checked],"
    " headersToDownstreamOnDeny: [x-reason]",
)


def policy(name: str, body: str, metadata: str = "") -> str:
    return f"""
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {name}{metadata}}}
spec: {{selector: {{matchLabels: {{app: server}}}}, {body}}}
---
"""


def custom(provider_name: str, rules: str = "[{}]", name: str = "ask") -> str:
    return policy(name, f"action: CUSTOM, provider: {{name: {provider_name}}}, rules: {rules}")


class Asked:
    """The mesh with both authorizers."""

    def __init__(self, mesh: EnvoyMesh, base: str) -> None:
        self.mesh, self.base = mesh, base
        self.by_grpc, self.by_http = Authorizer(), Authorizer()

    async def reset(self, *texts: str) -> None:
        await self.mesh.reset(self.base, *texts)
        for each in (self.by_grpc, self.by_http):
            each.asked.clear()
            each.bodies.clear()
            each.paths.clear()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def asked(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Asked]:
    async with EnvoyMesh.start(tmp_path_factory.mktemp("mesh"), WORKLOADS, STRICT) as mesh:
        address = mesh.free_address()
        it = Asked(mesh, STRICT + entry(address))
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(it.by_grpc.serve_grpc(f"{address}:{PORTS['grpc']}"))
            await stack.enter_async_context(it.by_http.serve_http(f"{address}:{PORTS['http']}"))
            yield it


async def test_an_authorizer_is_asked_over_grpc(asked: Asked) -> None:
    await asked.reset(settings(GRPC), custom("by-grpc"))
    assert (await asked.mesh.call(metadata=ALLOWED)).code is OK
    assert asked.mesh.backends["server-0"].metadata[-1]["x-checked"] == "yes"
    assert (await asked.mesh.call()).code is DENIED
    assert asked.mesh.calls() == 1
    assert asked.by_grpc.paths == ["/test.Echo/Unary"] * 2


async def test_an_authorizer_is_asked_over_http(asked: Asked) -> None:
    await asked.reset(settings(HTTP), custom("by-http"))
    assert (await asked.mesh.call(metadata={**ALLOWED, "x-other": "secret"})).code is OK
    assert (await asked.mesh.call()).code is DENIED
    assert asked.mesh.backends["server-0"].metadata[-1]["x-checked"] == "yes"
    assert asked.by_http.paths == ["/check/test.Echo/Unary"] * 2
    assert asked.by_http.asked[0]["x-extra"] == "1"
    assert "x-other" not in asked.by_http.asked[0]


async def test_only_what_the_rules_match_is_asked_about(asked: Asked) -> None:
    only = "[{to: [{operation: {paths: [/test.Echo/Chat]}}]}, {when: [{key: 'request.headers[x-ask]', values: ['*']}]}]"
    await asked.reset(settings(GRPC), custom("by-grpc", only))
    assert (await asked.mesh.call()).code is OK
    assert not asked.by_grpc.asked
    assert (await asked.mesh.call(metadata={"x-ask": "me"})).code is DENIED


async def test_its_consent_is_not_the_last_word(asked: Asked) -> None:
    """CUSTOM comes first, then DENY, then ALLOW: each may refuse."""
    deny = policy("deny", "action: DENY, rules: [{when: [{key: 'request.headers[x-evil]', values: ['yes']}]}]")
    allow = policy("allow", "rules: [{from: [{source: {principals: ['*/sa/client']}}]}]")
    await asked.reset(settings(GRPC), custom("by-grpc"), deny, allow)
    assert (await asked.mesh.call(metadata=ALLOWED)).code is OK
    assert (await asked.mesh.call(metadata={**ALLOWED, "x-evil": "yes"})).code is DENIED
    await asked.mesh.apply(allow.replace("/sa/client", "/sa/other"))
    assert (await asked.mesh.call(metadata=ALLOWED)).code is DENIED
    assert len(asked.by_grpc.asked) == 3


async def test_an_authorizer_that_does_not_answer(asked: Asked) -> None:
    """Closed by default, with the status that it asks for; open where it says so."""
    gone = provider("gone", "envoyExtAuthzGrpc", PORTS["nobody"])
    await asked.reset(settings(gone), custom("gone"))
    assert (await asked.mesh.call(metadata=ALLOWED)).code is DENIED
    await asked.mesh.apply(settings(gone.replace("port:", "statusOnError: '503', port:")))
    assert (await asked.mesh.call(metadata=ALLOWED)).code is grpc.StatusCode.UNAVAILABLE
    await asked.mesh.apply(settings(gone.replace("port:", "failOpen: true, port:")))
    assert (await asked.mesh.call()).code is OK


async def test_what_asks_nobody_that_is_known_is_denied(asked: Asked) -> None:
    """As in Istio: a provider that is not defined, a service that is not there, two providers for one workload."""
    lost = provider("lost", "envoyExtAuthzGrpc", 1).replace("authz.local", "nowhere.local")
    for documents in (
        (custom("unknown"),),
        (settings(lost), custom("lost")),
        (settings(GRPC, HTTP), custom("by-grpc"), custom("by-http", name="too")),
    ):
        await asked.reset(*documents)
        assert (await asked.mesh.call(metadata=ALLOWED)).code is DENIED
    only = "[{to: [{operation: {paths: [/other]}}]}]"
    await asked.reset(custom("unknown", only))
    assert (await asked.mesh.call()).code is OK


async def test_it_sees_the_body_that_it_asks_for(asked: Asked) -> None:
    body = ", includeRequestBodyInCheck: {maxRequestBytes: 8, allowPartialMessage: true, packAsBytes: true}"
    await asked.reset(settings(provider("by-grpc", "envoyExtAuthzGrpc", PORTS["grpc"], body)), custom("by-grpc"))
    assert (await asked.mesh.call(request=b"hello", metadata=ALLOWED)).text == "server-0:hello"
    # Five bytes of a gRPC message's prefix come first.
    assert asked.by_grpc.bodies == [b"\x00\x00\x00\x00\x05hel"]


async def test_changes_of_authorizers_let_nothing_through(asked: Asked) -> None:
    """Between authorizers, and between one that is known and one that is not: no call is let through unasked."""
    asks = custom("by-grpc"), custom("by-http"), custom("unknown")
    await asked.reset(settings(GRPC, HTTP), asks[0])
    before = await asked.mesh.stats("server-0", "listener_manager.lds.update_success")
    async with asked.mesh.channel() as channel:
        async with under_load(asked.mesh, call=lambda: unary(channel, b"", {}, 5.0)) as outcomes:
            for number in range(30):
                await outcomes.more(4)
                await asked.mesh.apply(asks[number % 3])
        assert outcomes.codes() == {DENIED}
    assert asked.mesh.calls() == 0
    assert asked.by_http.asked
    assert await asked.mesh.stats("server-0", "listener_manager.lds.update_success") == before


async def test_dry_runs_and_audits_refuse_nothing(asked: Asked) -> None:
    dry = ", annotations: {istio.io/dry-run: 'true'}"
    await asked.reset(
        policy("audit", "action: AUDIT, rules: [{}]"),
        policy("try-deny", "action: DENY, rules: [{}]", dry),
        policy("try-allow", "rules: [{from: [{source: {namespaces: [elsewhere]}}]}]", dry),
    )
    assert (await asked.mesh.call()).code is OK
    found = await asked.mesh.stats("server-0", "rbac.*shadow")
    names = {name.rpartition("rbac.")[2]: value for name, value in found.items() if value}
    assert {"istio_dry_run_deny_.shadow_denied", "istio_dry_run_allow_.shadow_denied"} <= names.keys()
