"""Compiling an ONNX file with TensorRT, in this process: what the compiler's child process does.

The network is strongly typed: every layer has the precision that the file says. Nothing is lowered here; a model in
FP16, BF16, FP8 or INT8 is one whose file says so. TF32, which keeps ten bits of an FP32's fraction, must be asked for.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.engines.tensorrt_api import MESSAGES, logger, precisions_of_network, with_tf32
from mlmesh_inference.engines.tensorrt_doubles import refuse_doubles
from mlmesh_inference.engines.tensorrt_profiles import FreeInput, Profile, batch_ranges, parse_dims, profiles


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What a plan is compiled for; together with the model it decides the plan's bytes.

    Attributes:
        rows_max, rows_preferred: most rows of a batch, and of a usual one.
        dims: declared ranges of free dimensions beside the batch; see tensorrt_profiles.parse_dims.
        tf32: let FP32 be multiplied in TF32.
        capabilities: of tensorrt_rtx, compute capabilities such as "SM86"; empty is its default, Ampere and later.
    """

    rows_max: int = 64
    rows_preferred: int = 8
    dims: str = ""
    tf32: bool = False
    capabilities: tuple[str, ...] = ()

    def describe(self) -> str:
        """The profiles, as part of a key and for people: "rows 1..64@8; seq=2..256@64"."""
        rows = f"rows 1..{self.rows_max}@{min(self.rows_preferred, self.rows_max)}"
        declared = [f"{name}={each}" for name, ranges in sorted(parse_dims(self.dims).items()) for each in ranges]
        return "; ".join([rows, *declared])


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """How far the compiler is: its own name of the phase, steps done and steps in all."""

    phase: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFacts:
    """What is known of a plan without running it.

    Attributes:
        precisions: of its arithmetic, as the strongly typed graph has them.
        profiles: how many.
        seconds: how long compiling took.
    """

    size: int
    sha256: str
    precisions: tuple[str, ...]
    profiles: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PlanFacts:
        """Read `to_json`. Raises ValueError, KeyError or TypeError."""
        return cls(
            size=int(data["size"]),
            sha256=str(data["sha256"]),
            precisions=tuple(map(str, data["precisions"])),
            profiles=int(data["profiles"]),
            seconds=float(data["seconds"]),
        )


class BuildCancelled(EngineError):  # noqa: N818  it is no fault of anybody's
    """The compiler stopped because it was asked to."""


@dataclass(slots=True, kw_only=True)
class Watch:
    """Is told of steps and says whether to go on."""

    step: Callable[[Step], None] = field(default=lambda _step: None)
    stopped: Callable[[], bool] = field(default=lambda: False)


def compile_plan(
    trt: ModuleType, model: Path, options: PlanOptions, watch: Watch | None = None
) -> tuple[Any, PlanFacts]:
    """A serialised engine and what is known of it. Blocking; raises EngineError, BuildCancelled."""
    watch = watch or Watch()
    began = time.monotonic()
    MESSAGES.take("")
    watch.step(Step(phase="Reading the model"))
    if model.is_file():
        refuse_doubles(model)
    builder = trt.Builder(logger(trt))
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger(trt))
    if not parser.parse_from_file(str(model)):
        problems = [parser.get_error(number).desc() for number in range(min(parser.num_errors, 3))]
        text = MESSAGES.take("; ".join(problems) or "it says no more").replace(str(model), model.name)
        raise EngineError(f"TensorRT cannot read it: {'; '.join(problems) or text}".replace(str(model), model.name))
    if network.num_outputs == 0:  # some bytes that are no model parse as an empty one
        raise EngineError("TensorRT cannot read it: it has no outputs")
    made = _profiles(network, options)
    config = _config(trt, builder, options)
    for profile in made:
        _add_profile(builder, config, profile)
    config.progress_monitor = _monitor(trt, watch)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        if watch.stopped():
            raise BuildCancelled("the build was cancelled")
        raise EngineError(f"TensorRT cannot build it: {MESSAGES.take('it does not say why')}")
    precisions = precisions_of_network(network)
    facts = PlanFacts(
        size=plan.nbytes,
        sha256=hashlib.sha256(plan).hexdigest(),
        precisions=with_tf32(precisions) if options.tf32 else precisions,
        profiles=len(made),
        seconds=time.monotonic() - began,
    )
    return plan, facts


def _network_flags(trt: ModuleType) -> int:
    """Strong typing must be asked for in TensorRT 10 and is the only way from 11 on."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _profiles(network: Any, options: PlanOptions) -> Sequence[Profile]:
    inputs = []
    for number in range(network.num_inputs):
        tensor = network.get_input(number)
        if tensor.is_shape_tensor:
            raise EngineError(f"input '{tensor.name}' decides shapes, which cannot be served")
        shape = tuple(tensor.shape)
        named = tuple(tensor.get_dimension_name(axis) or "" for axis in range(len(shape)))
        inputs.append(FreeInput(name=tensor.name, shape=shape, dimensions=named))
    try:
        declared = parse_dims(options.dims)
    except ValueError as error:
        raise EngineError(f"mlmesh.dims: {error}") from None
    return profiles(inputs, batch_ranges(options.rows_preferred, options.rows_max), declared)


def _config(trt: ModuleType, builder: Any, options: PlanOptions) -> Any:
    config = builder.create_builder_config()
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if hasattr(trt, "ComputeCapability") and options.capabilities:
        config.num_compute_capabilities = len(options.capabilities)
        for place, name in enumerate(options.capabilities):
            found = trt.ComputeCapability.__members__.get(name)
            if found is None:
                known = ", ".join(trt.ComputeCapability.__members__)
                raise EngineError(f"compute capability {name!r} is not one of TensorRT for RTX's: {known}")
            config.set_compute_capability(found, place)
    if not hasattr(trt, "ComputeCapability"):
        # The inspector tells each layer's precision only then; tensorrt_rtx decides kernels when it runs.
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    return config


def _add_profile(builder: Any, config: Any, profile: Profile) -> None:
    made = builder.create_optimization_profile()
    for name, bounds in profile.items():
        made.set_shape(name, bounds.low, bounds.usual, bounds.high)
    if config.add_optimization_profile(made) < 0:
        raise EngineError(f"TensorRT refuses a profile: {MESSAGES.take('it does not say why')}")


def _monitor(trt: ModuleType, watch: Watch) -> Any:
    """Steps of the outermost phase that is under way; phases inside of it would jump to and fro."""

    class _Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._totals: dict[str, int] = {}
            self._depth: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._totals[phase_name] = num_steps
            self._depth[phase_name] = self._depth.get(parent_phase or "", -1) + 1
            if self._depth[phase_name] <= 1:
                watch.step(Step(phase=phase_name, total=num_steps))

        def phase_finish(self, phase_name: str) -> None:
            if self._depth.pop(phase_name, 2) <= 1:
                total = self._totals.pop(phase_name, 0)
                watch.step(Step(phase=phase_name, done=total, total=total))

        def step_complete(self, phase_name: str, step: int) -> bool:
            if self._depth.get(phase_name, 2) <= 1:
                watch.step(Step(phase=phase_name, done=step + 1, total=self._totals.get(phase_name, 0)))
            return not watch.stopped()

    return _Monitor()
