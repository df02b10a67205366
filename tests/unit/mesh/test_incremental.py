"""What is built for one world after the other equals what is built from nothing, and only what changed is new."""

from __future__ import annotations

import dataclasses
import gc
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mlmesh_local import incremental
from mlmesh_local.envoy_types import CLUSTER, ENDPOINTS, EXTENSIONS, LISTENER, ROUTES
from mlmesh_local.model import ProxyNode, World
from mlmesh_local.resources.resource_set import ResourceSet
from mlmesh_local.snapshot import Snapshot, SnapshotBuilder, build_snapshot
from mlmesh_local.translate import View
from tests.differential import worlds
from tests.differential.fuzz import documents as random_documents
from tests.differential.fuzz import text
from tests.support.mesh_documents import SUBSETS
from tests.support.mesh_world import destination_rule, load_alone, resource, virtual_service, world

STEPS = 30
SECOND = """
apiVersion: v1
kind: Service
metadata: {name: second}
spec: {selector: {app: server}, ports: [{name: grpc, port: 9100, targetPort: grpc}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: outside}
spec:
  hosts: [outside.example.com]
  resolution: STATIC
  ports: [{number: 9000, name: grpc, protocol: GRPC}]
  endpoints: [{address: 192.0.2.1}]
---
"""


def split(weight: int) -> str:
    return virtual_service(
        f"[{{route: [{{destination: {{host: server, subset: v1}}, weight: {weight}}}, "
        f"{{destination: {{host: server, subset: v2}}, weight: {100 - weight}}}]}}]"
    )


def from_nothing(a_world: World) -> dict[str, Snapshot]:
    """By the plain translation, that remembers nothing."""
    return {proxy.id: build_snapshot(a_world, proxy) for proxy in a_world.proxies}


@pytest.mark.parametrize("always_forget", [False, True])
def test_a_world_after_another_equals_one_from_nothing(monkeypatch: pytest.MonkeyPatch, always_forget: bool) -> None:
    """Whatever changes: routes, rules, policies, services, endpoints, proxies, settings."""
    if always_forget:
        monkeypatch.setattr(incremental, "REPLACED_MAX", -1)
    choose = random.Random(7)  # noqa: S311
    start = world(SUBSETS, SECOND)
    builder = SnapshotBuilder()
    current = start
    for number in range(STEPS):
        current = changed(current, start, choose)
        # Snapshots are equal when their bytes are.
        built = builder.build(current)
        assert built == from_nothing(current), f"step {number}"


@pytest.mark.parametrize("seed", [1, 2])
def test_random_worlds_after_another_equal_those_from_nothing(seed: int) -> None:
    """Resources of every kind come and go, in any order."""
    for built, plain in turns(seed, 3):
        assert built == plain


def turns(seed: int, steps: int) -> Iterator[tuple[dict[str, Snapshot], dict[str, Snapshot]]]:
    """Worlds of a seed, of which each has one to three resources more or less than the one before."""
    choose = random.Random(seed)  # noqa: S311
    found = random_documents(seed)
    pods = [it for it in found if it["kind"] in ("Deployment", "ServiceAccount")]
    present = [it for it in found if it not in pods]
    more = [it for it in random_documents(seed + 5000) if it["apiVersion"] not in ("v1", "apps/v1")]
    pool = [*present, *more]
    members = worlds.members(pods)
    builder = SnapshotBuilder()
    for _ in range(steps):
        current = worlds.our_world([text([*pods, *present])], members)
        yield builder.build(current), from_nothing(current)
        for changed_one in choose.sample(pool, choose.randrange(1, 4)):
            present = (
                [it for it in present if it is not changed_one] if changed_one in present else [*present, changed_one]
            )
        choose.shuffle(present)


def test_proxies_that_come_and_go_are_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incremental, "REPLACED_MAX", 5)
    start = world(SUBSETS, SECOND)
    last = start.proxies[-1]
    memory = incremental.Memory()
    for number in range(40):
        proxy = dataclasses.replace(last, labels={**last.labels, "pod": str(number)})
        current = dataclasses.replace(start, proxies=(*start.proxies[:-1], proxy))
        memory.turn(View(current))
        for each in current.proxies:
            memory.translate(each)
    gc.collect()
    # Not isinstance: asked for their class, lazy modules of others load themselves.
    kept = [it for it in gc.get_objects() if type(it) is ProxyNode and "pod" in it.labels]
    assert 0 < len(kept) < 20


def changed(current: World, start: World, choose: random.Random) -> World:
    """A world that differs in one thing, or the first one again."""
    texts = documents(choose)
    kind = choose.choice([*texts, "gone", "ready", "endpoints", "proxy", "tracing", "back"])
    if kind in texts:
        return dataclasses.replace(current, resources=current.resources.apply(load_alone(texts[kind]())).resources)
    if kind == "gone":
        removable = [r for r in current.resources if r.kind in ("VirtualService", "PeerAuthentication", "Sidecar")]
        left = [r for r in current.resources if not removable or r is not removable[-1]]
        return dataclasses.replace(current, resources=ResourceSet.of(left))
    fields: dict[str, Any] = {}
    if kind == "ready":
        one = choose.randrange(len(current.endpoints))
        other = dataclasses.replace(current.endpoints[one], ready=not current.endpoints[one].ready)
        fields["endpoints"] = (*current.endpoints[:one], other, *current.endpoints[one + 1 :])
    elif kind == "endpoints":
        fields["endpoints"] = start.endpoints[: choose.randrange(1, len(start.endpoints) + 1)]
    elif kind == "proxy":
        fields["proxies"] = start.proxies[: choose.randrange(1, len(start.proxies) + 1)]
    elif kind == "tracing":
        fields["otlp_address"] = "" if current.otlp_address else "127.0.0.1:4317"
    return dataclasses.replace(current, **fields) if fields else start


