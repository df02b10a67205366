"""The registry process: python -m mlmesh_registry."""

from mlmesh.registry.v1 import registry_pb2, registry_pb2_grpc
from mlmesh_registry.config import RegistrySettings
from mlmesh_registry.memory import keep_some
from mlmesh_registry.registry import open_registry
from mlmesh_registry.servicer import RegistryServicer
from mlmesh_runtime.config import Settings
from mlmesh_runtime.server import Server, Service, run


async def serve(settings: Settings) -> None:
    """Serve until a signal says to stop."""
    own = RegistrySettings.from_environment(settings.environ)
    async with open_registry(settings.data_dir, own) as registry:
        service = Service(
            add=registry_pb2_grpc.add_ModelRegistryServiceServicer_to_server,
            servicer=RegistryServicer(
                registry.store,
                registry.artifacts,
                registry.feed,
                search=registry.search,
                signatures=registry.signatures,
                garbage=registry.garbage,
                verification=registry.verification,
                stall_s=own.watch_stall_s,
            ),
            descriptor=registry_pb2.DESCRIPTOR.services_by_name["ModelRegistryService"],
            deadline_exempt={"WatchModels"},
        )
        async with Server(settings, services=[service]) as server:
            await server.serve_until_signal()


if __name__ == "__main__":
    keep_some()
    run(serve, service="registry")
