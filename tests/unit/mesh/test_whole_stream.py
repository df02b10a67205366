"""State-of-the-world streams: what gRPC clients are sent, and when."""

from __future__ import annotations

import dataclasses

import pytest

from mlmesh_local.envoy_types import CLUSTER, ENDPOINTS, LISTENER, ROUTES
from mlmesh_local.packing import Packed
from mlmesh_local.snapshot import Snapshot
from mlmesh_local.sotw import WholeRequest, WholeStream


def packed(**versions: str) -> dict[str, Packed]:
    return {name: Packed(name=name, version=version, content=version.encode()) for name, version in versions.items()}


def snapshot(version: str, *, clusters: str = "a", route: str = "a", listener: str = "1") -> Snapshot:
    """Clusters are letters, an upper-case one is another version; the route names the cluster that it sends to."""
    names = {letter.lower(): letter for letter in clusters}
    return Snapshot(
        node_id="n",
        version=version,
        resources={
            CLUSTER: packed(**names),
            ENDPOINTS: packed(**names),
            LISTENER: packed(target=listener, other="1"),
            ROUTES: packed(routes=route),
        },
        endpoint_names=frozenset(),
        route_names=frozenset(),
        secret_names=frozenset(),
    )


class Client:
    """Asks as gRPC does: the listener, its routes, the cluster that they name, its endpoints."""

    def __init__(self) -> None:
        self.stream = WholeStream()
        self.has: dict[str, dict[str, str]] = {}
        self.wants: dict[str, tuple[str, ...]] = {}
        self.log: list[str] = []
        self.nonces: dict[str, str] = {}

    def ask(self, type_url: str, *names: str, error: str = "") -> None:
        self.wants[type_url] = names
        nonce = self.nonces.get(type_url, "")
        self.stream.receive(WholeRequest(type_url=type_url, names=names, nonce=nonce, error=error))

    def run(self, refuse: str = "") -> None:
        for _ in range(50):
            responses = self.stream.poll()
            if not responses:
                return
            for response in responses:
                kind = response.type_url
                self.log.append(f"{kind.rsplit('.', 1)[-1]} {','.join(p.name + p.version for p in response.resources)}")
                self.nonces[kind] = response.nonce
                if kind == refuse:
                    self.ask(kind, *self.wants[kind], error="no")
                    continue
                got = {p.name: p.version for p in response.resources}
                self.has[kind] = got if kind in (LISTENER, CLUSTER) else {**self.has.get(kind, {}), **got}
                self.ask(kind, *self.wants[kind])
                self.follow(kind)
        pytest.fail("the exchange does not end")

    def follow(self, kind: str) -> None:
        if kind == LISTENER and ROUTES not in self.wants:
            self.ask(ROUTES, "routes")
        if kind == ROUTES:
            cluster = self.has[ROUTES]["routes"]
            # It stays with the old one until the new one is there.
            kept = [name for name in self.wants.get(CLUSTER, ()) if name not in self.has.get(CLUSTER, {})]
            self.ask(CLUSTER, *dict.fromkeys([cluster, *kept]))
        if kind == CLUSTER:
            self.ask(ENDPOINTS, *self.wants[CLUSTER])


@pytest.fixture
def client() -> Client:
    client = Client()
    client.stream.set_snapshot(snapshot("one"))
    client.ask(LISTENER, "target")
    client.run()
    return client


def test_a_client_is_told_what_it_asks_for_and_no_more(client: Client) -> None:
    assert client.log == ["Listener target1", "RouteConfiguration routesa", "Cluster aa", "ClusterLoadAssignment aa"]
    assert client.stream.acked_version == "one"


def test_nothing_is_sent_when_nothing_changed(client: Client) -> None:
    client.log.clear()
    client.stream.set_snapshot(snapshot("two"))
    client.run()
    assert client.log == []
    assert client.stream.acked_version == "two"


def test_a_route_to_a_new_cluster_comes_before_the_client_asks_for_that(client: Client) -> None:
    client.log.clear()
    client.stream.set_snapshot(snapshot("two", clusters="ab", route="b"))
    client.run()
    assert client.log == ["RouteConfiguration routesb", "Cluster bb", "ClusterLoadAssignment bb"]
    assert client.stream.acked_version == "two"


def test_a_cluster_that_goes_is_sent_along_until_routes_have_left_it(client: Client) -> None:
    """A whole response without it would take it away while calls still go there."""
    client.ask(CLUSTER, "a", "c")
    client.run()
    client.log.clear()
    client.stream.set_snapshot(snapshot("two", clusters="c", route="c"))
    responses = client.stream.poll()
    sent = {p.name for response in responses if response.type_url == CLUSTER for p in response.resources}
    assert sent == {"a", "c"}


def test_listeners_are_sent_as_a_whole(client: Client) -> None:
    client.ask(LISTENER, "target", "other", "missing")
    client.log.clear()
    client.run()
    assert client.log == ["Listener other1,target1"]
    client.log.clear()
    client.stream.set_snapshot(snapshot("two", listener="2"))
    client.run()
    assert client.log == ["Listener other1,target2"]


def test_a_request_that_crossed_a_response_is_not_answered_twice(client: Client) -> None:
    client.stream.set_snapshot(snapshot("two", listener="2"))
    (response,) = client.stream.poll()
    client.stream.receive(WholeRequest(type_url=LISTENER, names=("target",), nonce=client.nonces[LISTENER]))
    assert client.stream.poll() == []
    client.stream.receive(WholeRequest(type_url=LISTENER, names=("target",), nonce=response.nonce))
    assert client.stream.acked_version == "two"


def test_a_refusal_is_kept_until_something_else_is_given(client: Client) -> None:
    client.stream.set_snapshot(snapshot("bad", route="x", clusters="x"))
    client.run(refuse=ROUTES)
    assert client.stream.rejection == "no"
    assert client.stream.acked_version == ""
    client.stream.set_snapshot(snapshot("good"))
    client.run()
    assert client.stream.acked_version == "good"
    assert client.has[ROUTES] == {"routes": "a"}


def test_everything_is_sent_to_who_names_nothing() -> None:
    """An Envoy that speaks this protocol."""
    stream = WholeStream()
    stream.set_snapshot(dataclasses.replace(snapshot("one", clusters="ab")))
    stream.receive(WholeRequest(type_url=CLUSTER))
    (response,) = stream.poll()
    assert [p.name for p in response.resources] == ["a", "b"]
