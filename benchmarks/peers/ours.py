"""mlmesh's own server: a registry with both models, and inference processes that serve them.

The registry is idle while anything is measured. `mesh` is the same behind two real sidecars with mutual TLS.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import grpc
import yaml

from benchmarks.peers import models
from benchmarks.peers.servers import START_S, Started, Unavailable, await_ready, free_port, oip_ready, process
from mlmesh.registry.v1 import registry_pb2_grpc
from mlmesh_cli import supervision
from mlmesh_cli.config import CliSettings, service_target
from mlmesh_cli.connection import SERVICE_PORT, Connection, find_instance, outbound_host
from mlmesh_cli.defaults import builtin_root, read_documents
from mlmesh_cli.options import OutputFormat
from mlmesh_cli.publishing import Publication, publish_file
from mlmesh_cli.terminal import Terminal
from mlmesh_runtime.channel import open_channel

SETTINGS: Mapping[str, str] = {
    # What is compared is the server: the engine is the peers', with as many threads.
    "MLMESH_ENGINE": "onnxruntime",
    "MLMESH_ENGINE_CONCURRENCY": "2",
    "MLMESH_ENGINE_THREADS": "1",
}


def _publication(name: str, path: Path, alias: str) -> Publication:
    aliases = [alias] if alias else []
    return Publication.from_options(name, path, aliases=aliases, metrics=[], labels=[], description="")


@contextlib.contextmanager
def registry(folder: Path, files: Mapping[str, Path]) -> Iterator[str]:
    """A registry that has the models; its address."""
    address, log = f"127.0.0.1:{free_port()}", folder / "registry.log"
    environ = {"MLMESH_LISTEN": address, "MLMESH_DATA_DIR": str(folder / "registry")}
    with process([sys.executable, "-m", "mlmesh_registry"], log=log, environ=environ) as started:
        await_ready(lambda: _published(address, files), started, log)
        yield address


def _quiet() -> Terminal:
    return Terminal(OutputFormat.JSON, out=io.StringIO(), err=io.StringIO())


def _published(address: str, files: Mapping[str, Path]) -> bool:
    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(timeout=START_S)
    publish(address, files)
    return True


def publish(address: str, files: Mapping[str, Path], *, alias: str = "stable") -> None:
    """Make each file a version of its model, with an alias unless that is empty."""

    async def run() -> None:
        async with open_channel(address) as channel:
            stub = registry_pb2_grpc.ModelRegistryServiceStub(channel)
            for name, path in files.items():
                await publish_file(stub, _publication(name, path, alias), _quiet())

    asyncio.run(run())


@contextlib.contextmanager
def server(
    folder: Path,
    registry_address: str,
    transport: str,
    *,
    name: str,
    ready: Sequence[str] = (models.TINY, models.MINILM),
    **settings: str,
) -> Iterator[Started]:
    """One inference process over a transport."""
    folder.mkdir(parents=True, exist_ok=True)
    address, log = f"127.0.0.1:{free_port()}", folder / "inference.log"
    environ = {
        "MLMESH_LISTEN": address,
        "MLMESH_DATA_DIR": str(folder / "inference"),
        "MLMESH_REGISTRY_TARGET": registry_address,
        "MLMESH_SERVE": "*@stable",
        "MLMESH_TRANSPORT": transport,
        **SETTINGS,
        **settings,
    }
    with process([sys.executable, "-m", "mlmesh_inference"], log=log, environ=environ) as started:
        await_ready(lambda: oip_ready(address, ready), started, log)
        yield Started(name=name, address=address, pids=[started.pid], streams=True, note=f"transport {transport}")


@contextlib.contextmanager
def mesh(folder: Path, files: Mapping[str, Path], transport: str) -> Iterator[Started]:
    """One inference process behind two sidecars: the caller's, which is dialled, and its own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifests").mkdir()
    _write_manifests(folder / "manifests", transport)
    state = folder / "state"
    with asyncio.Runner() as runner:
        try:
            yield runner.run(_mesh_up(folder, state, files))
        finally:
            runner.run(supervision.stop(state))


async def _mesh_up(folder: Path, state: Path, files: Mapping[str, Path]) -> Started:
    istio = builtin_root() / "mesh/istio"
    await supervision.start(supervision.options(state, [folder / "manifests"], [istio], "none"), timeout_s=120)
    async with Connection(state_dir=state, settings=CliSettings()) as connection:
        stub = await connection.registry()
        for name, path in files.items():
            await publish_file(stub, _publication(name, path, "stable"), _quiet())
        status = await connection.status()
        client, instance = find_instance(status, "toolbox"), find_instance(status, "inference-v1")
        direct = instance.application_address
        async with asyncio.timeout(90):
            while not await asyncio.to_thread(_ready, direct):  # noqa: ASYNC110
                await asyncio.sleep(0.3)
    authority = service_target("inference")
    return Started(
        name="mlmesh, two sidecars with mTLS",
        address=f"{outbound_host(client, SERVICE_PORT)}:{SERVICE_PORT}|{authority}",
        pids=[instance.application_pid, instance.sidecar_pid, client.sidecar_pid],
        streams=True,
        note="CPU includes both Envoys",
    )


def _ready(address: str) -> bool:
    with contextlib.suppress(grpc.RpcError):
        return oip_ready(address)
    return False


def _write_manifests(folder: Path, transport: str) -> None:
    kept = {"inference-v1": 1, "registry": 1, "toolbox": 1}
    documents = []
    for _, text in read_documents([builtin_root() / "manifests/base"]):
        for document in yaml.safe_load_all(text):
            if not document:
                continue
            if document["kind"] == "Deployment":
                document["spec"]["replicas"] = kept.get(document["metadata"]["name"], 0)
                if document["metadata"]["name"] == "inference-v1":
                    environ = document["spec"]["template"]["spec"]["containers"][0]["env"]
                    chosen = {**SETTINGS, "MLMESH_TRANSPORT": transport}
                    environ[:] = [entry for entry in environ if entry["name"] not in chosen]
                    environ += [{"name": name, "value": value} for name, value in chosen.items()]
            documents.append(document)
    (folder / "workloads.yaml").write_text(yaml.safe_dump_all(documents))


def ceiling(path: Path, *, batch: int, seconds: float, engine: str = "onnxruntime") -> float:
    """Rows a second of the engine alone, in a process of its own with two sessions of one thread."""
    import subprocess

    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("ceiling.py")), str(path), str(batch), str(seconds), engine],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise Unavailable(done.stderr[-300:])
    rate: float = json.loads(done.stdout)["rows_per_s"]
    return rate
