"""EnvoyFilters add HTTP filters where Istio would put them; all else of them is refused by name."""

from __future__ import annotations

import pytest

from mlmesh_local.resources import InvalidResource
from tests.support.mesh_world import Told, load_alone, resource

INBOUND, OUTBOUND = "127.64.1.1_8000", "127.64.0.2_9000"
ROUTER = "envoy.filters.http.router"


def envoy_filter(patches: str, *, namespace: str = "", selector: str = "", name: str = "it", priority: int = 0) -> str:
    chosen = f"workloadSelector: {{labels: {selector}}}, " if selector else ""
    spec = f"{{{chosen}priority: {priority}, configPatches: {patches}}}"
    return resource("EnvoyFilter", spec, name=name, group="networking.istio.io/v1alpha3", namespace=namespace)


def patch(
    name: str, operation: str = "INSERT_FIRST", context: str = "SIDECAR_INBOUND", sub: str = "", port: int = 0
) -> str:
    chain = "filter: {name: envoy.filters.network.http_connection_manager"
    chain += f", subFilter: {{name: {sub}}}}}" if sub else "}"
    number = f"portNumber: {port}, " if port else ""
    fault = "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault"
    value = f'{{name: {name}, typed_config: {{"@type": {fault}}}}}'
    match = f"{{context: {context}, listener: {{{number}filterChain: {{{chain}}}}}}}"
    return f"{{applyTo: HTTP_FILTER, match: {match}, patch: {{operation: {operation}, value: {value}}}}}"


def names(*texts: str, listener: str = INBOUND, instance: str = "server-v1") -> list[str]:
    return [found["name"] for found in Told(instance, *texts).manager(listener)["http_filters"]]


def refusal(text: str) -> str:
    with pytest.raises(InvalidResource) as caught:
        load_alone(text)
    return str(caught.value)


def test_first_before_and_after() -> None:
    plain = names()
    assert names(envoy_filter(f"[{patch('x')}]")) == ["x", *plain]
    assert names(envoy_filter(f"[{patch('x', 'INSERT_BEFORE', sub=ROUTER)}]")) == [*plain[:-1], "x", plain[-1]]
    assert names(envoy_filter(f"[{patch('x', 'INSERT_AFTER', sub=plain[0])}]")) == [plain[0], "x", *plain[1:]]
    # Istio has several filters of this name.
    rbac = envoy_filter(f"[{patch('x', 'INSERT_BEFORE', sub='envoy.filters.http.rbac')}]")
    assert names(rbac)[names(rbac).index("x") + 1].startswith("envoy.filters.http.rbac.")
    # The router stays the last.
    assert names(envoy_filter(f"[{patch('x', 'INSERT_AFTER', sub=ROUTER)}]")) == [*plain[:-1], "x", plain[-1]]
    # Nothing is added beside what is not there.
    assert names(envoy_filter(f"[{patch('x', 'INSERT_BEFORE', sub='nobody')}]")) == plain


def test_context_port_and_selector_choose() -> None:
    plain = names()
    assert names(envoy_filter(f"[{patch('x', context='SIDECAR_OUTBOUND')}]")) == plain
    assert names(envoy_filter(f"[{patch('x', context='GATEWAY')}]")) == plain
    assert names(envoy_filter(f"[{patch('x', context='ANY')}]")) == ["x", *plain]
    assert names(envoy_filter(f"[{patch('x', port=8001)}]")) == plain
    assert names(envoy_filter(f"[{patch('x', port=8000)}]")) == ["x", *plain]
    assert names(envoy_filter(f"[{patch('x')}]", selector="{version: v2}")) == plain
    assert names(envoy_filter(f"[{patch('x')}]", selector="{version: v1}")) == ["x", *plain]
    assert names(envoy_filter(f"[{patch('x')}]", namespace="elsewhere")) == plain
    assert names(envoy_filter(f"[{patch('x')}]", namespace="istio-system")) == ["x", *plain]


def test_the_root_namespace_and_lower_priorities_come_first() -> None:
    texts = (
        envoy_filter(f"[{patch('late')}]", name="a", priority=5),
        envoy_filter(f"[{patch('early')}]", name="b", priority=-5),
        envoy_filter(f"[{patch('mesh')}]", name="c", namespace="istio-system", priority=9),
    )
    # Each goes before what is there, so the last applied is the first.
    assert names(*texts)[:3] == ["late", "early", "mesh"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[{applyTo: CLUSTER, patch: {operation: INSERT_FIRST, value: {}}}]", '"CLUSTER" is not supported'),
        (f"[{patch('x', 'MERGE')}]", '"MERGE" is not supported'),
        (f"[{patch('x').replace('HTTPFault', 'HTTPFalt')}]", "is not a filter that Envoy knows"),
        (f"[{patch('x').replace('name: x, ', '')}]", 'must be an HTTP filter: "name" and "typed_config"'),
        (f"[{patch('x').replace('context', 'kontext')}]", 'did you mean "context"'),
        ("[{patch: {operation: INSERT_FIRST}}]", '"applyTo" is required'),
    ],
)
def test_what_is_not_understood_is_refused(text: str, told: str) -> None:
    assert told in refusal(envoy_filter(text))
