"""Who is let in: identities, mutual TLS, permissions, and gateways. A refused call never reaches a handler."""

from __future__ import annotations

import base64
import time

import grpc
import pytest

from tests.support.envoy_mesh import CHAT, Backend, EnvoyMesh
from tests.support.mesh_documents import STRICT, deployment, service
from tests.support.mesh_load import under_load
from tests.support.pki import Authority, Leaf, spiffe

pytestmark = pytest.mark.asyncio(loop_scope="module")

GATEWAY_POD = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: gateway}
spec:
  selector: {matchLabels: {istio: gateway}}
  template:
    metadata:
      labels: {istio: gateway}
      annotations: {inject.istio.io/templates: gateway}
    spec:
      containers: [{name: istio-proxy, image: auto, ports: [{name: tls-grpc, containerPort: 8443}]}]
---
"""
WORKLOADS = (
    deployment("client", "client", "client")
    + service("client")
    + deployment("other", "other", "other")
    + service("other")
    + deployment("server", "server", "server")
    + service("server")
    + GATEWAY_POD
)
GATEWAY = """
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: way-in}
spec:
  selector: {istio: gateway}
  servers:
    - port: {number: 8443, name: tls-grpc, protocol: HTTPS}
      tls: {mode: MUTUAL, credentialName: ingress-cert}
      hosts: [server.mlmesh.svc.cluster.local]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: way-in}
spec:
  hosts: [server]
  gateways: [way-in]
  http: [{route: [{destination: {host: server, port: {number: 9000}}}]}]
---
"""
BASE = STRICT + GATEWAY


def policy(name: str, body: str) -> str:
    return f"""
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {name}}}
spec: {body}
---
"""


def allow(account: str, operation: str = "") -> str:
    to = f", to: [{{operation: {operation}}}]" if operation else ""
    source = f"from: [{{source: {{principals: [cluster.local/ns/mlmesh/sa/{account}]}}}}]"
    return policy("server", f"{{selector: {{matchLabels: {{app: server}}}}, rules: [{{{source}{to}}}]}}")


async def test_the_server_learns_who_calls(mesh: EnvoyMesh) -> None:
    forged = f"URI={spiffe('operator')}"
    answer = await mesh.call(metadata={"x-forwarded-client-cert": forged})
    assert answer.code is grpc.StatusCode.OK
    (received,) = mesh.backends["server-0"].metadata
    elements = received["x-forwarded-client-cert"].split(",")
    assert len(elements) == 1  # what the application made up was dropped by its own sidecar
    assert f"URI={spiffe('client')}" in elements[-1]


async def test_a_made_up_identity_is_never_the_last_element(mesh: EnvoyMesh) -> None:
    """A peer that speaks to the sidecar itself, with a true certificate, cannot speak for another."""
    leaf = mesh.authority.leaf(spiffe("other"))
    answer = await mesh.direct("server-0", leaf, metadata={"x-forwarded-client-cert": f"URI={spiffe('operator')}"})
    assert answer.code is grpc.StatusCode.OK
    (received,) = mesh.backends["server-0"].metadata
    assert f"URI={spiffe('other')}" in received["x-forwarded-client-cert"].split(",")[-1]


async def test_strict_refuses_whoever_is_not_of_the_mesh(mesh: EnvoyMesh) -> None:
    authority = mesh.authority
    stranger = Authority("mesh root")
    intruders: dict[str, Leaf | None] = {
        "plaintext": None,
        "another authority": stranger.leaf(spiffe("client")),
        "another trust domain of the same authority": authority.leaf("spiffe://evil.local/ns/mlmesh/sa/client"),
        "a trust domain that begins alike": authority.leaf("spiffe://cluster.local.evil/ns/mlmesh/sa/client"),
        "no identity": authority.leaf(),
        "an expired certificate": authority.expired(spiffe("client")),
    }
    for name, leaf in intruders.items():
        answer = await mesh.direct("server-0", leaf)
        assert answer.code is grpc.StatusCode.UNAVAILABLE, name
    assert mesh.calls() == 0
    assert (await mesh.direct("server-0", authority.leaf(spiffe("client")))).text == "server-0"


SETTINGS = """
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |
    trustDomainAliases: [old.example]
