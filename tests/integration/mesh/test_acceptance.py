"""Documents as people write them from Istio's documentation: the calls that they route, and what must be refused.

Most calls are answered by explain's evaluator, which is compared with real Envoys elsewhere; some go through Envoys.
Where `istioctl` is built, it is asked about the same documents.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml

from mlmesh_local.explain import Call, Scene, explain, unmet
from mlmesh_local.offline import offline_world, only_for_processes
from mlmesh_local.resources import Document, InvalidResource, ResourceSet, load_resources
from tests.support.envoy_mesh import EnvoyMesh
from tests.support.mesh_documents import deployment, service
from tests.support.tools import run

FOLDER = Path(__file__).parent / "acceptance"
NOW_S = 1_800_000_000.0
SUBSETS = """
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews}
spec:
  host: reviews
  subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}, {name: v3, labels: {version: v3}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: cart-subsets, namespace: shop}
spec:
  host: cart
  subsets: [{name: stable, labels: {track: stable}}, {name: canary, labels: {track: canary}}]
"""


def _read(name: str) -> Any:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


ROUTED = {case["name"]: case for name in ("routed", "routed_more") for case in _read(name)}
REFUSED = {f"{kind.split()[1]} {one['spec']}": (kind, one) for kind, every in _read("refused").items() for one in every}
LIVE = {case["name"]: case for case in _read("live")}


def _call(text: str) -> tuple[Call, dict[str, str]]:
    left, _, right = text.partition("=>")
    words = shlex.split(left)
    gateway = words.pop(0).removeprefix("@") if words[0].startswith("@") else ""
    source, target, *rest = words
    address, _, path = target.partition("/")
    host, _, port = address.partition(":")
    named = dict(word.split("=", 1) for word in rest)
    call = Call(
        source=source,
        host=host,
        port=int(port or 0),
        path=f"/{path}",
        source_ip=named.pop("ip", "127.0.0.1"),
        headers=named,
        gateway=gateway,
    )
    return call, dict(word.split("=", 1) for word in shlex.split(right))


def _resources(*documents: str) -> ResourceSet:
    texts = [Document(source=f"{index}.yaml", text=text) for index, text in enumerate(documents)]
    return ResourceSet().apply(load_resources(texts, overlook=only_for_processes)).resources


@pytest.mark.parametrize("name", ROUTED)
def test_documents_route_calls(name: str) -> None:
    case = ROUTED[name]
    world = (FOLDER / "world.yaml").read_text()
    resources = _resources(world, *([SUBSETS] if case.get("subsets") else []), case["documents"])
    scene = Scene(offline_world(resources), now_s=NOW_S)
    for text in case["calls"]:
        call, expected = _call(text)
        assert not unmet(explain(scene, call), expected), text


@pytest.mark.parametrize("name", REFUSED)
def test_documents_are_refused_and_the_field_is_named(name: str) -> None:
    kind, one = REFUSED[name]
    with pytest.raises(InvalidResource) as refused:
        load_resources([Document(source="stranger.yaml", text=_document(kind, one["spec"], "a"))])
    said = " ".join(str(problem) for problem in refused.value.problems)
    assert re.search(one["says"], said)
    assert said.startswith("stranger.yaml:")


def _document(kind: str, spec: Any, name: str) -> str:
    version, kind = kind.split()
    metadata = {"name": name, "namespace": "mlmesh"}
    return yaml.safe_dump({"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec})


def test_there_are_enough_of_both() -> None:
    assert len(ROUTED) >= 70
    assert sum(len(case["calls"]) for case in ROUTED.values()) >= 120
    assert len(REFUSED) >= 120


def test_istio_takes_what_is_routed(tmp_path: Path) -> None:
    for number, case in enumerate(ROUTED.values()):
        (tmp_path / f"{number:03d}.yaml").write_text(case["documents"].removeprefix("\ufeff"))
    arguments = [part for path in sorted(tmp_path.glob("*.yaml")) for part in ("-f", str(path))]
    done = run("istioctl", "validate", *arguments)
    assert done.returncode == 0, done.stderr


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EnvoyMesh]:
    workloads = (
        deployment("client", "client", "client")
        + service("client")
        + deployment("other", "other", "other")
        + service("other")
        + deployment("server-v1", "server", "server", version="v1")
        + deployment("server-v2", "server", "server", version="v2")
        + service("server")
    )
    async with EnvoyMesh.start(tmp_path_factory.mktemp("mesh"), workloads) as mesh:
        yield mesh


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", LIVE)
async def test_calls_through_envoys(running: EnvoyMesh, name: str) -> None:
    await running.reset(LIVE[name]["documents"])
    for text in LIVE[name]["calls"]:
        left, _, wanted = (part.strip() for part in text.partition("=>"))
        source, host, *headers = shlex.split(left)
        metadata = dict(header.split("=", 1) for header in headers)
        found = await running.spread(6, f"{source}-0", host=host, metadata=metadata)
        assert set(found) == set(wanted.split()), text
