"""Who a request is from, by its token: what real Envoys make of RequestAuthentications, and of forged tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import grpc
import pytest

from mlmesh_local.key_sets import REFRESH_S, KeySets, fetcher
from mlmesh_runtime.executors import BoundedExecutor
from tests.support.envoy_mesh import EnvoyMesh, unary
from tests.support.mesh_documents import STRICT, deployment, service
from tests.support.mesh_load import under_load
from tests.support.tokens import ISSUER, Issuer, encode, tampered

pytestmark = pytest.mark.asyncio(loop_scope="module")

BASE = STRICT
WORKLOADS = (
    deployment("client", "client", "client")
    + service("client")
    + deployment("server", "server", "server")
    + service("server")
)
TRUSTED = Issuer(prefix="trusted-")
STRANGER = Issuer(prefix="trusted-")
OTHER = Issuer("https://other.example", prefix="other-")

OK = grpc.StatusCode.OK
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
DENIED = grpc.StatusCode.PERMISSION_DENIED


@pytest.fixture
def executor() -> Iterator[BoundedExecutor]:
    executor = BoundedExecutor("keys", workers_max=1)
    yield executor
    executor.shutdown()


def authentication(*rules: str, name: str = "tokens") -> str:
    return f"""
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{name: {name}}}
spec:
  selector: {{matchLabels: {{app: server}}}}
  jwtRules: [{", ".join(rules)}]
