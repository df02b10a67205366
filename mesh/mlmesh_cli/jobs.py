"""Training jobs from the caller's side: a spec from options or a file, and a watch that survives cuts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import grpc
import yaml
from google.protobuf.json_format import ParseDict, ParseError

from mlmesh.training.v1 import training_pb2 as pb
from mlmesh_cli.errors import CliError, usage_error
from mlmesh_cli.render.training import FINAL_STATES

if TYPE_CHECKING:
    from mlmesh.training.v1.training_pb2_grpc import TrainingServiceAsyncStub


_CUTS_IN_ROW_MAX = 30
_PAUSE_S = 1.0
_WATCH_DEADLINE_S = 24 * 3600.0
# What a restart of the service, its sidecar or its certificates looks like from here.
_CUT = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)


def read_spec(path: Path) -> pb.JobSpec:
    """A JobSpec from a YAML or JSON file with the field names of the proto. Raises CliError that says what is wrong."""
    try:
        value = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CliError(
            f"{path} is not YAML: {' '.join(str(error).split())}", "correct the file and submit it again"
        ) from None
    if isinstance(value, dict) and isinstance(value.get("spec"), dict):
        value = value["spec"]
    if not isinstance(value, dict):
        raise CliError(f"{path} is not a job", "write at least `recipe: cnn` and `dataset: mnist`")
    try:
        return ParseDict(value, pb.JobSpec())
    except ParseError as error:
        raise CliError(f"{path}: {error}", "the fields are those of JobSpec in protos/mlmesh/training/v1") from None


def hyperparameters(settings: Sequence[str]) -> dict[str, float]:
    """Hyperparameters from "name=value" texts. Raises CliError (exit code 2) for other texts."""
    result = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        try:
            result[name.strip()] = float(value)
        except ValueError:
            equals = ""
        if not equals or not name.strip():
            raise usage_error(
                f"--set wants NAME=NUMBER, not {setting!r}", "such as --set epochs=3 --set learning_rate=0.001"
            )
    return result


def job_name(text: str) -> str:
    """A job's resource name from what a person typed: with or without "jobs/"."""
    return text if text.startswith("jobs/") else f"jobs/{text}"


async def submit(stub: TrainingServiceAsyncStub, spec: pb.JobSpec) -> pb.Job:
    """Submits a job; OK means that it is stored. A retry by the mesh repeats the first answer."""
    return (await stub.CreateJob(pb.CreateJobRequest(spec=spec, request_id=uuid4().hex))).job


async def follow(
    stub: TrainingServiceAsyncStub, name: str, *, from_sequence: int = 0, pause_s: float = _PAUSE_S
) -> AsyncIterator[pb.WatchJobResponse]:
    """A job's events to its end, each once and in order, over reconnects.

    The history of a job that was retried goes on after a final state: the end is where the service ends the stream.

    Raises:
        grpc.aio.AioRpcError: the service refused, or stayed away for half a minute.
    """
    next_sequence, cuts, ended = from_sequence, 0, False
    while True:
        try:
            request = pb.WatchJobRequest(name=name, from_sequence=next_sequence)
            async for event in stub.WatchJob(request, timeout=_WATCH_DEADLINE_S):
                next_sequence, cuts = event.sequence + 1, 0
                yield event
                if event.HasField("job"):
                    ended = event.job.state in FINAL_STATES
            if ended:
                return
        except grpc.aio.AioRpcError as error:
            if error.code() not in _CUT or cuts >= _CUTS_IN_ROW_MAX:
                raise
        # Also after a quiet end without a final state: something between here and there closed the stream.
        cuts += 1
        await asyncio.sleep(pause_s)
