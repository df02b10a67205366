"""Channelz: what gRPC's core knows of this process's servers, channels and sockets.

https://github.com/grpc/proposal/blob/master/A14-channelz.md. For who debugs; off unless MLMESH_CHANNELZ asks for it,
because it names every peer. The ready-made servicer of grpcio-channelz fails as soon as the core tells something that
its messages do not have; here that is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf import json_format
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # a compiled module
from grpc_channelz.v1 import channelz_pb2 as pb
from grpc_channelz.v1 import channelz_pb2_grpc

from mlmesh_runtime.errors import NotFound

SERVICE = "grpc.channelz.v1.Channelz"
DESCRIPTOR = pb.DESCRIPTOR.services_by_name["Channelz"]
add_to_server = channelz_pb2_grpc.add_ChannelzServicer_to_server


class ChannelzServicer(channelz_pb2_grpc.ChannelzServicer):  # type: ignore[misc]  # untyped
    """Implements Channelz over the core's own JSON."""

    async def GetTopChannels(self, request: Any, _context: Any) -> Any:
        """Channels that this process opened."""
        return _answer(pb.GetTopChannelsResponse, cygrpc.channelz_get_top_channels, request.start_channel_id)

    async def GetServers(self, request: Any, _context: Any) -> Any:
        """Servers of this process, with the calls that they had."""
        return _answer(pb.GetServersResponse, cygrpc.channelz_get_servers, request.start_server_id)

    async def GetServer(self, request: Any, _context: Any) -> Any:
        """One server."""
        return _answer(pb.GetServerResponse, cygrpc.channelz_get_server, request.server_id)

    async def GetServerSockets(self, request: Any, _context: Any) -> Any:
        """Connections of a server."""
        return _answer(
            pb.GetServerSocketsResponse,
            cygrpc.channelz_get_server_sockets,
            request.server_id,
            request.start_socket_id,
            request.max_results,
        )

    async def GetChannel(self, request: Any, _context: Any) -> Any:
        """One channel."""
        return _answer(pb.GetChannelResponse, cygrpc.channelz_get_channel, request.channel_id)

    async def GetSubchannel(self, request: Any, _context: Any) -> Any:
        """One connection of a channel to be."""
        return _answer(pb.GetSubchannelResponse, cygrpc.channelz_get_subchannel, request.subchannel_id)

    async def GetSocket(self, request: Any, _context: Any) -> Any:
        """One connection: its peer, streams, messages and keepalives."""
        return _answer(pb.GetSocketResponse, cygrpc.channelz_get_socket, request.socket_id)


def _answer(message: Callable[[], Any], ask: Callable[..., bytes], *given: int) -> Any:
    try:
        return json_format.Parse(ask(*given), message(), ignore_unknown_fields=True)
    except ValueError as error:
        raise NotFound("channelz knows nothing by this number", reason="CHANNELZ_NUMBER_UNKNOWN") from error
