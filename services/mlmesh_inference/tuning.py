"""Changing the engine of a version: before it is ready, or while it serves."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from mlmesh_inference.catalog import ReadyModel
from mlmesh_inference.choosing import GIVEN_BYTES_MAX, TRIED_ALONE, EngineChooser, Plan, When, tuning_of
from mlmesh_inference.configured import ConfigError, sample
from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.engines.selection import REFERENCE, Trial, chosen, why
from mlmesh_inference.engines.trial import Given
from mlmesh_runtime.executors import run_blocking

if TYPE_CHECKING:
    from mlmesh_inference.loading import Loading, Prepared

_LOG = logging.getLogger(__name__)


async def settle(loading: Loading, prepared: Prepared) -> Prepared:
    """What has to happen before a version is ready: the comparison of an engine that was compiled, a declared trial.

    Returns the version as it may serve; closes an engine that it replaces. Raises EngineError.
    """
    plan, chooser = prepared.plan, loading.chooser
    if plan is None or chooser is None:
        return prepared
    engine = prepared.built.engine
    # What is known is of engines that were tried alone: an engine on a device is compared each time.
    if engine.name not in TRIED_ALONE and REFERENCE in {each.engine for each in plan.candidates.tried}:
        return await _compared(loading, chooser, prepared, plan)
    if plan.known:
        return _told(chooser, prepared, plan.known)
    if plan.when is not When.BEFORE:
        return replace(prepared, trials=plan.candidates.passed_over)
    changed = await rebuilt(loading, prepared, await chooser.trials(plan, await given(loading, prepared)))
    if changed.built.engine is not engine:
        engine.close()
    return changed


async def rebuilt(loading: Loading, prepared: Prepared, trials: tuple[Trial, ...]) -> Prepared:
    """The version with the engine that the trials chose; its present engine is left open. Raises EngineError."""
    winner, plan = chosen(trials), prepared.plan
    chooser = loading.chooser
    if winner is None or plan is None or chooser is None or prepared.path is None:
        raise EngineError(why(trials))
    engine, told = prepared.built.engine, _told(chooser, prepared, trials)
    tuning = tuning_of(trials)
    tunes = tuning is not None and chooser.may_tune_instances(prepared.config)
    instances = tuning.instances if tuning is not None and tunes else engine.concurrency
    same = (winner.engine, winner.precision, instances) == (engine.name, engine.facts.precision, engine.concurrency)
    if same and told.served == prepared.served:
        return told
    precision = "fp32" if winner.engine == REFERENCE else plan.wish.precision or "fp32"
    anew = replace(plan, kinds=(chooser.kind(winner.engine),), precision=precision, concurrency=instances)
    made = await loading.make(prepared.record, prepared.config, prepared.folder, prepared.path, anew)
    # Callers have seen the signature that is served; another engine may word it in another way, no more.
    made = replace(made, served=prepared.served, labels=prepared.labels, plan=plan)
    return _told(chooser, made, trials)


async def _compared(loading: Loading, chooser: EngineChooser, prepared: Prepared, plan: Plan) -> Prepared:
    """An engine on a device serves only if it answers as the reference does; if not, the next one does."""
    engine = prepared.built.engine
    trial = await chooser.compared(plan, engine.name, engine)
    if trial.accepted:
        trial = replace(trial, chosen=True, reason=f"{prepared.built.reason}; {trial.reason}")
        return _told(chooser, prepared, (trial, *plan.candidates.passed_over))
    if prepared.path is None:
        raise EngineError(trial.reason)
    kinds = tuple(kind for kind in plan.kinds if kind.name != engine.name)
    anew = replace(plan, kinds=kinds, precision="fp32")
    made = await loading.make(prepared.record, prepared.config, prepared.folder, prepared.path, anew)
    engine.close()
    made = replace(made, labels=prepared.labels, plan=plan, trials=(trial, *plan.candidates.passed_over))
    built = made.built
    return replace(made, built=replace(built, reason=f"{built.reason}; {trial.engine}: {trial.reason}"))


def _told(chooser: EngineChooser, prepared: Prepared, trials: tuple[Trial, ...]) -> Prepared:
    """With the trials and, where the engine is the one they chose, their reason and the size of batches they found."""
    winner, built, served = chosen(trials), prepared.built, prepared.served
    if winner is None or winner.engine != built.engine.name:
        return replace(prepared, trials=trials)
    tuning, reason = tuning_of(trials), why(trials)
    if tuning is None or not served.policy.batches:
        return replace(prepared, trials=trials, built=replace(built, reason=reason))
    if chooser.may_tune_rows(prepared.config):
        served = replace(served, policy=replace(served.policy, rows_preferred=tuning.rows))
        reason = f"{reason}. Batches: {tuning.reason}"
    built = replace(built, reason=reason)
    return replace(prepared, trials=trials, built=built, served=served, seconds=tuning.seconds)


async def given(loading: Loading, prepared: Prepared) -> tuple[Given, ...]:
    """The samples of the configuration, as requests to compare on; not more than GIVEN_BYTES_MAX of them."""

    def read() -> tuple[Given, ...]:
        found: list[Given] = []
        size = 0
        signature, batches = prepared.built.engine.signature, prepared.served.policy.batches
        for said in prepared.config.warmups:
            inputs = sample(said, signature, prepared.folder, batches=batches)
            size += sum(array.nbytes for array in inputs.values())
            if size <= GIVEN_BYTES_MAX and not any(array.dtype.hasobject for array in inputs.values()):
                found.append(Given(rows=said.rows or 1, inputs=inputs))
        return tuple(found)

    return await run_blocking(loading.disk, read)


async def tune(loading: Loading) -> None:
    """Try the engines of versions that serve, one after the other, for ever, and switch where another one wins."""
    if loading.chooser is None:
        return
    while True:
        prepared, ready = await loading.waiting.get()
        try:
            await _tune(loading, loading.chooser, prepared, ready)
        except (EngineError, ConfigError) as error:
            _told_in_log(ready, str(error))
        except Exception:  # what serves goes on
            _LOG.exception("trying engines failed", extra={"model": ready.name, "version": ready.version})


async def _tune(loading: Loading, chooser: EngineChooser, prepared: Prepared, ready: ReadyModel) -> None:
    def serves() -> bool:
        return loading.catalog.ready(ready.name, ready.version) is ready

    if not serves() or prepared.plan is None:
        return
    trials = await chooser.trials(prepared.plan, await given(loading, prepared))
    if not serves():
        return
    changed = await rebuilt(loading, prepared, trials)
    if changed.built.engine is prepared.built.engine:
        loading.catalog.amend(replace(ready, trials=trials), engine_reason=changed.built.reason)
        return
    if not serves():
        changed.built.engine.close()
        return
    before = loading.install(changed)
    if before is not None:
        await before.runner.drain()


def _told_in_log(ready: ReadyModel, error: str) -> None:
    _LOG.warning(
        "the engine stays as it is", extra={"model": ready.name, "version": ready.version, "error": error[:2000]}
    )
