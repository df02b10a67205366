"""torch elastic's agent: starts the workers of one machine, and starts all of them again when one of them dies.

It differs from `torchrun` where that would hang, wait or listen:

- There is nobody to meet on one machine, so the rendezvous answers at once, without a store that listens on all
  interfaces. Each round gets a store of its own, a file: with torch's shared one, workers that were started again read
  the addresses of the dead ones and hang.
- Workers are forked from a server that has torch loaded: starting them again takes tenths of a second, not seconds.
- Workers that outlive one of them are killed at once: all that counts is in the last checkpoint.

Linux only. Every process here is in the session of the training process, and dies with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import shutil
import signal
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

from mlmesh_training.backends.base import TrainingTask
from mlmesh_training.backends.process import epitaph
from mlmesh_training.jobs import LogLine
from mlmesh_training.trainer.fitting import forking, pausing, worker
from mlmesh_training.trainer.fitting.meeting import Machines
from mlmesh_training.trainer.fitting.wires import Exchange
from mlmesh_training.trainer.reporter import PermanentError, Reporter

RESTARTS_MAX = 3
"""Restarts of the workers within one attempt of a job; then the attempt has died, and the job's own budget counts."""
MONITOR_S = 0.1
_LEAVING_S_MAX = 60


def run(folder: Path, task: TrainingTask, reporter: Reporter, *, threads: int) -> None:
    """Fit with workers until all is done and in the last checkpoint. Only the main thread may call this.

    Of several machines each has an agent; only the first one's folder gets checkpoints. There a dead worker ends the
    attempt: the others must be started again too, with the newest checkpoint, which is the cluster's business.
    Errors: PermanentError, PauseRequested, GroupLost, OSError.
    """
    machines = Machines.of(task.distribution.nodes, os.environ)
    forking.reserve(folder)
    _quiet()
    scratch = folder / worker.SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    count = max(1, task.distribution.processes // machines.count)
    restarts = RESTARTS_MAX if machines.count == 1 else 0
    # Shared memory without a lock: a worker killed while it holds one would stop all others.
    pause = RawValue(ctypes.c_bool, False)
    pausing.forward(pause)
    share = threads or max(1, len(os.sched_getaffinity(0)) // count)
    try:
        with Exchange(count, reporter) as exchange:
            spec = WorkerSpec(
                role="worker",
                local_world_size=count,
                rdzv_handler=machines.meet(task.uid),
                fn=None,
                entrypoint=worker.work,
                args=(folder, share, exchange.wires, pause, forking.collective_s),
                max_restarts=restarts,
                monitor_interval=MONITOR_S,
            )
            agent = Agent(spec, scratch=scratch, exchange=exchange, reporter=reporter)
            result = agent.run()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if result.is_failed():
        raise forking.GroupLost(agent.reason + (f"; gave up after {restarts} restarts" if restarts else ""))
    if worker.PAUSED in result.return_values.values():
        raise pausing.PauseRequested


class Agent(LocalElasticAgent):
    """torch's agent of one machine, which tells why workers are started again. `reason`: of the last time."""

    def __init__(self, spec: WorkerSpec, *, scratch: Path, exchange: Exchange, reporter: Reporter) -> None:
        # Signals are this process's business; torch would turn them into exceptions.
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGHUP"
        super().__init__(
            spec,
            logs_specs=DefaultLogsSpecs(log_dir=str(scratch)),
            start_method="forkserver",
            exit_barrier_timeout=_LEAVING_S_MAX,
            shutdown_timeout=2,
        )
        self._exchange = exchange
        self._reporter = reporter
        self.reason = ""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        dead = self._found_dead()
        result: RunResult = super()._monitor_workers(worker_group)
        self._exchange.flush()
        died = self._exchange.died
        if died is not None and died.permanent:
            raise PermanentError(died.reason)
        if result.state in {WorkerState.FAILED, WorkerState.UNHEALTHY}:
            # What a process said before it ended tells more than how it ended.
            self.reason = died.reason if died is not None else dead or "its processes failed"
            self._exchange.died = None
            if (left := self._remaining_restarts - 1) >= 0:
                more = f"{left} more such {'restart' if left == 1 else 'restarts'}"
                message = f"{self.reason}; all processes start again from the last checkpoint ({more})"
                self._reporter.send(LogLine(severity="warning", message=message))
        return result

    def _found_dead(self) -> str:
        """What the first dead worker died of, empty when none has; the others are killed."""
        context: Any = self._pcontext
        processes: list[Any] = context._pc.processes if context else []
        dead = {rank: each.exitcode for rank, each in enumerate(processes) if each.exitcode}
        if not dead:
            return ""
        for each in processes:
            if each.exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each.pid, signal.SIGKILL)
        # One that was killed is the cause of another that lost it.
        rank = min(dead, key=lambda rank: (dead[rank] > 0, rank))
        return f"rank {rank}: {epitaph(dead[rank], '')}"


def _quiet() -> None:
    """Keep torch's agent from writing into the job's log what is reported in fewer words."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
