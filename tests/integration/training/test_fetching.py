"""Registered data sets from a real registry: resolved at acceptance, fetched whole, gone on with after a cut."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_runtime.channel import MeshChannel, open_channel
from mlmesh_runtime.errors import InvalidInput, MeshError, NotReady, WrongState
from mlmesh_runtime.executors import Executors
from mlmesh_training.fetching import RegistryFetcher
from mlmesh_training.jobs import Job
from mlmesh_training.ports import VERSION_FILE
from tests.support import registry_process
from tests.support.datasets import registered
from tests.support.registry_process import Client
from tests.support.training import job, spec

ROWS = b"a,b\n" + b"1,2\n" * 900_000


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with registry_process.running(tmp_path_factory.mktemp("registry")) as (_, address):
        yield address


@pytest.fixture
async def client(address: str) -> AsyncIterator[Client]:
    async with registry_process.connected(address) as opened:
        yield opened


@pytest.fixture
async def channel(address: str) -> AsyncIterator[MeshChannel]:
    async with open_channel(address) as opened:
        yield opened


@pytest.fixture
async def fetcher(channel: MeshChannel) -> AsyncIterator[RegistryFetcher]:
    async with Executors({"disk": 2}) as executors:
        yield RegistryFetcher(channel, executor=executors["disk"])


def wanting(version: str, **changes: str) -> Job:
    """A job of a registered data set."""
    return dataclasses.replace(job(spec=spec()), resolved_dataset=version, **changes)


async def test_an_alias_means_the_version_that_it_points_at_now(fetcher: RegistryFetcher, client: Client) -> None:
    first = await registered(client, "moving", {"data.csv": b"a,b\n1,2\n"}, {"kind": "tabular"}, aliases=["latest"])
    assert await fetcher.resolve_dataset("models/moving/aliases/latest", kind="TABULAR") == first
    assert await fetcher.resolve_dataset(first, kind="TABULAR") == first
    assert first == "models/moving/versions/1"


async def test_what_is_no_usable_data_set_is_refused_and_what_there_is_is_named(
    fetcher: RegistryFetcher, client: Client
) -> None:
    texts = await registered(client, "letters", {"data.jsonl": b'{"text": "a", "label": "b"}\n'}, {"kind": "text"})
    await registered(client, "a-model", {"notes.txt": b"hello"}, {}, kind=pb.MODEL_KIND_MODEL)
    for reference, said in (
        ("models/unheard-of/versions/1", "models/letters"),
        ("models/letters/versions/9", "models/letters"),
        ("models/letters/aliases/stable", "models/letters"),
        ("models/a-model/versions/1", "holds models, not data sets"),
        ("models/letters/versions/x", "names no version"),
        (texts, "holds text examples; the recipe takes tabular ones"),
    ):
        with pytest.raises(InvalidInput, match=said) as raised:
            await fetcher.resolve_dataset(reference, kind="TABULAR")
        assert raised.value.reason == "UNKNOWN_DATASET"
        assert [violation.field for violation in raised.value.violations] == ["spec.dataset"]
    with pytest.raises(InvalidInput, match="holds data sets, not models") as refused:
        await fetcher.resolve_source(texts)
    assert refused.value.field == "spec.optimization.source"
    assert await fetcher.resolve_source("models/a-model/versions/1") == "models/a-model/versions/1"


async def test_files_are_fetched_whole_and_described(fetcher: RegistryFetcher, client: Client, tmp_path: Path) -> None:
    version = await registered(
        client, "rows", {"data.csv": ROWS, "docs/readme.txt": b"where it is from"}, {"kind": "tabular", "target": "b"}
    )
    source = await registered(client, "source", {"notes.txt": b"a model"}, {}, kind=pb.MODEL_KIND_MODEL)
    asked = wanting(version, resolved_source=source)
    await fetcher.fetch(asked, tmp_path)
    assert (tmp_path / "dataset" / "data.csv").read_bytes() == ROWS
    assert (tmp_path / "dataset" / "docs" / "readme.txt").read_bytes() == b"where it is from"
    assert (tmp_path / "source" / "notes.txt").read_bytes() == b"a model"
    described = (tmp_path / "dataset" / VERSION_FILE).read_text()
    assert f'"version": "{version}"' in described
    assert '"target": "b"' in described
    # What is whole is kept: the registry is not asked again.
    async with Executors({"disk": 1}) as executors, open_channel("127.0.0.1:1") as nowhere:
        await RegistryFetcher(nowhere, executor=executors["disk"]).fetch(asked, tmp_path)


async def test_a_named_data_set_needs_nothing(fetcher: RegistryFetcher, tmp_path: Path) -> None:
    await fetcher.fetch(wanting("digits"), tmp_path)
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize("left", ["half", "changed", "whole", "too much"])
async def test_a_fetch_goes_on_where_it_was_cut_and_never_with_wrong_bytes(
    fetcher: RegistryFetcher, client: Client, tmp_path: Path, left: str
) -> None:
    version = await registered(client, "cut", {"data.csv": ROWS}, {"kind": "tabular"})
    partial = tmp_path / "dataset" / "data.csv.part"
    partial.parent.mkdir(parents=True)
    half = ROWS[: 2 << 20]
    partial.write_bytes({"half": half, "changed": b"x" + half[1:], "whole": ROWS, "too much": ROWS + b"more"}[left])
    asked: list[int] = []
    download = fetcher._stub.DownloadBlob

    def counted(request: pb.DownloadBlobRequest, **options: object) -> object:
        asked.append(request.offset)
        return download(request, **options)

    fetcher._stub.DownloadBlob = counted
    await fetcher.fetch(wanting(version), tmp_path)
    assert hashlib.sha256((tmp_path / "dataset" / "data.csv").read_bytes()).digest() == hashlib.sha256(ROWS).digest()
    assert not partial.exists()
    assert asked == {"half": [2 << 20], "changed": [2 << 20, 0], "whole": [], "too much": [0]}[left]


async def test_a_cancelled_fetch_leaves_what_came_and_the_next_goes_on(
    fetcher: RegistryFetcher, client: Client, tmp_path: Path
) -> None:
    version = await registered(client, "cancelled", {"data.csv": ROWS}, {"kind": "tabular"})
    came = asyncio.Event()
    download = fetcher._download

    async def told(blob: str, writer: object) -> None:
        asyncio.get_running_loop().call_soon(came.set)
        await download(blob, writer)  # type: ignore[arg-type]

    fetcher._download = told  # type: ignore[method-assign,assignment]
    fetching = asyncio.ensure_future(fetcher.fetch(wanting(version), tmp_path))
    await came.wait()
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert not (tmp_path / "dataset" / VERSION_FILE).exists()
    await fetcher.fetch(wanting(version), tmp_path)
    assert (tmp_path / "dataset" / "data.csv").read_bytes() == ROWS


async def test_a_registry_that_is_away_is_not_ready(tmp_path: Path) -> None:
    async with Executors({"disk": 1}) as executors, open_channel("127.0.0.1:1") as nowhere:
        away = RegistryFetcher(nowhere, executor=executors["disk"])
        with pytest.raises(NotReady):
            await away.resolve_dataset("models/rows/versions/1", kind="TABULAR")
        with pytest.raises(NotReady):
            await away.fetch(wanting("models/rows/versions/1"), tmp_path)


async def test_a_quarantined_data_set_is_neither_taken_nor_fetched(
    fetcher: RegistryFetcher, client: Client, tmp_path: Path
) -> None:
    version = await registered(client, "ill", {"data.csv": b"a,b\n"}, {"kind": "tabular"})
    read = (await client.stub.GetModelVersion(pb.GetModelVersionRequest(name=version))).model_version
    await client.stub.SetModelVersionStage(
        pb.SetModelVersionStageRequest(
            name=version, stage=pb.VERSION_STAGE_QUARANTINED, reason="mislabelled", etag=read.etag
        )
    )
    with pytest.raises(InvalidInput, match="quarantined: mislabelled"):
        await fetcher.resolve_dataset(version)
    with pytest.raises(WrongState, match="quarantined"):
        await fetcher.fetch(wanting(version), tmp_path)


async def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    from mlmesh_training.fetching import _inside

    for path in ("../escape", "/etc/passwd", "a/../../b", ""):
        with pytest.raises(MeshError, match="leave its folder"):
            _inside(tmp_path, path)
    assert _inside(tmp_path, "a/b.csv") == tmp_path / "a" / "b.csv"
