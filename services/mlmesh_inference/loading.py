"""One version from the registry's record to a model that answers: fetch, verify, build, check, warm up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from mlmesh_inference.cache import ModelCache
from mlmesh_inference.catalog import Catalog, ReadyModel, State
from mlmesh_inference.choosing import EngineChooser, Plan, Queue, When
from mlmesh_inference.config import InferenceSettings
from mlmesh_inference.configured import ConfigError, batched, read_labels, rows_bounds, sample, served_signature
from mlmesh_inference.desired import VersionRecord, signature_mismatch
from mlmesh_inference.engine_options import engine_options
from mlmesh_inference.engines.base import (
    BuiltEngine,
    Engine,
    EngineError,
    EngineFacts,
    EngineKind,
    MemorySource,
    build_preferred,
)
from mlmesh_inference.engines.inspection import inspect
from mlmesh_inference.engines.memory import GrowthMeter
from mlmesh_inference.engines.selection import Trial, chosen
from mlmesh_inference.fetching import FetchError, Fetching
from mlmesh_inference.follow import Sleep, Source
from mlmesh_inference.oip.model_config import read_text
from mlmesh_inference.pipelines.assembly import (
    Ensemble,
    LocalModel,
    build_ensemble,
    callers_signature,
    others,
    runner_for,
    take_over,
    warm_up_step,
)
from mlmesh_inference.pipelines.dependencies import Dependencies
from mlmesh_inference.scheduling.batcher import Batcher, Observer
from mlmesh_inference.scheduling.policy import BatchPolicy, policy_of
from mlmesh_inference.serving import CONFIG_FILE, ServingConfig
from mlmesh_inference.statistics import MemoryUse, Statistics, Tracer
from mlmesh_inference.tensors import Array, Signature, TensorSpec, show
from mlmesh_inference.tuning import settle
from mlmesh_runtime.errors import MeshError
from mlmesh_runtime.executors import BoundedExecutor, run_blocking

_LOG = logging.getLogger(__name__)

GROWTH: Final = GrowthMeter()
"""Memory that engines take; one a process, because memory is the process's."""
_PLATFORMS: Final = {"onnxruntime-cpu": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}