def documents(choose: random.Random) -> dict[str, Callable[[], str]]:
    """Makers of documents that may be applied."""
    port = choose.choice((8000, 9090))
    balancer = choose.choice(("RANDOM", "ROUND_ROBIN"))
    return {
        "route": lambda: split(choose.choice((0, 10, 50, 100))),
        "header": lambda: virtual_service(
            "[{match: [{headers: {x-user: {exact: ada}}, sourceLabels: {team: red}}], route: [{destination: "
            "{host: server, subset: v2}}]}, {route: [{destination: {host: second}}]}]"
        ),
        "rule": lambda: SUBSETS.replace(
            "host: server\n",
            f"host: server\n  trafficPolicy: {{loadBalancer: {{simple: {balancer}}}}}\n",
        ),
        "mtls": lambda: resource("PeerAuthentication", f"{{mtls: {{mode: {choose.choice(('STRICT', 'DISABLE'))}}}}}"),
        "port": lambda: resource(
            "PeerAuthentication",
            f"{{selector: {{matchLabels: {{app: server}}}}, portLevelMtls: {{{port}: {{mode: DISABLE}}}}}}",
            name="ports",
        ),
        "allow": lambda: resource(
            "AuthorizationPolicy",
            f"{{selector: {{matchLabels: {{app: {choose.choice(('server', 'client'))}}}}}, rules: [{{to: [{{operation: "
            "{ports: ['8000']}}]}]}",
            name="allow",
        ),
        "sidecar": lambda: resource(
            "Sidecar",
            f"{{egress: [{{hosts: ['{choose.choice(('./*', '*/*', './server.mlmesh.svc.cluster.local'))}']}}]}}",
            group="networking.istio.io/v1",
        ),
        "services": lambda: SECOND.replace("192.0.2.1", f"192.0.2.{choose.randrange(9) + 1}"),
    }


def unchanged(before: Snapshot, after: Snapshot) -> set[str]:
    """Types of which nothing was made anew."""
    return {type_url for type_url, named in after.resources.items() if named is before.resources[type_url]}


DENY = resource("AuthorizationPolicy", "{selector: {matchLabels: {app: server}}, action: DENY, rules: [{}]}")
ALL = {CLUSTER, ENDPOINTS, EXTENSIONS, LISTENER, ROUTES}


@pytest.mark.parametrize(
    ("change", "touched"),
    [
        (lambda w: with_text(w, split(10)), {ROUTES}),
        (lambda w: dataclasses.replace(w, endpoints=w.endpoints[1:]), {ENDPOINTS}),
        (
            lambda w: with_text(w, DENY),
            {EXTENSIONS, ROUTES},
        ),
        (dataclasses.replace, set()),
    ],
    ids=["route", "endpoint", "policy", "nothing"],
)
def test_a_change_touches_what_depends_on_it(change: Callable[[World], World], touched: set[str]) -> None:
    a_world = world(SUBSETS, split(90), SECOND)
    builder = SnapshotBuilder()
    before = builder.build(a_world)
    after = builder.build(change(a_world))
    for node in ("client", "server-v1"):
        assert ALL - unchanged(before[node], after[node]) <= touched, node


def with_text(a_world: World, text: str) -> World:
    return dataclasses.replace(a_world, resources=a_world.resources.apply(load_alone(text)).resources)


def test_one_route_among_many_is_made_alone() -> None:
    many = "".join(
        f"apiVersion: v1\nkind: Service\nmetadata: {{name: s{n}}}\nspec: {{ports: [{{name: grpc, port: 9000}}]}}\n---\n"
        + virtual_service(f"[{{route: [{{destination: {{host: s{n}}}}}]}}]", fields=f"hosts: [s{n}]").replace(
            "{name: server}", f"{{name: s{n}}}"
        )
        for n in range(30)
    )
    a_world = world(many)
    builder = SnapshotBuilder()
    builder.build(a_world)
    made = builder.memory.made
    builder.build(a_world)
    assert builder.memory.made == made
    changed_route = virtual_service(
        "[{timeout: 3s, route: [{destination: {host: s3}}]}]", fields="hosts: [s3]"
    ).replace("{name: server}", "{name: s3}")
    builder.build(with_text(a_world, changed_route))
    # A section, a port, a rule and a virtual host of each kind of client; not thirty of them.
    assert builder.memory.made - made <= 4 * len(a_world.proxies)


def test_a_rule_that_selects_nothing_makes_nothing_anew() -> None:
    a_world = world(SUBSETS)
    builder = SnapshotBuilder()
    before = builder.build(a_world)
    after = builder.build(
        with_text(a_world, destination_rule("{loadBalancer: {simple: RANDOM}}").replace("server", "nobody"))
    )
    told = [{k: dict(named) for k, named in s["client"].resources.items()} for s in (before, after)]
    assert told[0] == told[1]
