"""An engine of TensorRT at work: a plan that was deserialised, and its instances, each run by one thread at a time."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Final

from mlmesh_inference.engines.base import EngineError, EngineFacts, MemorySource, no_rows
from mlmesh_inference.engines.cuda import Device
from mlmesh_inference.engines.tensorrt_api import MESSAGES, logger, precisions_of_engine, signature_of, with_tf32
from mlmesh_inference.engines.tensorrt_instance import Instance
from mlmesh_inference.engines.tensorrt_profiles import Bounds, Profile
from mlmesh_inference.tensors import Array, Signature, TensorSpec

NAME: Final = "tensorrt"


class TensorRTEngine:
    """Runs a plan. `run` may be called by `concurrency` threads at a time.

    Args:
        plan: bytes that may be believed; deserialising runs what is in them.
        device: is closed with the engine.
        instances: how many batches may be under way at once. graphs: whether CUDA graphs are used.
        said: precisions as the graph had them, for libraries whose inspector tells none.
    """

    name = NAME

    def __init__(
        self,
        trt: ModuleType,
        plan: Any,
        device: Device,
        *,
        instances: int = 1,
        graphs: bool = True,
        said: Sequence[str] = (),
        device_name: str = "cuda:0",
    ) -> None:
        self._device = device
        self._instances: list[Instance] = []
        self._free: queue.SimpleQueue[Instance] = queue.SimpleQueue()
        self._runtime = self._engine = None
        device.enter()
        free_before, _ = device.memory()
        try:
            self._runtime = trt.Runtime(logger(trt))
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                why = MESSAGES.take("it does not say why")
                raise EngineError(f"TensorRT refuses the engine on this GPU: {why}")
            inputs, outputs = signature_of(trt, self._engine)
            self.signature = Signature(inputs=inputs, outputs=outputs)
            self.profiles = read_profiles(self._engine, inputs)
            for _ in range(instances):
                self._instances.append(
                    Instance(trt, self._engine, device, self.signature, self.profiles, graphs=graphs)
                )
        except BaseException:
            self.close()
            raise
        self.concurrency = instances
        found = precisions_of_engine(trt, self._engine) or tuple(said)
        self.precisions = with_tf32(found) if "tf32" in said else found
        free_after, _ = device.memory()
        self.facts = EngineFacts(
            # The narrowest: how far its answers may be from FP32 follows from this.
            precision=self.precisions[-1] if self.precisions else "",
            device=device_name,
            memory_bytes=max(0, free_before - free_after),
            memory_source=MemorySource.DEVICE,
        )
        for instance in self._instances:
            self._free.put(instance)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """See Engine.run. One copy into pinned memory, one out of it."""
        if any(array.size == 0 for array in inputs.values()):
            specs = {spec.name: spec for spec in self.signature.outputs}
            return [no_rows(specs[name]) for name in outputs]
        instance = self._free.get()
        try:
            return instance.run(inputs, outputs)
        finally:
            self._free.put(instance)

    @property
    def graphs(self) -> int:
        """CUDA graphs that are ready, of all instances; tensorrt_rtx keeps its own."""
        return sum(instance.graphs for instance in self._instances)

    def close(self) -> None:
        """Give GPU and pinned memory back, also after a failed start, and on a GPU that fails.

        What TensorRT made is gone before the device is let go, or its destructors would find no device.
        """
        with contextlib.suppress(EngineError):
            self._device.enter()
        for instance in self._instances:
            instance.close()
        self._instances.clear()
        self._free = queue.SimpleQueue()
        self._engine = None
        self._runtime = None
        with contextlib.suppress(EngineError):
            self._device.close()


def read_profiles(engine: Any, inputs: Sequence[TensorSpec]) -> tuple[Profile, ...]:
    """The engine's own profiles. A model of fixed shapes has one that covers just these."""
    return tuple(
        {spec.name: _bounds(engine.get_tensor_profile_shape(spec.name, number), spec) for spec in inputs}
        for number in range(max(1, engine.num_optimization_profiles))
    )


def _bounds(found: Sequence[Sequence[int]], spec: TensorSpec) -> Bounds:
    low, usual, high = (tuple(shape) for shape in found) if found else (spec.shape,) * 3
    return Bounds(low=low, usual=usual, high=high)
