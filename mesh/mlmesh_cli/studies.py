"""Studies from the caller's side: what is searched, as a person writes it, and a watch that survives cuts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import grpc
import yaml
from google.protobuf.json_format import ParseDict, ParseError

from mlmesh.training.v1 import training_pb2 as pb
from mlmesh_cli.errors import CliError, usage_error

if TYPE_CHECKING:
    from mlmesh.training.v1.training_pb2_grpc import TrainingServiceAsyncStub

FINAL_STATES = frozenset({pb.STUDY_STATE_SUCCEEDED, pb.STUDY_STATE_FAILED, pb.STUDY_STATE_STOPPED})
TRIALS_DEFAULT = 20
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
_LOG, _LINEAR = "log", "linear"
_WANTED = "such as learning_rate=1e-4..1e-1:log, dropout=0..0.5:0.1, width=32,64,128 or just weight_decay"


def read_spec(path: Path) -> pb.StudySpec:
    """A StudySpec from a YAML or JSON file with the field names of the proto. Raises CliError."""
    try:
        value = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CliError(
            f"{path} is not YAML: {' '.join(str(error).split())}", "correct the file and run it again"
        ) from None
    if isinstance(value, dict) and isinstance(value.get("spec"), dict):
        value = value["spec"]
    if not isinstance(value, dict):
        raise CliError(
            f"{path} is not a study", "write at least `job: {recipe: mlp, dataset: digits}` and `dimensions`"
        )
    try:
        return ParseDict(value, pb.StudySpec())
    except ParseError as error:
        raise CliError(f"{path}: {error}", "the fields are those of StudySpec in protos/mlmesh/training/v1") from None


def dimensions(texts: Sequence[str], known: Mapping[str, pb.HyperparameterSpec]) -> list[pb.SearchDimension]:
    """Dimensions from texts such as "learning_rate=1e-4..1e-1:log".

    Args:
        known: the recipe's hyperparameters by name. A range without a scale takes the one that the recipe advises.

    Raises:
        CliError: with exit code 2, for other texts.
    """
    found = []
    for text in texts:
        name, equals, rest = (part.strip() for part in text.partition("="))
        if not name or bool(equals) != bool(rest):
            raise _misread(text)
        dimension = pb.SearchDimension(name=name)
        if ".." in rest or not rest:
            _range(dimension, rest, text, advised=name in known and known[name].log_scale)
        else:
            dimension.values.extend(_number(part, text) for part in rest.split(","))
        found.append(dimension)
    return found


def _range(dimension: pb.SearchDimension, rest: str, text: str, *, advised: bool) -> None:
    ends, _, scale = rest.partition(":")
    if ends:
        low, _, high = ends.partition("..")
        dimension.min_value, dimension.max_value = _number(low, text), _number(high, text)
    if scale == _LOG:
        dimension.log_scale = True
    elif scale and scale != _LINEAR:
        dimension.step = _number(scale, text)
    else:
        dimension.log_scale = advised and not scale


def _number(part: str, text: str) -> float:
    try:
        return float(part)
    except ValueError:
        raise _misread(text) from None


def _misread(text: str) -> CliError:
    return usage_error(f"--search does not understand {text!r}", _WANTED)


def hyperparameters_of(recipes: Iterable[pb.Recipe], name: str) -> dict[str, pb.HyperparameterSpec]:
    """The hyperparameters of a recipe by name; none where there is no such recipe."""
    return {known.name: known for recipe in recipes if recipe.name == name for known in recipe.hyperparameters}


def trials_in_all(spec: pb.StudySpec) -> int:
    """How many trials a study will have at most, as far as its spec says."""
    asked = spec.trials_max or TRIALS_DEFAULT
    if spec.sampler != pb.SAMPLER_GRID:
        return asked
    points = 1
    for dimension in spec.dimensions:
        if dimension.values:
            points *= len(dimension.values)
        elif dimension.step and dimension.HasField("min_value"):
            points *= int((dimension.max_value - dimension.min_value) / dimension.step + 1e-9) + 1
        else:
            return asked
    return min(asked, points)


def study_name(text: str) -> str:
    """A study's resource name from what a person typed: with or without "studies/"."""
    return text if text.startswith("studies/") else f"studies/{text}"


async def submit(stub: TrainingServiceAsyncStub, spec: pb.StudySpec) -> pb.Study:
    """Starts a study; OK means that it is stored. A retry by the mesh repeats the first answer."""
    return (await stub.CreateStudy(pb.CreateStudyRequest(spec=spec, request_id=uuid4().hex))).study


async def all_trials(stub: TrainingServiceAsyncStub, name: str) -> list[pb.Trial]:
    """Every trial of a study, by number."""
    found: list[pb.Trial] = []
    request = pb.ListTrialsRequest(parent=name, page_size=1000)
    while True:
        page = await stub.ListTrials(request)
        found += page.trials
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


async def follow(
    stub: TrainingServiceAsyncStub, name: str, *, from_sequence: int = 0, pause_s: float = _PAUSE_S
) -> AsyncIterator[pb.WatchStudyResponse]:
    """A study's events to its end, each once and in order, over reconnects.

    Raises:
        grpc.aio.AioRpcError: the service refused, or stayed away for half a minute.
    """
    next_sequence, cuts = from_sequence, 0
    while True:
        try:
            request = pb.WatchStudyRequest(name=name, from_sequence=next_sequence)
            async for event in stub.WatchStudy(request, timeout=_WATCH_DEADLINE_S):
                next_sequence, cuts = event.sequence + 1, 0
                yield event
                if event.HasField("study") and event.study.state in FINAL_STATES:
                    return
        except grpc.aio.AioRpcError as error:
            if error.code() not in _CUT or cuts >= _CUTS_IN_ROW_MAX:
                raise
        # Also after a quiet end without a final state: something between here and there closed the stream.
        cuts += 1
        await asyncio.sleep(pause_s)
