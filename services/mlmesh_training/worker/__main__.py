"""The worker process: python -m mlmesh_training.worker, in the pods of a TrainJob."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import sys

from mlmesh.training.v1 import worker_pb2 as pb
from mlmesh_runtime.channel import open_channel
from mlmesh_runtime.config import Settings
from mlmesh_runtime.executors import Executors
from mlmesh_runtime.process import run
from mlmesh_training.config import trainer_environment
from mlmesh_training.worker.attempt import PAUSED_EXIT, Attempt
from mlmesh_training.worker.client import TrainingClient
from mlmesh_training.worker.config import WorkerSettings

logger = logging.getLogger(__name__)

SUSPENDED_WITHIN_S = 600.0
"""How long a paused worker waits to be suspended; ending by itself would mean that the TrainJob is complete."""


class StoppedError(Exception):
    """The service says that the job was stopped."""


async def work(settings: Settings) -> None:
    """Run one attempt to its end. Exits with the trainer's code."""
    own = WorkerSettings.from_environment(settings.environ)
    folder = settings.data_dir / own.job.removeprefix("jobs/")
    async with open_channel(own.target, settings=settings) as channel, Executors({"disk": 2}) as executors:
        client = TrainingClient(
            channel, job=own.job, token=own.token, worker=secrets.token_hex(8), executor=executors["disk"]
        )
        attempt = Attempt(
            client,
            folder,
            reporting=own.node_rank == 0,
            executor=executors["disk"],
            environ=trainer_environment(settings.environ),
        )
        code = await _run(client, attempt)
    sys.stderr.flush()
    # All that counts is stored by now.
    os._exit(code)


async def _run(client: TrainingClient, attempt: Attempt) -> int:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def end() -> None:
        # The pod goes; its grace period is for a checkpoint.
        ended.set()
        attempt.pause()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)

    def obey(command: int) -> None:
        if command == pb.WORKER_COMMAND_PAUSE:
            attempt.pause()
        elif command == pb.WORKER_COMMAND_STOP:
            raise StoppedError

    try:
        async with asyncio.TaskGroup() as group:
            reporting = group.create_task(client.report(obey))
            code = await attempt.run()
            if code == PAUSED_EXIT and not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(SUSPENDED_WITHIN_S):
                        await ended.wait()
            client.reports.close()
            if code == 0:
                await reporting
            reporting.cancel()
    except ExceptionGroup as errors:
        logger.warning("the attempt is over", extra={"error": str(errors.exceptions[0])})
        return 1
    return code


if __name__ == "__main__":
    run(work, service="worker")
