"""A running replica: its sidecar, its application, and where it stands."""

from __future__ import annotations

import asyncio
import enum
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from mlmesh_local import sidecar
from mlmesh_local.instances import InstancePlan, inheritable, resolved
from mlmesh_local.pki import write_private
from mlmesh_local.probes import Ask, asking
from mlmesh_local.process import MARK, Child, Command
from mlmesh_local.slot import Slot
from mlmesh_local.workloads import Probe
from mlmesh_runtime.errors import MeshError

logger = logging.getLogger(__name__)

# Until the first success probes are this close together: a person waits. Kubernetes' periods apply afterwards.
EAGER_S = 0.15
SIDECAR_PROBE_S = 5.0
SIDECAR_FAILURES_MAX = 3
SIDECAR_GRACE_S = 5.0


class State(enum.Enum):
    """Where an instance stands."""

    STARTING = "starting"
    READY = "ready"
    NOT_READY = "not ready"
    BACKING_OFF = "backing off"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class SidecarSetup:
    """What all sidecars of a mesh share."""

    envoy: Path
    ads_host: str
    ads_port: int
    run_folder: Path
    state_folder: Path
    working_folder: Path
    environ: Mapping[str, str]
    token: Callable[[str], str]
    """Gives the token by which a node proves to the control plane that it is the one."""


