"""What is sent on an ADS stream, and when: make before break, and a refusal leaves the last good in place."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlmesh_local.delta import DeltaStream, Request, Response
from mlmesh_local.envoy_types import CLUSTER, ENDPOINTS, EXTENSIONS, LISTENER, PUSH_ORDER, ROUTES, SECRET
from mlmesh_local.packing import Packed
from mlmesh_local.snapshot import Snapshot


def packed(**versions: str) -> dict[str, Packed]:
    return {name: Packed(name=name, version=version, content=version.encode()) for name, version in versions.items()}


def snapshot(
    version: str, *, clusters: str = "a", route: str = "1", listener: str = "1", filters: str = "1"
) -> Snapshot:
    """Clusters are letters; an upper-case one is another version of it."""
    names = {letter.lower(): letter for letter in clusters}
    return Snapshot(
        node_id="n",
        version=version,
        resources={
            CLUSTER: packed(**names),
            ENDPOINTS: packed(**names),
            EXTENSIONS: packed(filter=filters),
            LISTENER: packed(listener=listener),
            ROUTES: packed(routes=route),
        },
        endpoint_names=frozenset(names),
        route_names=frozenset({"routes"}),
        secret_names=frozenset({"default"}),
        extension_names=frozenset({"filter"}),
    )


class Envoy:
    """Acknowledges as Envoy does (clusters once they have endpoints) and asks for what clusters and listeners name."""

    def __init__(self, stream: DeltaStream) -> None:
        self.stream = stream
        self.has: dict[str, dict[str, str]] = {type_url: {} for type_url in PUSH_ORDER}
        self.log: list[str] = []
        self.waiting: list[Response] = []
        self.subscribed: set[str] = set()

    def connect(self) -> None:
        self.stream.receive(Request(type_url=CLUSTER, known=self.has[CLUSTER]))
        self.run()
        self.stream.receive(Request(type_url=SECRET, subscribe=("default",), known=self.has[SECRET]))
        self.stream.receive(Request(type_url=LISTENER, known=self.has[LISTENER]))
        self.run()

    def run(self, *, refuse: str = "") -> None:
        """Exchange messages until nothing moves."""
        for _ in range(100):
            responses = self.stream.poll()
            for response in responses:
                self.take(response, refuse)
            if not responses and not self.warm():
                return
        pytest.fail("the exchange does not end")

    def take(self, response: Response, refuse: str) -> None:
        short = response.type_url.rsplit(".", 1)[-1]
        self.log.append(f"{short} +{','.join(p.name for p in response.resources)} -{','.join(response.removed)}")
        if response.type_url == refuse:
            self.stream.receive(Request(type_url=refuse, nonce=response.nonce, error="no"))
            return
        for item in response.resources:
            self.has[response.type_url][item.name] = item.version
        for name in response.removed:
            del self.has[response.type_url][name]
        if response.type_url == CLUSTER:
            self.waiting.append(response)
            self.subscribe(ENDPOINTS, {p.name for p in response.resources})
            gone = tuple(name for name in response.removed if name in self.subscribed)
            if gone:
                self.subscribed -= set(gone)
                self.stream.receive(Request(type_url=ENDPOINTS, unsubscribe=gone))
            return
        self.stream.receive(Request(type_url=response.type_url, nonce=response.nonce))
        if response.type_url == LISTENER:
            self.subscribe(EXTENSIONS, {"filter"})
            self.subscribe(ROUTES, {"routes"})

    def subscribe(self, type_url: str, names: set[str]) -> None:
        new = tuple(sorted(names - self.subscribed))
        if new:
            self.subscribed |= set(new)
            self.stream.receive(Request(type_url=type_url, subscribe=new))

    def warm(self) -> bool:
        ready = [r for r in self.waiting if all(self.has[ENDPOINTS].get(p.name) == p.version for p in r.resources)]
        for response in ready:
            self.waiting.remove(response)
            self.stream.receive(Request(type_url=CLUSTER, nonce=response.nonce))
        return bool(ready)


@pytest.fixture
def envoy() -> Envoy:
    stream = DeltaStream()
    stream.set_secrets(packed(default="s1"))
    stream.set_snapshot(snapshot("one"))
    envoy = Envoy(stream)
    envoy.connect()
    envoy.log.clear()
    return envoy


def test_a_new_envoy_gets_everything_in_order() -> None:
    stream = DeltaStream()
    envoy = Envoy(stream)
    envoy.connect()
    assert envoy.log == []  # nothing is known of it yet
    stream.set_secrets(packed(default="s1"))
    stream.set_snapshot(snapshot("one", clusters="ab"))
    assert stream.acked_version == ""
    envoy.run()
    kinds = [line.split()[0] for line in envoy.log]
    assert kinds.index("Cluster") < kinds.index("ClusterLoadAssignment") < kinds.index("Listener")
    assert kinds[-1] == "RouteConfiguration"
    assert stream.acked_version == "one"


def test_a_change_of_routes_sends_routes_only(envoy: Envoy) -> None:
    envoy.stream.set_snapshot(snapshot("two", route="2"))
    assert envoy.stream.acked_version == ""
    envoy.run()
    assert envoy.log == ["RouteConfiguration +routes -"]
    assert envoy.stream.acked_version == "two"


def test_a_change_of_a_filter_sends_its_configuration_only(envoy: Envoy) -> None:
    envoy.stream.set_snapshot(snapshot("two", filters="2"))
    assert envoy.stream.acked_version == ""
    envoy.run()
    assert envoy.log == ["TypedExtensionConfig +filter -"]
    assert envoy.stream.acked_version == "two"


def test_filters_change_before_listeners_and_these_before_routes(envoy: Envoy) -> None:
    envoy.stream.set_snapshot(snapshot("two", clusters="ab", filters="2", listener="2", route="2"))
    envoy.run()
    assert [line.split()[0] for line in envoy.log] == [
        "Cluster",
        "ClusterLoadAssignment",
        "TypedExtensionConfig",
        "Listener",
        "RouteConfiguration",
    ]


def test_the_same_content_under_another_version_is_acknowledged_at_once(envoy: Envoy) -> None:
    envoy.stream.set_snapshot(snapshot("two"))
    assert envoy.stream.acked_version == "two"
    assert envoy.stream.poll() == []


def test_what_comes_back_before_anything_else_was_looked_at_is_sent_again(envoy: Envoy) -> None:
    """Snapshots that follow each other share what is equal, and a change that is taken back shares all of it."""
    one, two = snapshot("one"), snapshot("two", route="2")
    envoy.stream.set_snapshot(one)
    envoy.run()
    for number in range(3):
        envoy.stream.set_snapshot(two)
        (response,) = envoy.stream.poll()
        envoy.take(response, "")
        assert envoy.stream.acked_version == "two", number
        envoy.stream.set_snapshot(one)
        assert envoy.stream.acked_version == "", number
        (response,) = envoy.stream.poll()
        envoy.take(response, "")
        assert envoy.stream.acked_version == "one", number
        assert envoy.has[ROUTES] == {"routes": "1"}


def test_clusters_come_before_and_go_after_the_routes_that_use_them(envoy: Envoy) -> None:
    envoy.stream.set_snapshot(snapshot("two", clusters="b", route="2"))
    envoy.run()
    assert envoy.log == [
        "Cluster +b -",
        "ClusterLoadAssignment +b -",
        "RouteConfiguration +routes -",
        "Cluster + -a",
    ]
    assert envoy.stream.acked_version == "two"


def test_a_changed_cluster_gets_its_endpoints_again_while_it_warms(envoy: Envoy) -> None:
    envoy.stream.set_snapshot(snapshot("two", clusters="A"))
    envoy.run()
    assert envoy.log == ["Cluster +a -", "ClusterLoadAssignment +a -"]
    assert envoy.stream.acked_version == "two"


def test_secrets_are_rotated_on_their_own(envoy: Envoy) -> None:
    envoy.stream.set_secrets(packed(default="s2", unasked="x"))
    envoy.run()
    assert envoy.log == ["Secret +default -"]


@pytest.mark.parametrize("refused", [CLUSTER, EXTENSIONS, LISTENER, ROUTES])
def test_a_refusal_stops_what_would_follow_and_the_last_good_is_sent_again(envoy: Envoy, refused: str) -> None:
    bad = snapshot("bad", clusters="ab", route="2", listener="2", filters="2")
    envoy.stream.set_snapshot(bad)
    envoy.run(refuse=refused)
    assert envoy.stream.rejection == "no"
    assert envoy.stream.acked_version == ""
    sent = [line.split()[0] for line in envoy.log]
    assert sent[-1] == refused.rsplit(".", 1)[-1]
    # Certificates are rotated meanwhile, and nothing else is tried.
    envoy.log.clear()
    envoy.stream.set_secrets(packed(default="s2"))
    envoy.run()
    assert envoy.log == ["Secret +default -"]
    envoy.stream.set_snapshot(snapshot("good"))
    envoy.run()
    assert envoy.stream.rejection == ""
    assert envoy.stream.acked_version == "good"
    assert envoy.has[ROUTES] == {"routes": "1"}
    assert envoy.has[LISTENER] == {"listener": "1"}
    assert envoy.has[EXTENSIONS] == {"filter": "1"}


def test_a_late_refusal_of_what_was_replaced_does_not_count(envoy: Envoy) -> None:
    envoy.stream.set_snapshot(snapshot("bad", route="2"))
    (response,) = envoy.stream.poll()
    envoy.stream.set_snapshot(snapshot("good"))
    envoy.stream.receive(Request(type_url=ROUTES, nonce=response.nonce, error="no"))
    envoy.run()
    assert envoy.stream.rejection == ""
    assert envoy.stream.acked_version == "good"
    assert envoy.log == ["RouteConfiguration +routes -"]  # what Envoy has was uncertain


def test_a_refused_secret_is_told_and_the_next_one_is_tried(envoy: Envoy) -> None:
    envoy.stream.set_secrets(packed(default="broken"))
    envoy.run(refuse=SECRET)
    assert envoy.stream.rejection == "no"
    envoy.stream.set_secrets(packed(default="s3"))
    envoy.run()
    assert envoy.stream.rejection == ""
    assert envoy.has[SECRET] == {"default": "s3"}


def test_after_a_reconnection_only_the_difference_is_sent(envoy: Envoy) -> None:
    again = Envoy(DeltaStream())
    again.has = envoy.has
    again.stream.set_secrets(packed(default="s1"))
    again.stream.set_snapshot(snapshot("two", clusters="ab"))
    again.stream.receive(Request(type_url=CLUSTER, known=dict(again.has[CLUSTER])))
    again.subscribed = {"a", "filter", "routes"}
    again.stream.receive(Request(type_url=ENDPOINTS, subscribe=("a",), known=dict(again.has[ENDPOINTS])))
    again.stream.receive(Request(type_url=SECRET, subscribe=("default",), known=dict(again.has[SECRET])))
    known = dict(again.has[EXTENSIONS])
    again.stream.receive(Request(type_url=EXTENSIONS, subscribe=("filter",), known=known))
    again.stream.receive(Request(type_url=LISTENER, known=dict(again.has[LISTENER])))
    again.stream.receive(Request(type_url=ROUTES, subscribe=("routes",), known=dict(again.has[ROUTES])))
    again.run()
    assert again.log == ["Cluster +b -", "ClusterLoadAssignment +b -"]
    assert again.stream.acked_version == "two"


def test_a_proxy_without_listeners_hears_so_once() -> None:
    """Envoy does not become ready before."""
    envoy = Envoy(DeltaStream())
    empty = snapshot("one")
    envoy.stream.set_secrets(packed(default="s"))
    none = Snapshot(
        node_id="n",
        version="one",
        resources={**empty.resources, LISTENER: {}, ROUTES: {}},
        endpoint_names=empty.endpoint_names,
        route_names=frozenset(),
        secret_names=empty.secret_names,
    )
    envoy.stream.set_snapshot(none)
    envoy.connect()
    assert envoy.log.count("Listener + -") == 1
    assert envoy.stream.acked_version == "one"


def test_asking_again_is_answered_again(envoy: Envoy) -> None:
    envoy.stream.receive(Request(type_url=ROUTES, subscribe=("routes",)))
    envoy.run()
    assert envoy.log == ["RouteConfiguration +routes -"]


def test_unknown_types_and_old_nonces_change_nothing(envoy: Envoy) -> None:
    envoy.stream.receive(Request(type_url="type.googleapis.com/other", subscribe=("x",)))
    envoy.stream.receive(Request(type_url=ROUTES, nonce="999", error="old"))
    envoy.run()
    assert envoy.log == []
    assert envoy.stream.acked_version == "one"


STEP = st.tuples(st.text("aAbBcC", min_size=1, max_size=3), st.sampled_from("123"), st.sampled_from("12"))


@settings(max_examples=100, deadline=None)
@given(st.lists(STEP, min_size=1, max_size=6))
def test_whatever_is_pushed_envoy_ends_with_it_and_routes_never_precede_clusters(steps: list[Any]) -> None:
    envoy = Envoy(DeltaStream())
    envoy.stream.set_secrets(packed(default="s"))
    envoy.stream.set_snapshot(snapshot("start"))
    envoy.connect()
    for index, (letters, route, listener) in enumerate(steps):
        clusters = "".join({letter.lower(): letter for letter in letters}.values())
        wanted = snapshot(str(index), clusters=clusters, route=route, listener=listener)
        envoy.stream.set_snapshot(wanted)
        envoy.run()
        assert envoy.stream.acked_version == str(index)
        for type_url in (CLUSTER, LISTENER, ROUTES):
            assert envoy.has[type_url] == {name: p.version for name, p in wanted.resources[type_url].items()}
