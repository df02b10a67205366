"""The training process: python -m mlmesh_training."""

from __future__ import annotations

import asyncio

from mlmesh.training.v1 import training_pb2, training_pb2_grpc, worker_pb2, worker_pb2_grpc
from mlmesh_runtime.channel import open_channel
from mlmesh_runtime.config import Settings
from mlmesh_runtime.server import Server, Service, run
from mlmesh_training.config import TrainingSettings
from mlmesh_training.service import Workers, open_training
from mlmesh_training.servicer import TrainingServicer
from mlmesh_training.worker_servicer import WorkerServicer


async def serve(settings: Settings) -> None:
    """Serve until a signal says to stop. Jobs that run then go on from their last checkpoint at the next start."""
    own = TrainingSettings.from_environment(settings.environ)
    async with (
        open_channel(settings.registry_target, settings=settings) as registry,
        open_training(settings, own, registry=registry) as training,
    ):
        service = Service(
            add=training_pb2_grpc.add_TrainingServiceServicer_to_server,
            servicer=TrainingServicer(training.queue, training.book, stall_s=own.watch_stall_s),
            descriptor=training_pb2.DESCRIPTOR.services_by_name["TrainingService"],
            deadline_exempt={"WatchJob", "WatchStudy"},
        )
        services = [service, *([workers_service(training.workers)] if training.workers else [])]
        async with Server(settings, services=services) as server, asyncio.TaskGroup() as group:
            runner = group.create_task(training.run(), name="training")
            await server.serve_until_signal()
            runner.cancel()


def workers_service(workers: Workers) -> Service:
    """What the workers of a cluster talk to."""
    return Service(
        add=worker_pb2_grpc.add_TrainingWorkerServiceServicer_to_server,
        servicer=WorkerServicer(
            workers.hub, workers.executor, threads=workers.threads, file_bytes_max=workers.file_bytes_max
        ),
        descriptor=worker_pb2.DESCRIPTOR.services_by_name["TrainingWorkerService"],
        deadline_exempt={"ReportProgress"},
    )


if __name__ == "__main__":
    run(serve, service="training")
