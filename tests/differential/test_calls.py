"""The same calls get the same answers from real Envoys, be they configured by ours or by Istio's control plane."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
import pytest_asyncio

from tests.differential.driven import DrivenMesh
from tests.support import tools
from tests.support.envoy_mesh import EnvoyMesh
from tests.support.mesh_documents import STRICT, deployment, service, split
from tests.support.mesh_world import resource, virtual_service
from tests.support.tokens import Issuer

pytestmark = pytest.mark.asyncio(loop_scope="module")

WORKLOADS = (
    deployment("client", "client", "client")
    + service("client")
    + deployment("server-v1", "server", "server", version="v1")
    + deployment("server-v2", "server", "server", version="v2")
    + service("server")
    + deployment("other", "other", "other")
    + service("other")
)
# Istio keeps policies in listeners: the next call on a connection that is open still meets the policy of before. Ours
# act at once (differences.yaml: policies-at-once); with a connection for each call the sides are comparable.
SUBSETS = resource(
    "DestinationRule",
    "{host: server, trafficPolicy: {connectionPool: {http: {maxRequestsPerConnection: 1}}}, "
    "subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]}",
    name="server",
    group="networking.istio.io/v1",
)
BASE = STRICT + SUBSETS
V1 = "[{destination: {host: server, subset: v1}}]"
V2 = "[{destination: {host: server, subset: v2}}]"
POLICY = "AuthorizationPolicy"

JWT_RULES = (
    "{selector: {matchLabels: {app: server}}, jwtRules: [{issuer: 'https://issuer.example', jwks: 'JWKS', "
    "outputClaimToHeaders: [{header: x-group, claim: group}]}]}"
)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call, and what is compared of its answer besides the code and who answered."""

    client: str = "client-0"
    host: str = "server.mlmesh.svc.cluster.local"
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 5.0
    back: tuple[str, ...] = ()
    """Headers of the answer that are compared."""
    seen: tuple[str, ...] = ()
    """Headers that the backend got that are compared."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A world's policies and the calls that are made in it."""

    texts: tuple[str, ...]
    calls: tuple[Call, ...]
    failing: Mapping[str, tuple[grpc.StatusCode, int]] = field(default_factory=dict)
    """Backends that fail so, so often."""


UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
CASES: dict[str, Case] = {
    "weights-all-or-none": Case(texts=(split(100, 0),), calls=(Call(),) * 4),
    "header": Case(
        texts=(
            virtual_service(f"[{{match: [{{headers: {{x-user: {{exact: me}}}}}}], route: {V2}}}, {{route: {V1}}}]"),
        ),
        calls=(Call(), Call(headers={"x-user": "me"}), Call(headers={"x-user": "ME"})),
    ),
    "header-regex": Case(
        texts=(
            virtual_service(f'[{{match: [{{headers: {{x-user: {{regex: "a.*z"}}}}}}], route: {V2}}}, {{route: {V1}}}]'),
        ),
        calls=(Call(headers={"x-user": "a-z"}), Call(headers={"x-user": "a-z-"}), Call(headers={"x-user": "xa-z"})),
    ),
    "without-header": Case(
        texts=(virtual_service(f"[{{match: [{{withoutHeaders: {{x-a: {{}}}}}}], route: {V2}}}, {{route: {V1}}}]"),),
        calls=(Call(), Call(headers={"x-a": "b"})),
    ),
    "method": Case(
        texts=(virtual_service(f"[{{match: [{{uri: {{exact: /test.Echo/Unary}}}}], route: {V2}}}, {{route: {V1}}}]"),),
        calls=(Call(),),
    ),
    "source-labels": Case(
        texts=(virtual_service(f"[{{match: [{{sourceLabels: {{app: other}}}}], route: {V2}}}, {{route: {V1}}}]"),),
        calls=(Call(), Call(client="other-0")),
    ),
    "nothing-fits": Case(
        texts=(virtual_service(f"[{{match: [{{headers: {{x-a: {{exact: b}}}}}}], route: {V1}}}]"),),
        calls=(Call(), Call(headers={"x-a": "b"})),
    ),
    "headers": Case(
        texts=(
            virtual_service(
                f"[{{route: {V1}, headers: {{request: {{set: {{x-set: a}}, add: {{x-add: b}}, remove: [x-gone]}}, "
                f"response: {{set: {{x-back: c}}}}}}}}]"
            ),
        ),
        calls=(
            Call(headers={"x-gone": "1", "x-set": "old"}, back=("x-back",), seen=("x-set", "x-add", "x-gone")),
            Call(headers={"x-add": "mine"}, seen=("x-add",)),
        ),
    ),
    "authority": Case(
        texts=(virtual_service(f"[{{route: {V1}, rewrite: {{authority: new.example.com}}}}]"),),
        calls=(Call(seen=("x-forwarded-host",)),),
    ),
    "abort": Case(
        texts=(
            virtual_service(
                f"[{{route: {V1}, fault: {{abort: {{grpcStatus: RESOURCE_EXHAUSTED, percentage: {{value: 100}}}}}}}}]"
            ),
        ),
        calls=(Call(),),
    ),
    "abort-http": Case(
        texts=(
            virtual_service(f"[{{route: {V1}, fault: {{abort: {{httpStatus: 503, percentage: {{value: 100}}}}}}}}]"),
        ),
        calls=(Call(),),
    ),
    "abort-never": Case(
        texts=(virtual_service(f"[{{route: {V1}, fault: {{abort: {{httpStatus: 503}}}}}}]"),), calls=(Call(),)
    ),
    "direct-response": Case(
        texts=(virtual_service('[{directResponse: {status: 401, body: {string: "no"}}}]'),), calls=(Call(),)
    ),
    "retries-by-default": Case(
        texts=(virtual_service(f"[{{route: {V1}}}]"),),
        calls=(Call(),),
        failing={"server-v1-0": (UNAVAILABLE, 2)},
    ),
    "retries-exhausted": Case(
        texts=(virtual_service(f"[{{route: {V1}}}]"),),
        calls=(Call(),),
        failing={"server-v1-0": (UNAVAILABLE, 9)},
    ),
    "retries-off": Case(
        texts=(virtual_service(f"[{{route: {V1}, retries: {{attempts: 0}}}}]"),),
        calls=(Call(),),
        failing={"server-v1-0": (UNAVAILABLE, 1)},
    ),
    "retries-of-a-code": Case(
        texts=(virtual_service(f"[{{route: {V1}, retries: {{attempts: 3, retryOn: resource-exhausted}}}}]"),),
        calls=(Call(),),
        failing={"server-v1-0": (grpc.StatusCode.RESOURCE_EXHAUSTED, 3)},
    ),
    "not-retried": Case(
        texts=(virtual_service(f"[{{route: {V1}}}]"),),
        calls=(Call(),),
        failing={"server-v1-0": (grpc.StatusCode.INTERNAL, 1)},
    ),
    "delegate": Case(
        texts=(
            virtual_service(
                f"[{{match: [{{uri: {{prefix: /test.Echo}}}}], delegate: {{name: child}}}}, {{route: {V1}}}]"
            ),
            resource("VirtualService", f"{{http: [{{route: {V2}}}]}}", name="child", group="networking.istio.io/v1"),
        ),
        calls=(Call(),),
    ),
    "unknown-subset": Case(
        texts=(virtual_service("[{route: [{destination: {host: other}}]}]"),),
        calls=(Call(),),
    ),
    "deny-principal": Case(
        texts=(
            split(100, 0),
            resource(
                POLICY,
                '{action: DENY, rules: [{from: [{source: {principals: ["cluster.local/ns/mlmesh/sa/other"]}}]}]}',
            ),
        ),
        calls=(Call(), Call(client="other-0")),
    ),
    "allow-only": Case(
        texts=(
            split(100, 0),
            resource(
                POLICY,
                "{selector: {matchLabels: {app: server}}, "
                "rules: [{when: [{key: 'request.headers[x-a]', values: [b]}]}]}",
            ),
        ),
        calls=(Call(), Call(headers={"x-a": "b"}), Call(headers={"x-a": "c"})),
    ),
    "allow-nothing": Case(texts=(resource(POLICY, "{}"),), calls=(Call(),)),
    "allow-a-method": Case(
        texts=(
            split(0, 100),
            resource(POLICY, "{rules: [{to: [{operation: {paths: [/test.Echo/*], methods: [POST]}}]}]}"),
        ),
        calls=(Call(),),
    ),
    "jwt": Case(
        texts=(
            split(100, 0),
            resource("RequestAuthentication", JWT_RULES, name="jwt"),
            resource(POLICY, '{rules: [{from: [{source: {requestPrincipals: ["*"]}}]}]}'),
        ),
        calls=(
            Call(),
            Call(headers={"authorization": "Bearer a.b.c"}),
            Call(headers={"authorization": "TOKEN group=admin"}, seen=("x-group", "authorization")),
            Call(headers={"authorization": "TOKEN iss=somebody-else"}),
        ),
    ),
    "jwt-claims": Case(
        texts=(
            split(100, 0),
            resource("RequestAuthentication", JWT_RULES, name="jwt"),
            resource(POLICY, "{rules: [{when: [{key: 'request.auth.claims[group]', values: [admin]}]}]}"),
        ),
        calls=(
            Call(headers={"authorization": "TOKEN group=admin"}),
            Call(headers={"authorization": "TOKEN group=user"}),
            Call(headers={"authorization": "TOKEN"}),
        ),
    ),
    "unknown-host": Case(texts=(), calls=(Call(host="nobody.mlmesh.svc.cluster.local"),)),
    "short-host": Case(texts=(split(100, 0),), calls=(Call(host="server"), Call(host="server.mlmesh"))),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[EnvoyMesh, EnvoyMesh]]:
    """The mesh configured by ours, and the one configured by Istio."""
    program = tools.require("pilot-discovery")
    folders = [tmp_path_factory.mktemp(name) for name in ("ours", "theirs")]
    async with (
        EnvoyMesh.start(folders[0], WORKLOADS, BASE) as ours,
        DrivenMesh.driven(program, folders[1], WORKLOADS, BASE) as theirs,
    ):
        yield ours, theirs


