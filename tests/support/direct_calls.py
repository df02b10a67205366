"""A direct call that remembers how it ended, and a runner that answers at once: a direct method without a transport."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import numpy as np

from mlmesh_inference.catalog import Catalog, ReadyModel
from mlmesh_inference.running import Answer, Sink, Work
from mlmesh_inference.scheduling.policy import BatchPolicy
from mlmesh_inference.statistics import Statistics
from mlmesh_inference.tensors import Array, Signature, TensorSpec
from mlmesh_runtime.calls import Call
from mlmesh_runtime.errors import InvalidInput, MeshError


class Outcome:
    """One call, and what became of it."""

    def __init__(
        self,
        request: bytes,
        *,
        streaming: bool = False,
        deadline_ns: int = 0,
        metadata: Mapping[str, str] | None = None,
        identity_source: str = "none",
    ) -> None:
        self.request, self.streaming, self.deadline_ns = request, streaming, deadline_ns
        self._metadata = metadata or {}
        self._source = identity_source
        self.answers: list[bytes] = []
        self.error: MeshError | None = None
        self.generically = False
        self.ended = False

    def metadata(self, name: str) -> str | None:
        """See DirectCall."""
        return self._metadata.get(name)

    def context(self) -> Call:
        """See DirectCall."""
        return Call(_Context(self._metadata), "/inference.GRPCInferenceService/ModelInfer", self._source)

    def done(self) -> bool:
        """See DirectCall."""
        return self.ended

    def reply(self, *payload: Any) -> None:
        """See DirectCall."""
        assert not self.ended, "answered twice"
        self.answers.append(b"".join(payload))
        self.ended = True

    def send(self, *payload: Any) -> None:
        """See DirectCall."""
        assert not self.ended
        self.answers.append(b"".join(payload))

    def finish(self) -> None:
        """See DirectCall."""
        self.ended = True

    def fail(self, error: MeshError) -> None:
        """See DirectCall."""
        assert not self.ended, "answered twice"
        self.error = error
        self.ended = True

    def generic(self) -> None:
        """See DirectCall."""
        assert not self.ended
        self.generically = self.ended = True

    def seen(self) -> tuple[object, ...]:
        """What the caller gets, to compare."""
        error = self.error
        if error is None:
            return "answered", self.generically, *self.answers
        field = error.violations[0].field if isinstance(error, InvalidInput) and error.violations else ""
        return "failed", type(error).__name__, error.message, error.reason, field


class _Context:
    def __init__(self, metadata: Mapping[str, str]) -> None:
        self._metadata = metadata

    def time_remaining(self) -> None:
        """No deadline."""

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """As sent."""
        return tuple(self._metadata.items())

    def auth_context(self) -> Mapping[str, list[bytes]]:
        """Nothing is known."""
        return {}


class Immediate:
    """A runner that answers at once, every output made of all inputs' bytes; it remembers the works it got."""

    depth, capacity = 0, 1

    def __init__(self, signature: Signature, *, decoupled: bool = False) -> None:
        self._outputs = {spec.name: spec for spec in signature.outputs}
        self.decoupled = decoupled
        self.works: list[Work] = []
        self.refusal: Exception | None = None
        self.failure: Exception | None = None
        self.wrong_shape = False

    def submit(self, work: Work, sink: Sink) -> None:
        """Answer, or fail as told."""
        self.works.append(work)
        if self.refusal is not None:
            raise self.refusal
        if self.failure is not None:
            sink.fail(self.failure)
        else:
            sink.answer([self._output(self._outputs[name], work) for name in work.outputs])

    def _output(self, spec: TensorSpec, work: Work) -> Array:
        seed = sum(
            sum(map(len, array.ravel())) if array.dtype == object else sum(array.tobytes())
            for array in work.inputs.values()
        )
        count = work.rows * 3
        if spec.datatype.itemsize == 0:
            made = np.empty(count, object)
            made[:] = [b"%d" % (seed + number) for number in range(count)]
        else:
            made = (np.arange(count) + seed % 100).astype(spec.datatype.dtype)
        return made.reshape(work.rows, 3)

    async def respond(self, work: Work) -> AsyncIterator[Answer]:
        """Not of this runner."""
        raise NotImplementedError
        yield

    async def drain(self) -> None:
        """Nothing waits."""

    def abort(self) -> None:
        """Nothing waits."""


def immediate_model(
    signature: Signature, *, name: str = "m", rows_max: int = 64, decoupled: bool = False
) -> tuple[ReadyModel, Immediate]:
    """A model that answers at once."""
    runner = Immediate(signature, decoupled=decoupled)
    model = ReadyModel(
        name=name,
        version=1,
        platform="",
        signature=signature,
        policy=BatchPolicy(batches=signature.batches, rows_max=rows_max),
        runner=runner,
        statistics=Statistics(name, 1),
    )
    return model, runner


def catalog_of(*models: ReadyModel) -> Catalog:
    """A catalog that answers with them."""
    catalog = Catalog()
    for model in models:
        catalog.install(model, engine="", engine_reason="")
        catalog.point(model.name, default=model.version, aliases={"stable": model.version})
    return catalog
