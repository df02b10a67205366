"""How a client reaches its server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

Pem = bytes | str | Path
"""PEM text as bytes, or the path of a file with it."""

TIMEOUT_S: Final = 10.0
"""Deadline of a call that names none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """TLS towards the server.

    Attributes:
        ca: certificates to trust; None: those that gRPC brings.
        cert, key: the client's own, for mutual TLS; both or none.
        server_name: expected in the server's certificate, where it is not the target's host.
    """

    ca: Pem | None = None
    cert: Pem | None = None
    key: Pem | None = None
    server_name: str = ""

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel. Raises ValueError for a certificate without its key, OSError for a file that is not there."""
        if (self.cert is None) != (self.key is None):
            raise ValueError("mutual TLS takes both cert and key")
        return grpc.ssl_channel_credentials(_pem(self.ca), _pem(self.key), _pem(self.cert))


def _pem(source: Pem | None) -> bytes | None:
    return source if source is None or isinstance(source, bytes) else Path(source).read_bytes()


def channel_options(authority: str, tls: Tls | None) -> list[tuple[str, Any]]:
    """gRPC's channel arguments: no bound on messages, pings that end a connection to a hung server, and no retries of
    gRPC's own (see `retry`)."""
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # Without this the timeout above is not the one that counts.
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.enable_retries", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]
    if authority:
        options.append(("grpc.default_authority", authority))
    if tls is not None and tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options