@pytest.mark.parametrize("name", CASES)
async def test_answers_are_the_same(both: tuple[EnvoyMesh, EnvoyMesh], name: str) -> None:
    case = CASES[name]
    issuer = _issuer()
    found = await asyncio.gather(*(_answers(mesh, case, issuer) for mesh in both))
    assert found[0] == found[1]


@functools.cache
def _issuer() -> Issuer:
    return Issuer()


def _headers(call: Call, issuer: Issuer) -> dict[str, str]:
    """With a token in the place of "TOKEN claim=value"."""
    result = dict(call.headers)
    words = result.get("authorization", "").split()
    if words[:1] == ["TOKEN"]:
        token = issuer.token(**dict(word.split("=") for word in words[1:]))
        result["authorization"] = f"Bearer {token}"
    return result


async def _answers(mesh: EnvoyMesh, case: Case, issuer: Issuer) -> list[Any]:
    await mesh.reset(BASE, *(text.replace("JWKS", issuer.jwks) for text in case.texts))
    for backend, (code, times) in case.failing.items():
        mesh.backends[backend].fail, mesh.backends[backend].fail_times = code, times
    answers: list[Any] = []
    for call in case.calls:
        before = {name: backend.calls for name, backend in mesh.backends.items()}
        answer = await mesh.call(call.client, host=call.host, metadata=_headers(call, issuer), timeout_s=call.timeout_s)
        reached = {name: backend.calls - before[name] for name, backend in mesh.backends.items()}
        got = next((b.metadata[-1] for name, b in mesh.backends.items() if reached[name]), {})
        answers.append(
            {
                "code": answer.code.name,
                # Texts of refusals are the control plane's own for hosts that nobody serves.
                "text": answer.text if answer.code is not UNAVAILABLE else "",
                "attempts": reached,
                "back": {key: answer.metadata.get(key) for key in call.back},
                "seen": {key: got.get(key) for key in call.seen},
            }
        )
    return answers