class Instance:
    """A replica that runs. ``changed`` is called whenever something that `mlmesh status` shows changes."""

    def __init__(
        self,
        plan: InstancePlan,
        setup: SidecarSetup,
        *,
        changed: Callable[[], None],
        restarts: int = 0,
        sidecar_restarts: int = 0,
    ) -> None:
        self.plan = plan
        self._setup = setup
        self._changed = changed
        self._draining = False
        self._stopped = False
        self._sidecar_live = asyncio.Event()
        self._start_application = asyncio.Event()
        self._application_ready = plan.workload.is_gateway
        self._was_ready = False
        self._reason = ""
        self.sidecar = Slot(
            f"{plan.name} sidecar",
            command=self._sidecar_command,
            session=self._watch_sidecar,
            changed=self._update,
            restarts=sidecar_restarts,
        )
        self.application = Slot(
            plan.name,
            command=self._application_command,
            session=self._watch_application,
            changed=self._update,
            restarts=restarts,
        )

    @property
    def name(self) -> str:
        """Name of the instance, which is the pod's name and the sidecar's node id."""
        return self.plan.name

    @property
    def ready(self) -> bool:
        """Whether it may receive traffic."""
        application = self.plan.workload.is_gateway or bool(self.application.child)
        return not self._draining and self._sidecar_live.is_set() and self._application_ready and application

    @property
    def sidecar_live(self) -> bool:
        """Whether its Envoy runs with a complete configuration."""
        return self._sidecar_live.is_set()

    @property
    def state(self) -> State:
        """Where it stands."""
        if self._stopped:
            return State.STOPPED
        if self._draining:
            return State.STOPPING
        if self.ready:
            return State.READY
        backing_off = self.sidecar.failures and not self.sidecar.child
        backing_off = backing_off or (self.application.failures and not self.application.child)
        if backing_off:
            return State.BACKING_OFF
        return State.NOT_READY if self._was_ready else State.STARTING

    @property
    def reason(self) -> str:
        """Why it stands there, for a person."""
        if self.state in {State.READY, State.STOPPED}:
            return ""
        if self._draining:
            return "in-flight requests finish"
        if not self.sidecar.child and self.sidecar.last_exit:
            return f"sidecar: {self.sidecar.last_exit}"
        if not self._sidecar_live.is_set():
            return "the sidecar waits for its configuration" if self.sidecar.child else "the sidecar starts"
        if not self.application.child and self.application.last_exit:
            return f"application: {self.application.last_exit}"
        return self._reason or "the application starts"

    async def run(self) -> None:
        """Run until `stop`; cancelled, both processes are killed."""
        self.plan.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        async with asyncio.TaskGroup() as group:
            group.create_task(self.sidecar.run())
            if self.plan.argv:
                group.create_task(self._run_application())

    def drain(self) -> None:
        """Take no new requests from now on (the caller pushes that to every sidecar)."""
        self._draining = True
        self._update()

    async def stop(self, grace_s: float) -> None:
        """End the application, then the sidecar. Call `drain` and wait for its effect first."""
        self._draining = True
        self._start_application.set()
        if self.plan.argv:
            await self.application.stop(grace_s)
        await self.sidecar.stop(SIDECAR_GRACE_S)
        self._stopped = True
        self._update()

    def _update(self) -> None:
        if not self.sidecar.child:
            self._sidecar_live.clear()
        if not self.application.child and not self.plan.workload.is_gateway:
            self._application_ready = False
        self._was_ready = self._was_ready or self.ready
        self._changed()

    def _set_ready(self, ready: bool, reason: str) -> None:
        if (self._application_ready, self._reason) != (ready, reason):
            self._application_ready, self._reason = ready, reason
            self._update()

    async def _run_application(self) -> None:
        # holdApplicationUntilProxyStarts: an application that dials at once finds its sidecar.
        await self._start_application.wait()
        await self.application.run()

    # The sidecar.

    def _sidecar_command(self) -> Command:
        plan = self.plan
        document = sidecar.bootstrap(
            sidecar.SidecarPlan(
                node_id=plan.name,
                cluster=f"{plan.workload.labels.get('app', plan.workload.name)}.{plan.workload.namespace}",
                metadata={
                    "NAMESPACE": plan.workload.namespace,
                    "SERVICE_ACCOUNT": plan.workload.service_account,
                    "LABELS": dict(plan.workload.labels),
                    "WORKLOAD_NAME": plan.workload.name,
                },
                admin_host=plan.addresses.admin,
                ads_host=self._setup.ads_host,
                ads_port=self._setup.ads_port,
                token=self._setup.token(plan.name),
            )
        )
        path = self._setup.run_folder / f"{plan.name}.bootstrap.json"
        write_private(path, json.dumps(document, indent=1))
        return Command(
            argv=sidecar.command(
                self._setup.envoy, path, threads=plan.workload.proxy_threads, drain_s=plan.workload.proxy_drain_s
            ),
            environ=inheritable(self._setup.environ) | {MARK: str(self._setup.state_folder)},
            folder=self._setup.working_folder,
            log=plan.sidecar_log,
        )

    async def _watch_sidecar(self, child: Child) -> None:
        host = self.plan.addresses.admin
        while not await _is_live(host):  # noqa: ASYNC110  (another process, nothing to wait on)
            await asyncio.sleep(EAGER_S / 3)
        self._sidecar_live.set()
        self._start_application.set()
        self._update()
        failures = 0
        while failures < SIDECAR_FAILURES_MAX:
            await asyncio.sleep(SIDECAR_PROBE_S)
            failures = 0 if await _is_live(host) else failures + 1
        logger.error("the sidecar does not answer and is killed", extra={"instance": self.name})
        child.kill()

    # The application.

    def _application_command(self) -> Command:
        return Command(
            argv=self.plan.argv,
            environ=self.plan.environ,
            folder=self._setup.working_folder,
            log=self.plan.log,
        )

    async def _watch_application(self, child: Child) -> None:
        workload = self.plan.workload
        if workload.startup and not await self._pass_startup(child, workload.startup):
            return
        async with asyncio.TaskGroup() as group:
            if workload.readiness:
                group.create_task(self._watch_readiness(workload.readiness))
            else:
                self._set_ready(True, "")
            if workload.liveness:
                group.create_task(self._watch_liveness(child, workload.liveness))

    def _asking(self, probe: Probe) -> AbstractAsyncContextManager[Ask]:
        known = replace(probe, command=resolved(probe.command))
        return asking(known, self.plan.addresses.application, self.plan.environ)

    async def _pass_startup(self, child: Child, probe: Probe) -> bool:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(probe.initial_delay_s)
        deadline = loop.time() + probe.period_s * probe.failures_max
        async with self._asking(probe) as ask:
            while problem := await ask():
                if loop.time() >= deadline:
                    await self._end(child, f"the startup probe failed: {problem}")
                    return False
                self._set_ready(False, f"starts: {problem}")
                await asyncio.sleep(min(EAGER_S, probe.period_s))
        return True

    async def _watch_readiness(self, probe: Probe) -> None:
        await asyncio.sleep(probe.initial_delay_s)
        successes = failures = 0
        eager = True
        async with self._asking(probe) as ask:
            while True:
                problem = await ask()
                successes, failures = (0, failures + 1) if problem else (successes + 1, 0)
                if successes >= probe.successes_min:
                    self._set_ready(True, "")
                    eager = False
                elif eager or failures >= probe.failures_max:
                    self._set_ready(False, f"not ready: {problem}")
                    # Back as soon as it recovers, like a rolling update on a laptop should look.
                    eager = True
                await asyncio.sleep(min(EAGER_S, probe.period_s) if eager else probe.period_s)

    async def _watch_liveness(self, child: Child, probe: Probe) -> None:
        await asyncio.sleep(probe.initial_delay_s)
        failures = 0
        async with self._asking(probe) as ask:
            while True:
                problem = await ask()
                failures = failures + 1 if problem else 0
                if failures >= probe.failures_max:
                    await self._end(child, f"the liveness probe failed: {problem}")
                    return
                await asyncio.sleep(probe.period_s)

    async def _end(self, child: Child, reason: str) -> None:
        logger.error("the application is ended", extra={"instance": self.name, "reason": reason})
        self._set_ready(False, reason)
        await child.stop(self.plan.workload.grace_s)


async def _is_live(host: str) -> bool:
    try:
        return (await sidecar.admin(host, "/ready")).strip() == b"LIVE"
    except MeshError:
        return False
