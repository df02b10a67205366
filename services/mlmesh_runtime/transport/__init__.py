"""Which gRPC implementation serves a process: grpcio's, complete and with TLS, or the native one behind a sidecar.

Both take the same wrapped handlers (`mlmesh_runtime.handlers`) and have grpc.aio's server surface: what a service does
and how it behaves is the same on either. The native one (`services/mlmesh_front`, an optional module) moves bytes
without the interpreter's lock, and hands direct methods their calls in bursts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import grpc

from mlmesh_runtime.config import ConfigError, Settings
from mlmesh_runtime.limits import Limits
from mlmesh_runtime.rpcs import Gate

if TYPE_CHECKING:
    from mlmesh_runtime.transport.native import NativeServer

MODULE: Final = "mlmesh_front"
INTERNAL_RPCS_MAX: Final = 100
"""Health and reflection answer even when every slot is taken; this is how many of them are let in on top."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A transport and why it was chosen, for the log and the metrics."""

    name: str
    reason: str


def choose(settings: Settings, *, installed: Callable[[], bool] | None = None) -> Choice:
    """The transport of MLMESH_TRANSPORT. Raises ConfigError where the native one cannot do what is asked.

    Args:
        installed: whether the native module is there; looked up by default.
    """
    wanted = settings.transport
    if wanted == "grpcio":
        return Choice(name="grpcio", reason="asked for")
    there = (installed or _installed)()
    if wanted == "native":
        if settings.tls is not None:
            raise ConfigError("MLMESH_TRANSPORT: native has no TLS; expected grpcio where MLMESH_TLS_CERT is set")
        if not there:
            raise ConfigError(f"MLMESH_TRANSPORT: native needs the module {MODULE} (make front); it is not installed")
        return Choice(name="native", reason="asked for")
    if settings.tls is not None:
        return Choice(name="grpcio", reason="auto: TLS is served here, and native has none")
    if not there:
        return Choice(name="grpcio", reason=f"auto: {MODULE} is not installed")
    if settings.listen.startswith("unix:"):
        return Choice(name="grpcio", reason="auto: clients on a unix socket may send its path as :authority")
    return Choice(name="native", reason="auto: no TLS is served here")


def _installed() -> bool:
    spec = importlib.util.find_spec(MODULE)
    # The crate's own folder, when it is on the path, looks like a package without a file.
    return spec is not None and spec.origin is not None


def make(
    choice: Choice, limits: Limits, gate: Gate, options: Sequence[tuple[str, Any]]
) -> grpc.aio.Server | NativeServer:
    """A server that is not started. `options` are gRPC core's."""
    if choice.name == "native":
        from mlmesh_runtime.transport.native import NativeServer  # noqa: PLC0415  optional

        return NativeServer(limits, gate)
    return grpc.aio.server(options=options, maximum_concurrent_rpcs=limits.concurrent_rpcs_max + INTERNAL_RPCS_MAX)


def register(server: Any, service: str, handlers: Mapping[str, Any], direct: Mapping[str, Any]) -> None:
    """Register a service's wrapped handlers; `direct` are the ordinary ones beside those of direct methods."""
    if hasattr(server, "add_direct_method_handlers"):
        server.add_direct_method_handlers(service, handlers, direct)
    else:
        server.add_registered_method_handlers(service, handlers)
