"""Worlds without processes, and the reading of what a person names on a command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlmesh_local.offline import offline_world, only_for_processes
from mlmesh_local.reading import read_paths
from mlmesh_local.resources import Document, InvalidResource, ResourceSet, load_resources
from mlmesh_local.snapshot import build_snapshots
from tests.support.mesh_documents import SUBSETS
from tests.support.mesh_world import WORKLOADS, load

MANY = WORKLOADS
for name in ("server-v1", "server-v2", "client"):
    head = f"metadata: {{name: {name}}}\nspec:\n"
    MANY = MANY.replace(head, f"{head}  replicas: 100\n")


def test_every_replica_is_a_proxy_and_all_are_ready() -> None:
    world = offline_world(load(WORKLOADS, SUBSETS), not_ready={"server-v2-0"})
    assert [proxy.id for proxy in world.proxies] == ["server-v1-0", "server-v2-0", "client-0", "gateway-0"]
    ready = {(endpoint.port, endpoint.instance, endpoint.ready) for endpoint in world.endpoints}
    assert ready == {
        (port, instance, instance == "server-v1-0")
        for port in (9000, 9090)
        for instance in ("server-v1-0", "server-v2-0")
    }
    assert build_snapshots(world).keys() == {proxy.id for proxy in world.proxies}


def test_addresses_follow_from_the_files_alone_and_never_repeat() -> None:
    first, second = offline_world(load(MANY)), offline_world(load(MANY))
    assert first.version == second.version
    addresses = [proxy.pod_address for proxy in first.proxies]
    assert len(addresses) == len(set(addresses)) == 301
    assert addresses[0] == "127.64.1.1"
    assert addresses[249:252] == ["127.64.1.250", "127.65.1.1", "127.65.1.2"]


def test_other_fields_of_the_world_are_taken_as_they_are() -> None:
    world = offline_world(load(WORKLOADS), otlp_address="127.64.0.1:4317", endpoints=())
    assert (world.otlp_address, world.endpoints) == ("127.64.0.1:4317", ())


def test_kustomize_folders_are_followed_and_what_is_not_done_is_told(tmp_path: Path) -> None:
    base, mesh, overlay = tmp_path / "base", tmp_path / "mesh", tmp_path / "overlay"
    for folder in (base, mesh, overlay):
        folder.mkdir()
    (base / "workloads.yaml").write_text(WORKLOADS)
    (base / "forgotten.yaml").write_text("not: [read")
    (base / "kustomization.yaml").write_text("namespace: mlmesh\nresources:\n  - workloads.yaml\n")
    (mesh / "subsets.yaml").write_text(SUBSETS)
    (overlay / "kustomization.yaml").write_text("resources: [../base, ../mesh]\npatches:\n  - {path: replicas.yaml}\n")

    reading = read_paths([overlay, "-", mesh], standard_input=lambda: "kind: LimitRange\napiVersion: v1\n")
    assert [Path(document.source).name for document in reading.documents] == [
        "workloads.yaml",
        "subsets.yaml",
        "standard input",
    ]
    assert len(load_resources(reading.documents)) == 7
    assert reading.notes == (
        f'{overlay}/kustomization.yaml:2: "patches" is not followed; pipe `kustomize build` into "-" for it',
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("resources:\n  - missing.yaml\n", 'kustomization.yaml:2: resources: "missing.yaml" is no file or folder here'),
        ("resources: ['https://example.com/base']\n", "is no file or folder here"),
        ("resources: [.]\n", "more than 16 kustomizations name each other"),
        ("resources: [empty]\n", "empty: has no .yaml file"),
    ],
)
def test_what_cannot_be_followed_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "kustomization.yaml").write_text(text)
    with pytest.raises(InvalidResource, match=expected.replace(".", r"\.")):
        read_paths([tmp_path])


def test_what_hinders_only_processes_is_overlooked_where_nothing_runs() -> None:
    secret = "env: [{name: PASSWORD, valueFrom: {secretKeyRef: {name: a, key: b}}}], lifecycle: {preStop: {}}, ports:"
    text = WORKLOADS.replace("command: [serve], ports:", f"command: [serve], {secret}")
    document = Document(source="production.yaml", text=text)
    with pytest.raises(InvalidResource, match="does not read ConfigMaps and Secrets"):
        load_resources([document])
    resources = ResourceSet().apply(load_resources([document], overlook=only_for_processes)).resources
    assert len(offline_world(resources).proxies) == 4
    wrong = Document(source="wrong.yaml", text=text.replace("  selector: {app", "  selektor: {app"))
    with pytest.raises(InvalidResource, match="selektor: unknown field"):
        load_resources([wrong], overlook=only_for_processes)
