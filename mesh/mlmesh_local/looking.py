"""What the control service tells of configuration: what it is made from, and what sidecars were told."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.struct_pb2 import Struct

from mlmesh.local.v1 import local_pb2
from mlmesh_local.addresses import ADMIN_PORT
from mlmesh_local.configuration import Configuration
from mlmesh_local.envoy_types import SECRET, plain_bytes
from mlmesh_local.inspection import TYPES, find_proxies
from mlmesh_local.mesh import Mesh
from mlmesh_local.model import NodeStatus
from mlmesh_local.picture import documents_of, values_of

_SHORT: Mapping[str, str] = {**{url: name for name, url in TYPES.items()}, SECRET: "secrets"}


def world(configuration: Configuration) -> local_pb2.GetWorldResponse:
    """All that configuration is made from."""
    values = Struct()
    values.update(values_of(configuration.world))
    return local_pb2.GetWorldResponse(
        documents=[
            local_pb2.ResourceDocument(source=one.source, yaml=one.text, line=one.line)
            for one in documents_of(configuration.resources)
        ],
        world=values,
        version=configuration.version,
    )


def config_dump(mesh: Mesh, request: local_pb2.GetConfigDumpRequest) -> local_pb2.GetConfigDumpResponse:
    """What sidecars were told. Raises NotFound for one that is not there."""
    configuration = mesh.configuration
    admins = {instance.name: instance.plan.addresses.admin for instance in mesh.instances}
    proxies = configuration.world.proxies
    if request.proxy:
        proxies = find_proxies(configuration.world, request.proxy)
    statuses = configuration.node_status()
    return local_pb2.GetConfigDumpResponse(
        proxies=[
            _proxy(configuration, proxy.id, statuses[proxy.id], admins.get(proxy.id, ""), request)
            for proxy in proxies
            if proxy.id in statuses
        ]
    )


def _proxy(
    configuration: Configuration,
    name: str,
    status: NodeStatus,
    admin: str,
    request: local_pb2.GetConfigDumpRequest,
) -> local_pb2.ProxyConfig:
    result = local_pb2.ProxyConfig(
        name=name,
        connected=status.connected,
        version=status.version,
        acked_version=status.acked_version,
        rejection=status.rejection,
        admin_address=f"{admin}:{ADMIN_PORT}" if admin else "",
    )
    for sent in configuration.sent(name):
        kind = _SHORT.get(sent.type_url, sent.type_url)
        if request.type not in ("", kind):
            continue
        resource = result.resources.add(
            type=kind, name=sent.name, version=sent.version, size=sent.size, acked=sent.acked
        )
        if request.content and sent.content:
            resource.content.update(plain_bytes(sent.type_url, sent.content))
    return result