---
"""


async def test_an_alias_of_the_trust_domain_means_the_same_workloads(mesh: EnvoyMesh) -> None:
    old = mesh.authority.leaf("spiffe://old.example/ns/mlmesh/sa/client")
    assert (await mesh.direct("server-0", old)).code is grpc.StatusCode.UNAVAILABLE
    await mesh.apply(SETTINGS, allow("client"))
    assert (await mesh.direct("server-0", old)).code is grpc.StatusCode.OK
    for uri in ("spiffe://old.example/ns/mlmesh/sa/other", spiffe("other")):
        refused = await mesh.direct("server-0", mesh.authority.leaf(uri))
        assert refused.code is grpc.StatusCode.PERMISSION_DENIED
    elsewhere = mesh.authority.leaf("spiffe://older.example/ns/mlmesh/sa/client")
    assert (await mesh.direct("server-0", elsewhere)).code is grpc.StatusCode.UNAVAILABLE


async def test_a_server_of_another_identity_is_not_trusted(mesh: EnvoyMesh) -> None:
    """A workload that got hold of the address, but not of the identity, gets no call."""
    proxy = mesh.proxy("server-0")
    impostor = mesh.secrets_of("other")
    try:
        mesh.ads.set_secrets(proxy.id, impostor)
        await mesh.secrets_taken(proxy.id)
        async with mesh.channel("other-0") as channel:
            answer = await mesh.call("other-0", channel=channel)
        assert answer.code is grpc.StatusCode.UNAVAILABLE
        assert mesh.calls() == 0
    finally:
        mesh.ads.set_secrets(proxy.id, mesh.secrets_of("server"))
        await mesh.secrets_taken(proxy.id)


async def test_permissive_takes_both_and_disable_only_plaintext(mesh: EnvoyMesh) -> None:
    await mesh.apply(STRICT.replace("STRICT", "PERMISSIVE"))
    forged = {"x-forwarded-client-cert": f"URI={spiffe('operator')}"}
    assert (await mesh.direct("server-0", None, metadata=forged)).text == "server-0"
    assert (await mesh.call()).text == "server-0"
    plain, mutual = mesh.backends["server-0"].metadata
    assert "x-forwarded-client-cert" not in plain
    assert spiffe("client") in mutual["x-forwarded-client-cert"]

    # Clients learn it with their endpoints, and call in plaintext.
    await mesh.apply(STRICT.replace("STRICT", "DISABLE"))
    assert (await mesh.direct("server-0", None)).text == "server-0"
    assert (await mesh.call()).text == "server-0"
    assert "x-forwarded-client-cert" not in mesh.backends["server-0"].metadata[-1]

    # Listeners drain as Istio's do: a connection that is open is told to go with its next answer.
    await mesh.apply(STRICT)
    await mesh.call()
    assert (await mesh.call()).text == "server-0"
    assert spiffe("client") in mesh.backends["server-0"].metadata[-1]["x-forwarded-client-cert"]


async def test_permissions_by_identity_and_method(mesh: EnvoyMesh) -> None:
    await mesh.apply(policy("nobody", "{}"), allow("client", "{paths: [/test.Echo/Unary], methods: [POST]}"))
    assert (await mesh.call("client-0")).code is grpc.StatusCode.OK
    refused = await mesh.call("other-0")
    assert (refused.code, refused.text) == (grpc.StatusCode.PERMISSION_DENIED, "RBAC: access denied")
    async with mesh.channel("client-0") as channel:
        stream = channel.stream_stream(CHAT)(timeout=30)
        assert await stream.code() is grpc.StatusCode.PERMISSION_DENIED
    assert mesh.calls() == 1


async def test_denials_win_over_allowances(mesh: EnvoyMesh) -> None:
    deny = "{action: DENY, rules: [{when: [{key: 'request.headers[x-evil]', values: ['yes*']}]}]}"
    await mesh.apply(policy("deny", deny), allow("client"))
    assert (await mesh.call()).code is grpc.StatusCode.OK
    assert (await mesh.call(metadata={"x-evil": "no"})).code is grpc.StatusCode.OK
    assert (await mesh.call(metadata={"x-evil": "yes, sir"})).code is grpc.StatusCode.PERMISSION_DENIED


async def test_a_denial_acts_on_open_connections_and_lets_nothing_through(mesh: EnvoyMesh) -> None:
    await mesh.apply(allow("client"))
    listeners = await mesh.configuration("server-0", "?resource=dynamic_listeners")
    for _ in range(3):
        async with under_load(mesh) as outcomes:
            await outcomes.more(20)
            await mesh.apply(allow("other"))
            acknowledged = time.perf_counter()
            await outcomes.settled()
            handled = mesh.calls()
            await outcomes.more(40)
            assert outcomes.codes(since=acknowledged) == {grpc.StatusCode.PERMISSION_DENIED}
            assert mesh.calls() == handled
            await mesh.apply(allow("client"))
            await outcomes.more(20)
        assert outcomes.codes() == {grpc.StatusCode.OK, grpc.StatusCode.PERMISSION_DENIED}
    assert (await mesh.call()).code is grpc.StatusCode.OK
    assert await mesh.configuration("server-0", "?resource=dynamic_listeners") == listeners


async def test_the_gateway_demands_a_certificate_and_says_who_called(mesh: EnvoyMesh) -> None:
    leaf = mesh.authority.leaf(spiffe("operator"))
    host = "server.mlmesh.svc.cluster.local"
    forged = {"x-forwarded-client-cert": f"URI={spiffe('training')}"}
    answer = await mesh.direct("gateway-0", leaf, port=8443, host=host, metadata=forged)
    assert answer.text == "server-0"
    (received,) = mesh.backends["server-0"].metadata
    elements = received["x-forwarded-client-cert"].split(",")
    assert spiffe("default") in elements[-1]  # the gateway's own identity is who calls the server
    assert spiffe("operator") in elements[0]
    assert spiffe("training") not in received["x-forwarded-client-cert"]

    for intruder in (None, Authority().leaf(spiffe("operator"))):
        refused = await mesh.direct("gateway-0", intruder, port=8443, host=host)
        assert refused.code is grpc.StatusCode.UNAVAILABLE
    client = "client.mlmesh.svc.cluster.local"
    elsewhere = await mesh.direct("gateway-0", leaf, port=8443, host=client, server_name=host)
    assert elsewhere.code is grpc.StatusCode.UNIMPLEMENTED


async def test_policies_apply_to_the_gateway_too(mesh: EnvoyMesh) -> None:
    source = "{namespaces: [mlmesh], notPrincipals: ['*/sa/other']}"
    only = f"{{selector: {{matchLabels: {{istio: gateway}}}}, rules: [{{from: [{{source: {source}}}]}}]}}"
    await mesh.apply(policy("gateway", only))
    host = "server.mlmesh.svc.cluster.local"
    allowed = await mesh.direct("gateway-0", mesh.authority.leaf(spiffe("operator")), port=8443, host=host)
    assert allowed.code is grpc.StatusCode.OK
    for uri in (spiffe("other"), spiffe("operator", "elsewhere")):
        refused = await mesh.direct("gateway-0", mesh.authority.leaf(uri), port=8443, host=host)
        assert refused.code is grpc.StatusCode.PERMISSION_DENIED


async def test_a_gateway_knows_where_a_call_comes_from(mesh: EnvoyMesh) -> None:
    """`remoteIpBlocks` is who called the gateway, here and behind it, whatever the caller says."""
    leaf = mesh.authority.leaf(spiffe("operator"))
    host = "server.mlmesh.svc.cluster.local"
    allowed, denied = grpc.StatusCode.OK, grpc.StatusCode.PERMISSION_DENIED
    for app, source, code in (
        ("{istio: gateway}", "{remoteIpBlocks: [127.0.0.0/8]}", allowed),
        ("{istio: gateway}", "{remoteIpBlocks: [10.1.2.3]}", denied),
        ("{istio: gateway}", "{notRemoteIpBlocks: [127.0.0.0/8]}", denied),
        ("{app: server}", "{notRemoteIpBlocks: [10.1.2.3]}", allowed),
        ("{app: server}", "{remoteIpBlocks: [10.1.2.3]}", denied),
    ):
        selector = f"selector: {{matchLabels: {app}}}"
        await mesh.reset(BASE, policy("where", f"{{{selector}, rules: [{{from: [{{source: {source}}}]}}]}}"))
        for forged in ({}, {"x-forwarded-for": "10.1.2.3"}):
            answer = await mesh.direct("gateway-0", leaf, port=8443, host=host, metadata=forged)
            assert answer.code is code, (source, forged)


async def test_a_node_without_its_token_gets_no_configuration(mesh: EnvoyMesh) -> None:
    async with grpc.aio.insecure_channel(mesh.control_plane) as channel:
        call = channel.stream_stream("/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources")(
            metadata=(("x-mlmesh-token", "made up"),), timeout=5
        )
        await call.write(mesh.first_request("server-0"))
        assert await call.code() is grpc.StatusCode.PERMISSION_DENIED
    assert (await mesh.call()).code is grpc.StatusCode.OK


OUTSIDE = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: outside}}
spec: {{hosts: [api.example.com], resolution: STATIC, endpoints: [{{address: {address}}}],
  ports: [{{number: {port}, name: grpc, protocol: GRPC}}]}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: outside}}
spec:
  host: api.example.com
  workloadSelector: {{matchLabels: {{app: client}}}}
  trafficPolicy: {{tls: {{mode: MUTUAL, credentialName: partner}}}}
---
"""