class LoadError(Exception):
    """The version cannot be served, now or later. The text is for whoever published it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """What loading needs; one a process.

    Args:
        source: bytes. cache: the disk. catalog: is told how it goes. kinds: engines in order of preference.
        disk, build: executors for files and for engines.
        prover: has a file that was never seen run where it harms nobody, and says why it may not run here, or "".
        chooser: has engines tried; without one the first of `kinds` that can serves for good.
        waiting: versions that serve and whose engines are yet to be tried; see tuning.tune.
    """

    source: Source
    cache: ModelCache
    catalog: Catalog
    kinds: Sequence[EngineKind]
    settings: InferenceSettings
    disk: BoundedExecutor
    build: BoundedExecutor
    tracer: Tracer | None = None
    sleep: Sleep = asyncio.sleep
    chooser: EngineChooser | None = None
    prover: Callable[[Path, str], Awaitable[str]] | None = None
    waiting: Queue[tuple[Prepared, ReadyModel]] = field(default_factory=Queue)
    dependencies: Dependencies = field(init=False)
    fetching: Fetching = field(init=False)

    def __post_init__(self) -> None:
        """Ensembles of a process wait for models of its catalog; its versions share what is fetched."""
        fetching = Fetching(
            source=self.source, cache=self.cache, catalog=self.catalog, disk=self.disk, sleep=self.sleep
        )
        object.__setattr__(self, "fetching", fetching)
        object.__setattr__(self, "dependencies", Dependencies(self.catalog))

    async def load(
        self, record: VersionRecord, stalled: Callable[[], None], *, config: ServingConfig | None = None
    ) -> None:
        """Load a version and install it in the catalog, or mark it FAILED.

        What may pass is tried again for ever; `stalled` is called each time.

        Args:
            config: how to serve it, instead of what its own config.pbtxt says.
        """
        prepared = await self.prepare(record, stalled, config=config)
        if isinstance(prepared, str):
            self.catalog.fail(record.model, record.version, prepared)
        else:
            self.install(prepared)

    async def prepare(
        self, record: VersionRecord, stalled: Callable[[], None], *, config: ServingConfig | None = None
    ) -> Prepared | str:
        """All of `load` but its end: a version that could answer, to be installed or closed; or why there is none.

        A version that answers already is not touched: this makes its successor beside it.
        """
        model, version = record.model, record.version
        file = record.model_file
        self.catalog.begin(model, version, total_bytes=record.size, sha256=file.sha256 if file else "")
        built: BuiltEngine | None = None
        try:
            await self.fetching.fetch(record, stalled)
            folder = await run_blocking(self.disk, self.cache.lay_out, record)
            if config is None:
                config = await run_blocking(self.disk, read_config, folder, record)
            await self._prove(record, config, folder)
            if config.steps:
                built = await self._ensemble(record, config, folder, stalled)
                served = Served.of(config, built.engine, self.settings)
                prepared = Prepared(record=record, built=built, served=served, config=config, folder=folder)
            else:
                path = folder / _model_path(record, config)
                self.catalog.progress(model, version, State.BUILDING)
                prepared = await self.make(record, config, folder, path, await self._plan(record, config, path))
                built = prepared.built
                prepared = await settle(self, prepared)
                built = prepared.built
            labels = await run_blocking(self.disk, read_labels, folder, config)
        except (LoadError, FetchError, EngineError, ConfigError) as error:
            return self._failed(record, built, str(error))
        except Exception as error:  # the other models must go on
            _LOG.exception("loading failed unexpectedly", extra={"model": model, "version": version})
            return self._failed(record, built, f"{type(error).__name__} while loading; the log says more")
        return replace(prepared, labels=labels)

    async def _prove(self, record: VersionRecord, config: ServingConfig, folder: Path) -> None:
        """Have files that were never seen run where they harm nobody. Raises LoadError."""
        if self.prover is None:
            return
        self.catalog.progress(record.model, record.version, State.BUILDING)
        for file in record.files:
            if file.path.endswith(".onnx") if config.steps else file.path == _model_path(record, config):
                check = partial(inspect, folder / file.path, weight_bytes_max=self.settings.model_bytes_max)
                await run_blocking(self.build, check)
                if why := await self.prover(folder / file.path, file.sha256):
                    raise LoadError(why)

    async def _plan(self, record: VersionRecord, config: ServingConfig, path: Path) -> Plan | None:
        if self.chooser is None:
            return None
        digest = next(file.sha256 for file in record.files if path.as_posix().endswith(f"/{file.path}"))
        return await self.chooser.plan(path, digest, config, engine_options(config, self.settings))

    async def make(
        self, record: VersionRecord, config: ServingConfig, folder: Path, path: Path, plan: Plan | None
    ) -> Prepared:
        """Build and warm up one engine for a version. Raises LoadError, EngineError, ConfigError; closes it then."""
        measured = GROWTH.begin()
        try:
            built = await run_blocking(self.build, self._built, path, record, config, plan)
            try:
                served = Served.of(config, built.engine, self.settings)
                if self.catalog.ready(record.model, record.version) is None:
                    self.catalog.progress(record.model, record.version, State.WARMING_UP)
                await run_blocking(self.build, warm_up, built.engine, served.policy)
                await run_blocking(self.build, run_samples, built.engine, config, served, folder)
            except BaseException:
                built.engine.close()
                raise
            facts, grown = built.engine.facts, GROWTH.end(measured)
            if facts.memory_source is MemorySource.WEIGHTS and grown:
                facts = replace(facts, memory_bytes=grown, memory_source=MemorySource.RESIDENT)
        finally:
            GROWTH.cancel(measured)
        return Prepared(
            record=record, built=built, served=served, config=config, folder=folder, path=path, plan=plan, facts=facts
        )

    def _failed(self, record: VersionRecord, built: BuiltEngine | None, error: str) -> str:
        if built is not None:
            built.engine.close()
        _LOG.error("model failed", extra={"model": record.model, "version": record.version, "error": error})
        return error

    def install(self, prepared: Prepared) -> ReadyModel | None:
        """Let a prepared version answer from now on. Returns what answered for it until now, to be drained."""
        record, engine, served = prepared.record, prepared.built.engine, prepared.served
        before = self.catalog.ready(record.model, record.version)
        # A version that is loaded anew goes on counting where it was: its metrics have the same names.
        statistics = before.statistics if before else Statistics(record.model, record.version, tracer=self.tracer)
        facts = prepared.facts or engine.facts
        kind = "GPU" if facts.device.startswith("cuda") else "CPU"
        statistics.memory = (MemoryUse(kind=kind, size_bytes=facts.memory_bytes),) if facts.memory_bytes else ()
        name = f"{record.model}/{record.version}"
        make = partial(_batcher, prepared.seconds)
        runner = runner_for(prepared.config, engine, served.policy, statistics, name=name, make=make)
        if before is not None:
            take_over(runner, before.runner)
        statistics.watch_depth(lambda: runner.depth, lambda: getattr(runner, "concurrency_limit", 0))
        ready = ReadyModel(
            name=record.model,
            version=record.version,
            platform=_PLATFORMS.get(engine.name, engine.name),
            signature=served.signature,
            policy=served.policy,
            runner=runner,
            statistics=statistics,
            labels=prepared.labels.get("", ()),
            output_labels=prepared.labels,
            concurrency=engine.concurrency,
            config=prepared.config,
            composing=engine.composing if isinstance(engine, Ensemble) else (),
            path=prepared.path,
            facts=facts,
            trials=prepared.trials,
        )
        why = prepared.built.reason
        self.catalog.install(ready, engine=engine.name, engine_reason=why)
        _LOG.info(
            "model ready",
            extra={"model": record.model, "version": record.version, "engine": engine.name, "why": why},
        )
        if prepared.plan is not None and prepared.plan.when is When.AFTER and not chosen(prepared.trials):
            self.waiting.put((record.model, record.version), (prepared, ready))
        return before

    async def _ensemble(
        self, record: VersionRecord, config: ServingConfig, folder: Path, stalled: Callable[[], None]
    ) -> BuiltEngine:
        """The steps of an ensemble, checked and built; waits for models that it needs and that are on their way."""
        model, version, files = record.model, record.version, {file.path for file in record.files}
        check_config(config, record)

        def waits(why: str) -> None:
            self.catalog.progress(model, version, State.FETCHING, error=why)
            stalled()

        self.catalog.progress(model, version, State.BUILDING)
        served = await self.dependencies.served(model, others(config, files), waits)
        self.catalog.progress(model, version, State.BUILDING)

        def local(path: Path) -> LocalModel:
            alone = _of_a_step(config)
            built = self._build(path, alone)
            try:
                bounds = Served.of(alone, built.engine, self.settings).policy
                warm_up_step(built.engine, batches=bounds.batches)
            except BaseException:
                built.engine.close()
                raise
            return LocalModel(engine=built.engine, policy=bounds, reason=built.reason)

        build = partial(build_ensemble, config, folder=folder, files=files, catalog=self.catalog, build=local)
        ensemble = await run_blocking(self.build, build, served=served)
        if record.signature is not None and (problem := signature_mismatch(record.signature, ensemble.signature)):
            ensemble.close()
            raise LoadError(problem)
        return BuiltEngine(engine=ensemble, reason=ensemble.reason)

    def _built(self, path: Path, record: VersionRecord, config: ServingConfig, plan: Plan | None = None) -> BuiltEngine:
        """Build, and hold the file against what the registry says of it. On the build executor."""
        built = self._build(path, config, plan)
        if record.signature is not None and (problem := signature_mismatch(record.signature, built.engine.signature)):
            built.engine.close()
            raise LoadError(problem)
        return built

    def _build(self, path: Path, config: ServingConfig, plan: Plan | None = None) -> BuiltEngine:
        inspect(path, weight_bytes_max=self.settings.model_bytes_max)
        options = engine_options(config, self.settings)
        if plan is not None:
            options = replace(options, concurrency=plan.concurrency or options.concurrency)
            return build_preferred(plan.kinds, path, options, precision=plan.precision)
        kinds = [kind for kind in self.kinds if kind.name.startswith(config.engine)]
        if not kinds:
            names = ", ".join(kind.name for kind in self.kinds)
            raise LoadError(f"the configuration asks for engine {config.engine[:64]!r}; there are {names}")
        return build_preferred(kinds, path, options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model as its configuration lets it be served."""

    signature: Signature
    policy: BatchPolicy

    @classmethod
    def of(cls, config: ServingConfig, engine: Engine, settings: InferenceSettings) -> Served:
        """Hold the configuration against the engine. Raises ConfigError where they differ."""
        rows_max, rows_preferred = rows_bounds(
            config, rows_max=settings.rows_max, rows_preferred=settings.rows_preferred
        )
        queued = config.batching.queue.items_max if config.batching else 0
        batches = batched(config, engine.signature)
        policy = policy_of(
            config,
            batches=batches,
            rows_max=rows_max,
            rows_preferred=rows_preferred,
            queue_items_max=min(queued or settings.queue_items_max, settings.queue_items_max),
            limiter=settings.limiter,
        )
        signature = callers_signature(config, engine.signature, batches=batches)
        return cls(signature=served_signature(config, signature), policy=policy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A version that could answer."""

    record: VersionRecord
    built: BuiltEngine
    served: Served
    config: ServingConfig
    folder: Path
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    path: Path | None = None
    """The model file, None for an ensemble."""
    plan: Plan | None = None
    facts: EngineFacts | None = None
    """Of the engine, with the memory that it was seen to take; None leaves its own."""
    trials: tuple[Trial, ...] = ()
    seconds: Mapping[int, float] = field(default_factory=dict)
    """Time of a batch by its rows, where it was measured."""


def _batcher(
    seconds: Mapping[int, float], engine: Engine, policy: BatchPolicy, observer: Observer, name: str
) -> Batcher:
    return Batcher(engine, policy, observer, name=name, seconds=seconds or None)


def _of_a_step(config: ServingConfig) -> ServingConfig:
    """What an ensemble's configuration says of the models that lie beside it: their engine, and no more."""
    return ServingConfig(parameters=config.parameters, instances=config.instances)


def read_config(folder: Path, record: VersionRecord) -> ServingConfig:
    """What the version's own config.pbtxt says; without one, nothing. Blocking. Raises LoadError."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return ServingConfig()
    try:
        config = read_text(path.read_bytes())
    except MeshError as error:
        raise LoadError(f"{CONFIG_FILE}: {error.message}") from error
    check_config(config, record)
    if config.versions is not None and config.versions.numbers != (record.version,):
        raise LoadError(f"{CONFIG_FILE}: version_policy is for the registry's aliases and MLMESH_SERVE: leave it out")
    return config


def check_config(config: ServingConfig, record: VersionRecord) -> None:
    """Whether a configuration is for this model. Raises LoadError."""
    if config.name not in {"", record.model}:
        raise LoadError(f"the configuration's name is '{config.name[:128]}', the model's is '{record.model}'")


def _model_path(record: VersionRecord, config: ServingConfig) -> str:
    check_config(config, record)
    if config.model_file:
        if config.model_file not in {file.path for file in record.files}:
            raise LoadError(f"default_model_filename: the version has no file {config.model_file!r}")
        return config.model_file
    if record.model_file is None:
        raise LoadError("it has no model.onnx and not exactly one other .onnx file")
    return record.model_file.path


def run_samples(engine: Engine, config: ServingConfig, served: Served, folder: Path) -> None:
    """Run the warm-up samples of the configuration. Blocking. Raises EngineError, ConfigError."""
    names = [spec.name for spec in engine.signature.outputs]
    for said in config.warmups:
        inputs = sample(said, engine.signature, folder, batches=served.policy.batches)
        for _ in range(said.count):
            try:
                engine.run(inputs, names)
            except EngineError as error:
                raise EngineError(f"model_warmup '{said.name}': {error}") from error


def warm_up(engine: Engine, policy: BatchPolicy) -> None:
    """Run zeros of the real signature, at one row and at the usual and the largest batch. Blocking.

    Dimensions that are free beside the batch are taken as 1, and then a failure proves nothing: a model may want more.
    Raises EngineError when a model whose shapes are known fails, or answers in another shape than it says.
    """
    signature = engine.signature
    names = [spec.name for spec in signature.outputs]
    free = any(-1 in spec.shape[1 if policy.batches else 0 :] for spec in signature.inputs)
    sizes = sorted({1, policy.rows_preferred, policy.rows_max}) if policy.batches else [1]
    for rows in sizes:
        inputs = {spec.name: _zeros(spec, rows) for spec in signature.inputs}
        try:
            results = engine.run(inputs, names)
            for spec, array in zip(signature.outputs, results, strict=True):
                _check_output(spec, array, rows if policy.batches else None)
        except EngineError as error:
            if not free:
                raise EngineError(f"warm-up with {rows} rows: {error}") from error
            _LOG.warning("warm-up passed over", extra={"error": str(error)})
            return


def _zeros(spec: TensorSpec, rows: int) -> Array:
    shape = [rows if place == 0 and dim == -1 else 1 if dim == -1 else dim for place, dim in enumerate(spec.shape)]
    if spec.datatype.itemsize:
        return np.zeros(shape, spec.datatype.dtype)
    array = np.empty(shape, object)
    array.fill(b"")
    return array


def _check_output(spec: TensorSpec, array: Array, rows: int | None) -> None:
    said = spec.shape if rows is None else (rows, *spec.shape[1:])
    fits = len(array.shape) == len(said) and all(want in (-1, dim) for want, dim in zip(said, array.shape, strict=True))
    if not fits or array.dtype != spec.datatype.dtype:
        raise EngineError(
            f"output '{spec.name}' is {array.dtype}{show(array.shape)}, the signature says "
            f"{spec.datatype.name}{show(said)}"
        )
