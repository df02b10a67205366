"""NVIDIA TensorRT: `tensorrt` 10 and 11 and `tensorrt_rtx`, through what all of them have in common.

Precision is what the ONNX file says (the network is strongly typed). Compiling takes seconds to minutes and happens in
a process of its own; what was compiled is kept, and loaded again in a moment. `tensorrt_rtx` compiles without a GPU for
GPUs elsewhere; running needs one always.

A model is refused, and the next engine takes it, when it has a free dimension beside the batch that nobody declared, an
output whose size depends on the data, or an operator that TensorRT lacks.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Final

from mlmesh_inference.compiling import CompileOrder, Stop, compile_in_child
from mlmesh_inference.engine_cache import EngineCache, Plan, PlanKey, model_digest, read_plan
from mlmesh_inference.engines.base import Availability, EngineError, EngineOptions
from mlmesh_inference.engines.cuda import Device, find_gpu
from mlmesh_inference.engines.tensorrt_api import flavour, load_module
from mlmesh_inference.engines.tensorrt_compile import PlanOptions, Step
from mlmesh_inference.engines.tensorrt_run import NAME, TensorRTEngine

_TRUE: Final = frozenset({"1", "true", "yes", "on"})
DEFAULT_TARGET: Final = "default capabilities"
"""Ampere and later: what tensorrt_rtx compiles for when nothing else is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRTSettings:
    """How engines are compiled and run in this process.

    Attributes:
        gpu: ordinal. instances: batches of one engine at once.
        graphs: whether CUDA graphs are used.
        capabilities: of tensorrt_rtx, what to compile for, such as "SM86"; empty is its default.
    """

    gpu: int = 0
    instances: int = 1
    graphs: bool = True
    capabilities: tuple[str, ...] = ()


class TensorRTKind:
    """Builds engines where there is an NVIDIA GPU and one of the packages.

    Args:
        cache: where compiled engines are kept; None keeps none.
        compiles: whether `build` compiles what is not there. A server that has another engine meanwhile compiles by
            BuildEngine instead.
    """

    name = NAME
    precisions = ("fp32",)

    def __init__(
        self,
        *,
        cache: EngineCache | None = None,
        settings: TensorRTSettings | None = None,
        compiles: bool = True,
    ) -> None:
        self.cache = cache
        self.settings = settings or TensorRTSettings()
        self._compiles = compiles

    def probe(self) -> Availability:
        """Look for a driver, a GPU and a package, in this order of cost."""
        try:
            gpu = find_gpu(self.settings.gpu)
        except EngineError as error:
            return Availability(available=False, reason=str(error))
        try:
            trt = load_module()
        except EngineError as error:
            return Availability(available=False, reason=f"{gpu.name} is here, but {error}")
        return Availability(available=True, reason=f"{trt.__name__} runs on {gpu.name}", version=trt.__version__)

    def probe_compiler(self) -> Availability:
        """Look whether a model can be compiled here: with tensorrt_rtx anywhere, else where it can run."""
        try:
            trt = load_module()
        except EngineError as error:
            return Availability(available=False, reason=str(error))
        if flavour(trt) == "tensorrt_rtx":
            return Availability(available=True, reason="tensorrt_rtx compiles without a GPU", version=trt.__version__)
        return self.probe()

    def build(self, model: Path, options: EngineOptions) -> TensorRTEngine:
        """Load what was compiled; compile it first where `compiles` says so."""
        find_gpu(self.settings.gpu)
        key = self.key(model, options)
        plan = self.cache.get(key) if self.cache else None
        if plan is None and not self._compiles:
            raise EngineError("no engine is compiled for it yet; BuildEngine compiles one")
        return self.load(plan or self.compile(model, options))

    def key(self, model: Path, options: EngineOptions) -> PlanKey:
        """What an engine for this model, here, is found by. Hashes the file; raises EngineError."""
        trt = load_module()
        plan = self._plan_options(options)
        try:
            profiles = plan.describe()
        except ValueError as error:
            raise EngineError(f"mlmesh.dims: {error}") from None
        return PlanKey(
            model=model_digest(model),
            flavour=flavour(trt),
            version=str(trt.__version__),
            target=self._target(trt),
            profiles=profiles,
            precision="as the model says" + (", FP32 as TF32" if plan.tf32 else ""),
        )

    def compile(
        self,
        model: Path,
        options: EngineOptions,
        step: Callable[[Step], None] = lambda _step: None,
        stop: Stop | None = None,
    ) -> Plan:
        """Compile in a process of its own and keep the result. Blocking; raises EngineError, BuildCancelled."""
        found = self.probe_compiler()
        if not found.available:
            raise EngineError(f"no engine can be compiled here: {found.reason}")
        key = self.key(model, options)
        with contextlib.ExitStack() as stack:
            if self.cache:
                scratch = self.cache.scratch()
                stack.callback(scratch.unlink, missing_ok=True)
            else:
                scratch = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "plan"
            order = CompileOrder(
                model=model,
                plan=scratch,
                options=self._plan_options(options),
                flavour=key.flavour,
                version=key.version,
                gpu=self._gpu_ordinal(),
            )
            facts = compile_in_child(order, step, stop or Stop())
            plan = Plan(key=key, facts=facts, data=read_plan(scratch, facts), source="built")
        if self.cache:
            self.cache.put(plan)
        return plan

    def load(self, plan: Plan) -> TensorRTEngine:
        """An engine that runs a plan. Raises EngineError; needs the GPU."""
        trt = load_module()
        gpu = find_gpu(self.settings.gpu)
        device = Device(gpu.ordinal)
        try:
            return TensorRTEngine(
                trt,
                plan.data,
                device,
                instances=self.settings.instances,
                graphs=self.settings.graphs,
                said=plan.facts.precisions,
                device_name=f"cuda:{gpu.ordinal} {gpu.name}",
            )
        except EngineError:
            device.close()
            raise
        except Exception as error:  # bindings raise what they like; another engine may still take the model
            device.close()
            raise EngineError(f"TensorRT: {error}") from error

    def _plan_options(self, options: EngineOptions) -> PlanOptions:
        if options.precision not in self.precisions:
            raise EngineError(
                f"TensorRT computes in the precision that the model file says: convert the file to {options.precision}"
            )
        return PlanOptions(
            rows_max=options.rows_max,
            rows_preferred=min(options.rows_preferred, options.rows_max),
            dims=options.parameters.get("dims", ""),
            tf32=options.parameters.get("tf32", "").lower() in _TRUE,
            capabilities=self.settings.capabilities,
        )

    def _target(self, trt: ModuleType) -> str:
        if flavour(trt) == "tensorrt_rtx":
            return "+".join(self.settings.capabilities) or DEFAULT_TARGET
        gpu = find_gpu(self.settings.gpu)
        return f"{gpu.name} sm_{gpu.capability[0]}{gpu.capability[1]}"

    def _gpu_ordinal(self) -> int:
        try:
            return find_gpu(self.settings.gpu).ordinal
        except EngineError:
            return -1