def secret(name: str, leaf: Leaf, roots: bytes) -> str:
    texts = {"tls.crt": leaf.cert, "tls.key": leaf.key, "ca.crt": roots}
    data = ", ".join(f"{key}: {base64.b64encode(text).decode()}" for key, text in texts.items())
    return f"""
apiVersion: v1
kind: Secret
metadata: {{name: {name}}}
type: kubernetes.io/tls
data: {{{data}}}
---
"""


async def test_a_secret_is_shown_to_a_server_outside_by_whom_a_rule_selects(mesh: EnvoyMesh) -> None:
    partner = Authority("partner root")
    theirs = partner.leaf(dns=("api.example.com",))
    server = grpc.aio.server()
    backend = Backend("partner")
    handler = grpc.unary_unary_rpc_method_handler(backend.unary)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", {"Unary": handler}),))
    credentials = grpc.ssl_server_credentials([(theirs.key, theirs.cert)], partner.pem, require_client_auth=True)
    address = mesh.free_address()
    port = server.add_secure_port(f"{address}:0", credentials)
    await server.start()

    async def code(client: str = "client-0") -> grpc.StatusCode:
        return (await mesh.call(client, host="api.example.com", port=port, timeout_s=5)).code

    async def settled(expected: grpc.StatusCode) -> None:
        deadline = time.monotonic() + 30
        while (found := await code()) is not expected:
            assert time.monotonic() < deadline, found

    try:
        # Nobody has the secret: its cluster waits.
        await mesh.apply(OUTSIDE.format(address=address, port=port))
        assert await code() is grpc.StatusCode.UNAVAILABLE
        await mesh.apply(secret("partner", partner.leaf(), partner.pem))
        await settled(grpc.StatusCode.OK)
        # Others call in plaintext, which the server does not speak.
        assert await code("other-0") is grpc.StatusCode.UNAVAILABLE
    finally:
        await server.stop(None)
