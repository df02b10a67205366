"""Brings the mesh up, has the story told, and cleans up whatever happens."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil

from mlmesh.local.v1 import local_pb2
from mlmesh_cli.commands.lifecycle import starting
from mlmesh_cli.config import CliSettings
from mlmesh_cli.connection import Connection
from mlmesh_cli.defaults import choose_folders
from mlmesh_cli.demo import models, security, shift, streams, waterfall
from mlmesh_cli.demo.checks import Checks, checks_table
from mlmesh_cli.demo.story import Scale, Story
from mlmesh_cli.errors import CliError
from mlmesh_cli.render import text as t
from mlmesh_cli.supervision import options, start, stop
from mlmesh_cli.terminal import Terminal
from mlmesh_local.options import ControlPlane, Options

_START_S = 180.0
_END_S = 10.0

# Title, what the reader should know before, and what happens.
_STEPS: tuple[tuple[str, str, tuple[Callable[[Story], Awaitable[None]], ...]], ...] = (
    (
        "The mesh",
        "Each Deployment of manifests/base runs as a process behind a real Envoy sidecar. The control plane gave every "
        "sidecar a certificate with a SPIFFE identity and the configuration that follows from mesh/istio.",
        (models.show_mesh,),
    ),
    (
        "Training",
        "Two jobs go to TrainingService. Each trains in a process of its own and streams loss and accuracy; then it is "
        "evaluated, exported to ONNX, checked against the trained model, and registered.",
        (models.train_two,),
    ),
    (
        "Serving",
        "The registry's watch told the inference processes that aliases moved. They fetched the bytes, verified the "
        "digest, built an engine and warmed it up. Nobody restarted anything.",
        (models.wait_for_versions,),
    ),
    (
        "Traffic",
        "A VirtualService decides who answers. Requests and one long stream run all the time; the weights change under "
        "them. Open streams move with the weights, one user is routed by a header, a replica is killed, faults are "
        "injected, and strangers knock.",
        (shift.shift, streams.streams_follow, shift.one_user, shift.replica_dies, shift.faults, security.who_gets_in),
    ),
    (
        "One request, from the inside",
        "The same trace id travels from this command through both sidecars into the batcher and the engine.",
        (waterfall.one_request,),
    ),
)


async def tell(
    terminal: Terminal,
    scale: Scale,
    *,
    state_dir: Path | None,
    keep: bool,
    gateway_address: str,
    control_plane: ControlPlane = "mlmesh",
    istiod: str = "",
) -> None:
    """Tells the story and prints which claims held.

    Raises:
        CliError: a claim did not hold, or a step could not be done; the state folder with the logs is then kept.
    """
    begin = time.monotonic()
    temporary = state_dir is None
    folder = state_dir or Path(tempfile.mkdtemp(prefix="mlmesh-demo-"))
    checks = Checks()
    told = False
    try:
        chosen = choose_folders(Path())
        started = options(
            folder, chosen.manifests, chosen.istio, gateway_address, control_plane=control_plane, istiod=istiod
        )
        processes = await _tell_in(terminal, scale, started, checks, keep=keep)
        told = True
    finally:
        if not told and not keep:
            await asyncio.shield(stop(folder))
    if not keep:
        _, left = await asyncio.to_thread(psutil.wait_procs, processes, _END_S)
        ended = f"{len(processes) - len(left)} of {len(processes)} processes ended"
        checks.add("nothing is left running", not left, ended)
    elapsed = time.monotonic() - begin
    terminal.show(checks_table(checks), {**checks.as_dict(), "elapsed_s": round(elapsed, 1)})
    if checks.failed:
        claims = "; ".join(check.claim for check in checks.failed)
        raise CliError(f"did not hold: {claims}", f"logs are in {folder / 'logs'}", reason="CHECK_FAILED")
    if keep:
        terminal.say(f"the mesh runs on: `mlmesh status --state-dir {folder}`, `mlmesh down --state-dir {folder}`")
    elif temporary:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
    terminal.say(f"all {len(checks.all)} claims held, in {t.duration(elapsed)}")


async def _tell_in(
    terminal: Terminal, scale: Scale, started: Options, checks: Checks, *, keep: bool
) -> list[psutil.Process]:
    """Everything between up and down. Gives the processes that must be gone afterwards."""
    folder = started.state_dir
    with starting(terminal) as seen:
        await start(started, timeout_s=_START_S, seen=seen)
    settings = CliSettings()
    async with Connection(state_dir=folder, settings=settings) as connection:
        story = Story(terminal=terminal, connection=connection, scale=scale)
        story.checks = checks
        for number, (title, explanation, scenes) in enumerate(_STEPS, start=1):
            story.step(number, title, explanation)
            for scene in scenes:
                await scene(story)
        processes = _processes(await connection.status())
    if not keep:
        await stop(folder)
    return processes


def _processes(status: local_pb2.MeshStatus) -> list[psutil.Process]:
    pids = {status.supervisor_pid}
    for instance in status.instances:
        pids |= {instance.application_pid, instance.sidecar_pid}
    found = []
    for pid in pids - {0}:
        try:
            process = psutil.Process(pid)
            found += [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
    return found