---
"""


def policy(name: str, body: str) -> str:
    return f"""
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {name}}}
spec: {{selector: {{matchLabels: {{app: server}}}}, {body}}}
---
"""


def of(issuer: Issuer, more: str = "") -> str:
    return f"{{issuer: '{issuer.name}', jwks: '{issuer.jwks}', forwardOriginalToken: true{more}}}"


TOKENS = authentication(of(TRUSTED, ", audiences: [mlmesh]"))
REQUIRED = policy("required", f"rules: [{{from: [{{source: {{requestPrincipals: ['{ISSUER}/*']}}}}]}}]")


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def forgeries() -> dict[str, str]:
    """Tokens that must not pass, each because of one thing only (RFC 8725)."""
    good = {"aud": "mlmesh"}
    token = TRUSTED.token(**good)
    head, body, _ = token.split(".")
    return {
        "algorithm none": TRUSTED.token(alg="none", **good),
        "algorithm None": TRUSTED.token(alg="None", **good),
        "no signature": f"{head}.{body}.",
        "HS256 with the public key as secret": TRUSTED.token(alg="HS256", secret=TRUSTED.public_pem, **good),
        "HS256 with an empty secret": TRUSTED.token(alg="HS256", **good),
        "ES256 in the header of an RSA key": TRUSTED.token(header={"alg": "ES256"}, **good),
        "the key of another": STRANGER.token(**good),
        "another claim under a true signature": tampered(token, sub="admin"),
        "another signature": f"{head}.{body}.{encode(b'x' * 256)}",
        "another issuer": TRUSTED.token(iss="https://evil.example", **good),
        "no issuer": TRUSTED.token(iss=None, **good),
        "another audience": TRUSTED.token(aud="somebody-else"),
        "no audience": TRUSTED.token(),
        "expired": TRUSTED.token(exp=int(time.time()) - 120, **good),
        "not yet valid": TRUSTED.token(nbf=int(time.time()) + 120, **good),
        "an unknown key id": TRUSTED.token(header={"kid": "unknown"}, **good),
        "a path as key id": TRUSTED.token(header={"kid": "../../../../dev/null"}, alg="HS256", **good),
        "a key in the header": STRANGER.token(header={"kid": None, "jwk": {"kty": "oct", "k": "c2VjcmV0"}}, **good),
        "not a token": "nothing",
        "two dots": "..",
        "claims that are no object": TRUSTED.token(body='"text"'),
        "claims that are no JSON": TRUSTED.token(body="{"),
        "a claim that is there twice": TRUSTED.token(
            body=f'{{"iss": "{ISSUER}", "aud": "mlmesh", "sub": "somebody", "sub": "admin"}}'
        ),
        "an expiry that is no number": TRUSTED.token(exp="tomorrow", **good),
    }


async def test_forged_tokens_never_reach_a_handler(mesh: EnvoyMesh) -> None:
    await mesh.apply(TOKENS)
    for name, token in forgeries().items():
        answer = await mesh.call(metadata=bearer(token))
        # Envoy answers 403 to a true token for somebody else.
        assert answer.code is (DENIED if "audience" in name else UNAUTHENTICATED), name
    assert mesh.calls() == 0
    for alg in ("RS256", "ES256"):
        assert (await mesh.call(metadata=bearer(TRUSTED.token(alg=alg, aud="mlmesh")))).code is OK
    listed = TRUSTED.token(aud=["another", "mlmesh"])
    assert (await mesh.call(metadata=bearer(listed))).code is OK
    # Without a token nothing is refused: who needs one says so in a policy.
    assert (await mesh.call()).code is OK


async def test_who_needs_a_token_is_for_policies_to_say(mesh: EnvoyMesh) -> None:
    admin = "rules: [{when: [{key: 'request.auth.claims[realm][roles]', values: [admin]}]}]"
    await mesh.apply(TOKENS, REQUIRED)
    good = bearer(TRUSTED.token(aud="mlmesh"))
    assert (await mesh.call(metadata=good)).code is OK
    refused = await mesh.call()
    assert (refused.code, refused.text) == (DENIED, "RBAC: access denied")
    await mesh.apply(policy("required", admin))
    assert (await mesh.call(metadata=good)).code is DENIED
    for roles, code in ((["user", "admin"], OK), ("admin", OK), ("user admin", DENIED), ([], DENIED)):
        token = TRUSTED.token(aud="mlmesh", realm={"roles": roles})
        assert (await mesh.call(metadata=bearer(token))).code is code, roles
    scope = "rules: [{when: [{key: 'request.auth.claims[scope]', values: [write]}]}]"
    await mesh.apply(policy("required", scope))
    assert (await mesh.call(metadata=bearer(TRUSTED.token(aud="mlmesh", scope="read write")))).code is OK
    tool = "{key: request.auth.presenter, values: [tool]}"
    presenter = f"rules: [{{when: [{tool}, {{key: request.auth.audiences, values: [mlmesh]}}]}}]"
    await mesh.apply(policy("required", presenter))
    assert (await mesh.call(metadata=bearer(TRUSTED.token(aud="mlmesh", azp="tool")))).code is OK
    assert (await mesh.call(metadata=bearer(TRUSTED.token(aud="mlmesh", azp="other")))).code is DENIED


async def test_tokens_are_where_the_rule_says_and_go_on_as_it_says(mesh: EnvoyMesh) -> None:
    where = ", fromHeaders: [{name: x-token, prefix: 'Token '}], fromCookies: [session]"
    more = ", outputPayloadToHeader: x-payload, outputClaimToHeaders: [{header: x-sub, claim: sub}]"
    await mesh.apply(
        authentication(of(TRUSTED, where + more).replace("forwardOriginalToken: true", "forwardOriginalToken: false")),
        REQUIRED,
    )
    token = TRUSTED.token(sub="me")
    assert (await mesh.call(metadata=bearer(token))).code is DENIED
    assert (await mesh.call(metadata={"cookie": f"a=b; session={token}"})).code is OK
    assert (await mesh.call(metadata={"x-token": f"Token {token}", "x-sub": "forged"})).code is OK
    received = mesh.backends["server-0"].metadata[-1]
    assert received["x-sub"] == "me"
    assert received["x-payload"] == token.split(".")[1]
    assert "x-token" not in received


async def test_keys_are_fetched_where_the_rule_says(mesh: EnvoyMesh, executor: BoundedExecutor) -> None:
    """No token passes before the issuer answers; when it has new keys, tokens of the old ones do not any more."""
    pages: dict[str, str] = {}
    now = 0.0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
        text = pages.get(asked, "")
        writer.write(f"HTTP/1.0 {200 if text else 404} -\r\n\r\n{text}".encode())
        await writer.drain()
        writer.close()

    async def codes() -> list[grpc.StatusCode]:
        mesh.key_sets = keys.current()
        await mesh.ads.wait_acked(mesh.push(), timeout_s=30.0)
        return [(await mesh.call(metadata=bearer(issuer.token()))).code for issuer in (TRUSTED, STRANGER)]

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        keys = KeySets(fetch=fetcher(lambda *_: ""), executor=executor, clock=lambda: now, changed=lambda: None)
        await mesh.apply(authentication(f"{{issuer: '{ISSUER}', jwksUri: 'http://{host}:{port}/keys'}}"))
        await keys.need(mesh.resources)
        assert await codes() == [UNAUTHENTICATED, UNAUTHENTICATED]
        for issuer, expected in ((TRUSTED, [OK, UNAUTHENTICATED]), (STRANGER, [UNAUTHENTICATED, OK])):
            pages["/keys"] = issuer.jwks
            now += REFRESH_S
            await keys.refresh_due()
            assert await codes() == expected
    mesh.key_sets = {}


async def test_several_issuers(mesh: EnvoyMesh) -> None:
    """In one policy or in two: a token of either is valid, and any other is not."""
    for documents in (
        (authentication(of(TRUSTED), of(OTHER)),),
        (authentication(of(TRUSTED)), authentication(of(OTHER), name="more")),
    ):
        await mesh.reset(STRICT, *documents)
        for issuer in (TRUSTED, OTHER):
            assert (await mesh.call(metadata=bearer(issuer.token()))).code is OK
        assert (await mesh.call()).code is OK
        for token in (STRANGER.token(), OTHER.token(iss=ISSUER)):
            assert (await mesh.call(metadata=bearer(token))).code is UNAUTHENTICATED


async def test_a_change_acts_on_open_connections_and_lets_nothing_through(mesh: EnvoyMesh) -> None:
    """The key of an issuer is taken away, and a token demanded, while one connection is used without pause."""
    await mesh.apply(TOKENS, REQUIRED)
    listeners = await mesh.configuration("server-0", "?resource=dynamic_listeners")
    before = await mesh.stats("server-0", "listener_manager.lds.update_success")
    good = bearer(TRUSTED.token(aud="mlmesh"))
    async with mesh.channel() as channel:
        for _ in range(5):
            async with under_load(mesh, call=lambda: unary(channel, b"", good, 5.0)) as outcomes:
                await outcomes.more(10)
                await mesh.apply(authentication(of(STRANGER, ", audiences: [mlmesh]")))
                acknowledged = time.perf_counter()
                await outcomes.settled()
                handled = mesh.calls()
                await outcomes.more(20)
                assert outcomes.codes(since=acknowledged) == {UNAUTHENTICATED}
                assert mesh.calls() == handled
                await mesh.apply(TOKENS)
                await outcomes.more(10)
            assert outcomes.codes() == {OK, UNAUTHENTICATED}
    assert await mesh.configuration("server-0", "?resource=dynamic_listeners") == listeners
    assert await mesh.stats("server-0", "listener_manager.lds.update_success") == before


async def test_what_istio_takes_although_one_might_not_expect_it(mesh: EnvoyMesh) -> None:
    """Envoy takes tokens without expiry, for a minute after it, and with any `crit`: policies may demand claims."""
    await mesh.apply(TOKENS)
    for token in (
        TRUSTED.token(aud="mlmesh", exp=None),
        TRUSTED.token(aud="mlmesh", exp=int(time.time()) - 30),
        TRUSTED.token(aud="mlmesh", header={"crit": ["b64"], "b64": False}),
    ):
        assert (await mesh.call(metadata=bearer(token))).code is OK
    needed = policy("required", "rules: [{when: [{key: 'request.auth.claims[scope]', values: ['*']}]}]")
    await mesh.apply(needed)
    assert (await mesh.call(metadata=bearer(TRUSTED.token(aud="mlmesh")))).code is DENIED
