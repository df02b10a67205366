"""Connections of a gRPC server, by channelz (https://github.com/grpc/proposal/blob/master/A14-channelz.md)."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import grpc
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc

from mlmesh_local.live.facts import Socket


async def sockets(channel: grpc.aio.Channel, instance: str, *, most: int) -> list[Socket]:
    """At most so many connections of all servers of a process. Raises AioRpcError where channelz is not served.

    Servers that cannot tell of a connection (grpcio-channelz before it knows all of what gRPC's core says) tell of all
    of them together.
    """
    stub = channelz_pb2_grpc.ChannelzStub(channel)
    found: list[Socket] = []
    servers = await stub.GetServers(channelz_pb2.GetServersRequest())
    for server in servers.server:
        request = channelz_pb2.GetServerSocketsRequest(server_id=server.ref.server_id, max_results=most)
        for reference in (await stub.GetServerSockets(request)).socket_ref:
            if len(found) >= most:
                return found
            asked = channelz_pb2.GetSocketRequest(socket_id=reference.socket_id)
            try:
                found.append(_socket((await stub.GetSocket(asked)).socket, instance))
            except grpc.aio.AioRpcError:
                found.append(_together(server.data, instance))
                break
    return found


def _together(data: Any, instance: str) -> Socket:
    return Socket(
        instance=instance,
        remote="all of its clients",
        streams_started=data.calls_started,
        streams_failed=data.calls_failed,
        keepalives_sent=0,
    )


def _socket(message: Any, instance: str) -> Socket:
    data = message.data
    return Socket(
        instance=instance,
        remote=_address(message.remote),
        streams_started=data.streams_started,
        streams_failed=data.streams_failed,
        keepalives_sent=data.keep_alives_sent,
    )


def _address(address: Any) -> str:
    tcp = address.tcpip_address
    return f"{ip_address(tcp.ip_address)}:{tcp.port}" if tcp.ip_address else address.uds_address.filename or "unknown"
